"""sensitivity: measure the effect of pruning each channel group alone on the fields and the loss."""

import json
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from torch import nn

from pipeline.contracts import Objective, Splits
from pipeline.models import store
from pipeline.pruning.criteria import importance, taylor_gates
from pipeline.pruning.graph import survey
from pipeline.pruning.plan import nothing_to_prune
from pipeline.pruning.sensitivity import curves
from pipeline.results.job import Job
from pipeline.training.augment import NONE, Augmentation
from pipeline.training.shard import Material
from pipeline.training.views import Views
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.resolution import Resolution

_BATCH = 16


@dataclass(frozen=True)
class Sensitivity:
    """Measure the groups of the input "network" on tune images, and write curves.json.

    Attributes:
        data: the data set. Its tune images are used, and some train images for the criterion "taylor".
        objective: objective that defines the loss.
        resolution: size of the views.
        bases: framing whose base views are augmented.
        augment: augmentation of training. Nothing is augmented here, but "taylor" uses training's shard of the train images.
        criterion: importance criterion, which decides the channels of a group that are masked first.
        normalizer: normalizer of the criterion, as for the pruner.
        equalization_criterion: how to combine the norms of tied layers, as for the pruner.
        images: largest number of images.
    """

    data: Splits
    objective: Objective[Any] | None
    resolution: str
    bases: Framing
    augment: Augmentation
    criterion: Literal["l1", "l2", "bn_scale", "taylor", "group_l1"]
    normalizer: Literal["max", "L2"] | None
    equalization_criterion: Literal["union", "intersection", "arithmetic_mean", "geometric_mean"]
    images: Annotated[int, Interval(ge=1, le=10**6)]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network".

        Returns:
            The numbers of groups and images, and the most sensitive group.

        Raises:
            UserError: the family has no objective, or there are no tune images.
        """
        if self.objective is None or "tune" not in self.data:
            raise UserError("stage=sensitivity: needs a family that is trained here, and tune images (data.splits)")
        network, _, _ = store.load(job.inputs["network"])
        surveyed = survey(network)
        if not surveyed.groups:
            raise UserError(nothing_to_prune(surveyed))
        size = Resolution.parse(self.resolution)
        material = Material(self.data, self.objective, self.bases, size, self.augment, job.cache)
        gates = None
        if self.criterion == "taylor":
            gates = taylor_gates(network, replace(Views.of(material, ["train"], network, 0), augment=NONE))
        ranked = importance(network, surveyed.groups, self.criterion, self.normalizer, self.equalization_criterion, gates)
        views = Views.of(material, ["tune"], network, 0, NONE)
        whole = _Whole(network, replace(views, shard=views.shard.first(self.images)))
        before = whole.compared(network)["loss"]
        with torch.no_grad():
            measured = curves(network, surveyed.groups, ranked, whole.compared)
        content = {"criterion": self.criterion, "whole": {"loss": before}, **measured}
        (job.out / "curves.json").write_text(json.dumps(content, indent=1))
        worst = max(measured["error"], key=lambda name: measured["error"][name]["0.5"])
        return {
            "groups": len(measured["error"]),
            "left_out": surveyed.reasons(),
            "images": whole.count,
            "most_sensitive": worst,
            "its_error_at_half": measured["error"][worst]["0.5"],
        }


class _Whole:
    """The whole network's fields of some views, with which masked networks are compared."""

    def __init__(self, network: nn.Module, views: Views) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network.eval().to(device)
        self.count, self._objective = len(views.shard), views.objective
        parts = [range(n, min(n + _BATCH, self.count)) for n in range(0, self.count, _BATCH)]
        with torch.no_grad():
            self._batches = [(x, targets, network(x)) for x, targets in views.batches(iter(parts), device)]

    @torch.no_grad()
    def compared(self, network: nn.Module) -> dict[str, float]:
        """The objective's loss, and the relative root mean square distance of the fields from the whole network's."""
        loss, errors = 0.0, {name: [0.0, 0.0] for name in self._batches[0][2]}
        for x, targets, whole in self._batches:
            fields = network(x)
            loss += float(torch.stack([*self._objective.loss(fields, targets).values()]).sum()) * len(x) / self.count
            for name, total in errors.items():
                total[0] += float((fields[name] - whole[name]).square().sum())
                total[1] += float(whole[name].square().sum())
        relative = [wrong / max(power, 1e-30) for wrong, power in errors.values()]
        return {"loss": loss, "error": float(np.sqrt(np.mean(relative)))}
