"""Limbs between peaks: the line integral of part affinity fields (Cao et al., arXiv:1812.08008)."""

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

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
def score_limbs(pafs: F32, limbs: I32, peaks: F32, counts: I32, shift: float, threshold: float) -> tuple[F32, I32, I32]:
    """Score every pair of peaks that a limb can join: the mean PAF along their line.

    The PAF at the peaks is sampled once for all pairs, because most wrong pairs fail there. The inner samples are taken in
    steps of three, so that other wrong pairs fail early. Neither changes the result.

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
    H = pafs.shape[1]
    offset, least_paf = np.float32(shift), np.float32(threshold)
    L = limbs.shape[0]
    every = 0
    for at in range(L):
        every += counts[limbs[at, 0]] * counts[limbs[at, 1]]
    scores = np.empty(every, np.float32)
    pairs = np.empty((every, 2), np.int32)
    starts = np.zeros(L + 1, np.int32)
    room = peaks.shape[1]
    ends_a, ends_b = np.empty((room, 2), np.float32), np.empty((room, 2), np.float32)
    inner = SAMPLES - 2
    n = 0
    for at in range(L):
        A, B = limbs[at, 0], limbs[at, 1]
        nA, nB = counts[A], counts[B]
        a, b = peaks[A], peaks[B]
        px, py = pafs[2 * limbs[at, 2]], pafs[2 * limbs[at, 2] + 1]
        if nA > 0 and nB > 0:
            for k in range(nA):
                ends_a[k, 0], ends_a[k, 1] = _sample(px, py, a[k, 0] + offset, a[k, 1] + offset)
            for k in range(nB):
                ends_b[k, 0], ends_b[k, 1] = _sample(px, py, b[k, 0] + offset, b[k, 1] + offset)
        for i in range(nA):
            ax, ay = a[i, 0], a[i, 1]
            for j in range(nB):
                dx, dy = b[j, 0] - ax, b[j, 1] - ay
                length = np.float32(np.sqrt(dx * dx + dy * dy))
                if not length > np.float32(1e-4):
                    continue
                least = least_paf * length
                total, good, missed = np.float32(0), 0, 0
                at_a, at_b = ends_a[i, 0] * dx + ends_a[i, 1] * dy, ends_b[j, 0] * dx + ends_b[j, 1] * dy
                if at_a > least:
                    total += at_a
                    good += 1
                else:
                    missed += 1
                if at_b > least:
                    total += at_b
                    good += 1
                else:
                    missed += 1
                step = 0
                while missed <= MOST_MISSES and step < inner:
                    t = np.float32(1 + (step * 3 + inner // 2) % inner) / np.float32(SAMPLES - 1)
                    u, v = _sample(px, py, ax + offset + t * dx, ay + offset + t * dy)
                    dot = u * dx + v * dy
                    if dot > least:
                        total += dot
                        good += 1
                    else:
                        missed += 1
                    step += 1
                if missed > MOST_MISSES:
                    continue
                # OpenPose's penalty for limbs longer than half the map's height.
                long = min(np.float32(0), np.float32(0.5) * np.float32(H) / length - np.float32(1))
                score = total / (length * np.float32(good)) + long
                if 0 < score < np.inf:
                    scores[n] = score
                    pairs[n, 0], pairs[n, 1] = i, j
                    n += 1
        starts[at + 1] = n
    return scores[:n], pairs[:n], starts
