"""Peaks of heatmaps, with sub-pixel positions, found on the network's own grid."""

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_BLOCK = 64  # cells tested at once


@compiled
def log_parabola(before: np.float32, centre: np.float32, after: np.float32) -> np.float32:
    """Offset in -0.5..0.5 of the top of the parabola through three logarithms, exact for a Gaussian; 0 if not concave."""
    least = np.float32(1e-3)
    # With ratios to the centre, the greatest value, two logarithms suffice instead of three.
    # NaN fails the comparison, so that a NaN neighbour counts as `least`; max() might return NaN.
    a = np.log((before if before > least else least) / centre)  # noqa: FURB136
    b = np.log((after if after > least else least) / centre)  # noqa: FURB136
    curvature = a + b
    if not curvature < np.float32(-1e-6):
        return np.float32(0)
    return min(max(np.float32(0.5) * (a - b) / curvature, np.float32(-0.5)), np.float32(0.5))


@compiled
def refine(heatmap: F32, i: int, j: int) -> tuple[np.float32, np.float32]:
    """Offsets (dx, dy) in cells of the peak around the cell (i, j), which is a positive local maximum."""
    H, W = heatmap.shape
    v = heatmap[i, j]
    dx = dy = np.float32(0)
    if 0 < j < W - 1:
        dx = log_parabola(heatmap[i, j - 1], v, heatmap[i, j + 1])
    if 0 < i < H - 1:
        dy = log_parabola(heatmap[i - 1, j], v, heatmap[i + 1, j])
    return dx, dy


