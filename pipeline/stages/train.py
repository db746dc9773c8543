"""train and retrain: train a dense or pruned network, or a baseline with the pruned structure and random weights."""

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
from pipeline.pruning.costs import macs
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import groups
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from pipeline.training.augment import NONE, Augmentation
from pipeline.training.distillation import Distillation, splits
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.shard import Material
from pipeline.training.views import Views
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.resolution import Resolution


def run(
    job: Job,
    control: Literal["pruned", "scratch"] | None,
    network: "partial[nn.Module] | None",
    weights: str | None,
    data: Splits,
    objective: Objective[Any] | None,
    resolution: str,
    seed: Annotated[int, Interval(ge=0, lt=2**32)],
    bases: Framing,
    augment: Augmentation,
    training: Training,
    distillation: Distillation | None,
) -> dict[str, Any]:
    """Train a new network, one with given weights, or the one of the input "network".

    Args:
        job: the job. Its inputs may hold "network", and then "teacher", the dense network.
        control: baseline to train. "scratch" replaces the input's weights by random ones, and trains with the total
            multiply-accumulates of the dense network's training, pruning and retraining, without a teacher.
        network: class and options of the network; None uses the input.
        weights: state file with the initial weights.
        data: the data set. Its train images are used unless there are 0 steps; with a teacher, unlabelled images are, too.
        objective: training objective; None if the family has none yet.
        resolution: size of the views.
        seed: seed of the weights, the order and the views.
        bases: framing whose base views are augmented.
        augment: augmentation of the views.
        training: options of the training.
        distillation: options of distillation from the teacher; None without a teacher.

    Returns:
        The losses, the parameters, and the MACs of one image and of the whole training.

    Raises:
        UserError: neither training nor weights are given, or a part of the training fails.
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
        material = Material(data, objective, bases, size, augment, job.cache)
        check(model, size, objective, partial(material.source, ["train"]))
        norms = {"before": _norms(model)} if training.regularization_type else None
        teacher = store.load(job.inputs["teacher"])[0] if distillation is not None else None
        views = Views.of(material, splits(data, distillation), model, seed)
        tune = None
        if training.patience is not None and "tune" in data:
            tune = Views.of(material, ["tune"], model, seed, NONE)
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
    """The norm of every prunable channel, by group."""
    found = groups(model)
    values = importance(model, found, "group_l1", None, "union") if found else []
    return {
        group.name: [round(float(x), 5) for x in norms] for group, norms in zip(found, values, strict=True) if norms is not None
    }


def _as_long(job: Job, model: nn.Module, size: Resolution, training: Training, distillation: Distillation | None) -> Training:
    """The training of the baseline, with as many steps as the total multiply-accumulates of the other trainings allow."""
    dense, pruned = (read_manifest(job.inputs[role]) for role in ("teacher", "network"))
    assert dense is not None
    assert pruned is not None
    own = 3 * macs(model, size)
    taught = own + (dense["summary"]["macs"] if distillation is not None else 0)
    spent = dense["summary"]["train_macs"] + pruned["summary"]["train_macs"] + training.steps * training.batch_size * taught
    steps = round(spent / (own * training.batch_size))
    say(f"training with the total compute of dense training, pruning and retraining: {steps} steps")
    return replace(training, steps=steps)
