"""Suppression of boxes that overlap a better one, in bounded time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled

F32 = NDArray[np.float32]


@compiled
def suppress(
    boxes: NDArray[Any], scores: NDArray[Any], middles: bool, threshold: float, nms_iou: float, most: tuple[int, int]
) -> tuple[NDArray[np.int64], F32]:
    """Boxes that stay, best first.

    The candidates are the boxes above the threshold, and of these the best `most[0]`. So the time is bounded by the product of
    `most`, whatever the network returns. Boxes and scores that are not finite never stay.

    Args:
        boxes: x1, y1, x2, y2, or x and y of the middle, width and height; [N, 4].
        scores: [N].
        middles: whether boxes are given by their middles.
        threshold: a candidate's score is greater.
        nms_iou: greatest intersection over union with a better box; 1 keeps all.
        most: greatest numbers of candidates and of boxes that stay.

    Returns:
        Indices [M], and corners x1, y1, x2, y2 [M, 4].
    """
    N = scores.shape[0]
    rows = np.empty(N, np.int64)
    count = 0
    for n in range(N):
        if scores[n] > threshold and scores[n] < np.inf:
            rows[count] = n
            count += 1
    values = np.empty(count, np.float32)
    for n in range(count):
        values[n] = -scores[rows[n]]
    order = np.argsort(values, kind="mergesort")[: most[0]]
    most_kept = min(most[1], order.shape[0])
    kept, corners, areas = np.empty(most_kept, np.int64), np.empty((most_kept, 4), np.float32), np.empty(most_kept, np.float32)
    size = 0
    for place in order:
        if size == most_kept:
            break
        n = rows[place]
        x1, y1, x2, y2 = boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3]
        if middles:
            half_width, half_height = x2 / 2, y2 / 2
            x1, y1, x2, y2 = x1 - half_width, y1 - half_height, x1 + half_width, y1 + half_height
        area = (x2 - x1) * (y2 - y1)
        if not (x2 > x1 and y2 > y1 and area < np.inf):  # also a box that is not finite
            continue
        free = True
        for k in range(size if nms_iou < 1 else 0):
            width = min(x2, corners[k, 2]) - max(x1, corners[k, 0])
            height = min(y2, corners[k, 3]) - max(y1, corners[k, 1])
            if width > 0 and height > 0 and width * height > nms_iou * (area + areas[k] - width * height):
                free = False
                break
        if free:
            kept[size], areas[size] = n, area
            corners[size, 0], corners[size, 1], corners[size, 2], corners[size, 3] = x1, y1, x2, y2
            size += 1
    return kept[:size], corners[:size]
