"""A float network with the scales that it is written with."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.onnx_files.files import FLAVOURS
from pipeline.probing.candidate import Candidate
from pipeline.quantization import alignment, caches, equalization, half, writers
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import Graph, output_axis
from pipeline.quantization.place import Placement, place

SCALES, STEPS, FLOAT, TENSORRT_CACHE = "scales.json", "steps.json", "float.onnx", "calibration.cache"

MARK, MARKED = "posepress.network.", 16  # name and length of the network's digest, an extra line of our TensorRT caches


@dataclass(frozen=True)
class Calibrated:
    """An equalized float network, and the scales for quantizing it.

    Attributes:
        model: the network.
        placement: the tensors that are quantized.
        scales: for each runtime variant, the steps between integers.
        shifts: for each runtime variant, the bias corrections [O] of the quantized convolutions.
        thresholds: for each runtime variant, the thresholds of the scales, before tensors shared them.
        found: range and histogram of each tensor.
        key: digests of network, images, preprocessing and program that these scales depend on.
        rescaled: numbers of channels and tensors that were equalized.
        kept: nodes that stay in FP32 if TensorRT's variant computes the other floats in half precision; else None.
        tried: for each runtime variant, the error of the fields by calibration method, if several were tried.
        source: origin of the thresholds.
        left_out: for each layer that was not equalized, the reason.
    """

    model: onnx.ModelProto
    placement: Placement
    scales: Mapping[str, writers.Scales]
    shifts: Mapping[str, Mapping[str, NDArray[np.float64]]]
    thresholds: Mapping[str, Mapping[str, float]]
    found: Mapping[str, Histogram]
    key: Mapping[str, str]
    rescaled: Mapping[str, int]
    kept: half.Kept | None
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = "the calibration images"
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def most_weight(self) -> int:
        """The greatest integer of a weight."""
        return self.scales[FLAVOURS[0]].most_weight

    def as_in(self, flavour: str) -> "Calibrated":
        """A copy with the scales of one runtime variant in both."""
        scales, thresholds = self.scales[flavour], self.thresholds[flavour]
        tried = {flavour: self.tried[flavour]} if self.tried else {}
        both, ends = dict.fromkeys(FLAVOURS, scales), dict.fromkeys(FLAVOURS, thresholds)
        return replace(self, scales=both, thresholds=ends, tried=tried)

    def written(self, placement: Placement | None = None) -> Candidate:
        """Both runtime variants. A `placement` with fewer nodes leaves the others in float."""
        chosen = placement or self.placement
        made = {}
        for flavour in FLAVOURS:
            held = chosen.slow if flavour == "onnxruntime" else frozenset()
            rounded = {node.name for node in chosen.quantized(self.model)} - held
            shifts = self.shifts.get(flavour, {})
            model = equalization.corrected(self.model, {n: shift for n, shift in shifts.items() if n in rounded})
            if flavour == "onnxruntime":
                model, _ = alignment.align(model)
            made[flavour] = writers.insert(model, chosen, self.scales[flavour], flavour)
        if self.kept is not None:
            made["tensorrt"] = half.convert(made["tensorrt"], self.kept.nodes)
        return Candidate(made)

    def without(self, names: set[str]) -> Candidate:
        """Both runtime variants, with further nodes in float."""
        return self.written(place(self.model, self.placement.excluded | names))

    def rows(self) -> dict[str, dict[str, Any]]:
        """Scales, thresholds and ranges, by tensor."""
        return {
            name: {
                "scale": {flavour: scales.activations[name] for flavour, scales in self.scales.items()},
                "threshold": {flavour: thresholds[name] for flavour, thresholds in self.thresholds.items()},
                "least": one.least,
                "most": one.most,
            }
            for name, one in sorted(self.found.items())
        }

    def save(self, out: Path) -> None:
        """Write scales.json, TensorRT 10's calibration cache, and the float network that both belong to."""
        caches.write_scales(out / SCALES, self.key, self.rows(), sorted(self.placement.excluded), self.most_weight)
        mark = {f"{MARK}{caches.network_digest(self.model)[:MARKED]}": 1.0}
        caches.write_tensorrt(out / TENSORRT_CACHE, {**self.scales["tensorrt"].activations, **mark})
        onnx.save(equalization.corrected(self.model, self.shifts.get("tensorrt", {})), out / FLOAT)

    def summary(self) -> dict[str, Any]:
        """The manifest's entry on the calibration."""
        graph = Graph(self.model)
        convolutions = self.placement.quantized(self.model)
        empty = sum(
            int((~w.any(axis=tuple(axis for axis in range(w.ndim) if axis != output_axis(n)))).sum())
            for n in convolutions
            if (w := graph.weights(n)) is not None
        )
        return {
            "tensors": len(self.found),
            "scales_from": self.source,
            **(
                {
                    "calibration_method": {name: min(errors, key=errors.__getitem__) for name, errors in self.tried.items()},
                    "tried": {name: dict(errors) for name, errors in self.tried.items()},
                }
                if self.tried
                else {}
            ),
            "constant": [name for name, threshold in self.thresholds["tensorrt"].items() if threshold == 0],
            "clamped_scales": len(self.scales["tensorrt"].clamped),
            "zero_weight_channels": empty,
            "equalized_channels": self.rescaled["channels"],
            "equalized_tensors": self.rescaled["tensors"],
            "equalization_left_out": {n.name: self.left_out[n.name] for n in convolutions if n.name in self.left_out},
            "int8_layers": len(convolutions),
            "float_layers": sorted(self.placement.excluded),
            **({} if self.kept is None else self.kept.report()),
            "weight_bits": 8 if self.most_weight == 127 else 7,
        }
