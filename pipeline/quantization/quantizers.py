"""The precisions a network can be written in: fp32, fp16, int8."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.quantization import calibration, writers
from pipeline.specs import FLAVOURS, ModelFiles

Feed = Callable[[], Iterable[NDArray[np.float32]]]


def _write(models: Mapping[str, onnx.ModelProto], out: Path) -> None:
    for flavour, file in ModelFiles.in_folder(out).onnx.items():
        onnx.save(models[flavour], file)


@dataclass(frozen=True)
class Fp32:
    """The network as it is."""

    def quantize(self, onnx_file: Path, feed: Feed, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both flavours, which are the same."""
        model = onnx.load(onnx_file)
        _write(dict.fromkeys(FLAVOURS, model), out)
        return {"precision": "fp32"}


@dataclass(frozen=True)
class Fp16:
    """Half-precision weights and activations by casts; inputs and outputs stay float32.

    ONNX Runtime's CPU has no half-precision kernels and computes such a file in float32.
    """

    def quantize(self, onnx_file: Path, feed: Feed, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both flavours, which are the same."""
        from onnxconverter_common import float16

        model = float16.convert_float_to_float16(onnx.load(onnx_file), keep_io_types=True)
        onnx.checker.check_model(model)
        _write(dict.fromkeys(FLAVOURS, model), out)
        return {"precision": "fp16"}


@dataclass(frozen=True)
class Int8:
    """Symmetric INT8 by calibration: a scale a tensor for activations, a scale a channel for weights.

    Attributes:
        calibration_method: "minmax", "percentile" or "mse".
        percentile: for that method.
        nodes_to_exclude: names of nodes that stay in float.
    """

    calibration_method: calibration.Method = "percentile"
    percentile: float = 99.99
    nodes_to_exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an unknown method, or a percentile out of range.
        """
        if self.calibration_method not in ("minmax", "percentile", "mse"):
            raise ValueError(f"precision.calibration_method={self.calibration_method}: choose minmax, percentile or mse")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"precision.percentile={self.percentile}: choose above 50 to 100")

    def quantize(self, onnx_file: Path, feed: Feed, out: Path) -> dict[str, Any]:
        """Calibrate once, write both flavours and scales.json.

        Raises:
            ValueError: a name in `nodes_to_exclude` is no node of the network.
        """
        model = calibration.load(onnx_file)
        names = {node.name for node in model.graph.node}
        unknown = [name for name in self.nodes_to_exclude if name not in names]
        if unknown:
            raise ValueError(f"precision.nodes_to_exclude: no node named {unknown[0]} in {onnx_file.name}")
        placement = writers.place(model, self.nodes_to_exclude)
        tensors = sorted({*placement.inputs, *placement.ends, *placement.skips.values()})
        histograms = calibration.observe(model, tensors, feed())
        thresholds = {t: h.threshold(self.calibration_method, self.percentile) for t, h in histograms.items()}
        scales = writers.activation_scales(thresholds, placement)
        lows = {t: h.least for t, h in histograms.items()}
        for group in placement.shared:
            lows |= dict.fromkeys(group, min(lows[t] for t in group))
        written = {
            flavour: writers.insert(model, placement, scales, lows, flavour, self.nodes_to_exclude)  # type: ignore[arg-type]
            for flavour in FLAVOURS
        }
        _write(written, out)
        table = {
            t: {"scale": scales[t], "threshold": thresholds[t], "least": h.least, "most": h.most} for t, h in histograms.items()
        }
        (out / "scales.json").write_text(json.dumps(table, indent=1, sort_keys=True))
        return {"precision": "int8", "tensors": len(tensors), "constant": [t for t, v in thresholds.items() if v == 0]}
