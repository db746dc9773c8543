"""How many channels of each group are kept, and which: by ratio, by threshold, over all groups, or down to a target."""

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from evaluation.types import Resolution
from pipeline.errors import UserError, nearest
from pipeline.pruning.criteria import CRITERIA, EQUALIZATIONS, NORMALIZERS, importance
from pipeline.pruning.graph import Costs, Group, Survey, survey

TARGETS = ("params", "macs", "latency")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}

Curves = Mapping[str, Mapping[str, float]]  # loss by ratio ("0.25"), of each group, as the stage "sensitivity" measured it


@dataclass(frozen=True)
class Target:
    """What a network is pruned down to.

    Attributes:
        kind: "params", "macs" or "latency".
        value: a part of the dense network's, or a number of parameters, MACs or milliseconds.
        relative: whether it is a part.
    """

    kind: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, kind: str, text: Any) -> "Target":
        """Read "0.5x", "2.0ms", "1.2M" or "3G".

        Raises:
            UserError: it is none of these, or does not fit the kind.
        """
        if kind not in TARGETS:
            raise UserError(f"pruner.target={kind}: choose {', '.join(TARGETS)}")
        example = "2.0ms" if kind == "latency" else "1.2M"
        match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(x|ms|[kmg]?)", str(text).strip().lower())
        unit = match[2] if match else None
        fits = unit == "x" or (unit == "ms") == (kind == "latency")
        amount = float(match[1]) if match else 0.0
        possible = 0 < amount < 1 if unit == "x" else amount >= 1 if unit == "" else amount > 0
        if match is None or not fits or not possible:
            raise UserError(
                f"pruner.value={text}: not a target for {kind}; give a part of the dense network's below 1, as 0.5x, "
                f"or a value, as {example}"
            )
        return cls(kind, amount * _UNITS.get(match[2], 1.0), match[2] == "x")

    def of(self, dense: float) -> float:
        """The value to reach, where the dense network has `dense`."""
        return self.value * dense if self.relative else self.value

    def words(self, value: float, dense: float) -> str:
        """A value as the user wrote the target, rounded up, so that it can be reached."""
        if self.relative:
            return f"{_up(value / dense, 3)}x"
        return f"{_up(value, 3)}ms" if self.kind == "latency" else _up(value, 4)


def _up(value: float, digits: int) -> str:
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}"


class UnreachableError(Exception):
    """A size cannot be reached.

    Attributes:
        least: the least that can.
    """

    def __init__(self, least: float) -> None:
        super().__init__(f"the least is {least}")
        self.least = least


@dataclass(frozen=True)
class Plan:
    """What is to be removed, and why.

    Attributes:
        dropped: channels by the name of their group.
        kept: how many channels of each group stay.
        ranked: importance of each group's channels; None where the criterion says nothing.
        groups: all groups.
        level: the ratio or threshold that decided.
    """

    dropped: Mapping[str, Sequence[int]]
    kept: Sequence[int]
    ranked: Sequence[Tensor | None]
    groups: Sequence[Group]
    level: float


