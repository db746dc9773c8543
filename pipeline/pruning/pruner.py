"""The options of pruning: a ratio, a threshold, sensitivity or a target. `pipeline.pruning.plan` applies them."""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Interval

from posepress.errors import UserError, nearest

Criterion = Literal["l1", "l2", "bn_scale", "taylor", "group_l1"]
Normalizer = Literal["max", "L2"]
Equalization = Literal["union", "intersection", "arithmetic_mean", "geometric_mean"]
TARGETS = ("params", "macs", "latency")
_USUAL_RATIO = 0.45
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Target:
    """The size or latency that pruning must reach.

    Attributes:
        kind: "params", "macs" or "latency".
        value: a fraction of the dense network's value, or a number of parameters, MACs or milliseconds.
        relative: whether `value` is a fraction.
    """

    kind: str
    value: float
    relative: bool

    @classmethod
    def parse(cls, kind: str, text: Any) -> "Target":
        """Read "0.5x", "2.0ms", "1.2M" or "3G".

        Raises:
            UserError: the text has another form, or does not fit the kind.
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
                f"pruner.value={text}: not a target for {kind}; give a part of the dense network below 1, like 0.5x, "
                f"or a value, like {example}"
            )
        return cls(kind, amount * _UNITS.get(match[2], 1.0), match[2] == "x")

    def of(self, dense: float) -> float:
        """The value to reach, if that of the dense network is `dense`."""
        return self.value * dense if self.relative else self.value

    def words(self, value: float, dense: float) -> str:
        """A value in the form of the user's target. It is rounded up, so that it can be reached."""
        if self.relative:
            return f"{_up(value / dense, 3)}x"
        return f"{_up(value, 3)}ms" if self.kind == "latency" else _up(value, 4)


def _up(value: float, digits: int) -> str:
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return f"{math.ceil(value / unit - 1e-9) * unit:.{digits}g}"


