"""Importance criteria: rank the channels of a group, on weights with their batch norms folded in."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.contract import duplicate, fold
from pipeline.pruning.groups import LAYERS, Group, Part, folded, normalised, output_axis
from posepress.errors import UserError

_GATE_IMAGES, _GATE_BATCH = 64, 8  # number of train images for the criterion "taylor", and its batch size


def spread(part: Part, values: Tensor, size: int) -> Tensor:
    """Values of a part's channels [n] summed onto its group's channels [size]."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, part.roots, values.detach().double().cpu())


def filters(part: Part, pairs: Mapping[nn.Module, nn.BatchNorm2d]) -> Tensor:
    """The folded weights of a part's channels, one row a channel [n, everything else]."""
    weight = folded(part.layer, pairs.get(part.layer))
    axis = output_axis(part.layer) if part.outputs else 1 - output_axis(part.layer)
    return weight.transpose(0, axis)[part.channels.to(weight.device)].flatten(1)


def group_norms(group: Group, pairs: Mapping[nn.Module, nn.BatchNorm2d], p: int) -> Tensor:
    """The L1 (p=1) or squared L2 (p=2) norm of each channel over all weights that make and read it [size], with gradients."""
    total: Any = 0
    for part in group.parts:
        if not isinstance(part.layer, nn.BatchNorm2d):
            norms = filters(part, pairs).abs().pow(p).sum(1).float()
            place = part.roots.to(norms.device)
            total = total + torch.zeros(group.size, device=norms.device).index_add_(0, place, norms)
    assert isinstance(total, Tensor)
    return total


def _equalised(norms: Sequence[Tensor], how: str) -> Tensor:
    """Combine the norms of several layers into one value for each channel. Union keeps a channel that any layer ranks high."""
    stacked = torch.stack(list(norms))
    if how == "union":
        return stacked.amax(0)
    if how == "intersection":
        return stacked.amin(0)
    if how == "arithmetic_mean":
        return stacked.mean(0)
    return stacked.clamp(min=1e-30).log().mean(0).exp()


def _scaled(norms: Tensor, normalizer: str | None) -> Tensor:
    if normalizer is None:
        return norms
    whole = norms.abs().max() if normalizer == "max" else norms.norm()
    return norms / whole.clamp(min=1e-30)


def importance(
    network: nn.Module, groups: Sequence[Group], criterion: str, normalizer: str | None, equalization: str, gates: Any = None
) -> list[Tensor | None]:
    """The importance of each channel, float64 [size] for each group; None for a group that the criterion cannot rank.

    Args:
        network: the network.
        groups: groups of this network.
        criterion: "l1" and "l2" are norms of the filters that compute a channel, "bn_scale" the batch norm's scale
            (arXiv:1708.06519), "taylor" the squared first-order change of the loss without the channel (arXiv:1906.10771),
            "group_l1" the L1 norm over all weights that make and read it (arXiv:2301.12900).
        normalizer: "max" or "L2" divides the norms of each layer by their maximum or L2 norm; None leaves them unchanged.
        equalization: how to combine the values of layers with tied channels: "union" takes the greatest value,
            "intersection" the least.
        gates: the result of `taylor_gates`, for the criterion "taylor".

    Raises:
        UserError: no group has the parameters that the criterion needs.
    """
    pairs = normalised(network)
    norms_of = {norm: layer for layer, norm in pairs.items()}
    found: list[Tensor | None] = []
    for group in groups:
        if criterion == "group_l1":
            values = [group_norms(group, pairs, 1).detach().double().cpu()]
        elif criterion == "bn_scale":
            norms = [p for p in group.parts if p.layer in norms_of]
            values = [spread(p, p.layer.weight[p.channels].abs(), group.size) for p in norms]  # type: ignore[index]
        elif criterion == "taylor":
            values = [spread(p, gates[p.layer][p.channels], group.size) for p in group.producers]
        else:
            order = 1 if criterion == "l1" else 2
            values = [spread(p, filters(p, pairs).norm(order, dim=1), group.size) for p in group.producers]
        found.append(_equalised([_scaled(v, normalizer) for v in values], equalization) if values else None)
    if all(values is None for values in found):
        raise UserError(f"pruner.criterion={criterion}: this network has no batch norm; choose l1, l2, group_l1 or taylor")
    return found


def taylor_gates(network: nn.Module, views: Any) -> dict[nn.Module, Tensor]:
    """The squared first-order change of the loss if an output of a layer were removed, summed over batches.

    Behind a batch norm in evaluation mode the change is (scale * its gradient + shift * its gradient)^2. Without a batch norm,
    the layer's own weights and bias take their place. Both are the gradient of a gate on the channel (arXiv:1906.10771,
    section 3.1).

    Args:
        network: the network. It is left in evaluation mode.
        views: `pipeline.training.views.Views` of train images. Only the first ones are used.
    """
    device = torch.device("cuda") if torch.cuda.is_available() else next(network.parameters()).device
    copy = duplicate(network.eval()).to(device)
    fold(copy)  # computed weights (weight_norm) have no gradients of their own
    pairs = normalised(copy)
    gates: dict[nn.Module, Tensor] = {}
    layers: list[Any] = [m for m in copy.modules() if isinstance(m, LAYERS)]
    parts = iter([range(n, n + _GATE_BATCH) for n in range(0, _GATE_IMAGES, _GATE_BATCH)])
    for images, targets in views.batches(parts, device):
        copy.zero_grad()
        torch.stack([*views.objective.loss(copy(images), targets).values()]).sum().backward()  # type: ignore[no-untyped-call]
        for layer in layers:
            norm = pairs.get(layer)
            if norm is not None:
                change = sum(p * p.grad for p in (norm.weight, norm.bias) if p.grad is not None)
            elif layer.weight.grad is not None:
                change = (layer.weight * layer.weight.grad).transpose(0, output_axis(layer)).flatten(1).sum(1)
                if layer.bias is not None:
                    change = change + layer.bias * layer.bias.grad
            else:
                continue
            seen: Any = change
            gates[layer] = gates.get(layer, 0) + seen.detach().double() ** 2
    real, names = dict(network.named_modules()), {module: name for name, module in copy.named_modules()}
    return {real[names[layer]]: values.cpu() for layer, values in gates.items()}
