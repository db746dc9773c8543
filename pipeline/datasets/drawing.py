"""Drawing of articulated people in front of clutter, with their labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from pipeline.datasets.canvas import F64, Canvas, Paint
from pipeline.datasets.drawn_labels import annotation, label
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17

_BACKGROUND, _CROWD, _CLUTTER = -1, -2, -3

# Joints in body coordinates as fractions of the person's height: x to the person's left, y down, z forward.
_TORSO = {
    "neck": (0.0, 0.18, 0.0),
    "left_shoulder": (0.105, 0.2, 0.0),
    "right_shoulder": (-0.105, 0.2, 0.0),
    "left_hip": (0.06, 0.5, 0.0),
    "right_hip": (-0.06, 0.5, 0.0),
}

_FACE = {
    "head": (0.0, 0.095, 0.0),
    "nose": (0.0, 0.105, 0.078),
    "left_eye": (0.03, 0.085, 0.064),
    "right_eye": (-0.03, 0.085, 0.064),
    "left_ear": (0.064, 0.095, 0.0),
    "right_ear": (-0.064, 0.095, 0.0),
}

_ARM, _FOREARM, _THIGH, _SHIN = 0.165, 0.155, 0.235, 0.225

SKINS = np.array([[236, 200, 170], [224, 172, 138], [190, 134, 98], [141, 92, 62], [92, 58, 40]], np.float32)


@dataclass(frozen=True)
class Preset:
    """The difficulty of generated images.

    Attributes:
        size: size of the images, in pixels.
        people: smallest and largest number of people.
        heights: smallest and largest height of a person, as a fraction of the image's height.
        clutter: largest number of objects behind the people.
        occluders: largest number of objects in front of the people.
        crowds: share of images with a crowd region, 0 to 1.
        turned: share of people who show their side or back, 0 to 1.
        cut: largest distance of a person's middle from the image, as a fraction of the person's height.
    """

    size: Resolution
    people: tuple[Annotated[int, Interval(ge=0, le=100)], Annotated[int, Interval(ge=0, le=100)]]
    heights: tuple[Annotated[float, Interval(gt=0, le=10)], Annotated[float, Interval(gt=0, le=10)]]
    clutter: Annotated[int, Interval(ge=0, le=1000)]
    occluders: Annotated[int, Interval(ge=0, le=1000)]
    crowds: Annotated[float, Interval(ge=0, le=1)]
    turned: Annotated[float, Interval(ge=0, le=1)]
    cut: Annotated[float, Interval(ge=0, le=1)]

    category: ClassVar[str] = "person"
    skeleton: ClassVar[Skeleton] = COCO_17

    @property
    def version(self) -> int:
        """Version of the drawing."""
        return VERSION

    def draw(self, seed: Sequence[int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
        """Draw one image and return it with its COCO annotations; see `generate`."""
        return generate(self, seed)

    def __post_init__(self) -> None:
        """Check that no minimum exceeds its maximum.

        Raises:
            UserError: a minimum is larger than its maximum.
        """
        ordered(self, "people", "heights")


def ordered(preset: object, *options: str) -> None:
    """Check that each of a preset's options, a minimum and a maximum, is in that order.

    Raises:
        UserError: a minimum is larger than its maximum.
    """
    for option in options:
        least, most = getattr(preset, option)
        if not least <= most:
            raise UserError(f"data.preset.{option}=[{least},{most}]: give the least first, then the most")


def rotation(axis: int, angle: float) -> F64:
    """The matrix of a rotation about an axis, 0 for x, 1 for y and 2 for z."""
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _pose(draw: np.random.Generator, preset: Preset) -> dict[str, F64]:
    """Draw a random pose and return the joints of a person of height 1 after all rotations, z towards the viewer."""
    width = draw.uniform(0.85, 1.2)
    joints = {name: np.array(at) * (width, 1, 1) for name, at in _TORSO.items()}
    nod = rotation(1, draw.normal(0, 0.35)) @ rotation(0, draw.normal(0, 0.15)) @ rotation(2, draw.normal(0, 0.12))
    pivot = joints["neck"]
    joints |= {name: pivot + nod @ (np.array(at) - pivot) for name, at in _FACE.items()}
    sitting = draw.random() < 0.2
    for side, sign in (("left", 1.0), ("right", -1.0)):
        lift = draw.uniform(0.05, 0.6) if draw.random() < 0.65 else draw.uniform(0.6, 2.6)
        reach = draw.normal(0, 0.5)
        arm = rotation(0, reach) @ rotation(2, -sign * lift)
        down = np.array([0.0, 1.0, 0.0])
        joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + _ARM * (arm @ down)
        bend = arm @ rotation(1, draw.uniform(-1.2, 1.2)) @ rotation(0, abs(draw.normal(0, 0.9)))
        joints[f"{side}_wrist"] = joints[f"{side}_elbow"] + _FOREARM * (bend @ down)
        flex = draw.uniform(1.0, 1.6) if sitting else draw.normal(0.1, 0.3)
        leg = rotation(2, -sign * abs(draw.normal(0.05, 0.15))) @ rotation(0, flex)
        joints[f"{side}_knee"] = joints[f"{side}_hip"] + _THIGH * (leg @ down)
        shin = leg @ rotation(0, -(flex if sitting else abs(draw.normal(0, 0.4))))
        joints[f"{side}_ankle"] = joints[f"{side}_knee"] + _SHIN * (shin @ down)
        joints[f"{side}_toe"] = joints[f"{side}_ankle"] + 0.06 * (shin @ np.array([0.0, 0.3, 1.0]))
    turn = draw.uniform(-np.pi, np.pi) if draw.random() < preset.turned else draw.normal(0, 0.35)
    lean = rotation(2, draw.normal(0, 0.12)) @ rotation(0, draw.normal(0, 0.12)) @ rotation(1, turn)
    middle = (joints["left_hip"] + joints["right_hip"]) / 2
    return {name: lean @ (at - middle) for name, at in joints.items()}


def _paint(draw: np.random.Generator, plain: float = 0.6) -> Paint:
    base, other = draw.uniform(15, 240, (2, 3)).astype(np.float32)
    stripes = 0.0 if draw.random() < plain else float(draw.uniform(1, 5))
    return Paint(base, other, stripes, bool(draw.random() < 0.4))


def _noise(draw: np.random.Generator, H: int, W: int) -> NDArray[np.float32]:
    """Draw smooth coloured noise of several octaves with values of about -1 to 1, [H, W, 3]."""
    total = np.zeros((H, W, 3), np.float32)
    for cells in (3, 6, 14, 40):
        grid = draw.normal(0, 1, (cells + 1, cells + 1, 3)).astype(np.float32)
        grid = 0.5 * grid + 0.5 * grid.mean(axis=2, keepdims=True)
        y, x = np.linspace(0, cells, H, endpoint=False), np.linspace(0, cells, W, endpoint=False)
        i, j = y.astype(int), x.astype(int)
        fy, fx = (y - i).astype(np.float32)[:, None, None], (x - j).astype(np.float32)[None, :, None]
        rows = grid[i] * (1 - fy) + grid[i + 1] * fy
        total += (rows[:, j] * (1 - fx) + rows[:, j + 1] * fx) * np.float32(1.2 / np.sqrt(cells))
    return total


def background(draw: np.random.Generator, size: Resolution) -> NDArray[np.float32]:
    """Smooth noise, with a floor in half of the images, [H, W, 3]."""
    base = draw.uniform(40, 215, 3).astype(np.float32)
    image = base + draw.uniform(15, 60) * _noise(draw, size.height, size.width)
    if draw.random() < 0.5:  # a floor
        horizon = int(draw.uniform(0.4, 0.9) * size.height)
        image[horizon:] = draw.uniform(40, 215, 3) + 0.5 * (image[horizon:] - base)
    return image


def clutter(draw: np.random.Generator, canvas: Canvas, count: int) -> None:
    """Draw objects of random shape in the colours of clothes and skin."""
    H, W = canvas.owner.shape
    for _ in range(count):
        at = draw.uniform((0, 0), (W, H))
        length, angle = draw.uniform(0.05, 0.5) * H, draw.uniform(0, np.pi)
        to = at + length * np.array([np.cos(angle), np.sin(angle)])
        radius = draw.uniform(0.01, 0.07) * H
        paint = _paint(draw)
        if draw.random() < 0.2:
            skin = SKINS[draw.integers(len(SKINS))]
            paint = Paint(skin, skin)
        canvas.capsule(at.tolist(), to.tolist(), (radius, radius * draw.uniform(0.5, 1.5)), paint, _CLUTTER)


def _draw_person(draw: np.random.Generator, canvas: Canvas, joints: dict[str, F64], scale: float, owner: int) -> None:
    """Draw a posed person with joints in pixels. Body parts are numbered as in `_OWN_PARTS`."""
    skin_colour = SKINS[draw.integers(len(SKINS))] * np.float32(draw.uniform(0.85, 1.1))
    skin = Paint(skin_colour, skin_colour)
    hair_colour = draw.choice(np.array([[25, 20, 18], [70, 45, 25], [150, 110, 60], [120, 120, 120]], np.float32))
    hair = Paint(hair_colour, hair_colour)
    shirt, trousers, shoes = _paint(draw), _paint(draw, 0.85), _paint(draw, 1.0)
    sleeves, shorts = draw.random() < 0.5, draw.random() < 0.3
    thick = draw.uniform(0.85, 1.25) * scale
    Part = tuple[str, str, float, float, Paint, int]
    parts: list[Part] = []
    for n, side in enumerate(("left", "right")):
        shoulder, elbow, wrist, hip, knee, ankle, toe = (
            f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle", "toe")
        )
        parts += [
            (hip, knee, 0.055, 0.042, trousers, 10 + n),
            (knee, ankle, 0.04, 0.026, skin if shorts else trousers, 20 + n),
            (ankle, toe, 0.027, 0.02, shoes, 30 + n),
            (shoulder, elbow, 0.036, 0.03, shirt, 40 + n),
            (elbow, wrist, 0.028, 0.021, shirt if sleeves else skin, 50 + n),
            (wrist, wrist, 0.025, 0.025, skin, 60 + n),
        ]

    def depth(part: Part) -> float:
        return float(joints[part[0]][2] + joints[part[1]][2]) / 2

    def limb(part: Part) -> None:
        a, b, ra, rb, paint, number = part
        canvas.capsule(joints[a][:2].tolist(), joints[b][:2].tolist(), (ra * thick, rb * thick), paint, owner, number)

    torso: list[Part] = [
        ("left_hip", "right_hip", 0.05, 0.05, trousers, 1),
        ("left_shoulder", "left_hip", 0.045, 0.045, shirt, 1),
        ("right_shoulder", "right_hip", 0.045, 0.045, shirt, 1),
        ("neck", "left_hip", 0.05, 0.045, shirt, 1),
        ("neck", "right_hip", 0.05, 0.045, shirt, 1),
        ("left_shoulder", "right_shoulder", 0.04, 0.04, shirt, 1),
    ]
    middle = float(np.mean([joints[name][2] for name in _TORSO]))
    ordered = sorted(parts, key=depth)
    for part in [p for p in ordered if depth(p) <= middle]:
        limb(part)
    for part in torso:
        limb(part)
    _draw_head(canvas, joints, thick, owner, skin, hair)
    for part in [p for p in ordered if depth(p) > middle]:
        limb(part)


def _draw_head(canvas: Canvas, joints: dict[str, F64], thick: float, owner: int, skin: Paint, hair: Paint) -> None:
    neck, head, nose = joints["neck"], joints["head"], joints["nose"]
    canvas.capsule(neck[:2].tolist(), head[:2].tolist(), (0.03 * thick, 0.035 * thick), skin, owner, 2)
    up = head - neck
    crown, chin = head + 0.35 * up, head - 0.3 * up
    canvas.capsule(crown[:2].tolist(), chin[:2].tolist(), (0.06 * thick, 0.052 * thick), hair, owner, 2)
    facing = nose - head
    if facing[2] > -0.25 * np.linalg.norm(facing):  # the face is turned to the viewer
        low, high = chin + 0.35 * facing, head + 0.3 * facing
        canvas.capsule(high[:2].tolist(), low[:2].tolist(), (0.047 * thick, 0.04 * thick), skin, owner, 2)
    dark = Paint(np.array([20, 16, 14], np.float32), np.zeros(3, np.float32))
    red = Paint(skin.base * np.array([0.85, 0.6, 0.55], np.float32), skin.base)
    for name, paint, radius in (
        ("left_ear", skin, 0.017),
        ("right_ear", skin, 0.017),
        ("left_eye", dark, 0.0115),
        ("right_eye", dark, 0.0115),
        ("nose", red, 0.014),
    ):
        at = joints[name]
        # An ear is visible unless it is well behind the head; eyes and nose are visible from the front only.
        if at[2] - head[2] > (-0.02 if "ear" in name else 0.012) * thick:
            point = at[:2].tolist()
            canvas.capsule(point, point, (radius * thick, radius * thick), paint, owner, 3)


def generate(preset: Preset, seed: Sequence[int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Draw one image and return it with its COCO annotations.

    Args:
        preset: difficulty of the image.
        seed: any integers; equal seeds give equal images.

    Returns:
        uint8 [H, W, 3], RGB; and COCO annotation records without ids.
    """
    draw = np.random.default_rng([VERSION, *seed])
    size = preset.size
    H, W = size.height, size.width
    blank = np.full((H, W), _BACKGROUND, np.int16)
    canvas = Canvas(background(draw, size), blank, np.zeros((H, W), np.int16))
    clutter(draw, canvas, int(draw.integers(0, preset.clutter + 1)))
    if draw.random() < preset.crowds:
        at = np.array([draw.uniform(0.2 * W, 0.8 * W), draw.uniform(0.2 * H, 0.7 * H)])
        for _ in range(int(draw.integers(4, 9))):
            small = draw.uniform(0.1, 0.16) * H
            place = np.array([*(at + draw.normal(0, 0.07, 2) * (W, 0.4 * H)), 0.0])
            joints = {name: place + joint * small for name, joint in _pose(draw, preset).items()}
            _draw_person(draw, canvas, joints, small, _CROWD)
    crowd = canvas.owner == _CROWD

    count = int(draw.integers(preset.people[0], preset.people[1] + 1))
    least, most = np.log(preset.heights).tolist()
    heights = np.sort(np.exp(draw.uniform(least, most, count))) * H  # small people are farther away, so they are drawn first
    people: list[tuple[dict[str, F64], float]] = []
    middles: list[F64] = []
    for owner, scale in enumerate(heights.tolist()):
        margin = (0.25 - preset.cut) * scale
        for _ in range(12):  # try to find a place away from other people
            low = (min(margin, W / 2), min(0.45 * scale, H / 2))
            high = (max(W - margin, W / 2), max(H - 0.35 * scale, H / 2))
            middle = np.array([draw.uniform(low[0], high[0]), draw.uniform(low[1], high[1])])
            if all(abs(middle[0] - m[0]) > 0.3 * scale for m in middles):
                break
        middles.append(middle)
        at = np.array([*middle, 0.0])
        joints = {name: at + joint * scale for name, joint in _pose(draw, preset).items()}
        _draw_person(draw, canvas, joints, scale, owner)
        people.append((joints, scale))
    clutter(draw, canvas, int(draw.integers(0, preset.occluders + 1)))

    annotations = []
    for owner, (joints, scale) in enumerate(people):
        mask = canvas.owner == owner
        if mask.sum() < 24:
            continue
        keypoints = label(canvas, joints, scale, owner)
        few = (keypoints[:, 2] == 2).sum() < 3 or mask.sum() < 0.01 * scale * scale
        annotations.append(annotation(mask, None if few else keypoints))
    crowd &= canvas.owner == _CROWD
    if crowd.sum() >= 24:
        annotations.append({**annotation(crowd, None), "iscrowd": 1})
    return finished(draw, canvas), annotations


def finished(draw: np.random.Generator, canvas: Canvas) -> NDArray[np.uint8]:
    """The image of a canvas as a camera would take it: with another brightness and contrast, and with grain."""
    gain, shift = draw.uniform(0.75, 1.2), draw.uniform(-15, 15)
    grain = draw.standard_normal(canvas.image.shape, np.float32) * np.float32(draw.uniform(1, 7))
    image = canvas.image * np.float32(gain) + np.float32(shift) + grain
    return np.clip(np.rint(image, out=image), 0, 255, out=image).astype(np.uint8)


VERSION = 1  # raise it with every change of a pixel or a label
