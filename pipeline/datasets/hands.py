"""Drawing of hands in front of clutter, with their labels: a skeleton of 21 points."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from pipeline.datasets.canvas import F64, Canvas, Paint
from pipeline.datasets.drawing import SKINS, background, clutter, finished, ordered, rotation
from pipeline.datasets.drawn_labels import annotation
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import HAND_21

VERSION = 1  # raise it with every change of a pixel or a label

# In hand coordinates as fractions of its length: x to the little finger, y down from the finger tips, the wrist at (0, 0).
_KNUCKLES = {
    "thumb": (-0.1, -0.1), "index": (-0.13, -0.46), "middle": (-0.03, -0.48), "ring": (0.07, -0.45), "little": (0.16, -0.4),
}  # fmt: skip
_PHALANGES = {
    "thumb": (0.18, 0.15, 0.12), "index": (0.22, 0.13, 0.1), "middle": (0.25, 0.15, 0.11), "ring": (0.23, 0.14, 0.11),
    "little": (0.18, 0.1, 0.09),
}  # fmt: skip
_SPREAD = {"thumb": -0.75, "index": -0.12, "middle": -0.02, "ring": 0.1, "little": 0.22}  # angle from straight up, in radians
_THICK = {"thumb": 0.055, "index": 0.045, "middle": 0.047, "ring": 0.044, "little": 0.037}
_PALM, _FEW = 1, 8  # number of the palm's part, and least number of visible points of a labelled hand


@dataclass(frozen=True)
class Hands:
    """The difficulty of generated images of hands.

    Attributes:
        size: size of the images, in pixels.
        hands: smallest and largest number of hands.
        lengths: smallest and largest length of a hand, as a fraction of the image's height.
        clutter: largest number of objects behind the hands.
        turned: standard deviation of a hand's rotation out of the image's plane, in radians.
    """

    size: Resolution
    hands: tuple[Annotated[int, Interval(ge=0, le=100)], Annotated[int, Interval(ge=0, le=100)]] = (1, 2)
    lengths: tuple[Annotated[float, Interval(gt=0, le=10)], Annotated[float, Interval(gt=0, le=10)]] = (0.4, 0.8)
    clutter: Annotated[int, Interval(ge=0, le=1000)] = 6
    turned: Annotated[float, Interval(ge=0, le=3)] = 0.3

    category: ClassVar[str] = "hand"
    skeleton: ClassVar[Skeleton] = HAND_21
    version: ClassVar[str] = f"hands-{VERSION}"

    def __post_init__(self) -> None:
        """Check that no minimum exceeds its maximum.

        Raises:
            UserError: a minimum is larger than its maximum.
        """
        ordered(self, "hands", "lengths")

    def draw(self, seed: Sequence[int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
        """Draw one image; see `pipeline.datasets.drawing.Preset.draw`."""
        draw = np.random.default_rng([VERSION, 21, *seed])
        H, W = self.size.height, self.size.width
        canvas = Canvas(background(draw, self.size), np.full((H, W), -1, np.int16), np.zeros((H, W), np.int16))
        clutter(draw, canvas, int(draw.integers(0, self.clutter + 1)))
        hands: list[F64] = []
        for owner in range(int(draw.integers(self.hands[0], self.hands[1] + 1))):
            length = draw.uniform(*self.lengths) * H
            middle = draw.uniform((0.2 * W, 0.3 * H), (0.8 * W, 0.7 * H))
            points = _pose(draw, self.turned) * length
            points += np.append(middle - points[:, :2].mean(axis=0), 0)
            _draw_hand(draw, canvas, points, length, owner)
            hands.append(points)
        annotations = []
        for owner, points in enumerate(hands):
            mask = canvas.owner == owner
            if mask.sum() >= 24:  # COCO's annotators leave out what is hidden
                annotations.append(annotation(mask, _label(canvas, points, owner)))
        return finished(draw, canvas), annotations


def _pose(draw: np.random.Generator, turned: float) -> F64:
    """The 21 points of a hand of length 1, z towards the viewer."""
    points = [np.zeros(3)]
    for finger, knuckle in _KNUCKLES.items():
        at = np.array([*knuckle, 0.0])
        points.append(at)
        spread = rotation(2, _SPREAD[finger] + draw.normal(0, 0.08))
        curl = abs(draw.normal(0, 0.35)) if draw.random() < 0.7 else draw.uniform(0.5, 1.3)
        bend = 0.0
        for n, length in enumerate(_PHALANGES[finger]):
            bend += curl * (0.5 if n == 0 or finger == "thumb" else 1.0)
            at = at + length * (spread @ rotation(0, -bend) @ np.array([0.0, -1.0, 0.0]))
            points.append(at)
    side = draw.choice([-1.0, 1.0])  # a left or a right hand
    turn = rotation(2, draw.normal(0, 0.5)) @ rotation(0, draw.normal(0, turned)) @ rotation(1, draw.normal(0, turned))
    return np.array(points) * (side, 1, 1) @ turn.T


def _draw_hand(draw: np.random.Generator, canvas: Canvas, points: F64, length: float, owner: int) -> None:
    """Draw a hand with points in pixels, distant parts first; the phalanges of finger f are the parts 10 f + 10, + 11, + 12."""
    colour = SKINS[draw.integers(len(SKINS))] * np.float32(draw.uniform(0.85, 1.1))
    thick = draw.uniform(0.9, 1.15) * length
    nails = Paint(np.minimum(colour * np.float32(1.12), 255), colour)
    parts: list[tuple[float, int, int, float, Paint, int]] = []
    for f, finger in enumerate(_KNUCKLES):
        knuckle = 1 + 4 * f
        wide = 0.06 if finger != "thumb" else 0.075
        parts.append((min(points[0, 2], points[knuckle, 2]) - 1e-3, 0, knuckle, wide, Paint(colour, colour), _PALM))
        for n in range(3):
            a, b = knuckle + n, knuckle + n + 1
            shade = np.float32(1 - 0.05 * n)
            paint = nails if n == 2 else Paint(colour * shade, colour)
            parts.append((float(points[a, 2] + points[b, 2]) / 2, a, b, _THICK[finger] * (1 - 0.1 * n), paint, 10 * f + 10 + n))
    for _, a, b, radius, paint, number in sorted(parts, key=lambda part: part[0]):
        ends = (radius * thick, 0.9 * radius * thick)
        canvas.capsule(points[a, :2].tolist(), points[b, :2].tolist(), ends, paint, owner, number)


def _label(canvas: Canvas, points: F64, owner: int) -> NDArray[np.float64]:
    """Keypoints [21, 3]: 2 visible, 1 behind another part or thing, 0 outside the image; all 0 if too few are visible."""
    H, W = canvas.owner.shape
    labels = np.zeros((len(points), 3))
    for k, (x, y, _) in enumerate(points):
        i, j = round(y), round(x)
        if not (0 <= i < H and 0 <= j < W):
            continue
        finger, joint = divmod(k - 1, 4)
        own = {_PALM} if joint == 0 or k == 0 else set()
        own |= {10 * finger + 10 + n for n in (joint - 1, joint) if k and 0 <= n < 3}
        seen = canvas.owner[i, j] == owner and canvas.part[i, j] in own
        labels[k] = (round(x, 2), round(y, 2), 2 if seen else 1)
    return labels if (labels[:, 2] == 2).sum() >= _FEW else np.zeros_like(labels)
