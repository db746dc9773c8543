"""Where accuracy goes, step by step, and what engines lie on the Pareto front."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.statistics import Draws, spearman
from pipeline.report.collect import Result, averaged, difference, primary
from pipeline.report.tables import ENGINE


def rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of agreement with the metric, over engines evaluated on the same images; None below four engines.

    Both are relative to the same network in FP32: agreement is by definition, and for the metric the difference is taken. An
    engine that was timed in several ways counts once. Research settings, which no engine uses, do not count.
    """
    groups: dict[Any, dict[Any, tuple[float, float]]] = {}
    for row in rows:
        lost = 0.0 if row["precision"] == "fp32" else row[f"{primary(row)}_vs_fp32"]
        agreed = row[f"agreement_{primary(row)}"]
        if "" not in (agreed, lost) and not averaged(row):
            engine = tuple(row[key] for key in ENGINE)
            groups.setdefault((row["data"], row["data_digest"], primary(row)), {})[engine] = (float(agreed), float(lost))
    group = list(max(groups.values(), key=len, default={}).values())
    if len(group) < 4:
        return None
    ours, theirs = (np.array(values, np.float64) for values in zip(*group, strict=True))
    return spearman(ours, theirs)


_STEPS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("several scales, torch", lambda a: _torch_fp32(a) and "-x" in a["keep_aspect_ratio_mode"]),
    ("one scale, torch", lambda a: _torch_fp32(a) and a["keep_aspect_ratio_mode"] in ("adjust", "stretch")),
    ("strict letterbox, torch", lambda a: _torch_fp32(a) and a["keep_aspect_ratio_mode"] == "pad"),
    ("ONNX", lambda a: _onnxruntime(a, "fp32")),
    ("FP16", lambda a: a["backend"] == "torch" and a["keep_aspect_ratio_mode"] == "pad" and a["precision"] == "fp16"),
    ("INT8", lambda a: _onnxruntime(a, "int8")),
)


def _onnxruntime(axes: Mapping[str, Any], precision: str) -> bool:
    runs = str(axes["backend"]).startswith("onnxruntime")
    return bool(runs and axes["keep_aspect_ratio_mode"] == "pad" and axes["precision"] == precision)


def _torch_fp32(axes: Mapping[str, Any]) -> bool:
    return bool(axes["backend"] == "torch" and axes["precision"] == "fp32")


def waterfalls(results: Sequence[Result]) -> dict[str, list[tuple[str, str, str]]]:
    """From research settings to the deployed engine: for each network, (step, figure, paired difference to the step before).

    A network with fewer than three measured steps is skipped, since two steps would only repeat the difference to FP32.
    """
    found = {}
    axes = ("data", "network", "pruning", "resolution", "boxes")
    networks: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        networks.setdefault(tuple(str(r.axes[axis]) for axis in axes if axis in r.axes), []).append(r)
    for key, kin in sorted(networks.items()):
        rows: list[tuple[str, str, str]] = []
        before: Result | None = None
        last = ""
        for name, wanted in _STEPS:
            # Several recipes may match. The one with the highest figure counts, since it would be shipped.
            result = max((r for r in kin if wanted(r.axes)), key=lambda r: r.figure, default=None)
            if result is None:
                continue
            draws = Draws.load(result.folder / "draws.npz")
            change = difference(result, before) if before else None
            shown = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}] to {last}" if change else ""
            recipe = " ".join(str(result.axes[key]) for key in ("keep_aspect_ratio_mode", "calibration") if result.axes[key])
            rows.append((f"{name}: {recipe}", str(draws.interval), shown))
            before, last = result, name
        if len(rows) > 2:
            found[" · ".join(key)] = rows
    return found


def front(rows: Sequence[Mapping[str, Any]], group: Sequence[int]) -> list[int]:
    """The Pareto front of a group: rows that no other row beats in both figure and latency, the fastest first."""
    timed = [n for n in group if rows[n]["latency_p50_ms"] != ""]
    best, kept = -math.inf, []
    for n in sorted(timed, key=lambda n: (rows[n]["latency_p50_ms"], -rows[n][primary(rows[n])])):
        if rows[n][primary(rows[n])] > best:
            best = rows[n][primary(rows[n])]
            kept.append(n)
    return kept
