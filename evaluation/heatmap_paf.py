"""People from heatmaps and part affinity fields (PAFs), decoded on the network's own grid.

The grouping is OpenPose's (Cao et al., arXiv:1812.08008): peaks of each keypoint's heatmap, limbs scored by the line
integral of their PAF, greedy assignment limb by limb. Nothing is upsampled: peaks get a sub-pixel position from a
parabola through the logarithm of three values, exact for a Gaussian, and PAFs are sampled bilinearly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.compiled import compiled
from evaluation.types import NetworkSpec, Poses, Skeleton, View
from evaluation.views import cells_to_input

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_SAMPLES = 10  # PAF samples a limb, as in OpenPose
_MOST_MISSES = 1  # so many of them may lie below the threshold: the 9-of-10 rule


@compiled
def _log_parabola(before: float, centre: float, after: float) -> float:
    """Offset in -0.5..0.5 of the top of the parabola through three logarithms; 0 where they are not concave."""
    a, c, b = np.log(max(before, 1e-3)), np.log(max(centre, 1e-3)), np.log(max(after, 1e-3))
    curvature = a + b - 2.0 * c
    if not curvature < -1e-6:
        return 0.0
    return float(min(max(0.5 * (a - b) / curvature, -0.5), 0.5))


@compiled
def _peaks(heatmap: F32, threshold: float, peaks: F32) -> int:
    """Find local maxima of a map [H, W] above a threshold.

    Of equal neighbours the first in reading order counts, so that a plateau is one peak. NaN is never a peak. If there
    are more than `peaks` [P, 3] has room for, the highest stay. Returns how many (x, y, score) were written.
    """
    H, W = heatmap.shape
    room = peaks.shape[0]
    found = np.empty((max(H * W // 2, 1), 2), np.int32)
    values = np.empty(found.shape[0], np.float32)
    n = 0
    for i in range(H):
        for j in range(W):
            v = heatmap[i, j]
            if not v > threshold or n == found.shape[0]:
                continue
            top = True
            for di in range(-1, 2):
                ii = i + di
                if ii < 0 or ii >= H:
                    continue
                for dj in range(-1, 2):
                    jj = j + dj
                    if jj < 0 or jj >= W or (di == 0 and dj == 0):
                        continue
                    u = heatmap[ii, jj]
                    if u > v or (u == v and (di < 0 or (di == 0 and dj < 0))):
                        top = False
                        break
                if not top:
                    break
            if top:
                found[n, 0], found[n, 1] = i, j
                values[n] = v
                n += 1
    if n > room:
        keep = np.argsort(-values[:n])[:room]
        keep.sort()
        found[:room] = found[keep]
        n = room
    for k in range(n):
        i, j = found[k, 0], found[k, 1]
        v = heatmap[i, j]
        dx = dy = 0.0
        if 0 < j < W - 1:
            dx = _log_parabola(heatmap[i, j - 1], v, heatmap[i, j + 1])
        if 0 < i < H - 1:
            dy = _log_parabola(heatmap[i - 1, j], v, heatmap[i + 1, j])
        peaks[k, 0], peaks[k, 1], peaks[k, 2] = j + dx, i + dy, v
    return n


@compiled
def _along(px: F32, py: F32, x: np.float32, y: np.float32, dx: np.float32, dy: np.float32) -> np.float32:
    """The PAF (px, py) at a point, bilinear and clamped to the map, times the direction (dx, dy)."""
    H, W = px.shape
    x = min(max(x, np.float32(0)), np.float32(W - 1))
    y = min(max(y, np.float32(0)), np.float32(H - 1))
    j, i = min(int(x), max(W - 2, 0)), min(int(y), max(H - 2, 0))
    fx, fy = x - np.float32(j), y - np.float32(i)
    gx, gy = np.float32(1) - fx, np.float32(1) - fy
    jj, ii = min(j + 1, W - 1), min(i + 1, H - 1)
    u = (px[i, j] * gx + px[i, jj] * fx) * gy + (px[ii, j] * gx + px[ii, jj] * fx) * fy
    v = (py[i, j] * gx + py[i, jj] * fx) * gy + (py[ii, j] * gx + py[ii, jj] * fx) * fy
    return np.float32(u * dx + v * dy)


@compiled
def _limb_score(px: F32, py: F32, a: F32, b: F32, shift: float, threshold: float) -> float:
    """Mean PAF along the line from peak a to peak b; 0 if the line is not a limb.

    The ends are sampled first and then every third point: a wrong pair mostly fails at once, and the result does not
    depend on the order.
    """
    H = px.shape[0]
    ax, ay = np.float32(a[0] + shift), np.float32(a[1] + shift)
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = np.sqrt(dx * dx + dy * dy)
    if not length > 1e-4:
        return 0.0
    least = np.float32(threshold) * length
    total, good, missed = np.float32(0), 0, 0
    inner = _SAMPLES - 2
    for step in range(_SAMPLES):
        at = 0
        if step == 1:
            at = _SAMPLES - 1
        elif step > 1:
            at = 1 + ((step - 2) * 3 + inner // 2) % inner
        t = np.float32(at / (_SAMPLES - 1))
        dot = _along(px, py, ax + t * dx, ay + t * dy, dx, dy)
        if dot > least:
            total += dot
            good += 1
        else:
            missed += 1
            if missed > _MOST_MISSES:
                return 0.0
    # OpenPose's penalty for limbs longer than half the map's height.
    return float(total / (length * np.float32(good)) + min(np.float32(0), np.float32(0.5 * H) / length - np.float32(1)))


@compiled
def _group(
    heatmaps: F32,
    pafs: F32,
    limbs: I32,
    closing: int,
    shift: float,
    heatmap_threshold: float,
    paf_threshold: float,
    max_peaks: int,
) -> tuple[F32, F32]:
    """People in one image.

    Args:
        heatmaps: [K or more, H, W].
        pafs: [2 L, H, W].
        limbs: [L, 3]: keypoint, keypoint, index of the limb's PAF; the limbs that close a cycle stand last.
        closing: index of the first limb that closes a cycle; those confirm and merge people but begin none.
        shift: from heatmap cells to PAF cells.
        heatmap_threshold: least value of a peak.
        paf_threshold: least mean projection of a PAF sample.
        max_peaks: peaks kept in a map.

    Returns:
        Keypoints [N, K, 3] in cells with their peak values, NaN where missing; and sums of limb scores [N].
    """
    K = limbs[:, :2].max() + 1
    peaks = np.empty((K, max_peaks, 3), np.float32)
    counts = np.zeros(K, np.int32)
    for k in range(K):
        counts[k] = _peaks(heatmaps[k], heatmap_threshold, peaks[k])

    owner = np.full((K, max_peaks), -1, np.int32)
    room = 16
    members = np.full((room, K), -1, np.int32)
    limb_scores = np.zeros(room, np.float32)
    alive = np.zeros(room, np.bool_)
    people = 0
    for at in range(limbs.shape[0]):
        A, B, channel = limbs[at, 0], limbs[at, 1], 2 * limbs[at, 2]
        nA, nB = counts[A], counts[B]
        if nA == 0 or nB == 0:
            continue
        scores = np.empty(nA * nB, np.float32)
        pairs = np.empty((nA * nB, 2), np.int32)
        n = 0
        for a in range(nA):
            for b in range(nB):
                score = _limb_score(pafs[channel], pafs[channel + 1], peaks[A, a], peaks[B, b], shift, paf_threshold)
                if score > 0:
                    scores[n] = score
                    pairs[n, 0], pairs[n, 1] = a, b
                    n += 1
        used_a, used_b = np.zeros(nA, np.bool_), np.zeros(nB, np.bool_)
        for c in np.argsort(-scores[:n], kind="mergesort"):
            a, b = pairs[c, 0], pairs[c, 1]
            if used_a[a] or used_b[b]:
                continue
            used_a[a], used_b[b] = True, True
            p, q = owner[A, a], owner[B, b]
            if p < 0 and q < 0:
                if at >= closing:
                    continue
                if people == room:
                    more = np.full((2 * room, K), -1, np.int32)
                    more[:room] = members
                    members = more
                    limb_scores = np.concatenate((limb_scores, np.zeros(room, np.float32)))
                    alive = np.concatenate((alive, np.zeros(room, np.bool_)))
                    room *= 2
                p = people
                people += 1
                alive[p] = True
                members[p, A], members[p, B] = a, b
                owner[A, a], owner[B, b] = p, p
            elif q < 0:
                if members[p, B] >= 0:
                    continue
                members[p, B] = b
                owner[B, b] = p
            elif p < 0:
                p = q
                if members[p, A] >= 0:
                    continue
                members[p, A] = a
                owner[A, a] = p
            elif p != q:
                clash = False
                for k in range(K):
                    if members[p, k] >= 0 and members[q, k] >= 0:
                        clash = True
                        break
                if clash:
                    continue
                for k in range(K):
                    if members[q, k] >= 0:
                        members[p, k] = members[q, k]
                        owner[k, members[q, k]] = p
                limb_scores[p] += limb_scores[q]
                alive[q] = False
            limb_scores[p] += scores[c]

    keypoints = np.full((people, K, 3), np.nan, np.float32)
    for p in range(people):
        for k in range(K):
            if members[p, k] >= 0:
                keypoints[p, k] = peaks[k, members[p, k]]
    return keypoints[alive[:people]], limb_scores[:people][alive[:people]]


def limb_order(skeleton: Skeleton) -> tuple[I32, int]:
    """Order limbs for grouping: a spanning tree from the keypoint with most limbs outwards, then those closing cycles.

    Returns:
        [L, 3]: keypoint, keypoint, index in `skeleton.limbs`; and how many limbs the tree has.
    """
    degree = np.bincount(np.array(skeleton.limbs).ravel(), minlength=len(skeleton.names))
    reached, tree = {int(degree.argmax())}, []
    while True:
        grown = []
        for index, (a, b) in enumerate(skeleton.limbs):
            if index not in tree and (a in reached) != (b in reached):
                grown.append(index)
                reached |= {a, b}
        if not grown:
            break
        tree += grown
    rest = [i for i in range(len(skeleton.limbs)) if i not in tree]
    order = [(*skeleton.limbs[i], i) for i in tree + rest]
    return np.array(order, np.int32), len(tree)


@dataclass(frozen=True)
class HeatmapPafDecoder:
    """Decoder of bottom-up networks with the fields "heatmaps" and "pafs".

    Attributes:
        spec: the network's description.
        heatmap_threshold: least heatmap value of a keypoint.
        paf_threshold: least PAF projection of a limb's sample.
        min_keypoints: people with fewer keypoints are dropped.
        min_score: people whose mean of peak and limb scores is below are dropped.
        max_peaks: most peaks kept in one heatmap, the highest first.
    """

    spec: NetworkSpec
    heatmap_threshold: float = 0.05
    paf_threshold: float = 0.05
    min_keypoints: int = 3
    min_score: float = 0.2
    max_peaks: int = 128

    def decode(self, fields: Mapping[str, F32], views: Sequence[View]) -> list[Poses]:
        """Find the people of each view.

        Args:
            fields: "heatmaps" [B, K + 1, h, w] (background last) and "pafs" [B, 2 L, h, w].
            views: B views.

        Returns:
            Poses in image pixels, one a view, in the network's own skeleton.
        """
        heat, paf = self.spec.field("heatmaps"), self.spec.field("pafs")
        limbs, closing = limb_order(self.spec.skeleton)
        # A neck follows from the shoulders: counting it would count them twice.
        counts = np.array([name != "neck" for name in self.spec.skeleton.names], np.float32)
        found = []
        for heatmaps, pafs, view in zip(fields["heatmaps"], fields["pafs"], views, strict=True):
            keypoints, limb_scores = _group(
                np.ascontiguousarray(heatmaps, np.float32),
                np.ascontiguousarray(pafs, np.float32),
                limbs,
                closing,
                heat.shift - paf.shift,
                self.heatmap_threshold,
                self.paf_threshold,
                self.max_peaks,
            )
            present = ~np.isnan(keypoints[..., 2])
            count = present.sum(axis=1)
            peaks = np.where(present, keypoints[..., 2], 0)
            peak_sum = peaks.sum(axis=1)
            mean = (peak_sum + limb_scores) / np.maximum(count, 1)
            keep = (count >= self.min_keypoints) & (mean >= self.min_score)
            keypoints, present = keypoints[keep], present[keep]
            points = view.to_image(cells_to_input(keypoints[..., :2].astype(np.float64), heat))
            poses = np.zeros(keypoints.shape, np.float32)
            poses[..., :2] = np.where(present[..., None], points, 0)
            poses[..., 2] = peaks[keep]
            found.append(Poses(poses, (peaks[keep] @ counts).astype(np.float32)))
        return found

    def merge(self, parts: Sequence[Poses], views: Sequence[View]) -> Poses:  # noqa: ARG002
        """One result an image: a bottom-up network sees each image in one view."""
        (poses,) = parts
        return poses
