"""sensitivity: measure the effect of pruning each channel group alone on the fields and the loss."""

import json
from dataclasses import replace
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


def run(
    job: Job,
    data: Splits,
    objective: Objective[Any] | None,
    resolution: str,
    bases: Framing,
    augment: Augmentation,
    criterion: Literal["l1", "l2", "bn_scale", "taylor", "group_l1"],
    normalizer: Literal["max", "L2"] | None,
    equalization_criterion: Literal["union", "intersection", "arithmetic_mean", "geometric_mean"],
    images: Annotated[int, Interval(ge=1, le=10**6)],
) -> dict[str, Any]:
    """Measure the groups of the input "network" on tune images, and write curves.json.

    Args:
        job: the job. Its inputs hold "network".
        data: the data set. Its tune images are used, and some train images for the criterion "taylor".
        objective: objective that defines the loss.
        resolution: size of the views.
        bases: framing whose base views are augmented.
        augment: augmentation of training. Nothing is augmented here, but "taylor" uses training's shard of the train images.
        criterion: importance criterion, which decides the channels of a group that are masked first.
        normalizer: normalizer of the criterion, as for the pruner.
        equalization_criterion: how to combine the norms of tied layers, as for the pruner.
        images: largest number of images.

    Returns:
        The numbers of groups and images, and the most sensitive group.

    Raises:
        UserError: the family has no objective, or there are no tune images.
    """
    if objective is None or "tune" not in data:
        raise UserError("stage=sensitivity: needs a family that is trained here, and tune images (data.splits)")
    network, _, _ = store.load(job.inputs["network"])
    size, surveyed = Resolution.parse(resolution), survey(network)
    if not (found := surveyed.groups):
        raise UserError(nothing_to_prune(surveyed))
    material = Material(data, objective, bases, size, augment, job.cache)
    gates = None
    if criterion == "taylor":
        seen = Views.of(material, ["train"], network, 0)
        gates = taylor_gates(network, replace(seen, augment=NONE))
    ranked = importance(network, found, criterion, normalizer, equalization_criterion, gates)
    views = Views.of(material, ["tune"], network, 0, NONE)
    views = replace(views, shard=views.shard.first(images))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)
    count = len(views.shard)
    parts = [range(n, min(n + _BATCH, count)) for n in range(0, count, _BATCH)]
    with torch.no_grad():
        batches = [(x, targets, network(x)) for x, targets in views.batches(iter(parts), device)]

    def measure(net: nn.Module) -> dict[str, float]:
        """The objective's loss, and the relative root mean square distance of the fields from those of the whole network."""
        loss, errors = 0.0, {name: [0.0, 0.0] for name in batches[0][2]}
        for x, targets, whole in batches:
            fields = net(x)
            loss += float(torch.stack([*objective.loss(fields, targets).values()]).sum()) * len(x) / count
            for name, total in errors.items():
                total[0] += float((fields[name] - whole[name]).square().sum())
                total[1] += float(whole[name].square().sum())
        return {"loss": loss, "error": float(np.sqrt(np.mean([wrong / max(power, 1e-30) for wrong, power in errors.values()])))}

    with torch.no_grad():
        before = measure(network)["loss"]
        made = curves(network, found, ranked, measure)
    (job.out / "curves.json").write_text(json.dumps({"criterion": criterion, "whole": {"loss": before}, **made}, indent=1))
    worst = max(made["error"], key=lambda name: made["error"][name]["0.5"])
    return {
        "groups": len(made["error"]),
        "left_out": surveyed.reasons(),
        "images": count,
        "most_sensitive": worst,
        "its_error_at_half": made["error"][worst]["0.5"],
    }
