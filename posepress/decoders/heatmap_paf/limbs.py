"""Limbs between peaks: the line integral of part affinity fields (Cao et al., arXiv:1812.08008)."""

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled, inlined

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
F = np.float32

SAMPLES = 10  # number of PAF samples on a limb, as in OpenPose
MOST_MISSES = 1  # largest number of samples below the threshold: the 9-of-10 rule


@compiled
def _sample(px: F32, py: F32, x: np.float32, y: np.float32) -> tuple[np.float32, np.float32]:
    """The PAF (px, py) at a point, bilinear and clamped to the map."""
    H, W = px.shape
    x = min(max(x, np.float32(0)), np.float32(W - 1))
    y = min(max(y, np.float32(0)), np.float32(H - 1))
    j, i = int(x), int(y)
    fx, fy = x - np.float32(j), y - np.float32(i)
    gx, gy = np.float32(1) - fx, np.float32(1) - fy
    jj, ii = min(j + 1, W - 1), min(i + 1, H - 1)
    u = (px[i, j] * gx + px[i, jj] * fx) * gy + (px[ii, j] * gx + px[ii, jj] * fx) * fy
    v = (py[i, j] * gx + py[i, jj] * fx) * gy + (py[ii, j] * gx + py[ii, jj] * fx) * fy
    return np.float32(u), np.float32(v)


@compiled
def _ends(px: F32, py: F32, peaks: F32, shift: np.float32, out: F32) -> None:
    """Write peaks [n, 3] and the PAF at each into `out` [at least n, 4]."""
    for k in range(peaks.shape[0]):
        out[k, 0], out[k, 1] = peaks[k, 0], peaks[k, 1]
        out[k, 2], out[k, 3] = _sample(px, py, peaks[k, 0] + shift, peaks[k, 1] + shift)


@inlined
def _inner(px: F32, py: F32, start: tuple[F, F], along: tuple[F, F], least: F, total: F, missed: int) -> tuple[F, int]:
    """The sum of a limb's samples of the PAF that lie above a threshold, and how many do not.

    The samples are taken in steps of three, so that wrong pairs fail early. The order does not change the result.

    Args:
        px: the PAF's x component, [H, W].
        py: its y component.
        start: the first peak, in cells of the PAF.
        along: from the first peak to the second.
        least: threshold of a projection, times the limb's length.
        total: the sum of the projections at the peaks that lie above it.
        missed: how many of the two samples at the peaks do not.
    """
    inner, step = SAMPLES - 2, 0
    while missed <= MOST_MISSES and step < inner:
        t = np.float32(1 + (step * 3 + inner // 2) % inner) / np.float32(SAMPLES - 1)
        u, v = _sample(px, py, start[0] + t * along[0], start[1] + t * along[1])
        dot = u * along[0] + v * along[1]
        if dot > least:
            total += dot
        else:
            missed += 1
        step += 1
    return total, missed


@compiled
def score_limbs(pafs: F32, limbs: I32, peaks: F32, counts: I32, shift: float, threshold: float) -> tuple[F32, I32, I32]:
    """Score every pair of peaks that a limb can join: the mean PAF along their line.

    The PAF at the peaks is sampled once for all pairs, because most wrong pairs fail there.

    Args:
        pafs: [2 L, H, W].
        limbs: [L, 3]: keypoint, keypoint, index of the limb's PAF.
        peaks: [K, P, 3] in cells.
        counts: peaks in each map, [K].
        shift: offset from heatmap cells to PAF cells.
        threshold: least projection of a PAF sample.

    Returns:
        Scores [n] of the pairs that are limbs, their peaks' indices [n, 2], and where each limb's pairs begin, [L + 1].
    """
    offset, least_paf, none = np.float32(shift), np.float32(threshold), np.float32(0)
    L = limbs.shape[0]
    every = 0
    for at in range(L):
        every += counts[limbs[at, 0]] * counts[limbs[at, 1]]
    scores = np.empty(every, np.float32)
    pairs = np.empty((every, 2), np.int32)
    starts = np.zeros(L + 1, np.int32)
    room = peaks.shape[1]
    a, b = np.empty((room, 4), np.float32), np.empty((room, 4), np.float32)
    n = 0
    for at in range(L):
        nA, nB = counts[limbs[at, 0]], counts[limbs[at, 1]]
        px, py = pafs[2 * limbs[at, 2]], pafs[2 * limbs[at, 2] + 1]
        if nA > 0 and nB > 0:
            _ends(px, py, peaks[limbs[at, 0], :nA], offset, a)
            _ends(px, py, peaks[limbs[at, 1], :nB], offset, b)
        for i in range(nA):
            x, y = a[i, 0], a[i, 1]
            for j in range(nB):
                dx, dy = b[j, 0] - x, b[j, 1] - y
                length = np.float32(np.sqrt(dx * dx + dy * dy))
                if not length > np.float32(1e-4):
                    continue
                least = least_paf * length
                at_a, at_b = a[i, 2] * dx + a[i, 3] * dy, b[j, 2] * dx + b[j, 3] * dy
                missed = int(not at_a > least) + int(not at_b > least)
                if missed > MOST_MISSES:
                    continue
                total = (at_a if at_a > least else none) + (at_b if at_b > least else none)
                total, missed = _inner(px, py, (x + offset, y + offset), (dx, dy), least, total, missed)
                if missed > MOST_MISSES:
                    continue
                # OpenPose's penalty for limbs longer than half the map's height.
                long = min(none, np.float32(0.5) * np.float32(px.shape[0]) / length - np.float32(1))
                score = total / (length * np.float32(SAMPLES - missed)) + long
                if 0 < score < np.inf:
                    scores[n] = score
                    pairs[n, 0], pairs[n, 1] = i, j
                    n += 1
        starts[at + 1] = n
    return scores[:n], pairs[:n], starts
