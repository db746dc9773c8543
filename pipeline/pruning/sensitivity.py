"""What pruning each group alone does to the fields and the loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.contract import fold
from pipeline.progress import track
from pipeline.pruning.graph import LAYERS, Group, mask

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)


def curves(
    network: nn.Module,
    found: Sequence[Group],
    ranked: Sequence[Tensor | None],
    measure: Callable[[nn.Module], Mapping[str, float]],
) -> dict[str, dict[str, dict[str, float]]]:
    """What a network is worth with a part of each group's least worthy channels masked, the others whole.

    Args:
        network: as it is after; weights that are computed (weight_norm) become plain ones.
        found: its groups.
        ranked: importance of their channels; groups without one are left out.
        measure: figures of a network, on tune images.

    Returns:
        What `measure` says, by its name of the figure, the name of the group and the ratio ("0.25").
    """
    fold(network)
    made: dict[str, dict[str, dict[str, float]]] = {}
    for group, values in track(list(zip(found, ranked, strict=True)), "measuring sensitivity", unit="groups"):
        if values is None:
            continue
        order = torch.argsort(values, stable=True).tolist()
        own = dict(network.named_modules())
        layers = [own[part.name] for part in group.consumers if isinstance(own[part.name], LAYERS)]
        kept = [layer.weight.detach().clone() for layer in layers]
        for ratio in RATIOS:
            mask(network, group, order[: round(ratio * group.size)])
            for figure, value in measure(network).items():
                made.setdefault(figure, {}).setdefault(group.name, {})[str(ratio)] = value
        with torch.no_grad():
            for layer, weight in zip(layers, kept, strict=True):
                layer.weight.copy_(weight)
    return made
