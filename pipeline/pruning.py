"""Channel pruning by L1 norm over torch-pruning's dependency graph, recorded so that it can be replayed."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from evaluation.types import NetworkSpec, Resolution
from pipeline.errors import UserError


def example(network: nn.Module, resolution: Resolution | None = None) -> Tensor:
    """An input [1, 3, H, W] the network takes: the least sensible one, or one of a resolution."""
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    device = next(network.parameters()).device
    side = spec.input.fit(8 * spec.input.multiple)
    size = resolution or Resolution(side, side)
    return torch.zeros(1, 3, size.height, size.width, device=device)


def normalised(network: nn.Module) -> dict[nn.Conv2d, nn.BatchNorm2d]:
    """Each convolution whose output goes straight into a batch norm, and that batch norm."""
    made: dict[int, nn.Conv2d] = {}
    pairs: dict[nn.Conv2d, nn.BatchNorm2d] = {}
    kept: list[Tensor] = []  # ids are only unique while the tensors live

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kept.append(output)
            made[id(output)] = module
        elif isinstance(module, nn.BatchNorm2d) and id(inputs[0]) in made:
            pairs[made[id(inputs[0])]] = module

    hooks = [m.register_forward_hook(remember) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(example(network))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return pairs


def folded_weights(network: nn.Module, pairs: dict[nn.Conv2d, nn.BatchNorm2d]) -> Iterator[Tensor]:
    """The weights that pruning judges: of every convolution but the heads, times the scale of its batch norm."""
    heads = {id(layer) for layer in network.ignored_layers}  # type: ignore[union-attr]
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and id(module) not in heads:
            norm = pairs.get(module)
            if norm is None:
                yield module.weight
            else:
                assert norm.running_var is not None
                scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                yield module.weight * scale[:, None, None, None]


def replay(network: nn.Module, history: Sequence[Any]) -> None:
    """Remove the channels that a recorded pruning removed, in place."""
    if history:
        graph = tp.DependencyGraph().build_dependency(network, example(network))
        graph.load_pruning_history([(name, bool(out), list(ids)) for name, out, ids in history])


@dataclass(frozen=True)
class L1Pruner:
    """Removes the channels whose folded weights have the least L1 norm, the same way in every group of tied layers.

    Attributes:
        pruning_ratio: part of each group's channels to remove, 0 to below 1; None with `pruning_threshold`.
        pruning_threshold: remove channels whose norm, divided by the group's greatest, lies below; as TAO's `-pth`.
        round_to: channels left are a multiple of this; INT8 kernels are fast at 16.
        min_num_filters: never leave fewer.
    """

    pruning_ratio: float | None = 0.5
    pruning_threshold: float | None = None
    round_to: int = 8
    min_num_filters: int = 8

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: none or both of ratio and threshold are given, or one is out of range.
        """
        if (self.pruning_ratio is None) == (self.pruning_threshold is None):
            raise UserError("pruner: give either pruning_ratio or pruning_threshold (the other null)")
        value = self.pruning_ratio if self.pruning_ratio is not None else self.pruning_threshold
        assert value is not None
        if self.round_to < 1 or self.min_num_filters < 1:
            raise UserError(f"pruner: round_to={self.round_to} and min_num_filters={self.min_num_filters} must be at least 1")
        if not 0 <= value < 1:
            raise UserError(f"pruner: {value} is no ratio or threshold; choose 0 to below 1")

    def _dropped(self, importance: Tensor) -> list[int]:
        """Indices to remove of a group with these norms [C]."""
        channels = importance.numel()
        if self.pruning_ratio is not None:
            keep = round(channels * (1 - self.pruning_ratio))
        else:
            assert self.pruning_threshold is not None
            keep = int((importance >= self.pruning_threshold * importance.max()).sum())
        keep = -(-max(keep, self.min_num_filters) // self.round_to) * self.round_to
        if keep >= channels:
            return []
        order = torch.argsort(importance, stable=True)
        return sorted(order[: channels - keep].tolist())

    def prune(self, network: nn.Module) -> list[Any]:
        """Prune in place; returns the history for `replay`.

        Raises:
            UserError: nothing could be removed.
        """
        judged = deepcopy(network)
        with torch.no_grad():
            for conv, norm in normalised(judged).items():
                assert norm.running_var is not None
                conv.weight *= (norm.weight / torch.sqrt(norm.running_var + norm.eps))[:, None, None, None]
        graph = tp.DependencyGraph().build_dependency(judged, example(judged))
        measure = tp.importance.GroupMagnitudeImportance(p=1, group_reduction="mean", normalizer=None, target_types=[nn.Conv2d])
        heads = list(judged.ignored_layers)  # type: ignore[arg-type]
        for group in graph.get_all_groups(ignored_layers=heads, root_module_types=[nn.Conv2d]):
            importance = measure(group)
            if importance is None:
                continue
            dropped = self._dropped(importance)
            if dropped:
                root = group[0].dep
                graph.get_pruning_group(root.target.module, root.handler, dropped).prune()
        history = [[name, bool(out), [int(i) for i in ids]] for name, out, ids in graph.pruning_history()]
        if not history:
            raise UserError("pruner: nothing to remove with these options; raise pruning_ratio or pruning_threshold")
        replay(network, history)
        return history


def macs(network: nn.Module, resolution: Resolution) -> int:
    """Multiply-accumulates of all convolutions for one image at a resolution."""
    total = 0

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += module.weight.numel() * output.shape[2] * output.shape[3]

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d)]
    training = network.training
    try:
        with torch.no_grad():
            network.eval()(example(network, resolution))
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return total
