"""The channel groups of a network: which channels go together, what they cost, and removing them; by torch-pruning."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from evaluation.types import NetworkSpec, Resolution
from pipeline.errors import UserError

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
History = Sequence[
    Sequence[Any]
]  # [name of a layer, whether its outputs, channels] of every removal, as architecture.json has it


def example(network: nn.Module, resolution: Resolution | None = None) -> Tensor:
    """An input [1, 3, H, W] the network takes: the least sensible one, or one of a resolution."""
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    device = next(network.parameters()).device
    side = spec.input.fit(8 * spec.input.multiple)
    size = resolution or Resolution(side, side)
    return torch.zeros(1, 3, size.height, size.width, device=device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; after it every module is in the mode it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _watched(network: nn.Module, kinds: tuple[type, ...], hook: Any, image: Tensor) -> Iterator[None]:
    """Run the network once with a forward hook on its layers of some kinds."""
    hooks = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, kinds)]
    try:
        with _evaluating(network), torch.no_grad():
            network(image)
        yield
    finally:
        for handle in hooks:
            handle.remove()


def normalised(network: nn.Module) -> dict[nn.Module, nn.BatchNorm2d]:
    """Each convolution whose output goes straight into a batch norm, and that batch norm."""
    made: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, nn.BatchNorm2d] = {}
    kept: list[Tensor] = []  # ids are only unique while the tensors live

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            if id(inputs[0]) in made:
                pairs[made[id(inputs[0])]] = module
        else:
            kept.append(output)
            made[id(output)] = module

    with _watched(network, (*LAYERS, nn.BatchNorm2d), remember, example(network)):
        return pairs


def output_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that its outputs lie on."""
    return int(isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1)


def folded(layer: nn.Module, norm: nn.BatchNorm2d | None) -> Tensor:
    """The weight of a layer times the scale of the batch norm behind it, which is what an engine computes with."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if norm is None:
        return weight
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return weight * scale.view([-1 if n == output_axis(layer) else 1 for n in range(weight.dim())])


@dataclass(frozen=True, eq=False)
class Part:
    """The channels of one layer that belong to a group.

    Attributes:
        name: of the layer.
        layer: a convolution, a linear layer or a batch norm.
        outputs: they are its outputs, else its inputs.
        channels: of the layer [n].
        roots: the group's channel that each of them goes with [n].
    """

    name: str
    layer: nn.Module
    outputs: bool
    channels: Tensor
    roots: Tensor


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that can only be removed together.

    Attributes:
        name: of the layer that pruning begins at.
        size: how many channels.
        parts: of all layers that have them.
    """

    name: str
    size: int
    parts: Sequence[Part]

    @property
    def producers(self) -> list[Part]:
        """The layers that compute the channels, depthwise convolutions among them."""
        return [part for part in self.parts if part.outputs and isinstance(part.layer, LAYERS)]

    @property
    def consumers(self) -> list[Part]:
        """The layers that read them."""
        return [part for part in self.parts if not part.outputs]

    def signature(self) -> tuple[Any, ...]:
        """What isomorphic groups have in common (arXiv:2407.04616): kinds and kernels of their layers."""
        return tuple(
            sorted(
                (type(p.layer).__name__, p.outputs, str(getattr(p.layer, "kernel_size", "")), getattr(p.layer, "groups", 1) > 1)
                for p in self.parts
            )
        )


def _graph(network: nn.Module) -> tp.DependencyGraph:
    with _evaluating(network):  # which torch-pruning leaves it in
        return tp.DependencyGraph().build_dependency(network, example(network))


def groups(network: nn.Module) -> list[Group]:
    """The groups that may be pruned, in the order of the network's layers.

    Left out are those of the heads, and those with a grouped convolution that is not depthwise.
    """
    names = {module: name for name, module in network.named_modules()}
    order = {name: n for n, name in enumerate(names.values())}
    found = []
    heads = list(network.ignored_layers)  # type: ignore[arg-type]
    for group in _graph(network).get_all_groups(ignored_layers=heads, root_module_types=list(LAYERS)):
        parts = []
        for item in group:
            layer = item.dep.target.module
            if isinstance(layer, (*LAYERS, nn.BatchNorm2d)):
                outputs = item.dep.handler.__name__ == "prune_out_channels"
                parts.append(Part(names[layer], layer, outputs, torch.tensor(item.idxs), torch.tensor(item.root_idxs)))
        if all(getattr(p.layer, "groups", 1) in (1, getattr(p.layer, "in_channels", 1)) for p in parts):
            found.append(Group(names[group[0].dep.target.module], len(group[0].idxs), parts))
    return sorted(found, key=lambda g: order[g.name])


