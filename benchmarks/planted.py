"""Plant people into fields like those of an OpenPose network, and count how many of them a decoder recovers.

The fields have 46x62 cells (a 368x496 input at stride 8). Heatmaps have Gaussians of 7 pixels with peaks from .45 to .98. Limbs
have soft edges and values from .6 to .95, and are averaged where they overlap. One keypoint in fourteen is missing. The smooth
noise has a deviation of .03.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from posepress.skeletons import OPENPOSE_18

H, W, STRIDE = 46, 62, 8
HEIGHTS = {1: (240, 320), 5: (150, 230), 20: (90, 130), 50: (60, 80)}  # heights in pixels, by number of people
NEAR = 4.0  # distance within which a keypoint counts as recovered, in pixels

_POSE = {  # coordinates as fractions of the height, from the middle of the top of the head
    "nose": (0, 0.08), "neck": (0, 0.2), "right_shoulder": (-0.12, 0.2), "right_elbow": (-0.18, 0.36),
    "right_wrist": (-0.2, 0.5), "left_shoulder": (0.12, 0.2), "left_elbow": (0.18, 0.36), "left_wrist": (0.2, 0.5),
    "right_hip": (-0.08, 0.52), "right_knee": (-0.09, 0.75), "right_ankle": (-0.1, 0.97), "left_hip": (0.08, 0.52),
    "left_knee": (0.09, 0.75), "left_ankle": (0.1, 0.97), "right_eye": (-0.03, 0.055), "left_eye": (0.03, 0.055),
    "right_ear": (-0.065, 0.07), "left_ear": (0.065, 0.07),
}  # fmt: skip
_CHAINS = [
    [OPENPOSE_18.names.index(f"{side}_{part}") for part in parts]
    for side in ("right", "left")
    for parts in (("shoulder", "elbow", "wrist"), ("hip", "knee", "ankle"))
]


@dataclass(frozen=True)
class Planted:
    """The fields and the planted people of one image.

    Attributes:
        heatmaps: float32 [19, H, W], with the background last.
        pafs: float32 [38, H, W].
        points: keypoints in input pixels, float64 [N, 18, 2].
        present: whether each keypoint was planted, bool [N, 18].
    """

    heatmaps: NDArray[np.float32]
    pafs: NDArray[np.float32]
    points: NDArray[np.float64]
    present: NDArray[np.bool_]


def _person(draw: np.random.Generator, height: float, corner: NDArray[np.float64]) -> NDArray[np.float64]:
    rest = np.array([_POSE[name] for name in OPENPOSE_18.names]) * height
    points = rest + corner + draw.normal(0, 0.018 * height, rest.shape)
    for root, middle, end in _CHAINS:
        angle = draw.uniform(-0.6, 0.6)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        points[middle] = points[root] + turn @ (points[middle] - points[root])
        points[end] = points[middle] + turn @ (rest[end] - rest[middle])
    return points


def _crowd(draw: np.random.Generator, count: int) -> NDArray[np.float64]:
    """People with a minimum distance between their centres. The distance shrinks if there is no more room."""
    people: list[NDArray[np.float64]] = []
    middles: list[NDArray[np.float64]] = []
    apart = 0.62 * STRIDE * np.sqrt(H * W / count)
    while len(people) < count:
        height = draw.uniform(*HEIGHTS[count])
        corner = np.array([draw.uniform(0.22 * height, W * STRIDE - 0.22 * height), draw.uniform(0, H * STRIDE - height - 2)])
        middle = corner + np.array([0, height / 2])
        apart *= 0.97 ** (1 / 200)
        if all(np.hypot(*(middle - other)) >= apart for other in middles):
            people.append(_person(draw, height, corner))
            middles.append(middle)
    return np.array(people)


def _smooth(draw: np.random.Generator, channels: int, deviation: float) -> NDArray[np.float32]:
    noise = draw.normal(0, 1, (channels, H, W)).astype(np.float32)
    noise = np.stack([cv2.GaussianBlur(channel, (3, 3), 0.8) for channel in noise])
    scaled: NDArray[np.float32] = deviation * noise / noise.std()
    return scaled


def plant(count: int, seed: int, noise: float = 0.03) -> Planted:
    """Plant `count` people into fields: 1, 5, 20 or 50."""
    draw = np.random.default_rng(seed)
    points = _crowd(draw, count)
    inside = ((points > 3) & (points < (W * STRIDE - 4, H * STRIDE - 4))).all(axis=-1)
    present = inside & (draw.random(inside.shape) > 0.07)
    y, x = np.mgrid[0:H, 0:W] * STRIDE + (STRIDE - 1) / 2
    heatmaps = np.zeros((19, H, W))
    for n, k in np.argwhere(present):
        d2 = (x - points[n, k, 0]) ** 2 + (y - points[n, k, 1]) ** 2
        heatmaps[k] = np.maximum(heatmaps[k], draw.uniform(0.45, 0.98) * np.exp(-d2 / (2 * 7.0**2)))
    heatmaps[18] = 1 - heatmaps[:18].max(axis=0)
    pafs = np.zeros((38, H, W))
    for limb, (a, b) in enumerate(OPENPOSE_18.limbs):
        shares = np.zeros((H, W))
        for n in np.flatnonzero(present[:, a] & present[:, b]):
            start, along = points[n, a], points[n, b] - points[n, a]
            length = np.hypot(*along) + 1e-6
            ux, uy = along / length
            ahead = (x - start[0]) * ux + (y - start[1]) * uy
            aside = (x - start[0]) * uy - (y - start[1]) * ux
            beyond = np.maximum(np.maximum(-ahead, ahead - length), 0)
            strength = np.exp(-(aside**2) / (2 * 7.0**2) - beyond**2 / (2 * 5.0**2))
            strength = np.where(strength < 0.05, 0, strength) * draw.uniform(0.6, 0.95)
            pafs[2 * limb] += strength * ux
            pafs[2 * limb + 1] += strength * uy
            shares += strength > 0.3
        pafs[2 * limb : 2 * limb + 2] /= np.maximum(shares, 1)
    heatmaps[:18] += _smooth(draw, 18, noise)
    pafs += _smooth(draw, 38, 1.2 * noise)
    return Planted(heatmaps.astype(np.float32), pafs.astype(np.float32), points, present)


@dataclass(frozen=True)
class Recovery:
    """The recovery of planted people by a decoder.

    Attributes:
        keypoints: number of planted keypoints.
        recovered: number of planted keypoints with a predicted keypoint within `NEAR` pixels.
        whole: number of planted people for whom one prediction has at least four of five keypoints.
        wrong: number of predicted keypoints that are not near the planted person that their prediction mostly matches.
        error: sum of the distances of recovered keypoints, in pixels.
        people: number of predicted people.
    """

    keypoints: int
    recovered: int
    whole: int
    wrong: int
    error: float
    people: int


def recovery(planted: Planted, found: NDArray[np.float32]) -> Recovery:
    """Compare predicted people [N, 18, 3] with the planted ones.

    The last axis has x and y in input pixels and a score, which is 0 if the keypoint is missing.
    """
    nearest = np.full(planted.present.shape, np.inf)
    best = np.zeros(len(planted.points), int)
    wrong = 0
    for person in found:
        there = person[:, 2] > 0
        away = np.hypot(*(planted.points - person[:, :2]).transpose(2, 0, 1))
        away = np.where(planted.present & there, away, np.inf)
        nearest = np.minimum(nearest, away)
        hits = (away <= NEAR).sum(axis=1)
        best = np.maximum(best, hits)
        wrong += int(there.sum() - hits.max(initial=0))
    near = nearest <= NEAR
    whole = int((best >= 0.8 * planted.present.sum(axis=1)).sum())
    return Recovery(int(planted.present.sum()), int(near.sum()), whole, wrong, float(nearest[near].sum()), len(found))
