"""A generated data set of people in COCO's format, drawn from a seed with numpy alone.

A person is a skeleton in three dimensions that is posed by random joint angles and then projected. Its body is drawn as
tapered capsules, distant ones first. The owner of each pixel is recorded, so that masks, areas, boxes and the visibility of
keypoints match the image.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from pipeline.datasets.coco import SPLITS, CocoSplits
from pipeline.datasets.coco_split import Coco
from pipeline.probing import processes
from posepress.errors import UserError
from posepress.skeletons import COCO_17
from posepress.spec import Resolution

VERSION = 1  # raise it with every change of a pixel or a label

F64 = NDArray[np.float64]
Colour = NDArray[np.float32]

_NOBODY, _CROWD, _CLUTTER = -1, -2, -3

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
_SKINS = np.array([[236, 200, 170], [224, 172, 138], [190, 134, 98], [141, 92, 62], [92, 58, 40]], np.float32)


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

    def __post_init__(self) -> None:
        """Check that no minimum exceeds its maximum.

        Raises:
            UserError: a minimum is larger than its maximum.
        """
        for option in ("people", "heights"):
            least, most = getattr(self, option)
            if not least <= most:
                raise UserError(f"data.preset.{option}=[{least},{most}]: give the least first, then the most")


def _rotation(axis: int, angle: float) -> F64:
    c, s = np.cos(angle), np.sin(angle)
    matrix = np.eye(3)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def _pose(draw: np.random.Generator, preset: Preset) -> dict[str, F64]:
    """Draw a random pose and return the joints of a person of height 1 after all rotations, z towards the viewer."""
    width = draw.uniform(0.85, 1.2)
    joints = {name: np.array(at) * (width, 1, 1) for name, at in _TORSO.items()}
    nod = _rotation(1, draw.normal(0, 0.35)) @ _rotation(0, draw.normal(0, 0.15)) @ _rotation(2, draw.normal(0, 0.12))
    pivot = joints["neck"]
    joints |= {name: pivot + nod @ (np.array(at) - pivot) for name, at in _FACE.items()}
    sitting = draw.random() < 0.2
    for side, sign in (("left", 1.0), ("right", -1.0)):
        lift = draw.uniform(0.05, 0.6) if draw.random() < 0.65 else draw.uniform(0.6, 2.6)
        reach = draw.normal(0, 0.5)
        arm = _rotation(0, reach) @ _rotation(2, -sign * lift)
        down = np.array([0.0, 1.0, 0.0])
        joints[f"{side}_elbow"] = joints[f"{side}_shoulder"] + _ARM * (arm @ down)
        bend = arm @ _rotation(1, draw.uniform(-1.2, 1.2)) @ _rotation(0, abs(draw.normal(0, 0.9)))
        joints[f"{side}_wrist"] = joints[f"{side}_elbow"] + _FOREARM * (bend @ down)
        flex = draw.uniform(1.0, 1.6) if sitting else draw.normal(0.1, 0.3)
        leg = _rotation(2, -sign * abs(draw.normal(0.05, 0.15))) @ _rotation(0, flex)
        joints[f"{side}_knee"] = joints[f"{side}_hip"] + _THIGH * (leg @ down)
        shin = leg @ _rotation(0, -(flex if sitting else abs(draw.normal(0, 0.4))))
        joints[f"{side}_ankle"] = joints[f"{side}_knee"] + _SHIN * (shin @ down)
        joints[f"{side}_toe"] = joints[f"{side}_ankle"] + 0.06 * (shin @ np.array([0.0, 0.3, 1.0]))
    turn = draw.uniform(-np.pi, np.pi) if draw.random() < preset.turned else draw.normal(0, 0.35)
    lean = _rotation(2, draw.normal(0, 0.12)) @ _rotation(0, draw.normal(0, 0.12)) @ _rotation(1, turn)
    middle = (joints["left_hip"] + joints["right_hip"]) / 2
    return {name: lean @ (at - middle) for name, at in joints.items()}


@dataclass
class _Canvas:
    """The pixels of an image, with the person and the body part of each pixel."""

    image: NDArray[np.float32]
    owner: NDArray[np.int16]
    part: NDArray[np.int16]

    def capsule(
        self,
        a: Sequence[float],
        b: Sequence[float],
        radii: tuple[float, float],
        paint: "_Paint",
        owner: int,
        part: int = 0,
    ) -> None:
        """Draw a tapered capsule between points (x, y), antialiased and shaded towards its rim."""
        H, W = self.owner.shape
        reach = max(radii) + 1.5
        x0, x1 = int(max(min(a[0], b[0]) - reach, 0)), int(min(max(a[0], b[0]) + reach + 1, W))
        y0, y1 = int(max(min(a[1], b[1]) - reach, 0)), int(min(max(a[1], b[1]) + reach + 1, H))
        if x0 >= x1 or y0 >= y1:
            return
        ys, xs = np.ogrid[y0:y1, x0:x1]
        px, py = (xs - a[0]).astype(np.float32), (ys - a[1]).astype(np.float32)
        dx, dy = b[0] - a[0], b[1] - a[1]
        along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-6), 0, 1)
        across = np.hypot(px - along * dx, py - along * dy)
        radius = radii[0] + along * (radii[1] - radii[0])
        alpha = np.clip(radius - across + 0.5, 0, 1)
        if not alpha.any():
            return
        rim = np.clip(across / np.maximum(radius, 0.5), 0, 1)
        colour = paint.colour(along, across, radius) * (1.08 - 0.5 * rim**3)[..., None]
        window = self.image[y0:y1, x0:x1]
        window += alpha[..., None] * (colour - window)
        solid = alpha > 0.5
        self.owner[y0:y1, x0:x1][solid] = owner
        self.part[y0:y1, x0:x1][solid] = part


@dataclass(frozen=True)
class _Paint:
    """A texture: one colour, or stripes of two colours."""

    base: Colour
    other: Colour
    stripes: float = 0.0
    across: bool = False

    def colour(self, along: Any, across: Any, radius: Any) -> NDArray[np.float32]:
        if not self.stripes:
            return np.broadcast_to(self.base, (*np.shape(along + across), 3))
        phase = across / np.maximum(radius, 1) * 2 if self.across else along * self.stripes
        mix = (np.sin(2 * np.pi * phase) > 0)[..., None]
        return np.where(mix, self.base, self.other).astype(np.float32)


def _paint(draw: np.random.Generator, plain: float = 0.6) -> _Paint:
    base, other = draw.uniform(15, 240, (2, 3)).astype(np.float32)
    stripes = 0.0 if draw.random() < plain else float(draw.uniform(1, 5))
    return _Paint(base, other, stripes, bool(draw.random() < 0.4))


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


def _background(draw: np.random.Generator, size: Resolution) -> NDArray[np.float32]:
    base = draw.uniform(40, 215, 3).astype(np.float32)
    image = base + draw.uniform(15, 60) * _noise(draw, size.height, size.width)
    if draw.random() < 0.5:  # a floor
        horizon = int(draw.uniform(0.4, 0.9) * size.height)
        image[horizon:] = draw.uniform(40, 215, 3) + 0.5 * (image[horizon:] - base)
    return image


def _clutter(draw: np.random.Generator, canvas: _Canvas, count: int) -> None:
    """Draw objects of random shape in the colours of clothes and skin."""
    H, W = canvas.owner.shape
    for _ in range(count):
        at = draw.uniform((0, 0), (W, H))
        length, angle = draw.uniform(0.05, 0.5) * H, draw.uniform(0, np.pi)
        to = at + length * np.array([np.cos(angle), np.sin(angle)])
        radius = draw.uniform(0.01, 0.07) * H
        paint = _paint(draw)
        if draw.random() < 0.2:
            skin = _SKINS[draw.integers(len(_SKINS))]
            paint = _Paint(skin, skin)
        canvas.capsule(at.tolist(), to.tolist(), (radius, radius * draw.uniform(0.5, 1.5)), paint, _CLUTTER)


def _draw_person(draw: np.random.Generator, canvas: _Canvas, joints: dict[str, F64], scale: float, owner: int) -> None:
    """Draw a posed person with joints in pixels. Body parts are numbered as in `_OWN_PARTS`."""
    skin_colour = _SKINS[draw.integers(len(_SKINS))] * np.float32(draw.uniform(0.85, 1.1))
    skin = _Paint(skin_colour, skin_colour)
    hair_colour = draw.choice(np.array([[25, 20, 18], [70, 45, 25], [150, 110, 60], [120, 120, 120]], np.float32))
    hair = _Paint(hair_colour, hair_colour)
    shirt, trousers, shoes = _paint(draw), _paint(draw, 0.85), _paint(draw, 1.0)
    sleeves, shorts = draw.random() < 0.5, draw.random() < 0.3
    thick = draw.uniform(0.85, 1.25) * scale
    Part = tuple[str, str, float, float, _Paint, int]
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


def _draw_head(canvas: _Canvas, joints: dict[str, F64], thick: float, owner: int, skin: _Paint, hair: _Paint) -> None:
    neck, head, nose = joints["neck"], joints["head"], joints["nose"]
    canvas.capsule(neck[:2].tolist(), head[:2].tolist(), (0.03 * thick, 0.035 * thick), skin, owner, 2)
    up = head - neck
    crown, chin = head + 0.35 * up, head - 0.3 * up
    canvas.capsule(crown[:2].tolist(), chin[:2].tolist(), (0.06 * thick, 0.052 * thick), hair, owner, 2)
    facing = nose - head
    if facing[2] > -0.25 * np.linalg.norm(facing):  # the face is turned to the viewer
        low, high = chin + 0.35 * facing, head + 0.3 * facing
        canvas.capsule(high[:2].tolist(), low[:2].tolist(), (0.047 * thick, 0.04 * thick), skin, owner, 2)
    dark = _Paint(np.array([20, 16, 14], np.float32), np.zeros(3, np.float32))
    red = _Paint(skin.base * np.array([0.85, 0.6, 0.55], np.float32), skin.base)
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


_OWN_PARTS = {
    "nose": {2, 3}, "left_eye": {2, 3}, "right_eye": {2, 3}, "left_ear": {2, 3}, "right_ear": {2, 3},
    "left_shoulder": {1, 40}, "right_shoulder": {1, 41}, "left_elbow": {40, 50}, "right_elbow": {41, 51},
    "left_wrist": {50, 60}, "right_wrist": {51, 61}, "left_hip": {1, 10}, "right_hip": {1, 11},
    "left_knee": {10, 20}, "right_knee": {11, 21}, "left_ankle": {20, 30}, "right_ankle": {21, 31},
}  # fmt: skip


def _label(canvas: _Canvas, joints: dict[str, F64], scale: float, owner: int) -> NDArray[np.float64]:
    """Return keypoints [17, 3] as COCO's annotators label them: 2 visible, 1 hidden but guessed, 0 not labelled."""
    H, W = canvas.owner.shape
    keypoints = np.zeros((len(COCO_17.names), 3))
    head = joints["head"]
    for k, name in enumerate(COCO_17.names):
        x, y, z = joints[name]
        i, j = round(y), round(x)
        if not (0 <= i < H and 0 <= j < W):
            continue
        if k < 5 and z - head[2] <= (-0.02 if "ear" in name else 0.012) * scale:
            continue  # annotators do not label points on the far side of the head
        mine = canvas.owner[i, j] == owner
        seen = mine and canvas.part[i, j] in _OWN_PARTS[name]
        if k < 5 and not mine:
            continue
        keypoints[k] = (round(x, 2), round(y, 2), 2 if seen else 1)
    return keypoints


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return COCO's uncompressed run lengths of a mask, column by column."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size])))
    counts = [0, *runs.tolist()] if flat[0] else runs.tolist()
    return {"size": list(mask.shape), "counts": counts}


