"""precision=int8_qat: INT8 of a network that was retrained with its scales."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.contracts import CalibrationFeed
from pipeline.probing.probe import Probe
from pipeline.quantization import caches, half, writers
from pipeline.quantization.calibrated import SCALES, Calibrated
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import load
from pipeline.quantization.place import place
from pipeline.quantization.precisions.int8 import Int8
from pipeline.quantization.weights import LEAST_SCALE


@dataclass(frozen=True)
class Retrained:
    """INT8 of a network that was retrained with its scales. The scales are stored beside it and not calibrated again.

    Attributes:
        high_precision_dtype: "fp32" or "fp16": type of the layers that are not INT8 in TensorRT's runtime variant.
        trained_with: quantizer that calibrates the network before the stage qat retrains it.
    """

    high_precision_dtype: Literal["fp32", "fp16"] = "fp32"
    trained_with: Int8 | None = None

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            ValueError: the type is unknown.
        """
        if self.high_precision_dtype not in ("fp32", "fp16"):
            raise ValueError(f"precision.high_precision_dtype={self.high_precision_dtype}: choose fp32, fp16")
        if self.trained_with is not None:
            object.__setattr__(self, "trained_with", replace(self.trained_with, _where="precision.trained_with"))

    @staticmethod
    def settled(options: Mapping[str, Any], setting: Mapping[str, str]) -> dict[str, Any]:
        """The settings that `trained_with` chooses itself."""
        return {"trained_with": Int8.settled(options["trained_with"], setting)} if options.get("trained_with") else {}

    @staticmethod
    def label_of(options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the steps of training, and INT8's options that differ from the defaults.

        Bias correction is not among them, because biases are trained instead.
        """
        given = options.get("trained_with") or {}
        words = Int8.words({**given, **Int8.settled(given, setting), "bias_correction": True, "weight_scale": "max"})
        return f"qat{setting['qat_steps']}-{words}-{setting['sampler']}"

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both runtime variants and scales.json."""
        content = json.loads((onnx_file.parent / SCALES).read_text())
        rows = content["tensors"]
        model = load(onnx_file)
        in_half = self.high_precision_dtype == "fp16"
        placement = place(model, content["excluded"])
        thresholds = caches.thresholds(rows)
        lows = {name: float(row["least"]) for name, row in rows.items()}
        found = {name: Histogram(least=row["least"], most=row["most"]) for name, row in rows.items()}
        least = half.LEAST_NORMAL if in_half else LEAST_SCALE
        scales = {
            flavour: writers.Scales.of(some, lows, placement, most_weight=content["most_weight"], least=least)
            for flavour, some in thresholds.items()
        }
        kept = half.Kept(half.out_of_range(model, found)) if in_half else None
        made = Calibrated(model, placement, scales, {}, thresholds, found, content["key"], {"channels": 0, "tensors": 0}, kept)
        candidate = made.written()
        candidate.write(out)
        made.save(out)
        return {"precision": "int8", **made.summary(), **Probe.summary(probe, candidate)}