@dataclass(frozen=True)
class Pruner:
    """Removes the channels that are worth least.

    Attributes:
        criterion: what a channel is worth: l1, l2, bn_scale, taylor, group_l1; see `pipeline.pruning.criteria`.
        normalizer: max or L2 divides each layer's norms, as TAO's; None leaves them.
        equalization_criterion: how tied layers agree: union, intersection, arithmetic_mean, geometric_mean, as TAO's.
        pruning_ratio: part of the channels to remove, 0 to below 1; one of this, `pruning_threshold` and `target` is given.
        pruning_threshold: remove channels whose normalised importance lies below, as TAO's `-pth`; with `normalizer` none is
            above 1, so that a greater threshold would remove everything and is refused.
        target: params, macs or latency to reach, instead of a ratio.
        value: of the target: "0.5x" of the dense network's, "1.2M" parameters, "3G" MACs, "2.0ms".
        iterative_steps: reach it in so many steps, with a short training after each but the last.
        pruning_ratio_dict: ratios of the groups that hold a layer of some name pattern, instead of the common one.
        max_pruning_ratio: never remove more of a group.
        global_pruning: rank the channels of all groups together, each group's importance divided by its mean.
        isomorphic: rank together only groups of the same structure (arXiv:2407.04616).
        round_to: channels kept are a multiple of this (TAO's pruning_granularity); None: the divisor that is fastest where
            latency is measured, else `unmeasured`.
        unmeasured: the divisor where nothing is measured.
        min_num_filters: never leave fewer.
        excluded_layers: name patterns of layers whose groups stay whole.
        by_sensitivity: set the ratios so that each group alone raises the loss by the same amount.
    """

    criterion: Literal["l1", "l2", "bn_scale", "taylor", "group_l1"] = "group_l1"
    normalizer: Literal["max", "L2"] | None = None
    equalization_criterion: Literal["union", "intersection", "arithmetic_mean", "geometric_mean"] = "union"
    pruning_ratio: Annotated[float, Interval(ge=0, lt=1)] | None = None
    pruning_threshold: Annotated[float, Ge(0)] | None = None
    target: Literal["params", "macs", "latency"] | None = None
    value: Annotated[float, Gt(0)] | str | None = None
    iterative_steps: Annotated[int, Interval(ge=1, le=1000)] = 1
    pruning_ratio_dict: Mapping[str, Annotated[float, Interval(ge=0, lt=1)]] | None = None
    max_pruning_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    global_pruning: bool = False
    isomorphic: bool = False
    round_to: Annotated[int, Interval(ge=1, le=65536)] | None = 8
    unmeasured: Annotated[int, Interval(ge=1, le=65536)] = 8
    min_num_filters: Annotated[int, Interval(ge=1, le=65536)] = 8
    excluded_layers: Sequence[str] = ()
    by_sensitivity: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: one is out of range, or they do not go together.
        """
        for option, known in (
            ("criterion", CRITERIA),
            ("normalizer", (None, *NORMALIZERS)),
            ("equalization_criterion", EQUALIZATIONS),
            ("target", (None, *TARGETS)),
        ):
            if (given := getattr(self, option)) not in known:
                names = ["null" if name is None else name for name in known]
                raise UserError(f"pruner.{option}={given}{nearest(str(given), names)}; choose {', '.join(names)}")
        ways = [w for w in ("pruning_ratio", "pruning_threshold", "target") if getattr(self, w) is not None]
        if len(ways) != 1:
            raise UserError(
                f"pruner: give one of pruning_ratio, pruning_threshold and target (the others null), not {len(ways)} of them"
            )
        if self.target is not None:
            Target.parse(self.target, self.value)
        for option, least in (("round_to", 1), ("unmeasured", 1), ("min_num_filters", 1), ("iterative_steps", 1)):
            number = getattr(self, option)
            if not (number is None and option == "round_to") and (not isinstance(number, int) or number < least):
                raise UserError(f"pruner.{option}={number}: choose a whole number, at least {least}")
        ratios = {"pruning_ratio": self.pruning_ratio or 0.0, "max_pruning_ratio": self.max_pruning_ratio}
        ratios |= {f"pruning_ratio_dict.{name}": ratio for name, ratio in (self.pruning_ratio_dict or {}).items()}
        for option, ratio in ratios.items():
            if not 0 <= ratio < 1:
                raise UserError(f"pruner.{option}={ratio}: no ratio; choose 0 to below 1 (1 would empty the layer)")
        threshold = self.pruning_threshold
        if threshold is not None and not threshold >= 0:
            raise UserError(f"pruner.pruning_threshold={threshold}: no threshold; choose 0 or more")
        if self.value is not None and self.target is None:
            raise UserError(f"pruner.value={self.value}: of what? add pruner.target=params, macs or latency")
        if threshold is not None and (self.global_pruning or self.by_sensitivity or self.iterative_steps > 1):
            raise UserError(
                "pruner.pruning_threshold decides alone: not with global_pruning, sensitivity or iterative_steps; give a "
                "pruning_ratio or a target for these"
            )
        if self.isomorphic and not self.global_pruning:
            raise UserError("pruner.isomorphic=true ranks groups together; it needs pruner.global_pruning=true")
        if self.criterion == "group_l1" and self.equalization_criterion != "union":
            raise UserError(
                f"pruner.equalization_criterion={self.equalization_criterion}: group_l1 judges tied layers as one, and "
                "they have nothing to agree on; choose another pruner.criterion"
            )
        if self.global_pruning and self.by_sensitivity:
            raise UserError("pruner.global_pruning=true and pruner.sensitivity both set the ratios; choose one")

    @property
    def divisor(self) -> int:
        """Channels kept are a multiple of this where no measurement chose another."""
        return self.round_to or self.unmeasured

    @staticmethod
    def _match(found: Sequence[Group], pattern: str) -> list[int]:
        return [n for n, g in enumerate(found) if fnmatch.filter([p.name for p in g.parts if p.outputs], pattern)]

    def _matched(self, found: Sequence[Group], patterns: Sequence[str], option: str) -> dict[str, list[int]]:
        """The groups that hold a layer of each pattern.

        Raises:
            UserError: a pattern matches nothing.
        """
        matched = {}
        for pattern in patterns:
            matched[pattern] = self._match(found, pattern)
            if not matched[pattern]:
                everything = sorted({p.name for g in found for p in g.parts if p.outputs})
                raise UserError(
                    f"pruner.{option}={pattern}: matches no layer that can be pruned{nearest(pattern, everything)}; "
                    f"there are {', '.join(everything[:6])}, ... (patterns like {everything[0].split('.')[0]}.* are allowed)"
                )
        return matched

    def plan(
        self,
        network: nn.Module,
        resolution: Resolution,
        gates: Any = None,
        curves: Curves | None = None,
        reach: Mapping[str, float] | None = None,
        round_to: int | None = None,
        whole: Mapping[str, int] | None = None,
        part: float = 1.0,
    ) -> Plan:
        """Which channels to remove.

        Args:
            network: whose channels they are.
            resolution: of the MACs.
            gates: for the criterion "taylor".
            curves: for `by_sensitivity`.
            reach: {"macs": number} or {"params": number} to get below, instead of the ratio.
            round_to: instead of the option of that name.
            whole: how many channels each group had before anything was removed, where steps are taken; ratios are of these, and
                a step may remove nothing.
            part: of the ratio, for a step on the way to it.

        Raises:
            UserError: nothing can be removed, or everything would be.
            UnreachableError: what is to be reached cannot be.
        """
        surveyed = survey(network)
        found = surveyed.groups
        if not found:
            raise UserError(nothing_to_prune(surveyed))
        others = [name for own in surveyed.left_out for name in own.layers]  # which stay whole as it is
        patterns = [p for p in self.excluded_layers if not fnmatch.filter(others, p) or self._match(found, p)]
        excluded = {n for own in self._matched(found, patterns, "excluded_layers").values() for n in own}
        ratios = self.pruning_ratio_dict or {}
        own_ratio = {
            n: ratios[pattern] * part
            for pattern, matched in self._matched(found, list(ratios), "pruning_ratio_dict").items()
            for n in matched
        }
        ranked = importance(network, found, self.criterion, self.normalizer, self.equalization_criterion, gates)
        divisor = round_to or self.divisor
        if self.by_sensitivity != (curves is not None):
            raise UserError("pruner.by_sensitivity follows from pruner.sensitivity; leave it alone and give that")
        sizes = [(whole or {}).get(group.name, group.size) for group in found]
        wanted = self._wanted(found, sizes, ranked, own_ratio, curves, excluded)

        def kept(level: float) -> list[int]:
            counts = []
            for n, (group, keep) in enumerate(zip(found, wanted(level), strict=True)):
                least = max(self.min_num_filters, math.ceil(sizes[n] * (1 - self.max_pruning_ratio) - 1e-9))
                stays = n in excluded or ranked[n] is None
                rounded = -(-max(math.ceil(keep - 1e-9), least) // divisor) * divisor
                counts.append(group.size if stays or rounded >= group.size else int(rounded))
            return counts

        if self.pruning_threshold is not None:
            level = float(self.pruning_threshold)
            self._check_threshold(ranked, level, [n for n in range(len(found)) if n not in excluded])
            counts = kept(level)
        elif reach is None:
            level = (self.pruning_ratio or 0.0) * part
            if self.by_sensitivity:
                left = [n for n in range(len(found)) if n not in excluded]
                total = sum(sizes[n] for n in left)
                level = _bisect(lambda x: sum(kept(x)[n] for n in left), total * (1 - level), *self._span(curves))
            counts = kept(level)
        else:
            costs = Costs(network, found, resolution)
            ((kind, value),) = reach.items()
            span = self._span(curves)
            least = costs(kept(span[1]))[kind]
            if least > value:
                raise UnreachableError(least)
            level = _bisect(lambda x: costs(kept(x))[kind], value, *span)
            open_to = [g.size if n not in own_ratio else k for n, (g, k) in enumerate(zip(found, kept(level), strict=True))]
            counts = _restored(kept(level), open_to, wanted(level), divisor, lambda c: costs(c)[kind], value)
        dropped = {}
        for group, values, keep in zip(found, ranked, counts, strict=True):
            if keep < group.size and values is not None:
                dropped[group.name] = sorted(torch.argsort(values, stable=True)[: group.size - keep].tolist())
        if not dropped and whole is None:
            raise UserError(self.nothing(ranked))
        return Plan(dropped, counts, ranked, found, level)

    @staticmethod
    def _span(curves: Curves | None) -> tuple[float, float]:
        if curves is None:
            return 0.0, 1.0 - 1e-6
        return 0.0, max(loss for curve in curves.values() for loss in curve.values())

    def _wanted(
        self,
        found: Sequence[Group],
        sizes: Sequence[int],
        ranked: Sequence[Tensor | None],
        own_ratio: Mapping[int, float],
        curves: Curves | None,
        excluded: Collection[int],
    ) -> Callable[[float], list[float]]:
        """The number of channels that each group keeps at a level, before it is rounded; `sizes` is before any step."""
        if self.pruning_threshold is not None:
            return lambda level: [
                s * (1 - own_ratio[n]) if n in own_ratio else float((r >= level).sum()) if r is not None else s
                for n, (s, r) in enumerate(zip(sizes, ranked, strict=True))
            ]
        if self.global_pruning:
            even = [None if r is None else r / r.mean().clamp(min=1e-30) for r in ranked]
            pools: dict[Any, list[Tensor]] = {}
            before: dict[Any, int] = {}
            keys = [group.signature() if self.isomorphic else "" for group in found]
            for n, (key, values) in enumerate(zip(keys, even, strict=True)):
                if values is not None and n not in own_ratio and n not in excluded:
                    pools.setdefault(key, []).append(values)
                    before[key] = before.get(key, 0) + sizes[n]
            sorted_pools = {key: torch.cat(values).sort().values for key, values in pools.items()}

            def of_all(level: float) -> list[float]:
                cut = {}
                for key, values in sorted_pools.items():
                    gone = len(values) - (1 - level) * before[key]  # steps before this one removed some
                    cut[key] = values[min(max(int(gone), 0), len(values) - 1)]
                return [
                    s * (1 - own_ratio[n]) if n in own_ratio else s if r is None else float((r >= cut.get(k, 0)).sum())
                    for n, (s, r, k) in enumerate(zip(sizes, even, keys, strict=True))
                ]

            return of_all
        if self.by_sensitivity:
            assert curves is not None
            return lambda level: [
                sizes[n] * (1 - own_ratio.get(n, _tolerated(curves.get(g.name, {}), level))) for n, g in enumerate(found)
            ]
        return lambda level: [s * (1 - own_ratio.get(n, level)) for n, s in enumerate(sizes)]

    def _check_threshold(self, ranked: Sequence[Tensor | None], level: float, open_groups: Sequence[int]) -> None:
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

    def nothing(self, ranked: Sequence[Tensor | None]) -> str:
        """What to say where nothing is removed."""
        if self.pruning_threshold is not None:
            values = torch.cat([r for r in ranked if r is not None])
            return (
                f"pruner.pruning_threshold={self.pruning_threshold:g}: nothing to remove with round_to={self.divisor} and "
                f"min_num_filters={self.min_num_filters}, and norms of {float(values.min()):.3g} to "
                f"{float(values.max()):.3g}; raise the threshold or lower the others"
            )
        return (
            f"pruner: nothing to remove with pruning_ratio={self.pruning_ratio}, round_to={self.divisor}, "
            f"min_num_filters={self.min_num_filters} and {len(self.excluded_layers)} excluded_layers; raise the ratio or lower "
            "the others"
        )


def nothing_to_prune(surveyed: Survey) -> str:
    """What to say of a network without a group that may be pruned."""
    why = f": left out are {surveyed.words()}" if surveyed.left_out else ""
    return f"pruner: this network has no channels that can be removed{why}; choose pruner=none"


def _bisect(measure: Callable[[float], float], value: float, low: float, high: float) -> float:
    """The least level whose measure is at most a value; the measure falls with the level."""
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
    """Give channels back, a divisor's worth at a time, as long as the cost stays below a value.

    Many groups are of one size and are rounded at the same level, so that a level alone lands far off. Those that rounding
    favoured least come first.
    """
    step = [min(divisor, size - count) for count, size in zip(counts, sizes, strict=True)]
    for n in sorted(range(len(counts)), key=lambda n: counts[n] - wanted[n]):
        if 0 < counts[n] < sizes[n]:
            more = [*counts[:n], counts[n] + step[n], *counts[n + 1 :]]
            if cost(more) <= value:
                counts = more
    return counts


def _tolerated(curve: Mapping[str, float], level: float) -> float:
    """The greatest ratio whose loss is at most a level, between the measured ones on a line; 0 where nothing is measured."""
    points = sorted((float(ratio), loss) for ratio, loss in curve.items())
    before, reached = (0.0, 0.0), 0.0
    for ratio, loss in points:
        if loss > level:
            rise = loss - before[1]
            return before[0] + (ratio - before[0]) * (level - before[1]) / rise if rise > 0 else before[0]
        before = (ratio, max(loss, 0.0))
        reached = ratio
    return reached
