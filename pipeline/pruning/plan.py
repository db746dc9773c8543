"""Choose the channels to remove: counts by ratio, threshold, sensitivity or target, then the least important channels."""

import fnmatch
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.pruning.costs import Costs
from pipeline.pruning.criteria import importance
from pipeline.pruning.graph import Survey, survey
from pipeline.pruning.groups import Group
from pipeline.pruning.pruner import Pruner
from posepress.errors import UserError, nearest
from posepress.resolution import Resolution

Gates = Mapping[nn.Module, Tensor] | None  # of the criterion "taylor"
Curves = Mapping[str, Mapping[str, float]]  # for each group, the loss by ratio ("0.25"), measured by the stage "sensitivity"


class UnreachableError(Exception):
    """A size cannot be reached.

    Attributes:
        least: the smallest size that can be reached.
    """

    def __init__(self, least: float) -> None:
        super().__init__(f"the least is {least}")
        self.least = least


@dataclass(frozen=True)
class Plan:
    """The channels to remove, and the values that led to this choice.

    Attributes:
        dropped: the channels to remove, by the name of their group.
        kept: number of channels of each group that stay.
        ranked: importance of each group's channels; None if the criterion cannot rank the group.
        groups: all groups.
        level: the ratio or threshold that was applied.
    """

    dropped: Mapping[str, Sequence[int]]
    kept: Sequence[int]
    ranked: Sequence[Tensor | None]
    groups: Sequence[Group]
    level: float


def _match(found: Sequence[Group], pattern: str) -> list[int]:
    return [n for n, g in enumerate(found) if fnmatch.filter([p.name for p in g.parts if p.outputs], pattern)]


def _matched(found: Sequence[Group], patterns: Sequence[str], option: str) -> dict[str, list[int]]:
    """The groups that hold a layer of each pattern.

    Raises:
        UserError: a pattern matches nothing.
    """
    matched = {}
    for pattern in patterns:
        matched[pattern] = _match(found, pattern)
        if not matched[pattern]:
            everything = sorted({p.name for g in found for p in g.parts if p.outputs})
            raise UserError(
                f"pruner.{option}={pattern}: matches no layer that can be pruned{nearest(pattern, everything)}; "
                f"there are {', '.join(everything[:6])}, ... (patterns like {everything[0].split('.')[0]}.* are allowed)"
            )
    return matched


@dataclass(frozen=True)
class Step:
    """What one of several steps must reach.

    Attributes:
        reach: upper limit, {"macs": number} or {"params": number}, used instead of the ratio.
        round_to: divisor that replaces the option `round_to`.
        whole: number of channels of each group before the first step. Ratios refer to these numbers, and a step may remove
            nothing. None for the only step.
        part: fraction of the ratio that this step must reach.
    """

    reach: Mapping[str, float] | None = None
    round_to: int | None = None
    whole: Mapping[str, int] | None = None
    part: float = 1.0


def choose(
    pruner: Pruner,
    network: nn.Module,
    resolution: Resolution,
    gates: Gates = None,
    curves: Curves | None = None,
    step: Step = Step(),
) -> Plan:
    """Choose the channels to remove.

    Args:
        pruner: the options of pruning.
        network: the network to prune.
        resolution: input size for the MACs.
        gates: gates for the criterion "taylor".
        curves: sensitivity curves for the option `sensitivity`.
        step: what this step must reach.

    Raises:
        UserError: nothing can be removed, or everything would be.
        UnreachableError: the limit cannot be reached.
    """
    surveyed = survey(network)
    if not surveyed.groups:
        raise UserError(nothing_to_prune(surveyed))
    counts = _Counts.of(pruner, network, surveyed, gates, curves, step)
    if pruner.pruning_threshold is not None:
        level = float(pruner.pruning_threshold)
        _check_threshold(counts.ranked, level, counts.open)
        kept = counts.kept(level)
    elif step.reach is None:
        level = (pruner.pruning_ratio or 0.0) * step.part
        if pruner.sensitivity is not None:
            total = sum(counts.sizes[n] for n in counts.open)
            level = _bisect(lambda x: sum(counts.kept(x)[n] for n in counts.open), total * (1 - level), *_span(curves))
        kept = counts.kept(level)
    else:
        level, kept = _reached(counts, Costs(network, surveyed.groups, resolution), step.reach, _span(curves))
    dropped = {}
    for group, values, keep in zip(surveyed.groups, counts.ranked, kept, strict=True):
        if keep < group.size and values is not None:
            dropped[group.name] = sorted(torch.argsort(values, stable=True)[: group.size - keep].tolist())
    if not dropped and step.whole is None:
        raise UserError(nothing(pruner, counts.ranked))
    return Plan(dropped, kept, counts.ranked, surveyed.groups, level)