@dataclass(frozen=True)
class Pruner:
    """Removes the least important channels.

    Attributes:
        criterion: importance of a channel: l1, l2, bn_scale, taylor or group_l1; see `pipeline.pruning.criteria`.
        normalizer: max or L2 divides the norms of each layer by their maximum or L2 norm, as in TAO. None: no division.
        equalization_criterion: how to combine the norms of tied layers: union, intersection, arithmetic_mean or
            geometric_mean, as in TAO.
        pruning_ratio: fraction of the channels to remove, 0 to below 1. Give one of this, `pruning_threshold` and `target`.
        pruning_threshold: remove channels with a normalised importance below this value, like TAO's `-pth`. With
            `normalizer` no importance exceeds 1, so a greater threshold would remove everything and is refused.
        target: what to reach instead of a ratio: params, macs or latency.
        value: value of the target: "0.5x" of the dense network, "1.2M" parameters, "3G" MACs or "2.0ms".
        iterative_steps: number of pruning steps. A short training follows each step except the last.
        pruning_ratio_dict: ratios by name pattern of layers. Groups with a matching layer use them instead of `pruning_ratio`.
        max_pruning_ratio: largest fraction of a group's channels that may be removed.
        global_pruning: rank the channels of all groups together, each group's importance divided by its mean.
        isomorphic: rank together only groups of the same structure (arXiv:2407.04616).
        round_to: the number of kept channels is a multiple of this. None: the fastest divisor if latency is measured,
            otherwise `unmeasured`.
        pruning_granularity: TAO's name of `round_to`.
        unmeasured: divisor used if latency is not measured. None: 8; in a configuration, 16, or 32 for INT8 on TensorRT.
        min_num_filters: smallest number of channels that a group keeps.
        excluded_layers: name patterns of layers. Their groups are not pruned.
        sensitivity: let the stage `sensitivity` set the ratios, so that each group alone raises the loss by an equal amount.
    """

    criterion: Criterion = "group_l1"
    normalizer: Normalizer | None = None
    equalization_criterion: Equalization = "union"
    pruning_ratio: Annotated[float, Interval(ge=0, lt=1)] | None = None
    pruning_threshold: Annotated[float, Ge(0)] | None = None
    target: Literal["params", "macs", "latency"] | None = None
    value: Annotated[float, Gt(0)] | str | None = None
    iterative_steps: Annotated[int, Interval(ge=1, le=1000)] = 1
    pruning_ratio_dict: Mapping[str, Annotated[float, Interval(ge=0, lt=1)]] | None = None
    max_pruning_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    global_pruning: bool = False
    isomorphic: bool = False
    round_to: Annotated[int, Interval(ge=1, le=65536)] | None = None
    pruning_granularity: Annotated[int, Interval(ge=1, le=65536)] | None = None
    unmeasured: Annotated[int, Interval(ge=1, le=65536)] | None = None
    min_num_filters: Annotated[int, Interval(ge=1, le=65536)] = 8
    excluded_layers: Sequence[str] = ()
    sensitivity: Literal["sensitivity"] | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: an option is out of range, or two options contradict each other.
        """
        for option, known in (
            ("criterion", get_args(Criterion)),
            ("normalizer", (None, *get_args(Normalizer))),
            ("equalization_criterion", get_args(Equalization)),
            ("target", (None, *TARGETS)),
        ):
            if (given := getattr(self, option)) not in known:
                names = ["null" if name is None else name for name in known]
                raise UserError(f"pruner.{option}={given}{nearest(str(given), names)}; choose {', '.join(names)}")
        self._check_numbers()
        self._check_together()

    def _check_together(self) -> None:
        """Check options that exclude or need each other."""
        ways = [w for w in ("pruning_ratio", "pruning_threshold", "target") if getattr(self, w) is not None]
        if len(ways) != 1:
            raise UserError(
                f"pruner: give one of pruning_ratio, pruning_threshold and target (the others null), not {len(ways)} of them"
            )
        if self.value is not None and self.target is None:
            raise UserError(f"pruner.value={self.value}: the kind is missing; add pruner.target=params, macs or latency")
        if self.target is not None:
            Target.parse(self.target, self.value)
        if self.pruning_threshold is not None and (self.global_pruning or self.sensitivity or self.iterative_steps > 1):
            raise UserError(
                "pruner.pruning_threshold decides alone: not with global_pruning, sensitivity or iterative_steps; give a "
                "pruning_ratio or a target for these"
            )
        if self.isomorphic and not self.global_pruning:
            raise UserError("pruner.isomorphic=true ranks groups together; it needs pruner.global_pruning=true")
        if self.criterion == "group_l1" and self.equalization_criterion != "union":
            raise UserError(
                f"pruner.equalization_criterion={self.equalization_criterion}: group_l1 judges tied layers as one, so that "
                "this option has no effect; choose another pruner.criterion"
            )
        if self.global_pruning and self.sensitivity:
            raise UserError("pruner.global_pruning=true and pruner.sensitivity both set the ratios; choose one")

    def _check_numbers(self) -> None:
        """Check the range of each number."""
        optional = ("round_to", "pruning_granularity", "unmeasured")
        for option in (*optional, "min_num_filters", "iterative_steps"):
            number = getattr(self, option)
            if (number is not None or option not in optional) and (not isinstance(number, int) or number < 1):
                raise UserError(f"pruner.{option}={number}: choose a whole number, at least 1")
        ratios = {"pruning_ratio": self.pruning_ratio or 0.0, "max_pruning_ratio": self.max_pruning_ratio}
        ratios |= {f"pruning_ratio_dict.{name}": ratio for name, ratio in (self.pruning_ratio_dict or {}).items()}
        for option, ratio in ratios.items():
            if not 0 <= ratio < 1:
                raise UserError(f"pruner.{option}={ratio}: not a ratio; choose 0 to below 1 (1 would empty the layer)")
        if self.pruning_threshold is not None and not self.pruning_threshold >= 0:
            raise UserError(f"pruner.pruning_threshold={self.pruning_threshold}: not a threshold; choose 0 or more")

    @property
    def multiple(self) -> int | None:
        """The given divisor of channel counts; None if it was not given."""
        return self.round_to or self.pruning_granularity

    @property
    def divisor(self) -> int:
        """The divisor of channel counts that is used unless a measurement chose another."""
        return self.multiple or self.unmeasured or 8

    @staticmethod
    def measures(options: Mapping[str, Any]) -> bool:
        """Whether steps are measured on this machine: to reach a target, or between trainings."""
        return options.get("target") is not None or options.get("iterative_steps", 1) > 1

    @staticmethod
    def trains(options: Mapping[str, Any]) -> bool:
        """Whether the network is trained between steps."""
        return bool(options.get("iterative_steps", 1) > 1)

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """The default ratio if no way is given, and the default divisor if nothing is measured.

        The divisor comes from NVIDIA's documentation of tensor cores. It has a fixed value if it is not used, so that equal
        prunings have one address.
        """
        values: dict[str, Any] = {}
        if all(options.get(way) is None for way in ("pruning_ratio", "pruning_threshold", "target")):
            values["pruning_ratio"] = _USUAL_RATIO
        if options.get("unmeasured") is None:
            given = [options.get(option) for option in ("round_to", "pruning_granularity")]
            asked = any(given) or options.get("target") == "latency"
            int8 = setting["backend"].startswith("tensorrt") and setting["precision"].startswith("int8")
            values["unmeasured"] = 32 if int8 and not asked else 16
        return values

    @classmethod
    def label_of(cls, options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix of a pruning. A pruning that measures latency includes the backend and device."""
        usual = {field.name: field.default for field in fields(cls)}
        given = {**usual, **options}
        ways = {"": given["pruning_ratio"], "th": given["pruning_threshold"], f"{given['target']}-": given["value"]}
        criterion = str(given["criterion"])
        words = [{"group_l1": "l1", "l1": "own.l1"}.get(criterion, criterion.replace("_", "."))]
        words += [f"{way}{value}" for way, value in ways.items() if value is not None]
        for option in ("normalizer", "equalization_criterion", "max_pruning_ratio", "min_num_filters"):
            words += [f"{option[:3]}.{given[option]}"] if given[option] != usual[option] else []
        words += [f"own.{digest_in_label(given['pruning_ratio_dict'])}"] if given["pruning_ratio_dict"] else []
        words += [f"ex.{digest_in_label(given['excluded_layers'])}"] if given["excluded_layers"] else []
        words += [f"n{given['iterative_steps']}"] if given["iterative_steps"] > 1 else []
        words += ["isomorphic"] if given["isomorphic"] else ["global"] if given["global_pruning"] else []
        words += ["sensitivity"] if given["sensitivity"] is not None else []
        round_to = given["round_to"] if given["round_to"] is not None else given["pruning_granularity"]
        if round_to is None and given["target"] is None:
            words.append(f"r{given['unmeasured']}")
        else:
            otherwise = "" if given["unmeasured"] == 16 else f".{given['unmeasured']}"
            words.append(f"rauto{otherwise}" if round_to is None else f"r{round_to}")
        if cls.measures(given):
            words.append("-".join([*(setting[key] for key in ("backend", "resolution", "framing")), f"t{setting['threads']}"]))
        return "-".join(words)


def digest_in_label(option: Any) -> str:
    """Six letters that stand for an option too long for a label."""
    return hashlib.sha256(json.dumps(option, sort_keys=True).encode()).hexdigest()[:6]
