"""Measure the effect of pruning each group alone on the fields and the loss."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.contract import fold
from pipeline.progress import track
from pipeline.pruning.groups import LAYERS, Group, mask

RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)


def curves(
    network: nn.Module,
    found: Sequence[Group],
    ranked: Sequence[Tensor | None],
    measure: Callable[[nn.Module], Mapping[str, float]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Measure a network while a fraction of one group's least important channels is masked, for each group.

    Args:
        network: the network. Its weights are restored, but computed weights (weight_norm) become plain ones.
        found: the groups of this network.
        ranked: importance of their channels. Groups without it are skipped.
        measure: function that returns the metrics of a network on the tune images.

    Returns:
        The results of `measure`, by metric, name of the group and ratio ("0.25").
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
