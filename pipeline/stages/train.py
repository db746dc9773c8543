"""train and retrain: weights for a network, dense or pruned."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.errors import UserError
from pipeline.models import store
from pipeline.pruning import macs
from pipeline.specs import Objective, Splits
from pipeline.training.augment import Augmentation
from pipeline.training.loop import Training, train


def run(
    job: Job,
    network: "partial[nn.Module] | None",
    weights: str | None,
    data: Splits,
    objective: Objective[Any] | None,
    resolution: str,
    seed: int,
    augment: Augmentation,
    training: Training,
) -> dict[str, Any]:
    """Train a new network, one with given weights, or the one of the input "network".

    Args:
        job: inputs may hold "network".
        network: class and options; None takes the input.
        weights: a state file to begin from.
        data: its train images are used, unless there are 0 steps.
        objective: what is learnt; None where the family has none yet.
        resolution: of the views.
        seed: of the weights, the order and the views.
        augment: how views are drawn.
        training: how long and how fast.

    Returns:
        Losses, parameters and MACs.

    Raises:
        UserError: neither training nor weights are asked for; or as the parts raise it.
    """
    torch.manual_seed(seed)
    size = Resolution.parse(resolution)
    if network is None:
        model, make, history = store.load(job.inputs["network"])
    else:
        make, history = network, []
        try:
            model = make()
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from error
        if weights is not None:
            store.load_state(model, store.read_weights(Path(weights)), Path(weights))
        elif training.steps == 0:
            raise UserError(
                "stages.train.training.steps=0 and no weights=FILE: an untrained network is of no use; give one of them"
            )
    losses: Mapping[str, float] = {}
    if training.steps:
        if objective is None:
            raise UserError(
                "this family's networks are not trained here: give model=onnx model.onnx=FILE, or "
                "stages.train.training.steps=0 and weights=FILE"
            )
        losses = train(model, data.open("train"), objective, size, augment, training, job.scratch / "state.ckpt", seed)
    store.save(model, job.out, make, history)
    params = sum(p.numel() for p in model.parameters())
    return {**losses, "params": params, "macs": macs(model, size)}
