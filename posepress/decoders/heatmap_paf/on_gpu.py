"""Peaks and limb scores of heatmaps and PAFs in torch, for fields in the memory of a GPU.

The formulas are those of `peaks` and `limbs`, but all peaks of a map and all pairs of peaks are computed at once. The
grouping stays on the CPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from posepress.compiled import compiled
from posepress.decoders.heatmap_paf.candidates import Candidates
from posepress.decoders.heatmap_paf.limbs import MOST_MISSES, SAMPLES

TOP = 32  # largest number of peaks kept in a map; the CPU decodes an image with more
OFTEN = 20  # batches of one shape after which the functions are fused, which takes some seconds
_MOST_COMPILED = 4  # largest number of shapes for which the functions are fused
_compiling = Lock()  # torch's compiler serves one thread at a time
_seen: Counter[tuple[float, ...]] = Counter()


def _offset(before: Tensor, centre: Tensor, after: Tensor) -> Tensor:
    """See `peaks.log_parabola`."""
    a, b = (torch.log(torch.clamp(side, min=1e-3) / centre) for side in (before, after))
    curvature = a + b
    top = (0.5 * (a - b) / torch.where(curvature < -1e-6, curvature, -1.0)).clamp(-0.5, 0.5)
    return torch.where(curvature < -1e-6, top, 0.0)


def find_peaks(heatmaps: Tensor, threshold: float, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Local maxima of maps [B, K, H, W].

    Returns:
        Peaks [B, K, top, 3] as x, y in cells and the value, the highest first, padded with 0; the number of peaks in each map
        [B, K], which may exceed `top`; and whether an image's maps hold NaN or infinity [B].
    """
    H, W = heatmaps.shape[2:]
    finite = torch.isfinite(heatmaps)
    padded = F.pad(torch.where(torch.isnan(heatmaps), -torch.inf, heatmaps), (1, 1, 1, 1), value=-torch.inf)
    centre = padded[..., 1:-1, 1:-1]
    is_top = finite & (centre > max(threshold, 0.0))
    for di, dj in ((0, 0), (0, 1), (0, 2), (1, 0)):  # of equal neighbours the first in reading order counts
        is_top &= ~(padded[..., di : di + H, dj : dj + W] >= centre)
    for di, dj in ((1, 2), (2, 0), (2, 1), (2, 2)):
        is_top &= ~(padded[..., di : di + H, dj : dj + W] > centre)
    counts = is_top.flatten(2).sum(-1)
    values, cells = torch.where(is_top, centre, 0.0).flatten(2).topk(min(top, H * W), dim=-1)
    i, j = cells // W, cells % W
    flat = padded.flatten(2)
    at = (i + 1) * (W + 2) + j + 1
    left, right, above, below = (flat.gather(2, at + step) for step in (-1, 1, -W - 2, W + 2))
    safe = torch.where(values > 0, values, 1.0)
    dx = torch.where((j > 0) & (j < W - 1), _offset(left, safe, right), 0.0)
    dy = torch.where((i > 0) & (i < H - 1), _offset(above, safe, below), 0.0)
    present = values > 0
    peaks = torch.stack((j + dx, i + dy, values), dim=-1) * present[..., None]
    return peaks, counts, ~finite.flatten(1).all(-1)


def score_limbs(pafs: Tensor, peaks: Tensor, limbs: Tensor, shift: float, threshold: float) -> Tensor:
    """Scores [B, L, top, top] of all pairs of peaks that each limb can join; 0 for pairs that are no limb.

    Args:
        pafs: [B, 2 L, H, W].
        peaks: [B, K, top, 3].
        limbs: [L, 3]: keypoint, keypoint, index of the limb's PAF.
        shift: from heatmap cells to PAF cells.
        threshold: least projection of a PAF sample.
    """
    B, _, H, W = pafs.shape
    L = limbs.shape[0]
    maps = pafs.reshape(B, L, 2, H * W)[:, limbs[:, 2]]
    a, b = peaks[:, limbs[:, 0], :, None], peaks[:, limbs[:, 1], None]
    d = (b - a)[..., :2]
    length = torch.sqrt((d * d).sum(-1))
    along = torch.arange(SAMPLES, device=pafs.device)[:, None, None, None] / (SAMPLES - 1)
    at = (a[..., :2] + shift)[:, :, None] + d[:, :, None] * along  # [B, L, samples, top, top, 2]
    x, y = at[..., 0].clamp(0, W - 1), at[..., 1].clamp(0, H - 1)
    j, i = x.long(), y.long()
    fx, fy = x - j, y - i
    jj, ii = (j + 1).clamp(max=W - 1), (i + 1).clamp(max=H - 1)
    dot = torch.zeros_like(x)
    for axis in range(2):
        flat = maps[:, :, axis]

        def read(row: Tensor, column: Tensor, flat: Tensor = flat) -> Tensor:
            return flat.gather(2, (row * W + column).flatten(2)).view(x.shape)

        upper = read(i, j) * (1 - fx) + read(i, jj) * fx
        lower = read(ii, j) * (1 - fx) + read(ii, jj) * fx
        dot = dot + (upper * (1 - fy) + lower * fy) * d[:, :, None][..., axis]
    hit = dot > (threshold * length)[:, :, None]
    total, good = torch.where(hit, dot, 0.0).sum(2), hit.sum(2)
    score = total / (length * good).clamp(min=1e-9) + torch.clamp(0.5 * H / length - 1, max=0)
    there = (a[..., 2] > 0) & (b[..., 2] > 0) & (length > 1e-4) & (good >= SAMPLES - MOST_MISSES)
    return torch.where(there & (score > 0) & torch.isfinite(score), score, 0.0)


