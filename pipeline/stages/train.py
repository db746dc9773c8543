"""train and retrain: weights for a network, dense or pruned, or for the control that has only the pruned one's shape."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Interval
from torch import nn

from pipeline.contracts import Objective, Splits
from pipeline.models import store
from pipeline.models.contract import check, created
from pipeline.progress import say
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import groups, macs
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from pipeline.training.augment import NONE, Augmentation
from pipeline.training.distillation import Distillation, splits
from pipeline.training.loop import Training, train
from pipeline.training.views import Views
from posepress.errors import UserError
from posepress.spec import Resolution


def run(
    job: Job,
    control: Literal["pruned", "scratch"] | None,
    network: "partial[nn.Module] | None",
    weights: str | None,
    data: Splits,
    objective: Objective[Any] | None,
    resolution: str,
    seed: Annotated[int, Interval(ge=0, lt=2**32)],
    augment: Augmentation,
    training: Training,
    distillation: Distillation | None,
) -> dict[str, Any]:
    """Train a new network, one with given weights, or the one of the input "network".

    Args:
        job: inputs may hold "network", and then "teacher", the dense network.
        control: "scratch" forgets the input's weights, and trains as long as the dense network, its pruning and its retraining
            took together, counted in multiply-accumulates; nothing is learnt from a teacher.
        network: class and options; None takes the input.
        weights: a state file to begin from.
        data: its train images are used, unless there are 0 steps; with a teacher also those without labels.
        objective: what is learnt; None where the family has none yet.
        resolution: of the views.
        seed: of the weights, the order and the views.
        augment: how views are drawn.
        training: how long and how fast.
        distillation: what is learnt from the teacher; None where there is none.

    Returns:
        Losses, parameters, MACs of an image and of all training.

    Raises:
        UserError: neither training nor weights are asked for; or as the parts raise it.
    """
    torch.manual_seed(seed)
    size = Resolution.parse(resolution)
    if network is None:
        model, make, history = store.load(job.inputs["network"])
        if control == "scratch":
            training, distillation = _as_long(job, model, size, training, distillation), None
            model = store.build(make, history)
    else:
        make, history = network, []
        model = created(make)
        if weights is not None:
            store.load_state(model, store.read_weights(Path(weights)), Path(weights))
        elif training.steps == 0:
            raise UserError(
                "stages.train.training.steps=0 and no weights=FILE: an untrained network is of no use; give one of them"
            )
    found: dict[str, Any] = {"train_macs": 0}
    if training.steps:
        if objective is None:
            raise UserError(
                "this family's networks are not trained here: give model=onnx model.onnx=FILE, or "
                "stages.train.training.steps=0 and weights=FILE"
            )
        check(model, size, objective)
        norms = {"before": _norms(model)} if training.regularization_type else None
        teacher = store.load(job.inputs["teacher"])[0] if distillation is not None else None
        views = Views.of(data, splits(data, distillation), objective, model, size, augment, seed, job.cache)
        tune = None
        if training.patience is not None and "tune" in data:
            tune = Views.of(data, ["tune"], objective, model, size, NONE, seed, job.cache)
        found = train(model, views, training, job.scratch / "state.ckpt", teacher, distillation, tune)
        (job.out / "curve.json").write_text(json.dumps(found.pop("curve")))
        if norms is not None:
            (job.out / "norms.json").write_text(json.dumps({**norms, "after": _norms(model)}))
    else:
        check(model, size)
    store.save(model, job.out, make, history)
    params = sum(p.numel() for p in model.parameters())
    return {**found, "params": params, "macs": macs(model, size)}


def _norms(model: nn.Module) -> dict[str, list[float]]:
    """The norm of every channel that can be pruned, by group."""
    found = groups(model)
    values = importance(model, found, "group_l1", None, "union") if found else []
    return {
        group.name: [round(float(x), 5) for x in norms] for group, norms in zip(found, values, strict=True) if norms is not None
    }


def _as_long(job: Job, model: nn.Module, size: Resolution, training: Training, distillation: Distillation | None) -> Training:
    """As many steps for the control as the multiply-accumulates of all the training it is compared with pay for."""
    dense, pruned = (read_manifest(job.inputs[role]) for role in ("teacher", "network"))
    assert dense is not None
    assert pruned is not None
    own = 3 * macs(model, size)
    taught = own + (dense["summary"]["macs"] if distillation is not None else 0)
    spent = dense["summary"]["train_macs"] + pruned["summary"]["train_macs"] + training.steps * training.batch_size * taught
    steps = round(spent / (own * training.batch_size))
    say(f"as long as dense, pruning and retraining together: {steps} steps")
    return replace(training, steps=steps)