def remove(network: nn.Module, dropped: Mapping[str, Sequence[int]]) -> list[Any]:
    """Remove channels of groups, in place; returns the history for `replay`.

    Args:
        network: with `spec` and `ignored_layers`.
        dropped: channels by the name of the group they are of.
    """
    graph = _graph(network)
    layers = dict(network.named_modules())
    for name, channels in dropped.items():
        layer = layers[name]
        pruning = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, pruning, sorted(channels)).prune()
    return [[name, bool(out), [int(i) for i in ids]] for name, out, ids in graph.pruning_history()]


def replay(network: nn.Module, history: History) -> None:
    """Remove the channels that a recorded pruning removed, in place.

    Raises:
        UserError: the history is of another network.
    """
    if not history:
        return
    layers = dict(network.named_modules())
    for name, _, ids in history:
        layer: Any = layers.get(name)
        if not isinstance(layer, LAYERS):
            raise UserError(
                f"architecture.json prunes the layer {name}, which {type(network).__name__} does not have; "
                "it is of another network or version"
            )
        outputs = layer.weight.shape[output_axis(layer)]
        if ids and not 0 <= max(ids) < outputs:
            raise UserError(
                f"architecture.json removes channel {max(ids)} of {name}, which has {outputs} in "
                f"{type(network).__name__}; it is of another network or version"
            )
    _graph(network).load_pruning_history([(name, bool(out), list(ids)) for name, out, ids in history])


def mask(network: nn.Module, group: Group, dropped: Iterable[int]) -> None:
    """Zero what reads some channels of a group, in place: the outputs are those of the pruned network."""
    gone = torch.tensor(sorted(dropped))
    own = dict(network.named_modules())
    for part in group.consumers:
        channels = part.channels[torch.isin(part.roots, gone)]
        layer: Any = own[part.name]
        with torch.no_grad():
            layer.weight.index_fill_(1 - output_axis(layer), channels.to(layer.weight.device), 0)


def head_parameters(network: nn.Module) -> set[int]:
    """Identities of the weights that are never pruned."""
    return {id(layer.weight) for layer in network.ignored_layers}  # type: ignore[union-attr]


class Costs:
    """Parameters and multiply-accumulates of a network as a function of how many channels of each group are kept.

    Args:
        network: with `spec` and `ignored_layers`.
        of: its groups.
        resolution: of the input.
    """

    def __init__(self, network: nn.Module, of: Sequence[Group], resolution: Resolution) -> None:
        self.sizes = torch.tensor([g.size for g in of], dtype=torch.float64)
        positions: dict[nn.Module, int] = {}

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            positions[module] = seen[0].numel() // seen.shape[-1 if isinstance(module, nn.Linear) else 1]

        with _watched(network, LAYERS, count, example(network, resolution)):
            pass
        layers: list[Any] = list(positions)
        at = {layer: n for n, layer in enumerate(layers)}
        self.fixed_out, self.fixed_in, self.kernel = (torch.zeros(len(layers), dtype=torch.float64) for _ in range(3))
        self.of_out = torch.zeros(len(layers), len(of), dtype=torch.float64)
        self.of_in = torch.zeros(len(layers), len(of), dtype=torch.float64)
        for n, layer in enumerate(layers):
            axis = output_axis(layer)
            self.fixed_out[n], self.fixed_in[n] = layer.weight.shape[axis], layer.weight.shape[1 - axis]
            self.kernel[n] = layer.weight[0, 0].numel()
        self.norms = torch.zeros(len(of), dtype=torch.float64)
        for g, group in enumerate(of):
            for part in group.parts:
                if isinstance(part.layer, nn.BatchNorm2d):
                    self.norms[g] += 2 * len(part.channels) / group.size
                elif part.layer in at:
                    shares = self.of_out if part.outputs else self.of_in
                    shares[at[part.layer], g] += len(part.channels) / group.size
        self.fixed_out -= self.of_out @ self.sizes
        self.fixed_in -= self.of_in @ self.sizes
        self.biased = torch.tensor([layer.bias is not None for layer in layers], dtype=torch.float64)
        self.positions = torch.tensor([positions[layer] for layer in layers], dtype=torch.float64)
        self.rest = 0.0
        self.rest = sum(p.numel() for p in network.parameters()) - self(self.sizes.tolist())["params"]

    def __call__(self, kept: Sequence[float]) -> dict[str, float]:
        """Return "params" and "macs" (of one image) with so many channels kept of each group."""
        counts = torch.tensor(kept, dtype=torch.float64)
        outputs, inputs = self.fixed_out + self.of_out @ counts, self.fixed_in + self.of_in @ counts
        weights = outputs * inputs * self.kernel
        params = float((weights + self.biased * outputs).sum() + self.norms @ counts) + self.rest
        return {"params": params, "macs": float((weights * self.positions).sum())}


def macs(network: nn.Module, resolution: Resolution) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one image at a resolution."""
    return round(Costs(network, [], resolution)([])["macs"])
