"""People from heatmaps and part affinity fields (PAFs), decoded on the network's own grid.

The grouping is OpenPose's (Cao et al., arXiv:1812.08008): peaks of each keypoint's heatmap, limbs scored by the line
integral of their PAF, greedy assignment limb by limb. Nothing is upsampled: peaks get a sub-pixel position from a
parabola through the logarithm of three values, exact for a Gaussian, and PAFs are sampled bilinearly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

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
def _log_parabola(before: np.float32, centre: np.float32, after: np.float32) -> np.float32:
    """Offset in -0.5..0.5 of the top of the parabola through three logarithms; 0 where they are not concave."""
    least = np.float32(1e-3)
    # Ratios to the centre, which is the greatest: two logarithms instead of three.
    a, b = np.log(max(before, least) / centre), np.log(max(after, least) / centre)
    curvature = a + b
    if not curvature < np.float32(-1e-6):
        return np.float32(0)
    return min(max(np.float32(0.5) * (a - b) / curvature, np.float32(-0.5)), np.float32(0.5))


@compiled
def _peaks(heatmap: F32, threshold: float, peaks: F32) -> int:
    """Find local maxima of a map [H, W] above a threshold.

    Of equal neighbours the first in reading order counts, so that a plateau is one peak. NaN is never a peak. If there
    are more than `peaks` [P, 3] has room for, the highest stay. Returns how many (x, y, score) were written.
    """
    H, W = heatmap.shape
    room = peaks.shape[0]
    flat = heatmap.ravel()
    above = np.empty(H * W + 1, np.int32)
    least = np.float32(threshold)
    count = 0
    for cell in range(H * W):  # without a branch: most cells are below
        above[count] = cell
        count += flat[cell] > least
    found = np.empty((max(count, 1), 2), np.int32)
    values = np.empty(max(count, 1), np.float32)
    n = 0
    for c in range(count):
        i, j = above[c] // W, above[c] % W
        v = flat[above[c]]
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
        dx = dy = np.float32(0)
        if 0 < j < W - 1:
            dx = _log_parabola(heatmap[i, j - 1], v, heatmap[i, j + 1])
        if 0 < i < H - 1:
            dy = _log_parabola(heatmap[i - 1, j], v, heatmap[i + 1, j])
        peaks[k, 0], peaks[k, 1], peaks[k, 2] = j + dx, i + dy, v
    return n


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
def _score_limbs(
    px: F32, py: F32, a: F32, nA: int, b: F32, nB: int, shift: float, threshold: float, scores: F32, pairs: I32
) -> int:
    """Score every pair of the first nA peaks a [P, 3] and nB peaks b: the mean PAF along their line.

    The PAF at the peaks is sampled once for all pairs, because a wrong pair mostly fails there; the inner samples come every
    third, so that the others fail soon. Neither changes a result.

    Returns:
        How many pairs are limbs; their scores and indices are written to `scores` [nA nB] and `pairs` [nA nB, 2].
    """
    H = px.shape[0]
    offset, least_paf = np.float32(shift), np.float32(threshold)
    ends_a, ends_b = np.empty((nA, 2), np.float32), np.empty((nB, 2), np.float32)
    for k in range(nA):
        ends_a[k, 0], ends_a[k, 1] = _sample(px, py, a[k, 0] + offset, a[k, 1] + offset)
    for k in range(nB):
        ends_b[k, 0], ends_b[k, 1] = _sample(px, py, b[k, 0] + offset, b[k, 1] + offset)
    inner = _SAMPLES - 2
    n = 0
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
            while missed <= _MOST_MISSES and step < inner:
                t = np.float32(1 + (step * 3 + inner // 2) % inner) / np.float32(_SAMPLES - 1)
                u, v = _sample(px, py, ax + offset + t * dx, ay + offset + t * dy)
                dot = u * dx + v * dy
                if dot > least:
                    total += dot
                    good += 1
                else:
                    missed += 1
                step += 1
            if missed > _MOST_MISSES:
                continue
            # OpenPose's penalty for limbs longer than half the map's height.
            long = min(np.float32(0), np.float32(0.5) * np.float32(H) / length - np.float32(1))
            score = total / (length * np.float32(good)) + long
            if score > 0:
                scores[n] = score
                pairs[n, 0], pairs[n, 1] = i, j
                n += 1
    return n


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
        px, py = pafs[channel], pafs[channel + 1]
        scores = np.empty(nA * nB, np.float32)
        pairs = np.empty((nA * nB, 2), np.int32)
        n = _score_limbs(px, py, peaks[A], nA, peaks[B], nB, shift, paf_threshold, scores, pairs)
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


@cache
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


@cache
def _counted(skeleton: Skeleton) -> F32:
    """1 for keypoints that count in a person's score, [K]: a neck follows from the shoulders and would count them twice."""
    return np.array([name != "neck" for name in skeleton.names], np.float32)


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

    def __post_init__(self) -> None:
        """Check that the fields hold what the skeleton needs.

        Raises:
            ValueError: a field has too few channels, or heatmaps and PAFs have different strides.
        """
        heat, paf, skeleton = self.spec.field("heatmaps"), self.spec.field("pafs"), self.spec.skeleton
        if heat.channels < len(skeleton.names) or paf.channels != 2 * len(skeleton.limbs) or heat.stride != paf.stride:
            raise ValueError(
                f"{heat.channels} heatmaps (stride {heat.stride}) and {paf.channels} PAF channels (stride {paf.stride}) do "
                f"not fit a skeleton of {len(skeleton.names)} keypoints and {len(skeleton.limbs)} limbs; mend model.spec"
            )

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
        counts = _counted(self.spec.skeleton)
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