def _annotation(mask: NDArray[np.bool_], keypoints: F64 | None) -> dict[str, Any]:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    labels = np.zeros((len(COCO_17.names), 3)) if keypoints is None else keypoints
    return {
        "category_id": 1,
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)],
        "segmentation": _run_lengths(mask),
        "num_keypoints": int((labels[:, 2] > 0).sum()),
        "keypoints": [round(float(v), 2) for v in labels.ravel()],
    }


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
    blank = np.full((H, W), _NOBODY, np.int16)
    canvas = _Canvas(_background(draw, size), blank, np.zeros((H, W), np.int16))
    _clutter(draw, canvas, int(draw.integers(0, preset.clutter + 1)))
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
    _clutter(draw, canvas, int(draw.integers(0, preset.occluders + 1)))

    annotations = []
    for owner, (joints, scale) in enumerate(people):
        mask = canvas.owner == owner
        if mask.sum() < 24:
            continue
        keypoints = _label(canvas, joints, scale, owner)
        few = (keypoints[:, 2] == 2).sum() < 3 or mask.sum() < 0.01 * scale * scale
        annotations.append(_annotation(mask, None if few else keypoints))
    crowd &= canvas.owner == _CROWD
    if crowd.sum() >= 24:
        annotations.append({**_annotation(crowd, None), "iscrowd": 1})
    gain, shift = draw.uniform(0.75, 1.2), draw.uniform(-15, 15)
    grain = draw.standard_normal(canvas.image.shape, np.float32) * np.float32(draw.uniform(1, 7))
    image = canvas.image * np.float32(gain) + np.float32(shift) + grain
    return np.clip(np.rint(image, out=image), 0, 255, out=image).astype(np.uint8), annotations


