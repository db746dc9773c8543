"""Drawing of predicted poses on their image."""

import numpy as np
from numpy.typing import NDArray

from posepress.labels import Skeleton
from posepress.results import Poses

_COLOURS = ((255, 120, 40), (60, 180, 255), (120, 220, 80), (230, 90, 200), (250, 210, 60), (110, 110, 255))


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
