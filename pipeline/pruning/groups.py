"""Groups of channels that can only go together, and their removal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pipeline.models.contract import fold, spec_of
from posepress.errors import UserError
from posepress.resolution import Resolution

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


History = Sequence[
    Sequence[Any]
]  # every removal as [name of a layer, whether its outputs are removed, channels], the form of architecture.json


def normalised(network: nn.Module) -> dict[nn.Module, nn.BatchNorm2d]:
    """Each convolution whose output goes straight into a batch norm, and that batch norm."""
    made: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, nn.BatchNorm2d] = {}
    kept: list[Tensor] = []  # keeps the tensors alive, since ids are unique only among live objects

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            if id(inputs[0]) in made and module.affine and module.running_var is not None:
                pairs[made[id(inputs[0])]] = module
        else:
            kept.append(output)
            made[id(output)] = module

    with watched(network, (*LAYERS, nn.BatchNorm2d), remember, example(network)):
        return pairs


def output_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight that belongs to its outputs."""
    return int(isinstance(layer, nn.ConvTranspose2d) and layer.groups == 1)


def folded(layer: nn.Module, norm: nn.BatchNorm2d | None) -> Tensor:
    """The weight of a layer times the scale of the batch norm behind it. Engines compute with this product."""
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
        name: name of the layer.
        layer: the layer: a convolution, a linear layer or a batch norm.
        outputs: whether the channels are outputs of the layer; otherwise they are its inputs.
        channels: indices of the layer's channels [n].
        roots: the index in the group of each of these channels [n].
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
        name: name of the layer at which pruning begins.
        size: number of channels.
        parts: the parts of all layers that have these channels.
        through: names of other modules and parameters that the channels pass; without any, names of unusual operators.
        others: number of parameters in these modules for each channel.
    """

    name: str
    size: int
    parts: Sequence[Part]
    through: tuple[str, ...] = ()
    others: float = 0.0

    @property
    def producers(self) -> list[Part]:
        """The layers that compute the channels, depthwise convolutions among them."""
        return [part for part in self.parts if part.outputs and isinstance(part.layer, LAYERS)]

    @property
    def consumers(self) -> list[Part]:
        """The layers that read the channels."""
        return [part for part in self.parts if not part.outputs]

    def signature(self) -> tuple[Any, ...]:
        """The kinds and kernels of the layers. Isomorphic groups (arXiv:2407.04616) have equal signatures."""
        return tuple(
            sorted(
                (type(p.layer).__name__, p.outputs, str(getattr(p.layer, "kernel_size", "")), getattr(p.layer, "groups", 1) > 1)
                for p in self.parts
            )
        )


def remove(network: nn.Module, dropped: Mapping[str, Sequence[int]]) -> list[Any]:
    """Remove channels of groups, in place, and return the history for `replay`.

    Computed weights (weight_norm) become plain ones.

    Args:
        network: a network with `spec` and `ignored_layers`.
        dropped: the channels to remove, by the name of their group.
    """
    if not dropped:
        return []
    fold(network)
    layers = dict(network.named_modules())
    with learning(network):
        graph = traced(network)
        for name, channels in dropped.items():
            layer = layers[name]
            pruning = graph.get_pruner_of_module(layer).prune_out_channels
            graph.get_pruning_group(layer, pruning, sorted(channels)).prune()
    return [[name, bool(out), [int(i) for i in ids]] for name, out, ids in graph.pruning_history()]


def replay(network: nn.Module, history: History) -> None:
    """Remove the channels that a recorded pruning removed, in place.

    Raises:
        UserError: the history belongs to another network.
    """
    if not history:
        return
    fold(network)
    layers = dict(network.named_modules())
    for name, _, ids in history:
        layer: Any = layers.get(name)
        if not isinstance(layer, LAYERS):
            raise UserError(
                f"architecture.json prunes the layer {name}, which {type(network).__name__} does not have; "
                "it belongs to another network or version: prune again"
            )
        outputs = layer.weight.shape[output_axis(layer)]
        if ids and not 0 <= max(ids) < outputs:
            raise UserError(
                f"architecture.json removes channel {max(ids)} of {name}, which has {outputs} in "
                f"{type(network).__name__}; it belongs to another network or version: prune again"
            )
    with learning(network):
        traced(network).load_pruning_history([(name, bool(out), list(ids)) for name, out, ids in history])


def mask(network: nn.Module, group: Group, dropped: Iterable[int]) -> None:
    """Zero the weights that read some channels of a group, in place. The outputs then equal those of the pruned network."""
    gone = torch.tensor(sorted(dropped))
    own = dict(network.named_modules())
    for part in group.consumers:
        channels = part.channels[torch.isin(part.roots, gone)]
        layer: Any = own[part.name]
        with torch.no_grad():
            layer.weight.index_fill_(1 - output_axis(layer), channels.to(layer.weight.device), 0)


def example(network: nn.Module, resolution: Resolution | None = None) -> Tensor:
    """An input [1, 3, H, W] that the network accepts: of the given resolution, or else of a small default size."""
    spec = spec_of(network)
    device = next(network.parameters()).device
    side = spec.input.fit(8 * spec.input.multiple)
    size = resolution or spec.input.size or Resolution(side, side)
    return torch.zeros(1, 3, size.height, size.width, device=device)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode for a block, and restore every module's mode after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def watched(network: nn.Module, kinds: tuple[type, ...], hook: Any, image: Tensor) -> Iterator[None]:
    """Run the network once, with a forward hook on every layer of the given kinds."""
    hooks = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, kinds)]
    try:
        with evaluating(network), torch.no_grad():
            network(image)
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def learning(network: nn.Module) -> Iterator[None]:
    """Give every weight gradients for a block, because torch-pruning follows them. Frozen weights are frozen again after it."""
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad and weight.is_floating_point()]
    for name, weight in network.named_parameters():
        if name in frozen:
            weight.requires_grad_(True)
    try:
        yield
    finally:
        weights = dict(network.named_parameters())  # read again, because pruning creates new parameters
        for name in frozen:
            weights[name].requires_grad_(False)


def traced(network: nn.Module) -> tp.DependencyGraph:
    """The dependencies between the channels of a network's layers, as torch-pruning finds them."""
    with evaluating(network), torch.enable_grad():  # torch-pruning leaves it in evaluation mode
        return tp.DependencyGraph().build_dependency(network, example(network), verbose=False)


def heads(network: nn.Module) -> list[nn.Module]:
    """The layers that keep all outputs: `ignored_layers` and all layers inside them."""
    return [layer for head in network.ignored_layers for layer in head.modules()]  # type: ignore[union-attr]