def _fields_to_scores(
    heatmaps: Tensor, pafs: Tensor, limbs: Tensor, shift: float, heatmap_threshold: float, paf_threshold: float, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    peaks, counts, strange = find_peaks(heatmaps, heatmap_threshold, top)
    return peaks, counts, strange, score_limbs(pafs, peaks, limbs, shift, paf_threshold)


@cache
def _compiled(shift: float, heatmap_threshold: float, paf_threshold: float, top: int) -> Callable[..., Any]:
    """`_fields_to_scores` with these options, fused by torch's compiler."""
    function = partial(
        _fields_to_scores, shift=shift, heatmap_threshold=heatmap_threshold, paf_threshold=paf_threshold, top=top
    )
    return torch.compile(function, dynamic=False)


@cache
def _on(device: torch.device, limbs: tuple[tuple[int, ...], ...]) -> Tensor:
    return torch.tensor(limbs, device=device)


@cache
def _ahead(device: torch.device) -> torch.cuda.Stream:
    """A stream of high priority, so that its short work does not wait for networks on the same GPU."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


def to_scores(
    heatmaps: Tensor,
    pafs: Tensor,
    limbs: NDArray[np.int32],
    shift: float,
    heatmap_threshold: float,
    paf_threshold: float,
    top: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Peaks, their counts, whether maps hold NaN, and limb scores of a batch of fields; all stay on the fields' device."""
    there = _on(heatmaps.device, tuple(map(tuple, limbs.tolist())))
    options = (shift, heatmap_threshold, paf_threshold, top)
    with torch.inference_mode():
        if heatmaps.is_cuda:
            shape = (*heatmaps.shape, *options)
            with _compiling:
                _seen[shape] += 1
                often = [known for known, times in _seen.items() if times > OFTEN][:_MOST_COMPILED]
                if shape in often:
                    made: tuple[Tensor, Tensor, Tensor, Tensor] = _compiled(*options)(heatmaps, pafs, there)
                    return made
        return _fields_to_scores(heatmaps, pafs, there, *options)


def to_host(*tensors: Tensor) -> list[NDArray[Any]]:
    """Copies in host memory; tensors on a GPU are copied together through pinned memory."""
    if not tensors[0].is_cuda:
        return [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    return [copy.numpy() for copy in copies]


@compiled
def _pairs(
    scores: NDArray[np.float32], limbs: NDArray[np.int32], counts: NDArray[np.int64], kept: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], int]:
    """The pairs of an image that are limbs, as `limbs.score_limbs` returns them, and the number of dropped peaks.

    Args:
        scores: [L, top, top].
        limbs: [L, 3].
        counts: peaks that each map has, [K].
        kept: output, the number of peaks kept in each map, [K].
    """
    L, top = scores.shape[0], scores.shape[1]
    dropped = 0
    for k in range(counts.shape[0]):
        kept[k] = min(counts[k], top)
        dropped += counts[k] - kept[k]
    room = 0
    for at in range(L):
        room += kept[limbs[at, 0]] * kept[limbs[at, 1]]
    values, pairs, starts = np.empty(room, np.float32), np.empty((room, 2), np.int32), np.zeros(L + 1, np.int32)
    n = 0
    for at in range(L):
        for i in range(kept[limbs[at, 0]]):
            for j in range(kept[limbs[at, 1]]):
                if scores[at, i, j] > 0:
                    values[n] = scores[at, i, j]
                    pairs[n, 0], pairs[n, 1] = i, j
                    n += 1
        starts[at + 1] = n
    return values[:n], pairs[:n], starts, dropped


def to_candidates(peaks: Any, counts: Any, strange: Any, scores: Any, limbs: NDArray[np.int32]) -> Iterator[Candidates]:
    """Each image's candidates, from the tensors of `to_scores` in the host's memory."""
    for n in range(len(peaks)):
        kept = np.empty(counts.shape[1], np.int32)
        values, pairs, starts, dropped = _pairs(scores[n], limbs, counts[n], kept)
        yield Candidates(peaks[n], kept, values, pairs, starts, dropped, bool(strange[n]))


def candidates(
    heatmaps: Tensor,
    pafs: Tensor,
    limbs: NDArray[np.int32],
    shift: float,
    heatmap_threshold: float,
    paf_threshold: float,
    max_peaks: int,
) -> Iterator[tuple[Candidates | None, NDArray[np.float32]]]:
    """Each image's candidates and heatmaps [K, H, W], the latter for completing poses on the host.

    For an image with more than `TOP` peaks in a map (a crowd) the candidates are None; the CPU must compute them.

    Args:
        heatmaps: [B, K, H, W], without the background.
        pafs: [B, 2 L, H, W].
        limbs: [L, 3]: keypoint, keypoint, index of the limb's PAF.
        shift: from heatmap cells to PAF cells.
        heatmap_threshold: threshold of a peak's value.
        paf_threshold: least projection of a PAF sample.
        max_peaks: largest number of peaks kept in a map; dropped peaks are counted.
    """
    with torch.cuda.stream(_ahead(heatmaps.device)) if heatmaps.is_cuda else nullcontext():
        made = to_scores(heatmaps, pafs, limbs, shift, heatmap_threshold, paf_threshold, min(max_peaks, TOP))
        peaks, counts, strange, scores, maps = to_host(*made, heatmaps)
    crowded = np.any(counts > TOP, axis=1) if max_peaks > TOP else np.zeros(len(counts), bool)
    for found, full, fields in zip(to_candidates(peaks, counts, strange, scores, limbs), crowded, maps, strict=True):
        yield None if full else found, fields
