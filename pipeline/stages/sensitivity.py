"""sensitivity: what pruning each channel group alone does to the loss, and the picture of it."""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.errors import UserError
from pipeline.models import store
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import groups
from pipeline.pruning.sensitivity import curves
from pipeline.specs import Objective, Splits
from pipeline.training.augment import NONE
from pipeline.training.loop import loss_on
from pipeline.training.views import Views

_BATCH = 8


def run(
    job: Job, data: Splits, objective: Objective[Any] | None, resolution: str, criterion: str, images: int
) -> dict[str, Any]:
    """Measure the groups of the input "network" on tune images; write curves.json.

    Args:
        job: inputs hold "network".
        data: its tune images are used.
        objective: the loss.
        resolution: of the views.
        criterion: which channels of a group are masked first.
        images: at most so many.

    Returns:
        How many groups and images, and the group that bears least.

    Raises:
        UserError: the family has no objective, or there are no tune images.
    """
    if objective is None or "tune" not in data:
        raise UserError("stage=sensitivity: needs a family that is trained here, and tune images (data.splits)")
    if criterion == "taylor":
        raise UserError("stages.sensitivity.criterion=taylor: choose l1, l2, bn_scale or group_l1")
    network, _, _ = store.load(job.inputs["network"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.eval().to(device)
    size = Resolution.parse(resolution)
    views = Views.of(data, ["tune"], objective, network, size, NONE, 0, job.cache)
    views = replace(views, shard=views.shard.first(images))

    def loss(net: nn.Module) -> float:
        return loss_on(net, views, _BATCH)

    found = groups(network)
    made = curves(network, found, importance(network, found, criterion, None, "union"), loss)
    (job.out / "curves.json").write_text(json.dumps(made, indent=1))
    worst = max(made, key=lambda name: made[name]["0.5"])
    return {"groups": len(made), "images": len(views.shard), "most_sensitive": worst, "its_loss_at_half": made[worst]["0.5"]}