@dataclass(frozen=True)
class _Counts:
    """How many channels each group keeps at a level, which is a ratio, a threshold or a tolerated loss.

    Attributes:
        pruner: the options of pruning.
        groups: all groups.
        ranked: importance of each group's channels; None if the criterion cannot rank the group.
        sizes: number of channels of each group before the first step.
        excluded: groups that keep all channels.
        own_ratio: ratios of single groups.
        wanted: number of channels that each group keeps at a level, before rounding.
        divisor: kept channels are a multiple of it.
    """

    pruner: Pruner
    groups: Sequence[Group]
    ranked: Sequence[Tensor | None]
    sizes: Sequence[int]
    excluded: Collection[int]
    own_ratio: Mapping[int, float]
    wanted: Callable[[float], list[float]]
    divisor: int

    @classmethod
    def of(
        cls, pruner: Pruner, network: nn.Module, surveyed: Survey, gates: Gates, curves: Curves | None, step: Step
    ) -> "_Counts":
        """The counts of a network's groups."""
        found = surveyed.groups
        others = [name for own in surveyed.left_out for name in own.layers]  # these layers are not pruned in any case
        patterns = [p for p in pruner.excluded_layers if not fnmatch.filter(others, p) or _match(found, p)]
        excluded = {n for own in _matched(found, patterns, "excluded_layers").values() for n in own}
        ratios = pruner.pruning_ratio_dict or {}
        matched = _matched(found, list(ratios), "pruning_ratio_dict")
        own_ratio = {n: ratios[pattern] * step.part for pattern, own in matched.items() for n in own}
        ranked = importance(network, found, pruner.criterion, pruner.normalizer, pruner.equalization_criterion, gates)
        if (pruner.sensitivity is not None) != (curves is not None):
            raise UserError("pruner.sensitivity: the curves of the stage 'sensitivity' belong to it; give both or none")
        sizes = [(step.whole or {}).get(group.name, group.size) for group in found]
        wanted = _wanted(pruner, found, sizes, ranked, own_ratio, curves, excluded)
        return cls(pruner, found, ranked, sizes, excluded, own_ratio, wanted, step.round_to or pruner.divisor)

    @property
    def open(self) -> list[int]:
        """The groups that may lose channels."""
        return [n for n in range(len(self.groups)) if n not in self.excluded]

    def kept(self, level: float) -> list[int]:
        """Number of channels that each group keeps."""
        counts = []
        for n, (group, keep) in enumerate(zip(self.groups, self.wanted(level), strict=True)):
            least = max(self.pruner.min_num_filters, math.ceil(self.sizes[n] * (1 - self.pruner.max_pruning_ratio) - 1e-9))
            stays = n in self.excluded or self.ranked[n] is None
            rounded = -(-max(math.ceil(keep - 1e-9), least) // self.divisor) * self.divisor
            counts.append(group.size if stays or rounded >= group.size else int(rounded))
        return counts


def _reached(counts: _Counts, costs: Costs, reach: Mapping[str, float], span: tuple[float, float]) -> tuple[float, list[int]]:
    """The lowest level at which the network is small enough, and the channels kept there.

    Raises:
        UnreachableError: the network is never small enough.
    """
    ((kind, value),) = reach.items()
    least = costs(counts.kept(span[1]))[kind]
    if least > value:
        raise UnreachableError(least)
    level = _bisect(lambda x: costs(counts.kept(x))[kind], value, *span)
    kept = counts.kept(level)
    open_to = [g.size if n not in counts.own_ratio else k for n, (g, k) in enumerate(zip(counts.groups, kept, strict=True))]
    return level, _restored(kept, open_to, counts.wanted(level), counts.divisor, lambda c: costs(c)[kind], value)


def _span(curves: Curves | None) -> tuple[float, float]:
    if curves is None:
        return 0.0, 1.0 - 1e-6
    return 0.0, max(loss for curve in curves.values() for loss in curve.values())


def _wanted(
    pruner: Pruner,
    found: Sequence[Group],
    sizes: Sequence[int],
    ranked: Sequence[Tensor | None],
    own_ratio: Mapping[int, float],
    curves: Curves | None,
    excluded: Collection[int],
) -> Callable[[float], list[float]]:
    """The number of channels that each group keeps at a level, before rounding; `sizes` are the counts before any step."""
    if pruner.pruning_threshold is not None:
        return lambda level: [
            s * (1 - own_ratio[n]) if n in own_ratio else float((r >= level).sum()) if r is not None else s
            for n, (s, r) in enumerate(zip(sizes, ranked, strict=True))
        ]
    if pruner.global_pruning:
        even = [None if r is None else r / r.mean().clamp(min=1e-30) for r in ranked]
        pools: dict[Any, list[Tensor]] = {}
        before: dict[Any, int] = {}
        keys = [group.signature() if pruner.isomorphic else "" for group in found]
        for n, (key, values) in enumerate(zip(keys, even, strict=True)):
            if values is not None and n not in own_ratio and n not in excluded:
                pools.setdefault(key, []).append(values)
                before[key] = before.get(key, 0) + sizes[n]
        sorted_pools = {key: torch.cat(values).sort().values for key, values in pools.items()}

        def of_all(level: float) -> list[float]:
            cut = {}
            for key, values in sorted_pools.items():
                gone = len(values) - (1 - level) * before[key]  # earlier steps removed some channels
                cut[key] = values[min(max(int(gone), 0), len(values) - 1)]
            return [
                s * (1 - own_ratio[n]) if n in own_ratio else s if r is None else float((r >= cut.get(k, 0)).sum())
                for n, (s, r, k) in enumerate(zip(sizes, even, keys, strict=True))
            ]

        return of_all
    if pruner.sensitivity is not None:
        assert curves is not None
        return lambda level: [
            sizes[n] * (1 - own_ratio.get(n, _tolerated(curves.get(g.name, {}), level))) for n, g in enumerate(found)
        ]
    return lambda level: [s * (1 - own_ratio.get(n, level)) for n, s in enumerate(sizes)]


def _check_threshold(ranked: Sequence[Tensor | None], level: float, open_groups: Sequence[int]) -> None:
    judged = [r for n in open_groups if (r := ranked[n]) is not None]
    if not judged:
        raise UserError("pruner.excluded_layers: nothing is left to prune; exclude less")
    values = torch.cat(judged)
    low, high = float(values.min()), float(values.max())
    middle = ", ".join(f"{q:.0%} below {float(values.quantile(q)):.3g}" for q in (0.1, 0.5, 0.9))
    every = all(bool((r < level).all()) for n in open_groups if (r := ranked[n]) is not None)
    if level > low and not every:
        return
    what = "every channel lies below it, all would go" if every else "no channel lies below it, none would go"
    raise UserError(
        f"pruner.pruning_threshold={level:g}: {what}; the norms of this network lie in {low:.3g} to {high:.3g} "
        f"({middle}): choose a threshold between"
    )


def nothing(pruner: Pruner, ranked: Sequence[Tensor | None]) -> str:
    """The error message for a plan that removes nothing."""
    if pruner.pruning_threshold is not None:
        values = torch.cat([r for r in ranked if r is not None])
        return (
            f"pruner.pruning_threshold={pruner.pruning_threshold:g}: nothing to remove with round_to={pruner.divisor} and "
            f"min_num_filters={pruner.min_num_filters}, and norms of {float(values.min()):.3g} to "
            f"{float(values.max()):.3g}; raise the threshold or lower the others"
        )
    return (
        f"pruner: nothing to remove with pruning_ratio={pruner.pruning_ratio}, round_to={pruner.divisor}, "
        f"min_num_filters={pruner.min_num_filters} and {len(pruner.excluded_layers)} excluded_layers; raise the ratio or lower "
        "the others"
    )


def nothing_to_prune(surveyed: Survey) -> str:
    """The error message for a network without a prunable group."""
    why = f": left out are {surveyed.words()}" if surveyed.left_out else ""
    return f"pruner: this network has no channels that can be removed{why}; choose pruner=none"


def _bisect(measure: Callable[[float], float], value: float, low: float, high: float) -> float:
    """The lowest level with a measure of at most `value`. The measure must decrease with the level."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if measure(middle) <= value else (middle, high)
    return high


def _restored(
    counts: list[int],
    sizes: Sequence[int],
    wanted: Sequence[float],
    divisor: int,
    cost: Callable[[Sequence[int]], float],
    value: float,
) -> list[int]:
    """Give channels back, `divisor` at a time, as long as the cost stays below a value.

    Many groups have equal sizes and are rounded at the same level, so that a level alone misses the value by far. Groups
    that gained least by rounding come first.
    """
    step = [min(divisor, size - count) for count, size in zip(counts, sizes, strict=True)]
    for n in sorted(range(len(counts)), key=lambda n: counts[n] - wanted[n]):
        if 0 < counts[n] < sizes[n]:
            more = [*counts[:n], counts[n] + step[n], *counts[n + 1 :]]
            if cost(more) <= value:
                counts = more
    return counts


def _tolerated(curve: Mapping[str, float], level: float) -> float:
    """The greatest ratio with a loss of at most a level, by linear interpolation; 0 if nothing was measured."""
    points = sorted((float(ratio), loss) for ratio, loss in curve.items())
    before, reached = (0.0, 0.0), 0.0
    for ratio, loss in points:
        if loss > level:
            rise = loss - before[1]
            return before[0] + (ratio - before[0]) * (level - before[1]) / rise if rise > 0 else before[0]
        before = (ratio, max(loss, 0.0))
        reached = ratio
    return reached
