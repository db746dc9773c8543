"""Activation ranges from one pass over calibration images, in memory that does not grow with their number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from evaluation.compiled import compiled
from pipeline.errors import UserError

Method = Literal["minmax", "percentile", "mse"]

_BINS = 2048


@compiled
def _count(values: NDArray[np.float32], scale: float, counts: NDArray[np.int64]) -> None:
    """Add |values| * scale to a histogram of unit bins."""
    last = counts.shape[0] - 1
    for i in range(values.shape[0]):
        bin_ = int(abs(values[i]) * scale)
        counts[min(bin_, last)] += 1


@dataclass
class Histogram:
    """A histogram of magnitudes over 0..limit whose limit doubles by merging pairs of bins."""

    limit: float = 0.0
    least: float = np.inf
    most: float = -np.inf
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count an array of any shape.

        Raises:
            ValueError: a value is not finite.
        """
        flat = np.ascontiguousarray(values, np.float32).ravel()
        low, high = float(flat.min()), float(flat.max())
        if not np.isfinite(low + high):
            raise ValueError("NaN or infinity")
        self.least, self.most = min(self.least, low), max(self.most, high)
        peak = max(-low, high)
        if self.limit == 0.0:
            self.limit = peak
        while peak > self.limit > 0:
            self.counts = np.concatenate((self.counts.reshape(-1, 2).sum(axis=1), np.zeros(_BINS // 2, np.int64)))
            self.limit *= 2
        _count(flat, _BINS / self.limit if self.limit else 0.0, self.counts)

    def threshold(self, method: Method, percentile: float = 99.99) -> float:
        """The magnitude that the greatest integer stands for.

        Args:
            method: "minmax" the greatest magnitude seen; "percentile" the one that so many per cent lie below; "mse" the
                one with the least squared error of rounding and clipping to 127 steps.
            percentile: for that method.
        """
        peak = max(-self.least, self.most, 0.0)
        if method == "minmax" or peak == 0:
            return peak
        if method == "percentile":
            place = np.searchsorted(np.cumsum(self.counts), percentile / 100 * self.counts.sum())
            return min(float(place + 1) / _BINS * self.limit, peak)
        centres = (np.arange(_BINS) + 0.5) / _BINS * self.limit
        candidates = np.linspace(0.1, 1.0, 91) * peak
        steps = candidates[:, None] / 127
        error = np.minimum(np.rint(centres / steps), 127) * steps - centres
        return float(candidates[np.argmin((error**2) @ self.counts)])


def observe(model: onnx.ModelProto, tensors: Sequence[str], feed: Iterable[NDArray[np.float32]]) -> dict[str, Histogram]:
    """Run a network over images and histogram some of its tensors.

    Args:
        model: a float network with one input.
        tensors: names of activations.
        feed: batches [B, 3, H, W].

    Returns:
        A histogram for each tensor.

    Raises:
        UserError: there was no image, or a tensor is not finite.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    name = probe.graph.input[0].name
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(t, onnx.TensorProto.FLOAT, None) for t in tensors if t not in present and t != name
    )
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = [t for t in tensors if t != name]
    histograms = {t: Histogram() for t in tensors}
    seen = 0
    for images in feed:
        seen += len(images)
        if name in histograms:
            histograms[name].add(images)
        for tensor, values in zip(wanted, session.run(wanted, {name: images}), strict=True):
            try:
                histograms[tensor].add(values)
            except ValueError as error:
                raise UserError(
                    f"calibration: {error} in the activation '{tensor}'; the network is broken before quantization"
                ) from error
    if not seen:
        raise UserError("calibration: no images; run the stage 'sample' with more of them")
    return histograms


def load(file: Path) -> onnx.ModelProto:
    """Read an ONNX file with the shapes of its tensors inferred."""
    return onnx.shape_inference.infer_shapes(onnx.load(file))
