"""Drawing of people and boxes on their image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_COLOURS = ((255, 120, 40), (60, 180, 255), (120, 220, 80), (230, 90, 200), (250, 210, 60), (110, 110, 255))

SHOWN = 0.3  # least score of a detection in pictures; AP counts fainter ones, too


def draw_people(
    image: NDArray[np.uint8],
    keypoints: NDArray[np.float32],
    limbs: Sequence[tuple[int, int]],
    numbers: Sequence[int],
    captions: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Draw each person in a colour on a copy of an image.

    Args:
        image: RGB [H, W, 3].
        keypoints: x and y in image pixels, and a score; keypoints with a score of 0 are left out. [N, K, 3].
        limbs: pairs of keypoints that a line joins.
        numbers: number of each person, which chooses its colour.
        captions: a text for each person, above its highest keypoint; none writes nothing.
    """
    import cv2

    out = image.copy()
    thick = max(1, round(max(image.shape) / 320))
    for n, person in enumerate(keypoints):
        colour = _COLOURS[numbers[n] % len(_COLOURS)]
        points = np.rint(person[:, :2]).astype(int)
        seen = person[:, 2] > 0
        for a, b in limbs:
            if seen[a] and seen[b]:
                cv2.line(out, points[a].tolist(), points[b].tolist(), colour, 2 * thick, cv2.LINE_AA)
        for point in points[seen]:
            cv2.circle(out, point.tolist(), 2 * thick, (255, 255, 255), -1, cv2.LINE_AA)
        if captions and seen.any():
            x, y = points[seen][points[seen][:, 1].argmin()].tolist()
            at = (max(x, 0), max(y - 6 * thick, 12 * thick))
            for shade, width in (((0, 0, 0), 3 * thick), (colour, thick)):
                cv2.putText(out, captions[n], at, cv2.FONT_HERSHEY_SIMPLEX, 0.4 * thick, shade, width, cv2.LINE_AA)
    return out


def draw_boxes(
    image: NDArray[np.uint8], xywh: NDArray[np.float64], scores: NDArray[np.float64] | None, threshold: float = SHOWN
) -> NDArray[np.uint8]:
    """Draw boxes on a copy of an image.

    Args:
        image: RGB [H, W, 3].
        xywh: x and y of the upper left corner, width and height in image pixels, [N, 4].
        scores: a score for each box, which is written beside it; None for none.
        threshold: least score of a box that is drawn.
    """
    import cv2

    out = image.copy()
    thick = max(1, round(max(image.shape) / 320))
    written = [None] * len(xywh) if scores is None else scores.tolist()
    for n, ((x, y, width, height), score) in enumerate(zip(xywh.tolist(), written, strict=True)):
        if score is not None and score < threshold:
            continue
        colour, corner = _COLOURS[n % len(_COLOURS)], (round(x), round(y))
        cv2.rectangle(out, corner, (round(x + width), round(y + height)), colour, 2 * thick)
        if score is not None:
            cv2.putText(out, f"{score:.2f}", corner, cv2.FONT_HERSHEY_SIMPLEX, 0.4 * thick, colour, thick, cv2.LINE_AA)
    return out
