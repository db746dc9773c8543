"""The part that all top-down decoders share: one person in each view becomes poses of an image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled
from posepress.geometry import View
from posepress.labels import Skeleton
from posepress.results import Poses

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_NONE: dict[str, Any] = {}
_COUNTS = ({"images_not_finite": 0}, {"images_not_finite": 1})  # shared, as results are never changed


def poses(
    points: F64,
    values: F32,
    views: Sequence[View],
    threshold: float,
    odd: NDArray[np.int64] | None = None,
    certainty: NDArray[np.floating[Any]] | float = 1.0,
) -> list[Poses]:
    """The person in each view.

    Args:
        points: keypoints in pixels of their view, [B, K, 2].
        values: scores of the keypoints, [B, K]. Keypoints at 0 or less are missing.
        views: B views.
        threshold: score above which a keypoint counts in the person's score.
        odd: 1 for views with other outputs that are not finite, [B]; None: there are none.
        certainty: factors of the people's scores, [B] or one number.

    Returns:
        For each view, the poses of at most one person, in image pixels. A person's score is the mean score of the keypoints
        above the threshold, times the score of the box. A view without such keypoints has no person. A keypoint with a point
        or value that is not finite is missing, a person with such a factor is left out, and both count in `images_not_finite`.
    """
    matrices = np.array([view.matrix for view in views])
    boxes = np.array([view.score for view in views]) * certainty
    keypoints, scores, found, strange = _placed(points, values, matrices, boxes, threshold)
    if odd is not None:
        strange = strange | odd
    ends = zip(range(len(views)), found.tolist(), strange.tolist(), strict=True)
    return [Poses(keypoints[n : n + one], scores[n : n + one], _NONE, _COUNTS[bad]) for n, one, bad in ends]


@compiled
def _placed(
    points: F64, values: F32, matrices: F64, boxes: F64, threshold: float
) -> tuple[F32, F32, NDArray[np.int64], NDArray[np.int64]]:
    """The people in image pixels.

    Args:
        points: keypoints in pixels of their view, [B, K, 2].
        values: scores of the keypoints, [B, K].
        matrices: from image to view, [B, 2, 3].
        boxes: factors of the people's scores, [B].
        threshold: as in `poses`.

    Returns:
        Keypoints [B, K, 3], scores [B], whether there is a person [B], and whether a point, a score or a factor is not finite
        [B].
    """
    B, K = values.shape
    keypoints, scores = np.zeros((B, K, 3), np.float32), np.zeros(B, np.float32)
    found, strange = np.zeros(B, np.int64), np.zeros(B, np.int64)
    for n in range(B):
        a, b, x0 = matrices[n, 0, 0], matrices[n, 0, 1], matrices[n, 0, 2]
        c, d, y0 = matrices[n, 1, 0], matrices[n, 1, 1], matrices[n, 1, 2]
        area = a * d - b * c
        total, count = 0.0, 0
        for k in range(K):
            value = values[n, k]
            if not np.isfinite(value):
                strange[n] = 1
                continue
            if value <= 0:
                continue
            x, y = points[n, k, 0] - x0, points[n, k, 1] - y0
            column, row = np.float32((d * x - b * y) / area), np.float32((a * y - c * x) / area)
            if not (np.isfinite(column) and np.isfinite(row)):
                strange[n] = 1
                continue
            keypoints[n, k, 0], keypoints[n, k, 1], keypoints[n, k, 2] = column, row, value
            if value > threshold:
                total += value
                count += 1
        if not np.isfinite(boxes[n]):
            strange[n] = 1
        elif count:
            found[n] = 1
            scores[n] = total / count * boxes[n]
    return keypoints, scores, found, strange


@compiled
def _suppressed(points: F64, areas: F64, order: NDArray[np.int64], variances: F64, most: float) -> NDArray[np.bool_]:
    """Which poses a better one resembles with an OKS above `most`.

    Args:
        points: keypoints, [N, K, 3].
        areas: of the people's boxes, [N].
        order: the poses, best first, [N].
        variances: squares of the keypoints' doubled OKS deviations, [K].
        most: greatest OKS of two people.
    """
    N, K = points.shape[:2]
    gone = np.zeros(N, np.bool_)
    for i in range(N):
        better = order[i]
        if gone[better]:
            continue
        for j in range(i + 1, N):
            other = order[j]
            if gone[other]:
                continue
            area = (areas[better] + areas[other]) / 2 + 1e-9
            total = 0.0
            for k in range(K):
                dx, dy = points[better, k, 0] - points[other, k, 0], points[better, k, 1] - points[other, k, 1]
                total += np.exp(-(dx * dx + dy * dy) / variances[k] / area / 2)
            gone[other] = total / K > most
    return gone


def merged(parts: Sequence[Poses], views: Sequence[View], skeleton: Skeleton, nms_oks: float) -> Poses:
    """All people of an image; of two that resemble each other the one with the lower score is left out.

    Args:
        parts: the poses of each view, at most one person.
        views: the views.
        skeleton: the network's skeleton.
        nms_oks: greatest OKS of two people, 0 to 1; the mean area of their boxes is the OKS's area. 1 keeps all.
    """
    K = len(skeleton.names)
    keypoints = np.concatenate([np.zeros((0, K, 3), np.float32), *(part.keypoints for part in parts)])
    scores = np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)])
    boxes = [view.box or (0.0, 0.0, 0.0, 0.0) for part, view in zip(parts, views, strict=True) if len(part.scores)]
    rows = np.array(boxes, np.float32).reshape(-1, 4)
    counts = {"images_not_finite": int(any(part.counts["images_not_finite"] for part in parts))}
    if nms_oks < 1 and len(scores) > 1:
        order = np.argsort(-scores, kind="stable")
        areas = (rows[:, 2] * rows[:, 3]).astype(np.float64)
        kept = ~_suppressed(keypoints.astype(np.float64), areas, order, (2 * np.array(skeleton.oks_sigmas)) ** 2, nms_oks)
        keypoints, scores, rows = keypoints[kept], scores[kept], rows[kept]
    return Poses(keypoints, scores, counts=counts, boxes=rows)
