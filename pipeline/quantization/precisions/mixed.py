"""Mixed precision: choose the layers that stay in float, by their gain in accuracy and their cost in time on the backend."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Gt, Interval, doc

from evaluation.statistics import spearman
from pipeline.contracts import CalibrationFeed
from pipeline.probing.probe import Probe, of_all_fields
from pipeline.progress import track
from pipeline.quantization.calibrated import Calibrated
from pipeline.quantization.place import place
from pipeline.quantization.precisions.int8 import Int8
from posepress.errors import UserError

SENSITIVITY = "sensitivity.json"


@dataclass(frozen=True)
class Unit:
    """Neighbouring convolutions that share a precision.

    Attributes:
        nodes: names of the convolutions.
        error: error of the fields if only this unit is in float.
        gain: reduction of the squared error if only this unit is in float.
        cost: milliseconds that this unit adds in float.
    """

    nodes: tuple[str, ...]
    error: float
    gain: float
    cost: float


@dataclass(frozen=True)
class Mixed:
    """INT8 if it costs no accuracy, float elsewhere.

    Each unit of neighbouring convolutions is tried in float while all others are INT8. Units are ranked by the removed error
    of the fields divided by the added milliseconds. A finalist has the first units of this ranking in float. Finalists are
    built and measured as whole engines, because neither errors nor milliseconds add up.

    Attributes:
        int8: quantizer of the INT8 layers.
        max_drop: largest accepted drop of the primary metric on the tune images, as a fraction of 1. A candidate is rejected
            if the lower end of its paired 95 % interval drops more; without agreement, if the drop itself is larger.
        min_agreement: smallest accepted agreement with FP32's predictions on the tune images, fitted as a monotone function
            of the fields' error.
        max_latency: largest latency, in milliseconds or as "0.6x" of FP32's. The candidate with the least error within it is
            chosen, regardless of its drop.
        units: largest number of units.
        finalists: number of finalists.
        seconds: longest time of timing one set of engines, in seconds.
    """

    int8: Int8 = field(default_factory=Int8)
    max_drop: Annotated[float, Interval(ge=0, le=1)] = 0.002
    min_agreement: Annotated[float, Interval(ge=0, le=1)] = 0.95
    max_latency: Annotated[float, Gt(0)] | Annotated[str, doc("a fraction of FP32's, like 0.6x")] | None = None
    units: Annotated[int, Interval(ge=1, le=1000)] = 32
    finalists: Annotated[int, Interval(ge=2, le=1000)] = 10
    seconds: Annotated[float, Interval(gt=0, le=86400)] = 20.0
    judged: ClassVar[bool] = True  # candidates are compared by their decoded predictions, not only by their fields

    @staticmethod
    def measures(_: Mapping[str, Any]) -> bool:
        """Whether candidates are timed: always, so that the result holds only for this machine."""
        return True

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """The settings that INT8 chooses itself."""
        return {"int8": Int8.settled(options["int8"], setting)} if "int8" in options else {}

    @classmethod
    def label_of(cls, options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the budget, INT8's options, and the backend and device for which it holds."""
        given = {**{option.name: option.default for option in fields(cls)}, "int8": {}, **options}
        int8 = {**given["int8"], **cls.settled(options, setting).get("int8", {})}
        latency = "" if given["max_latency"] is None else f"-t{given['max_latency']}"
        budget = f"d{given['max_drop']}-a{given['min_agreement']}{latency}"
        return f"{budget}-{Int8.label_of(int8, setting)}-{setting['backend']}-t{setting['threads']}"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range.
        """
        object.__setattr__(self, "int8", replace(self.int8, _where="precision.int8"))
        for option in ("max_drop", "min_agreement", "seconds"):
            if not isinstance(getattr(self, option), (int, float)):
                raise ValueError(f"precision.{option}={getattr(self, option)}: choose a number")  # noqa: TRY004
        for option in ("units", "finalists"):
            if not isinstance(getattr(self, option), int):
                raise ValueError(f"precision.{option}={getattr(self, option)}: choose a whole number")  # noqa: TRY004
        if not self.seconds > 0:
            raise ValueError(f"precision.seconds={self.seconds}: choose more than 0")
        if not 0 <= self.max_drop <= 1:
            raise ValueError(f"precision.max_drop={self.max_drop}: choose 0 to 1, a part of the figure (0.002 is .2 points)")
        if not 0 <= self.min_agreement <= 1:
            raise ValueError(f"precision.min_agreement={self.min_agreement}: choose 0 to 1")
        if self.units < 1 or self.finalists < 2:
            raise ValueError(f"precision.units={self.units}, precision.finalists={self.finalists}: choose at least 1 and 2")
        try:
            limit = None if self.max_latency is None else float(str(self.max_latency).removesuffix("x"))
        except ValueError:
            limit = -1.0
        if limit is not None and not 0 < limit < math.inf:
            raise ValueError(f"precision.max_latency={self.max_latency}: choose milliseconds, or 0.6x for a part of FP32's")

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:
        """Calibrate, measure and choose, then write both runtime variants, scales.json and sensitivity.json.

        Raises:
            UserError: no candidate is within the limits, or `Int8.quantize` fails.
        """
        assert feed is not None
        assert probe is not None
        calibrated = self.int8.calibrate(onnx_file, feed)
        timed = probe.backend.timeable
        units, whole = self._sensitivity(calibrated, probe)
        order = sorted(range(len(units)), key=lambda n: -units[n].gain / max(units[n].cost, 1e-3 * whole["ms"]))
        counts = sorted({0, *np.geomspace(1, len(units), self.finalists - 1).round().astype(int).tolist()})
        candidates = [calibrated.without({name for n in order[:count] for name in units[n].nodes}) for count in counts]
        times = probe.latencies([probe.fp32, *candidates], self.seconds) if timed else [1.0] * (1 + len(candidates))
        rows = []
        for count, candidate, ms in zip(
            counts, track(candidates, "measuring finalists", unit="engines"), times[1:], strict=True
        ):
            error = of_all_fields(probe.errors(candidate))
            rows.append({"float_units": count, "ms": ms, "error": error, **probe.figures(candidate)})
        _smooth(rows)
        chosen = self._choose(rows, times[0], timed)
        kept = {name for n in order[: rows[chosen]["float_units"]] for name in units[n].nodes}
        candidates[chosen].write(out)
        solved = replace(calibrated, placement=place(calibrated.model, calibrated.placement.excluded | kept))
        solved.save(out)
        content = {
            "backend": probe.backend.name,
            "timed": timed,
            "fp32_ms": times[0],
            "int8": whole,
            "units": [unit.__dict__ for unit in units],
            "order": order,
            "finalists": rows,
            "chosen": chosen,
            "rank_correlation": _correlations(rows),
            "layers": _layers(calibrated, kept | (calibrated.placement.slow if probe.backend.kind == "onnxruntime" else set())),
        }
        (out / SENSITIVITY).write_text(json.dumps(content, indent=1))
        return {
            "precision": "mixed",
            **solved.summary(),
            "budget_solved_on": probe.backend.name,
            "float_units": rows[chosen]["float_units"],
            "units": len(units),
            "float_convolutions": len(kept),
            "missed": self._missed(rows[chosen]),
            **{f"tune_{key}": value for key, value in rows[chosen].items() if key != "float_units"},
        }

    def _sensitivity(self, calibrated: Calibrated, probe: Probe) -> tuple[list[Unit], dict[str, float]]:
        """Measure each unit alone in float, and the network with all layers in INT8."""
        names = [node.name for node in calibrated.placement.quantized(calibrated.model)]
        groups = [tuple(part.tolist()) for part in np.array_split(np.array(names, object), min(self.units, len(names)))]
        everything = calibrated.written()
        error = of_all_fields(probe.errors(everything))
        timed = probe.backend.timeable
        ms = probe.latencies([probe.fp32, everything], self.seconds / 4)[1] if timed else 1.0
        units = []
        for group in track(groups, "measuring sensitivity", unit="groups of layers"):
            candidate = calibrated.without(set(group))
            left = of_all_fields(probe.errors(candidate))
            cost = 1.0
            if timed:
                before, after = probe.latencies([everything, candidate], self.seconds / 20)
                cost = after - before
            units.append(Unit(group, left, error**2 - left**2, cost))
        return units, {"error": error, "ms": ms}

    def _choose(self, rows: Sequence[Mapping[str, Any]], fp32: float, timed: bool) -> int:
        """The index of the best finalist.

        Raises:
            UserError: no finalist is within the limits.
        """
        if self.max_latency is not None:
            text = str(self.max_latency)
            limit = float(text.removesuffix("x")) * (fp32 if text.endswith("x") else 1)
            fast = [n for n, row in enumerate(rows) if row["ms"] <= limit]
            if not fast:
                least = min(row["ms"] for row in rows)
                raise UserError(
                    f"precision.max_latency={text}: the fastest choice takes {least:.3g} ms ({least / fp32:.3g}x of FP32); "
                    "allow that, or a smaller resolution"
                )
            return min(fast, key=lambda n: rows[n]["error"])
        good = [
            n
            for n, row in enumerate(rows)
            if row["drop_lo" if "expected_agreement" in row else "drop"] <= self.max_drop
            and row.get("expected_agreement", 1.0) >= self.min_agreement
        ]
        if not good:
            best = min(rows, key=lambda row: row["error"])
            raise UserError(
                f"precision.max_drop={self.max_drop}, precision.min_agreement={self.min_agreement}: no choice of layers keeps "
                f"to both; the nearest loses {best['drop']:.4f} and agrees to "
                f"{best.get('expected_agreement', 1.0):.3f}: allow that, or give more tune images"
            )
        return min(good, key=lambda n: rows[n]["ms" if timed else "float_units"])

    def _missed(self, row: Mapping[str, Any]) -> list[str]:
        """The limits that the choice exceeds. A given latency has precedence over the other limits."""
        said = []
        if row["drop"] > self.max_drop:
            ends = f", {row['drop_lo']:.4f} to {row['drop_hi']:.4f}" if "drop_hi" in row else ""
            word = "not kept" if row["drop_lo"] > self.max_drop else "not shown to be kept"
            said.append(f"max_drop={self.max_drop:g} is {word}: the tune images lose {row['drop']:.4f}{ends}")
        if (agreed := row.get("expected_agreement", 1.0)) < self.min_agreement:
            said.append(f"min_agreement={self.min_agreement:g} is not kept: the choice agrees to {agreed:.3f} with FP32")
        hint = f" within max_latency={self.max_latency}" if self.max_latency is not None else ""
        return [f"precision.{words}{hint}" for words in said]


def _smooth(rows: list[dict[str, Any]]) -> None:
    """Add the expected agreement: the monotone function of the fields' error that fits the finalists best.

    On a few dozen images the agreement is noisy, but the error of the fields is not.
    """
    if all("agreement" in row for row in rows):
        order = np.argsort([row["error"] for row in rows], kind="stable")
        from scipy.optimize import isotonic_regression

        fitted = isotonic_regression(np.array([rows[n]["agreement"] for n in order]), increasing=False).x
        for n, value in zip(order, fitted, strict=True):
            rows[n]["expected_agreement"] = float(value)


def _correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Spearman's rank correlations of the fields' error with the drop of the metric and with the loss of agreement."""
    errors = np.array([row["error"] for row in rows])
    found: dict[str, float | None] = {"drop": spearman(errors, np.array([row["drop"] for row in rows]))}
    if all("agreement" in row for row in rows):
        found["agreement"] = spearman(errors, -np.array([row["agreement"] for row in rows]))
    return found


def _layers(calibrated: Calibrated, kept: set[str]) -> list[dict[str, Any]]:
    """The precision of every convolution, in order."""
    chosen = {node.name for node in calibrated.placement.quantized(calibrated.model)} - kept
    return [
        {"name": node.name, "op": node.op_type, "precision": "int8" if node.name in chosen else "float"}
        for node in calibrated.model.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    ]
