"""What pruning each group alone does to the loss."""

from collections.abc import Callable, Sequence

import torch
from rich.progress import track
from torch import Tensor, nn

from pipeline.pruning.graph import LAYERS, Group, mask

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)


def curves(
    network: nn.Module, found: Sequence[Group], ranked: Sequence[Tensor | None], loss: Callable[[nn.Module], float]
) -> dict[str, dict[str, float]]:
    """The relative rise of the loss with a part of each group's least worthy channels masked, the others whole.

    Args:
        network: as it is after.
        found: its groups.
        ranked: importance of their channels; groups without one are left out.
        loss: of a network, on tune images.

    Returns:
        loss / loss of the whole network - 1, by name of the group and ratio ("0.25").
    """
    before = loss(network)
    made: dict[str, dict[str, float]] = {}
    for group, values in track(list(zip(found, ranked, strict=True)), "measuring sensitivity", transient=True):
        if values is None:
            continue
        order = torch.argsort(values, stable=True).tolist()
        own = dict(network.named_modules())
        layers = [own[part.name] for part in group.consumers if isinstance(own[part.name], LAYERS)]
        kept = [layer.weight.detach().clone() for layer in layers]  # type: ignore[operator]
        made[group.name] = {}
        for ratio in RATIOS:
            mask(network, group, order[: round(ratio * group.size)])
            made[group.name][str(ratio)] = loss(network) / before - 1
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)  # type: ignore[operator]
    return made
