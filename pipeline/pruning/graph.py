"""The channel groups of a network, found by torch-pruning: which channels are tied, their cost, and their removal."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import nn

from pipeline.models.contract import duplicate, fold, forward, tied
from pipeline.pruning.groups import LAYERS, Group, Part, evaluating, example, heads, learning, traced
from pipeline.pruning.trial import LeftOut, Trial, told

_PLAIN = {
    "Add", "Sub", "Mul", "Div", "Concat", "Output", "Relu", "LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Sigmoid",
    "Silu", "Tanh", "Gelu", "Elu", "Mish", "MaxPool2DWithIndices", "AvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D",
    "Clone", "T", "Addmm", "Mm", "Bmm", "Unsqueeze", "Squeeze", "Contiguous",
}  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """The channels of a network that may be pruned, and those that may not.

    Attributes:
        groups: the prunable groups, in the order of the network's layers.
        left_out: the other channels, without those of the heads.
    """

    groups: Sequence[Group]
    left_out: Sequence[LeftOut]

    def reasons(self) -> dict[str, list[str]]:
        """The layers that are not pruned, by reason."""
        layers: dict[str, list[str]] = {}
        for own in self.left_out:
            layers.setdefault(own.reason, []).extend(own.layers)
        return layers

    def words(self) -> str:
        """A text that names the layers that are not pruned; empty if there are none."""
        return "; ".join(f"{_few(names)} ({reason})" for reason, names in self.reasons().items())


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


_VERDICTS: WeakKeyDictionary[nn.Module, tuple[Any, Sequence[LeftOut]]] = WeakKeyDictionary()


def survey(network: nn.Module) -> Survey:
    """The groups that may be pruned, and the channels that are left out.

    Torch-pruning follows channels through known operators, and treats all others as element-wise. So its groups are tried:
    the pruned network must equal the dense network in which no layer reads those channels.

    Raises:
        UserError: the network's own forward pass fails.
    """
    with evaluating(network):
        forward(network, example(network))
    try:
        found, left_out = _candidates(network)
        structure = [(name, type(module)) for name, module in network.named_modules()]
        known = _VERDICTS.get(network)
        if known is None or known[0] != structure:  # a verdict holds for any weights and any number of channels
            known = _VERDICTS[network] = structure, Trial(network).broken(found)
    except Exception as error:  # noqa: BLE001 torch-pruning and a network's own code raise anything
        layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
        return Survey([], [LeftOut(layers, f"the network cannot be followed: {told(error)}")])
    broken = {name for own in known[1] for name in own.layers}
    kept = [group for group in found if broken.isdisjoint(part.name for part in group.producers)]
    return Survey(kept, [*left_out, *known[1]])


def groups(network: nn.Module) -> list[Group]:
    """The groups that may be pruned, in the order of the network's layers; `survey` says what is left out."""
    return list(survey(network).groups)


def _candidates(network: nn.Module) -> tuple[list[Group], list[LeftOut]]:
    """The groups that torch-pruning finds, and those that cannot be pruned because of the kind of a layer."""
    copy = duplicate(network)
    fold(copy)
    real, names = dict(network.named_modules()), {module: name for name, module in copy.named_modules()}
    order = {name: n for n, name in enumerate(real)}
    shared = {name.rpartition(".")[0]: other for one, two in tied(copy).items() for name, other in ((one, two), (two, one))}
    found, left_out = [], []
    with learning(copy):
        graph = traced(copy)
        for members in _members(graph, heads(copy)):
            parts = []
            for item in members:
                layer = item.dep.target.module
                if isinstance(layer, (*LAYERS, nn.BatchNorm2d)):
                    outputs = item.dep.handler.__name__ == "prune_out_channels"
                    name = names[layer]
                    parts.append(Part(name, real[name], outputs, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
            size = len(members[0].idxs)
            through, others = _others(graph, members, size)
            group = Group(names[members[0].dep.target.module], size, parts, through, others)
            if (reason := _at_sight(parts, shared)) is None:
                found.append(group)
            else:
                left_out.append(LeftOut([part.name for part in group.producers], reason))
    return sorted(found, key=lambda group: order[group.name]), left_out


def _members(graph: tp.DependencyGraph, ignored: Sequence[nn.Module]) -> Iterator[Any]:
    """The groups of tied channels, each from the outputs of a layer. Groups with outputs of a head are skipped."""
    yield from graph.get_all_groups(ignored_layers=list(ignored), root_module_types=list(LAYERS))


def _others(graph: tp.DependencyGraph, members: Any, size: int) -> tuple[tuple[str, ...], float]:
    """The members of a group that are neither layers nor plain operators, and their number of parameters for each channel."""
    operators, own, params = set(), set(), {}
    for item in members:
        node = item.dep.target
        module = node.module
        if isinstance(module, nn.Parameter):
            own.add(graph._param_to_name[module])  # noqa: SLF001
            params[module] = module.numel() / module.shape[node.pruning_dim] * len(item.idxs) / size
        elif isinstance(module, tp.ops._ElementWiseOp):  # noqa: SLF001
            operators.add(re.sub(r"Backward\d*$", "", str(module._grad_fn)))  # noqa: SLF001
        elif type(module).__module__ == tp.ops.__name__:
            operators.add(type(module).__name__.strip("_").removesuffix("Op"))
        elif not isinstance(module, (*LAYERS, nn.BatchNorm2d)):
            own.add(type(module).__name__)
            if channels := graph.get_out_channels(node):
                params[module] = sum(p.numel() for p in module.parameters()) / channels * len(item.idxs) / size
    return tuple(sorted(own or operators - _PLAIN)), sum(params.values())


def _at_sight(parts: Sequence[Part], shared: Mapping[str, str]) -> str | None:
    """The reason for which the kinds of the layers exclude channels from pruning; None if there is none."""
    for part in parts:
        layer: Any = part.layer
        if getattr(layer, "groups", 1) not in (1, getattr(layer, "in_channels", 1)):
            return f"{part.name} is a grouped convolution that is not depthwise"
        if getattr(layer, "groups", 1) > 1 and layer.in_channels != layer.out_channels:
            return f"{part.name} is a depthwise convolution with {layer.out_channels // layer.in_channels} outputs a channel"
        if part.name in shared:
            return f"{part.name} shares a weight with {shared[part.name]}"
    return None
