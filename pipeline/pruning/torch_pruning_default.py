"""Torch-Pruning with its defaults and only a ratio: the peer that our pruner is compared with."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch_pruning as tp
from annotated_types import Interval
from torch import nn

from pipeline.models.contract import fold
from pipeline.pruning.groups import example, heads
from posepress.errors import UserError, first_line


@dataclass(frozen=True)
class TorchPruningDefault:
    """`BasePruner` with `GroupMagnitudeImportance` and their defaults: L2 over the group, without folding or rounding.

    Attributes:
        pruning_ratio: fraction of each group's channels to remove.
    """

    pruning_ratio: Annotated[float, Interval(gt=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        """Check the ratio.

        Raises:
            UserError: the ratio is out of range.
        """
        if not 0 < self.pruning_ratio < 1:
            raise UserError(f"pruner.pruning_ratio={self.pruning_ratio}: not a ratio; choose above 0 to below 1")

    def prune(self, network: nn.Module) -> list[Any]:
        """Prune in place, and return the history for `pipeline.pruning.groups.replay`.

        Raises:
            UserError: Torch-Pruning fails, or the pruned network does not run.
        """
        fold(network)
        image = example(network)
        try:
            pruner = tp.pruner.BasePruner(
                network,
                image,
                importance=tp.importance.GroupMagnitudeImportance(),
                pruning_ratio=self.pruning_ratio,
                ignored_layers=heads(network),
            )
            pruner.step()
            network(image)
        except Exception as error:
            what = first_line(error)
            raise UserError(
                f"pruner=torch_pruning: Torch-Pruning's defaults cannot prune this network ({what}); choose pruner=l1, which "
                "leaves out what it cannot follow"
            ) from error
        return [[name, bool(out), [int(i) for i in ids]] for name, out, ids in pruner.DG.pruning_history()]
