"""Drawing of predictions on their image."""

import numpy as np
from numpy.typing import NDArray

from posepress.labels import Skeleton
from posepress.results import Boxes, Poses

_COLOURS = ((255, 120, 40), (60, 180, 255), (120, 220, 80), (230, 90, 200), (250, 210, 60), (110, 110, 255))

SHOWN = 0.3  # least score of a detection in pictures; AP counts fainter ones, too


def draw(image: NDArray[np.uint8], found: Poses, labels: Skeleton) -> NDArray[np.uint8]:
    """Draw each person in a colour on a copy of an RGB image [H, W, 3]; filled-in keypoints are left out."""
    import cv2

    out = image.copy()
    thick = max(1, round(max(image.shape) / 320))
    for n, keypoints in enumerate(found.as_found().keypoints):
        colour = _COLOURS[n % len(_COLOURS)]
        points = np.rint(keypoints[:, :2]).astype(int)
        seen = keypoints[:, 2] > 0
        for a, b in labels.limbs:
            if seen[a] and seen[b]:
                cv2.line(out, points[a].tolist(), points[b].tolist(), colour, 2 * thick, cv2.LINE_AA)
        for point in points[seen]:
            cv2.circle(out, point.tolist(), 2 * thick, (255, 255, 255), -1, cv2.LINE_AA)
    return out


def draw_boxes(image: NDArray[np.uint8], found: Boxes) -> NDArray[np.uint8]:
    """Draw boxes on a copy of an RGB image [H, W, 3], each with its score; those below `SHOWN` are left out."""
    import cv2

    out = image.copy()
    thick = max(1, round(max(image.shape) / 320))
    scores = [None] * len(found.xywh) if found.scores is None else found.scores.tolist()
    for n, ((x, y, width, height), score) in enumerate(zip(found.xywh.tolist(), scores, strict=True)):
        if score is not None and score < SHOWN:
            continue
        colour, corner = _COLOURS[n % len(_COLOURS)], (round(x), round(y))
        cv2.rectangle(out, corner, (round(x + width), round(y + height)), colour, 2 * thick)
        if score is not None:
            cv2.putText(out, f"{score:.2f}", corner, cv2.FONT_HERSHEY_SIMPLEX, 0.4 * thick, colour, thick, cv2.LINE_AA)
    return out