@compiled
def _inner_tops(flat: F32, W: int, least: np.float32, mask: NDArray[np.uint8], tops: I32) -> tuple[int, bool]:
    """Write the local maxima that have eight neighbours, and tell whether one of the map's cells was NaN or infinite.

    The map is compared with itself shifted by one cell, block by block and without branches, which compiles to vector
    instructions. Cells of the first and last column are left out: their shifted neighbours belong to other rows.
    """
    # Unsigned indices need no test for negative values; that test would prevent vector instructions.
    w, block = np.uint64(W), np.uint64(_BLOCK)
    first = w + np.uint64(1)
    cells = np.uint64(flat.shape[0]) - np.uint64(2) * first
    infinite = np.float32(np.inf)
    n, strange = 0, False
    for at in range((cells + block - np.uint64(1)) // block):
        start = min(at * block, cells - block)  # the last block overlaps the one before it
        some = np.uint8(0)
        for c in range(block):  # NaN fails the comparison, so that its block is not skipped
            some |= np.uint8(not flat[first + start + c] <= least)
        if some == 0:
            continue
        above, left, below = start, start + w, start + w + w
        some, odd = np.uint8(0), np.uint8(0)
        for c in range(block):
            x = flat[first + start + c]
            top = (x > least) & (x < infinite)
            for ahead in (above, above + np.uint64(1), above + np.uint64(2), left):
                top &= not flat[ahead + c] >= x
            for behind in (left + np.uint64(2), below, below + np.uint64(1), below + np.uint64(2)):
                top &= not flat[behind + c] > x
            mask[c] = top
            some |= np.uint8(top)
            odd |= np.uint8(not abs(x) < infinite)
        strange |= bool(odd > 0)
        if some == 0:
            continue
        for c in range(at * block - start, block):
            cell = first + start + c
            if mask[c] and np.uint64(0) < cell % w < w - np.uint64(1):
                tops[n] = cell
                n += 1
    return n, strange


@compiled
def _is_top(heatmap: F32, i: int, j: int) -> bool:
    H, W = heatmap.shape
    v = heatmap[i, j]
    for ii in range(max(i - 1, 0), min(i + 2, H)):
        for jj in range(max(j - 1, 0), min(j + 2, W)):
            u = heatmap[ii, jj]
            if u > v or (u == v and (ii < i or (ii == i and jj < j))):
                return False
    return True


@compiled
def _edge_tops(heatmap: F32, least: np.float32, inner: bool, tops: I32, n: int) -> tuple[int, bool]:
    """Append the local maxima of the outermost cells to the first n of `tops`; of all cells if not `inner`."""
    H, W = heatmap.shape
    strange = False
    for i in range(H):
        step = W - 1 if inner and 0 < i < H - 1 else 1
        for j in range(0, W, step):
            v = heatmap[i, j]
            if v <= least:
                continue
            if not np.isfinite(v):
                strange = True
            elif _is_top(heatmap, i, j):
                tops[n] = i * W + j
                n += 1
    return n, strange


@compiled
def find_peaks(heatmaps: F32, K: int, threshold: float, max_peaks: int) -> tuple[F32, I32, int, bool]:
    """Find the local maxima of the first K maps [K or more, H, W] above a threshold.

    Of equal neighbours the first in reading order counts, so that a plateau is one peak. NaN and infinity are never peaks.

    Returns:
        Peaks [K, max_peaks, 3] as x, y in cells and the map's value; the number of peaks in each map [K]; the number of peaks
        dropped, the lowest first, because a map had more than `max_peaks`; and whether a map held NaN or infinity.
    """
    H, W = heatmaps.shape[1], heatmaps.shape[2]
    peaks = np.empty((K, max_peaks, 3), np.float32)
    counts = np.zeros(K, np.int32)
    mask = np.empty(_BLOCK, np.uint8)
    tops = np.empty(H * W, np.int32)
    least = np.float32(max(threshold, 0.0))
    dropped, strange = 0, False
    for k in range(K):
        heatmap = heatmaps[k]
        n, odd = 0, False
        large = W > 2 and (H - 2) * W - 2 >= _BLOCK
        if large:
            n, odd = _inner_tops(heatmap.ravel(), W, least, mask, tops)
            strange = strange or odd
        n, odd = _edge_tops(heatmap, least, large, tops, n)
        strange = strange or odd
        if n > max_peaks:
            dropped += n - max_peaks
            values, every = np.empty(n, np.float32), np.empty(n, np.int32)
            for c in range(n):
                values[c], every[c] = -heatmap[tops[c] // W, tops[c] % W], tops[c]
            order = np.argsort(values, kind="mergesort")
            for c in range(max_peaks):  # numba takes seconds to compile a slice here
                tops[c] = every[order[c]]
            n = max_peaks
        for c in range(n):
            i, j = tops[c] // W, tops[c] % W
            dx, dy = refine(heatmap, i, j)
            peaks[k, c, 0], peaks[k, c, 1], peaks[k, c, 2] = np.float32(j) + dx, np.float32(i) + dy, heatmap[i, j]
        counts[k] = n
    return peaks, counts, dropped, strange


@compiled
def complete(heatmaps: F32, keypoints: F32, margin: float) -> None:
    """Place each missing keypoint (x is NaN) at the highest value of its map inside the person's box.

    Args:
        heatmaps: [K or more, H, W].
        keypoints: [N, K, 3] in cells, changed in place; the third column becomes the map's value. A keypoint whose map has
            no positive value in the box stays missing.
        margin: margin of the present keypoints' box, added on each side, as a fraction of its longer side.
    """
    H, W = heatmaps.shape[1], heatmaps.shape[2]
    for p in range(keypoints.shape[0]):
        x0, y0, x1, y1 = np.inf, np.inf, -np.inf, -np.inf
        missing = 0
        for k in range(keypoints.shape[1]):
            if np.isnan(keypoints[p, k, 0]):
                missing += 1
                continue
            x0, x1 = min(x0, keypoints[p, k, 0]), max(x1, keypoints[p, k, 0])
            y0, y1 = min(y0, keypoints[p, k, 1]), max(y1, keypoints[p, k, 1])
        if missing == 0 or not x1 >= x0:
            continue
        grow = margin * max(x1 - x0, y1 - y0)
        left, right = max(int(np.rint(x0 - grow)), 0), min(int(np.rint(x1 + grow)), W - 1)
        top, bottom = max(int(np.rint(y0 - grow)), 0), min(int(np.rint(y1 + grow)), H - 1)
        for k in range(keypoints.shape[1]):
            if not np.isnan(keypoints[p, k, 0]):
                continue
            heatmap = heatmaps[k]
            best, at_i, at_j = np.float32(0), -1, -1
            for i in range(top, bottom + 1):
                for j in range(left, right + 1):
                    if best < heatmap[i, j] < np.inf:
                        best, at_i, at_j = heatmap[i, j], i, j
            if at_i >= 0:
                dx, dy = refine(heatmap, at_i, at_j)
                keypoints[p, k, 0], keypoints[p, k, 1] = np.float32(at_j) + dx, np.float32(at_i) + dy
                keypoints[p, k, 2] = best
