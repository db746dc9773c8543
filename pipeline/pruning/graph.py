"""The channel groups of a network, found by torch-pruning: which channels are tied, their cost, and their removal."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pipeline.models.contract import duplicate, fold, forward, tied
from posepress.errors import UserError
from posepress.spec import NetworkSpec, Resolution

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
History = Sequence[
    Sequence[Any]
]  # every removal as [name of a layer, whether its outputs are removed, channels], the form of architecture.json

# largest accepted difference of a pruned from a masked network in single precision, relative to the greatest value; wrongly
# followed channels cause 0.01 or more
_TOLERANCE = 1e-4
_PLAIN = {
    "Add", "Sub", "Mul", "Div", "Concat", "Output", "Relu", "LeakyRelu", "Hardtanh", "Hardswish", "Hardsigmoid", "Sigmoid",
    "Silu", "Tanh", "Gelu", "Elu", "Mish", "MaxPool2DWithIndices", "AvgPool2D", "UpsampleNearest2D", "UpsampleBilinear2D",
    "Clone", "T", "Addmm", "Mm", "Bmm", "Unsqueeze", "Squeeze", "Contiguous",
}  # fmt: skip


def example(network: nn.Module, resolution: Resolution | None = None) -> Tensor:
    """An input [1, 3, H, W] that the network accepts: of the given resolution, or else of a small default size."""
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    device = next(network.parameters()).device
    side = spec.input.fit(8 * spec.input.multiple)
    size = resolution or Resolution(side, side)
    return torch.zeros(1, 3, size.height, size.width, device=device)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode for a block, and restore every module's mode after it."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _watched(network: nn.Module, kinds: tuple[type, ...], hook: Any, image: Tensor) -> Iterator[None]:
    """Run the network once, with a forward hook on every layer of the given kinds."""
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
    kept: list[Tensor] = []  # keeps the tensors alive, since ids are unique only among live objects

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm2d):
            if id(inputs[0]) in made and module.affine and module.running_var is not None:
                pairs[made[id(inputs[0])]] = module
        else:
            kept.append(output)
            made[id(output)] = module

    with _watched(network, (*LAYERS, nn.BatchNorm2d), remember, example(network)):
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


@dataclass(frozen=True)
class LeftOut:
    """Channels that are not pruned, although they are not outputs of a head.

    Attributes:
        layers: names of the layers that compute the channels.
        reason: a readable reason.
    """

    layers: Sequence[str]
    reason: str


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


@contextmanager
def _learning(network: nn.Module) -> Iterator[None]:
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


def _graph(network: nn.Module) -> tp.DependencyGraph:
    with _evaluating(network), torch.enable_grad():  # torch-pruning leaves it in evaluation mode
        return tp.DependencyGraph().build_dependency(network, example(network), verbose=False)


def heads(network: nn.Module) -> list[nn.Module]:
    """The layers that keep all outputs: `ignored_layers` and all layers inside them."""
    return [layer for head in network.ignored_layers for layer in head.modules()]  # type: ignore[union-attr]


_VERDICTS: WeakKeyDictionary[nn.Module, tuple[Any, Sequence[LeftOut]]] = WeakKeyDictionary()


def survey(network: nn.Module) -> Survey:
    """The groups that may be pruned, and the channels that are left out.

    Torch-pruning follows channels through known operators, and treats all others as element-wise. So its groups are tried:
    the pruned network must equal the dense network in which no layer reads those channels.

    Raises:
        UserError: the network's own forward pass fails.
    """
    with _evaluating(network):
        forward(network, example(network))
    try:
        found, left_out = _candidates(network)
        structure = [(name, type(module)) for name, module in network.named_modules()]
        known = _VERDICTS.get(network)
        if known is None or known[0] != structure:  # a verdict holds for any weights and any number of channels
            known = _VERDICTS[network] = structure, _Trial(network).broken(found)
    except Exception as error:  # noqa: BLE001 torch-pruning and a network's own code raise anything
        layers = [name for name, module in network.named_modules() if isinstance(module, LAYERS)]
        return Survey([], [LeftOut(layers, f"the network cannot be followed: {_told(error)}")])
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
    with _learning(copy):
        graph = _graph(copy)
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


class _Trial:
    """Prunes a copy of a network with random weights, to check which groups torch-pruning followed correctly.

    Random weights make the verdict independent of training: initial zeros or dead channels would hide a fault.

    Args:
        network: the network, which is not changed.
    """

    def __init__(self, network: nn.Module) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.network = duplicate(network).cpu().eval()
        fold(self.network)
        self.image = torch.rand(example(self.network).shape, generator=self.random)
        given = {name: value.clone() for name, value in self.network.state_dict().items()}
        self._enliven()
        if not all(bool(values.isfinite().all()) for values in self._outputs(self.network).values()):
            self.network.load_state_dict(given)  # unlike the random weights, these give finite and varied outputs

    @torch.no_grad()
    def _enliven(self) -> None:
        weights = {name for name, _ in self.network.named_parameters(remove_duplicate=False)}
        for name, values in self.network.state_dict().items():
            if name.endswith("running_var"):
                values.uniform_(0.5, 2, generator=self.random)
            elif name.endswith(("running_mean", "bias")):
                values.uniform_(-0.2, 0.2, generator=self.random)
            elif name in weights and values.is_floating_point():
                if values.numel() == max(values.shape, default=1):  # the values are the scales of a normalisation
                    values.uniform_(0.5, 1.5, generator=self.random)
                else:
                    values.normal_(0, (2 * len(values) / values.numel()) ** 0.5, generator=self.random)

    @torch.no_grad()
    def _outputs(self, network: nn.Module) -> Mapping[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            outputs: Mapping[str, Tensor] = network(self.image)
        return outputs

    def broken(self, found: Sequence[Group]) -> list[LeftOut]:
        """The groups that were not followed correctly. All groups are tried at once; if that fails, each half is."""
        if self._fault(found) is None:
            return []
        kinds: dict[tuple[str, ...], list[Group]] = {}
        for group in found:
            kinds.setdefault(group.through, []).append(group)
        wrong = {group.name: why for alike in kinds.values() for group, why in self._faults(alike)}
        right = [group for group in found if group.name not in wrong]
        if self._fault(right) is not None:  # each group alone is right, but not all of them together
            kept: list[Group] = []
            for group in right:
                if (why := self._fault([*kept, group])) is None:
                    kept.append(group)
                else:
                    wrong[group.name] = why
        made = []
        for group in found:
            if group.name in wrong:
                where = f"{', '.join(group.through)}: " if group.through else ""
                made.append(LeftOut([part.name for part in group.producers], where + wrong[group.name]))
        return made

    def _faults(self, alike: Sequence[Group]) -> Iterator[tuple[Group, str]]:
        why = self._fault(alike)
        if why is not None and len(alike) == 1:
            yield alike[0], why
        elif why is not None:
            yield from self._faults(alike[: len(alike) // 2])
            yield from self._faults(alike[len(alike) // 2 :])

    def _fault(self, chosen: Sequence[Group]) -> str | None:
        """The fault of a network without half the channels of some groups; None if it has no fault."""
        dropped = {}
        for group in chosen:
            kept = group.size // 2 | 1  # an odd number reveals operators that reshape the channels
            dropped[group.name] = torch.randperm(group.size, generator=self.random)[kept:].tolist()
        dropped = {name: channels for name, channels in dropped.items() if channels}
        whole, pruned = duplicate(self.network), duplicate(self.network)
        try:
            for group in chosen:
                mask(whole, group, dropped.get(group.name, ()))
            expected = self._outputs(whole)
            remove(pruned, dropped)
            found = self._outputs(pruned)
            shapes = {name: values.shape for name, values in expected.items()}
            if {name: values.shape for name, values in found.items()} != shapes:
                return "they reach an output; is a head missing in ignored_layers?"
            apart = max(_apart(found[name], values) for name, values in expected.items())
        except Exception as error:  # noqa: BLE001 torch-pruning and a network's own code raise anything
            return f"without some channels the network fails, {_told(error)}"
        return None if apart <= _TOLERANCE else f"pruned differs from masked by {apart:.2g} of the greatest value"


def _apart(one: Tensor, other: Tensor) -> float:
    """The greatest difference, relative to the greatest value; infinite if the result is not a number."""
    part = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
    return part if math.isfinite(part) else math.inf


@torch.no_grad()
def apart(network: nn.Module, masked: nn.Module, resolution: Resolution) -> float:
    """The greatest difference of two networks on an image, relative to each field's greatest value.

    Args:
        network: the pruned network.
        masked: the masked network, on the CPU and in evaluation mode. Nothing can be compared if its values are not finite.
        resolution: size of the image.
    """
    copy = duplicate(network).cpu().eval()
    image = torch.rand(example(copy, resolution).shape, generator=torch.Generator().manual_seed(0))
    expected, found = masked(image), copy(image)
    if not all(bool(values.isfinite().all()) for values in expected.values()):
        return 0.0
    return max(_apart(found[name], values) for name, values in expected.items())


def _told(error: Exception) -> str:
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:120]}{'...' if len(text) > 120 else ''}"


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
    with _learning(network):
        graph = _graph(network)
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
    with _learning(network):
        _graph(network).load_pruning_history([(name, bool(out), list(ids)) for name, out, ids in history])


def mask(network: nn.Module, group: Group, dropped: Iterable[int]) -> None:
    """Zero the weights that read some channels of a group, in place. The outputs then equal those of the pruned network."""
    gone = torch.tensor(sorted(dropped))
    own = dict(network.named_modules())
    for part in group.consumers:
        channels = part.channels[torch.isin(part.roots, gone)]
        layer: Any = own[part.name]
        with torch.no_grad():
            layer.weight.index_fill_(1 - output_axis(layer), channels.to(layer.weight.device), 0)


class Costs:
    """Parameters and multiply-accumulates of a network as a function of how many channels of each group are kept.

    Args:
        network: a network with `spec` and `ignored_layers`.
        of: the groups of this network.
        resolution: size of the input.
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
            self.norms[g] = group.others
            for part in group.parts:
                if isinstance(part.layer, nn.BatchNorm2d):
                    self.norms[g] += 2 * part.layer.affine * len(part.channels) / group.size
                elif part.layer in at:
                    shares = self.of_out if part.outputs else self.of_in
                    shares[at[part.layer], g] += len(part.channels) / group.size
        self.fixed_out -= self.of_out @ self.sizes
        self.fixed_in -= self.of_in @ self.sizes
        self.biased = torch.tensor([layer.bias is not None for layer in layers], dtype=torch.float64)
        self.positions = torch.tensor([positions[layer] for layer in layers], dtype=torch.float64)
        self.rest = 0.0
        plain = duplicate(network)
        fold(plain)  # pruning also replaces computed weights by plain ones
        self.rest = sum(p.numel() for p in plain.parameters()) - self(self.sizes.tolist())["params"]

    def __call__(self, kept: Sequence[float]) -> dict[str, float]:
        """Return "params" and "macs" (for one image) if `kept` channels of each group stay."""
        counts = torch.tensor(kept, dtype=torch.float64)
        outputs, inputs = self.fixed_out + self.of_out @ counts, self.fixed_in + self.of_in @ counts
        weights = outputs * inputs * self.kernel
        params = float((weights + self.biased * outputs).sum() + self.norms @ counts) + self.rest
        return {"params": params, "macs": float((weights * self.positions).sum())}


def macs(network: nn.Module, resolution: Resolution) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one image at a resolution."""
    return round(Costs(network, [], resolution)([])["macs"])
