"""train and retrain: train a dense or pruned network, or a baseline with the pruned structure and random weights."""

import json
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Train:
    """Train a new network, one with given weights, or the one of the input "network".

    Attributes:
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
    """

    control: Literal["pruned", "scratch"] | None
    network: "partial[nn.Module] | None"
    weights: str | None
    data: Splits
    objective: Objective[Any] | None
    resolution: str
    seed: Annotated[int, Interval(ge=0, lt=2**32)]
    bases: Framing
    augment: Augmentation
    training: Training
    distillation: Distillation | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs may hold "network", and then "teacher", the dense network.

        Returns:
            The losses, the parameters, and the MACs of one image and of the whole training.

        Raises:
            UserError: neither training nor weights are given, or a part of the training fails.
        """
        torch.manual_seed(self.seed)
        size = Resolution.parse(self.resolution)
        training, distillation = self.training, self.distillation
        if self.network is None:
            model, make, history = store.load(job.inputs["network"])
            if self.control == "scratch":
                training, distillation = self._as_long(job, model, size), None
                model = store.build(make, history)
        else:
            make, history = self.network, []
            model = created(make)
            if self.weights is not None:
                store.load_state(model, store.read_weights(Path(self.weights)), Path(self.weights))
            elif self.training.steps == 0:
                raise UserError(
                    "stages.train.training.steps=0 and no weights=FILE: an untrained network is of no use; give one of them"
                )
        summary: dict[str, Any] = {"train_macs": 0}
        if training.steps:
            summary = self._trained(job, model, training, distillation)
        else:
            check(model, size)
        store.save(model, job.out, make, history)
        return {**summary, "params": sum(p.numel() for p in model.parameters()), "macs": macs(model, size)}

    def _trained(self, job: Job, model: nn.Module, training: Training, distillation: Distillation | None) -> dict[str, Any]:
        """Train a network in place, and write its curves."""
        if self.objective is None:
            raise UserError(
                "this family's networks are not trained here: give model=onnx model.onnx=FILE, or "
                "stages.train.training.steps=0 and weights=FILE"
            )
        size = Resolution.parse(self.resolution)
        material = Material(self.data, self.objective, self.bases, size, self.augment, job.cache)
        check(model, size, self.objective, partial(material.source, ["train"]))
        norms = {"before": _norms(model)} if training.regularization_type else None
        teacher = store.load(job.inputs["teacher"])[0] if distillation is not None else None
        views = Views.of(material, splits(self.data, distillation, self.bases, size), model, self.seed)
        tune = None
        if training.patience is not None and "tune" in self.data:
            tune = Views.of(material, ["tune"], model, self.seed, NONE)
        summary = train(model, views, training, job.scratch / "state.ckpt", teacher, distillation, tune)
        (job.out / "curve.json").write_text(json.dumps(summary.pop("curve")))
        if norms is not None:
            (job.out / "norms.json").write_text(json.dumps({**norms, "after": _norms(model)}))
        return summary

    def _as_long(self, job: Job, model: nn.Module, size: Resolution) -> Training:
        """The training of the baseline, with as many steps as the total multiply-accumulates of the other trainings allow."""
        dense, pruned = (read_manifest(job.inputs[role]) for role in ("teacher", "network"))
        assert dense is not None
        assert pruned is not None
        own, batch = 3 * macs(model, size), self.training.batch_size
        taught = own + (dense["summary"]["macs"] if self.distillation is not None else 0)
        spent = dense["summary"]["train_macs"] + pruned["summary"]["train_macs"] + self.training.steps * batch * taught
        steps = round(spent / (own * batch))
        say(f"training with the total compute of dense training, pruning and retraining: {steps} steps")
        return replace(self.training, steps=steps)


def _norms(model: nn.Module) -> dict[str, list[float]]:
    """The norm of every prunable channel, by group."""
    found = groups(model)
    values = importance(model, found, "group_l1", None, "union") if found else []
    return {
        group.name: [round(float(x), 5) for x in norms] for group, norms in zip(found, values, strict=True) if norms is not None
    }
