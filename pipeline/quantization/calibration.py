"""Activation ranges from one pass over calibration images, in memory that does not grow with their number."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.onnx_files.execute import computed_over
from pipeline.quantization.graph import Graph
from posepress.compiled import compiled
from posepress.errors import UserError

Method = Literal["minmax", "moving_average", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

_BINS = 2048
_LEVELS = 128  # number of magnitudes of symmetric 8-bit integers
_GREATEST, _LEAST, _SUM = "posepress_greatest", "posepress_least", "posepress_sum"
_NO_IMAGES = "calibration: no images; run the stage 'sample' with more of them"
_BROKEN = "calibration: NaN or infinity in the activation '{}'; the float network itself is broken: train or export it again"
_LARGEST = np.int32(0x7F7FFFFF)  # the bits of the greatest finite float32


@compiled
def _tally(
    planes: NDArray[np.int32], counts: NDArray[np.int64], limit: float, peaks: NDArray[np.int32]
) -> tuple[float, int, int]:
    """Add magnitudes to a histogram, one plane at a time, so that a plane stays in the CPU cache.

    Floats are compared by their bits. As integers they have an equal order, and integer loops vectorise.

    Args:
        planes: bits of float32 values, [C, n].
        counts: number of magnitudes in each bin over 0..limit, [bins].
        limit: upper end of the histogram; 0 if it is empty.
        peaks: bits of the greatest magnitude of each channel so far, [C]. They are updated.

    Returns:
        The new limit, and the least and the greatest value, as ordered integers.
    """
    bins = counts.shape[0]
    parts = np.zeros((4, bins), np.int64)
    least, most = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for c in range(planes.shape[0]):
        row = planes[c]
        low, high = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
        for i in range(row.shape[0]):
            bits = row[i]
            value = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
            low = min(low, value)
            high = max(high, value)
        least = min(least, low)
        most = max(most, high)
        under = (low ^ np.int32(0x7FFFFFFF)) & np.int32(0x7FFFFFFF) if low < 0 else np.int32(0)
        peak = max(under, high)
        peaks[c] = max(peaks[c], peak)
        if peak > np.int32(0x7F7FFFFF):
            continue
        greatest = np.array([peak], np.int32).view(np.float32)[0]
        if limit == 0.0 and greatest > 0:
            limit = max(float(greatest), 1e-30)  # the inverse must be finite
        while greatest > limit > 0:
            for part in range(4):
                for k in range(bins // 2):
                    parts[part, k] = parts[part, 2 * k] + parts[part, 2 * k + 1]
                parts[part, bins // 2 :] = 0
            for k in range(bins // 2):
                counts[k] = counts[2 * k] + counts[2 * k + 1]
            counts[bins // 2 :] = 0
            limit *= 2
        scale = np.float32(bins / limit) if limit > 0 else np.float32(0)
        values = row.view(np.float32)
        last = np.int32(bins - 1)
        for i in range(values.shape[0]):  # four histograms in turns, so that a value need not wait for the previous bin
            bin_ = np.int32(abs(values[i]) * scale)
            parts[i & 3, min(last, bin_)] += 1
    for part in range(4):
        for k in range(bins):
            counts[k] += parts[part, k]
    return limit, int(least), int(most)


def _number(ordered: int) -> float:
    """The float32 of an ordered integer."""
    bits = np.int32(ordered)
    return float((bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32))


@dataclass
class Histogram:
    """The extremes of a tensor, and a histogram of its magnitudes over 0..limit. Merging bins doubles the limit.

    Attributes:
        limit: upper end of the histogram; 0 before anything was counted.
        least: the least value.
        most: the greatest value.
        mean_peak: mean over the images of each image's greatest magnitude.
        images: number of images.
        counts: number of values in each bin, [2048]; empty if only extremes are kept.
        peaks: greatest magnitude of each channel, [C].
    """

    limit: float = 0.0
    least: float = np.inf
    most: float = -np.inf
    mean_peak: float = 0.0
    images: int = 0
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))
    peaks: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count an array [B, C, ...].

        Raises:
            ValueError: a value is not finite.
        """
        flat = np.ascontiguousarray(values, np.float32)
        channels = flat.shape[1] if flat.ndim > 1 else 1
        if not len(self.peaks):
            self.peaks = np.zeros(channels, np.float32)
        for image in flat.reshape(-1, channels, flat[0].size // channels) if flat.ndim > 1 else flat.reshape(1, 1, -1):
            now = np.zeros(channels, np.int32)
            self.limit, low, high = _tally(image.view(np.int32), self.counts, self.limit, now)
            if now.max() > _LARGEST:
                raise ValueError("NaN or infinity")
            self.least, self.most = min(self.least, _number(low)), max(self.most, _number(high))
            peaks = now.view(np.float32)
            self.peaks = np.maximum(self.peaks, peaks)
            self.images += 1
            self.mean_peak += (float(peaks.max()) - self.mean_peak) / self.images

    def stretch(self, values: NDArray[np.float32]) -> None:
        """Update the extremes from an array [B, C, ...], without the histogram."""
        flat = values.reshape(*values.shape[:2], -1) if values.ndim > 1 else values.reshape(1, 1, -1)
        peaks = np.abs(flat).max(-1)
        self.peaks = np.maximum(self.peaks, peaks.max(0)) if len(self.peaks) else peaks.max(0)
        self.least, self.most = min(self.least, float(flat.min())), max(self.most, float(flat.max()))
        for peak in peaks.max(1):
            self.images += 1
            self.mean_peak += (float(peak) - self.mean_peak) / self.images

    @property
    def peak(self) -> float:
        """The greatest magnitude."""
        return max(-self.least, self.most, 0.0)

    def threshold(self, method: Method, percentile: float = 99.99) -> float:
        """The threshold: the magnitude that the greatest integer represents.

        Args:
            method: "minmax" is the greatest magnitude; "moving_average" is the mean of each image's greatest magnitude;
                "percentile" is the magnitude with this percentage of values below it; "entropy" is the one with which
                128 levels keep most information, after TensorRT's calibrator (Migacz, GTC 2017); "mse" is the one with the
                least squared error of rounding and clipping.
            percentile: percentage of the method "percentile".
        """
        peak = self.peak
        if method == "minmax" or peak == 0:
            return peak
        if method == "moving_average":
            return self.mean_peak
        if method == "percentile":
            place = np.searchsorted(np.cumsum(self.counts), percentile / 100 * self.counts.sum())
            return min(float(place + 1) / _BINS * self.limit, peak)
        if method == "entropy":
            return min(_least_divergence(self.counts) / _BINS * self.limit, peak)
        centres = (np.arange(_BINS) + 0.5) / _BINS * self.limit
        candidates = np.linspace(0.1, 1.0, 91) * peak
        steps = candidates[:, None] / (_LEVELS - 1)
        error = np.minimum(np.rint(centres / steps), _LEVELS - 1) * steps - centres
        return float(candidates[np.argmin((error**2) @ self.counts)])


@compiled
def _least_divergence(counts: NDArray[np.int64]) -> int:
    """The number of bins to keep, so that 128 levels of them have the least Kullback-Leibler divergence from all bins.

    The first bin's count is replaced by the second's. After a ReLU the first bin holds all negative values, and its peak would
    outweigh the rest.
    """
    bins = counts.shape[0]
    every = counts.astype(np.float64)
    every[0] = every[1]
    best, least = bins, np.inf
    for kept in range(128, bins + 1, 8):
        p = every[:kept].copy()
        p[kept - 1] += every[kept:].sum()
        q = np.zeros(kept)
        for level in range(128):
            first, last = level * kept // 128, (level + 1) * kept // 128
            filled = 0
            total = 0.0
            for k in range(first, last):
                filled += every[k] > 0
                total += every[k]
            for k in range(first, last):
                if every[k] > 0:
                    q[k] = total / filled
        total_p, total_q = p.sum(), q.sum()
        if total_q == 0:
            continue
        divergence = 0.0
        for k in range(kept):
            if p[k] > 0:
                q_k = q[k] / total_q
                divergence += p[k] / total_p * np.log(p[k] / total_p / (q_k if q_k > 0 else 1e-9))
        if divergence < least:
            best, least = kept, divergence
    return int(best)


def observe(
    model: onnx.ModelProto, tensors: Sequence[str], feed: Iterable[NDArray[np.float32]], histograms: bool = True
) -> dict[str, Histogram]:
    """Run a network over images, and keep the statistics that the choice of its tensors' ranges needs.

    The next image is computed while the tensors of the last one are counted.

    Args:
        model: a float network with one input.
        tensors: names of activations.
        feed: batches [B, 3, H, W].
        histograms: whether to make histograms. False keeps only the extremes of tensors and channels.

    Returns:
        A histogram for each tensor.

    Raises:
        UserError: there was no image, or a tensor is not finite.
    """
    if not histograms:
        return _extremes(model, tensors, feed)
    found = {name: Histogram() for name in tensors}

    def count(name: str, values: NDArray[np.float32]) -> None:
        try:
            found[name].add(values)
        except ValueError as error:
            raise UserError(_BROKEN.format(name)) from error

    waiting: deque[list[Future[None]]] = deque()
    seen = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        for made in computed_over(model, tensors, feed):
            seen += 1
            while waiting:  # only one image at a time may update a tensor's histogram
                for counted in waiting.popleft():
                    counted.result()
            largest = sorted(made.items(), key=lambda item: -item[1].size)
            waiting.append([pool.submit(count, name, values) for name, values in largest])
        for counting in waiting:
            for counted in counting:
                counted.result()
    if not seen:
        raise UserError(_NO_IMAGES)
    return found


def _extremes(model: onnx.ModelProto, tensors: Sequence[str], feed: Iterable[NDArray[np.float32]]) -> dict[str, Histogram]:
    """The extremes of tensors and of their channels. Extra nodes compute them, so that the network returns only small outputs.

    The least value of a tensor that cannot be negative is set to 0.
    """
    probe, sizes, signed = _reducing(model, tensors)
    ends = np.cumsum([0, *sizes.values()])
    places = {name: slice(start, end) for name, start, end in zip(sizes, ends, ends[1:], strict=False)}
    negative = np.array([place for name in signed for place in range(ends[-1])[places[name]]], np.intp)
    found = {name: Histogram(counts=np.zeros(0, np.int64)) for name in tensors}
    whole = [name for name in tensors if name not in sizes]
    least, most, mean_peaks, count = np.full(ends[-1], np.inf), np.full(ends[-1], -np.inf), np.zeros(len(sizes)), 0
    last: deque[NDArray[np.float32]] = deque(maxlen=1)

    def remembered() -> Iterator[NDArray[np.float32]]:
        for images in feed:
            last.append(images)
            yield images

    wanted = [output.name for output in probe.graph.output[len(model.graph.output) :]]
    for made in computed_over(probe, [*wanted, *whole], remembered()):
        # The maximum and the minimum ignore NaN, but the sum does not.
        if not all(np.isfinite(values).all() for values in made.values()):
            for inside in computed_over(model, tensors, last):
                broken = next((name for name in tensors if not np.isfinite(inside[name]).all()), None)
                if broken is not None:
                    raise UserError(_BROKEN.format(broken))
        for name in whole:
            found[name].stretch(made[name])
        for n in range(len(last[0]) if sizes else 0):
            high, low = made[_GREATEST][n].ravel(), np.zeros(ends[-1], np.float32)
            if signed:
                low[negative] = made[_LEAST][n].ravel()
            least, most, count = np.minimum(least, low), np.maximum(most, high), count + 1
            mean_peaks += (np.maximum.reduceat(np.maximum(-low, high), ends[:-1]) - mean_peaks) / count
    if not last:
        raise UserError(_NO_IMAGES)
    for (name, place), mean_peak in zip(places.items(), mean_peaks, strict=True):
        low, high = least[place], most[place]
        peaks = np.maximum(np.maximum(-low, high), 0).astype(np.float32)
        found[name] = Histogram(0.0, float(low.min()), float(high.max()), float(mean_peak), count, found[name].counts, peaks)
    return found


def _reducing(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, dict[str, int], list[str]]:
    """A network that also returns each channel's greatest value and sum, and the least value of those that may be negative.

    Pooling works on maps in the runtime's internal layout. A reduction would first convert all maps to the standard layout.

    Returns:
        The network, the number of channels by tensor, and the tensors that may be negative. Tensors without maps or of unknown
        sizes are not counted.
    """
    graph = Graph(model)
    values = (*model.graph.value_info, *model.graph.output, *model.graph.input)
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
    sizes = {name: shapes[name][1] for name in tensors if len(shapes.get(name, ())) == 4 and shapes[name][1]}
    signed = [name for name in sizes if (bounds := graph.bounds(name)) is None or bounds[0] < 0]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    made: dict[str, list[str]] = {_GREATEST: [], _LEAST: [], _SUM: []}

    def node(kind: str, source: str, **attributes: Any) -> str:
        probe.graph.node.append(onnx.helper.make_node(kind, [source], [f"{source}_{kind}"], **attributes))
        return f"{source}_{kind}"

    for name in sizes:
        made[_GREATEST].append(node("GlobalMaxPool", name))
        made[_SUM].append(node("GlobalAveragePool", name))
        if name in signed:
            made[_LEAST].append(node("Neg", node("GlobalMaxPool", node("Neg", name))))
    for result, parts in made.items():
        if parts:
            probe.graph.node.append(onnx.helper.make_node("Concat", parts, [result], axis=1))
            probe.graph.output.append(onnx.helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, None))
    return probe, sizes, signed


def save(found: Mapping[str, Histogram]) -> dict[str, NDArray[np.generic]]:
    """Histograms as arrays, for an .npz file."""
    arrays: dict[str, NDArray[np.generic]] = {"names": np.array(sorted(found), dtype=str)}
    for n, name in enumerate(sorted(found)):
        one = found[name]
        arrays[f"{n}.counts"], arrays[f"{n}.peaks"] = one.counts, one.peaks
        arrays[f"{n}.extremes"] = np.array([one.limit, one.least, one.most, one.mean_peak, one.images])
    return arrays


def restore(arrays: Mapping[str, NDArray[np.generic]]) -> dict[str, Histogram]:
    """The histograms from the arrays that `save` returned."""
    found = {}
    for n, name in enumerate(arrays["names"].tolist()):
        limit, least, most, mean_peak, images = (float(v) for v in arrays[f"{n}.extremes"])
        counts, peaks = np.asarray(arrays[f"{n}.counts"], np.int64), np.asarray(arrays[f"{n}.peaks"], np.float32)
        found[name] = Histogram(limit, least, most, mean_peak, int(images), counts, peaks)
    return found
