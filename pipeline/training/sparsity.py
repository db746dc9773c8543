"""Sparsity in training: penalties on the folded weights of the groups that pruning will rank."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.pruning.criteria import filters, group_norms
from pipeline.pruning.graph import survey
from pipeline.pruning.groups import Group, normalised
from posepress.errors import UserError

TYPES = ("l1", "l2", "group_lasso")


class Penalty:
    """A penalty that is added to the loss: `factor` times a norm of the weights of every group's channels.

    "l1" is the sum of the magnitudes of the weights that compute the channels, and "l2" the sum of their squares, as TAO's
    regularization_type. "group_lasso" considers, for each channel, all weights that compute or read it. It sums their L2 norms
    times the root of their number over the channels (Yuan and Lin 2006), which makes whole channels zero.

    Args:
        network: the network. Its groups are penalised, except for the heads.
        kind: "l1", "l2" or "group_lasso".
        factor: TAO's kernel_regularization_factor.

    Raises:
        UserError: no channels of the network can be pruned.
    """

    def __init__(self, network: nn.Module, kind: str, factor: float) -> None:
        self.kind, self.factor, self.pairs = kind, factor, normalised(network)
        device = next(network.parameters()).device
        surveyed = survey(network)
        self.groups: list[Group] = [
            replace(g, parts=[replace(p, channels=p.channels.to(device), roots=p.roots.to(device)) for p in g.parts])
            for g in surveyed.groups
        ]
        if not self.groups:
            why = f" ({surveyed.words()})" if surveyed.left_out else ""
            raise UserError(f"training.regularization_type={kind}: no channels of this network can be pruned{why}; choose null")
        with torch.no_grad():
            self.counts = [
                sum(filters(p, self.pairs).numel() for p in g.parts if not isinstance(p.layer, nn.BatchNorm2d)) / g.size
                for g in self.groups
            ]

    def __call__(self) -> Tensor:
        """The penalty, with gradients."""
        total: Any = 0
        for group, count in zip(self.groups, self.counts, strict=True):
            if self.kind == "group_lasso":
                norms = (group_norms(group, self.pairs, 2) + 1e-12).sqrt()
                total = total + norms.sum() * count**0.5
            else:
                order = 1 if self.kind == "l1" else 2
                for part in group.producers:
                    total = total + filters(part, self.pairs).abs().pow(order).sum()
        penalty: Tensor = self.factor * total
        return penalty
