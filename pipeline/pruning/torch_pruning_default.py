"""What Torch-Pruning does when it is given nothing but a ratio: the peer that our pruner is measured against."""

from dataclasses import dataclass
from typing import Annotated, Any

import torch_pruning as tp
from annotated_types import Interval
from torch import nn

from pipeline.errors import UserError
from pipeline.pruning.graph import example


@dataclass(frozen=True)
class TorchPruningDefault:
    """`BasePruner` with `GroupMagnitudeImportance`, as they come: L2 over the group, nothing folded or rounded.

    Attributes:
        pruning_ratio: part of each group's channels to remove.
    """

    pruning_ratio: Annotated[float, Interval(gt=0, lt=1)] = 0.5

    def __post_init__(self) -> None:
        """Check the ratio.

        Raises:
            UserError: it is none.
        """
        if not 0 < self.pruning_ratio < 1:
            raise UserError(f"pruner.pruning_ratio={self.pruning_ratio}: no ratio; choose above 0 to below 1")

    def prune(self, network: nn.Module) -> list[Any]:
        """Prune in place; returns the history for `pipeline.pruning.graph.replay`."""
        pruner = tp.pruner.BasePruner(
            network,
            example(network),
            importance=tp.importance.GroupMagnitudeImportance(),
            pruning_ratio=self.pruning_ratio,
            ignored_layers=list(network.ignored_layers),  # type: ignore[arg-type]
        )
        pruner.step()
        return [[name, bool(out), [int(i) for i in ids]] for name, out, ids in pruner.DG.pruning_history()]