def _name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _write(job: tuple[Preset, Path, int, list[int], list[int]]) -> list[tuple[int, list[dict[str, Any]]]]:
    import cv2

    preset, folder, split, ids, seeds = job
    found = []
    for image_id in ids:
        image, annotations = generate(preset, [*seeds, split, image_id])
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (folder / _name(image_id)).write_bytes(jpeg.tobytes())
        found.append((image_id, annotations))
    return found


@dataclass(frozen=True)
class Synthetic:
    """A generated data set. It is written once in COCO's layout and then read as any other data set.

    Attributes:
        preset: difficulty of the images.
        counts: number of images of each split: train, unlabelled, tune, agreement, validation.
        seed: seed of the whole data set.
        cache: folder that holds the data set, in a subfolder named after `identity`.
    """

    preset: Preset
    counts: dict[str, Annotated[int, Interval(ge=1, le=10**7)]]
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    cache: str = "outputs/cache"

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            UserError: a split is unknown or empty.
        """
        wrong = [s for s in self.counts if s not in SPLITS] or [s for s in SPLITS if self.counts.get(s, 0) < 1]
        if wrong:
            raise UserError(
                f"data.counts.{wrong[0]}={self.counts.get(wrong[0])}: give at least one image to each of {', '.join(SPLITS)}"
            )

    @property
    def identity(self) -> str:
        """Digest of all values that determine the pixels and labels."""
        what = {"version": VERSION, "preset": asdict(self.preset), "counts": self.counts, "seed": self.seed}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """The folder of the data set."""
        return Path(self.cache) / "synthetic" / f"v{VERSION}-{self.identity[:12]}"

    def digest(self, splits: Sequence[str]) -> str:
        """Return a digest of some splits. It depends on the generator's version and options only, so no file need exist."""
        return hashlib.sha256(f"{self.identity} {' '.join(splits)}".encode()).hexdigest()

    @cached_property
    def _splits(self) -> CocoSplits:
        self._make()
        root = self.folder
        return CocoSplits(
            {"images": root / "images/train", "annotations": root / "annotations/train.json"},
            {"images": root / "images/validation", "annotations": root / "annotations/validation.json"},
            {"images": root / "images/unlabelled"},
            str(root / "splits.json"),
            self.cache,
        )

    def __contains__(self, split: str) -> bool:
        """Whether the split has images."""
        return self.counts.get(split, 0) > 0

    def open(self, split: str) -> Coco:
        """Return the images of a split. The data set is written first if it does not exist."""
        return self._splits.open(split)

    def _jobs(self, folder: Path) -> Iterator[tuple[Preset, Path, int, list[int], list[int]]]:
        for index, split in enumerate(SPLITS):
            first = index * 10_000_000 + 1  # the images of a split must not depend on the sizes of other splits
            ids = list(range(first, first + self.counts[split]))
            where = folder / "images" / {"tune": "train", "agreement": "unlabelled"}.get(split, split)
            where.mkdir(parents=True, exist_ok=True)
            for at in range(0, len(ids), 32):
                yield self.preset, where, index, ids[at : at + 32], [self.seed]

    def _make(self) -> None:
        from filelock import FileLock

        from pipeline.progress import Progress, say

        if (self.folder / "splits.json").exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock")):
            if (self.folder / "splits.json").exists():
                return
            unfinished = self.folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            count = sum(self.counts.values())
            say(f"drawing {count:,} images of {self.preset.size} once, into {self.folder}; data=coco uses your own images")
            jobs = list(self._jobs(unfinished))
            split_records: dict[int, list[tuple[int, list[dict[str, Any]]]]] = {}
            workers = min(os.cpu_count() or 1, len(jobs))
            with processes.pool(workers) as pool:
                done = zip(jobs, pool.map(_write, jobs), strict=True)
                with Progress("drawing", sum(self.counts.values()), "images") as progress:
                    for job, records in done:
                        split_records.setdefault(job[2], []).extend(records)
                        progress.update(sum(map(len, split_records.values())))
            self._write_annotations(unfinished, split_records)
            unfinished.rename(self.folder)

    def _write_annotations(self, root: Path, records: dict[int, list[tuple[int, list[dict[str, Any]]]]]) -> None:
        size = {"height": self.preset.size.height, "width": self.preset.size.width}
        (root / "annotations").mkdir(exist_ok=True)
        for file, splits in (("train", ("train", "tune")), ("validation", ("validation",))):
            rows = [row for split in splits for row in records[SPLITS.index(split)]]
            content = {
                "info": {"description": f"Posepress generated people, version {VERSION}, digest {self.identity}"},
                "categories": [
                    {
                        "id": 1,
                        "name": "person",
                        "supercategory": "person",
                        "keypoints": list(COCO_17.names),
                        "skeleton": [[a + 1, b + 1] for a, b in COCO_17.limbs],
                    }
                ],
                "images": [{"id": i, "file_name": _name(i), **size} for i, _ in rows],
                "annotations": [
                    {"id": 1000 * i + n, "image_id": i, **annotation}
                    for i, annotations in rows
                    for n, annotation in enumerate(annotations)
                ],
            }
            (root / "annotations" / f"{file}.json").write_text(json.dumps(content))
        named = {
            split: {"synthetic": [_name(i) for i, _ in records[SPLITS.index(split)]]}
            for split in ("train", "tune", "agreement", "validation")
        }
        named["train"]["unlabelled"] = [_name(i) for i, _ in records[SPLITS.index("unlabelled")]]
        (root / "splits.json").write_text(json.dumps(named))
