"""Keypoints for training: what a shard keeps of the people in an image, and the data's keypoints in a network's skeleton."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.training.augment import sampling_grid
from posepress.errors import UserError, nearest
from posepress.labels import Palette, Skeleton, enumerated
from posepress.resolution import Resolution
from posepress.spec import OutputSpec

_MASK_STRIDE = 4  # stored pixels a cell of the mask of unlabelled people
_MIDDLES = {"neck": ("left_shoulder", "right_shoulder")}  # keypoints that follow from two others where the data has none


def labelled(truth: People) -> NDArray[np.bool_]:
    """Which people have labelled keypoints, [N]."""
    chosen: NDArray[np.bool_] = ~truth.crowd & (truth.keypoints[..., 2] > 0).any(axis=1)
    return chosen


def kept(truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
    """What a training shard keeps of an image's people.

    Args:
        truth: the labels; None for an image without labels.
        stored: how the image is kept.
        capacity: greatest number of labelled people in an image.

    Returns:
        "keypoints" float32 [capacity, K, 3] and "anchors" [capacity, 4] of labelled people, in pixels as stored. "instances"
        int64 [capacity]: the number of each one's box in the image, as "base" numbers crops, or -1. "unlabelled" uint8
        [H / 4, W / 4]: 1 on crowds and on people without keypoints.
    """
    points = np.zeros((capacity, len(stored.labels.names), 3), np.float32)
    anchors, instances = np.zeros((capacity, 4), np.float32), np.full(capacity, -1, np.int64)
    cells = (-(-stored.whole.height // _MASK_STRIDE), -(-stored.whole.width // _MASK_STRIDE))
    covered = np.zeros(cells, np.uint8)
    if truth is not None:
        scale = np.array([stored.size.width / stored.original.width, stored.size.height / stored.original.height])
        chosen = labelled(truth)
        scaled = truth.keypoints[chosen].astype(np.float64)
        scaled[..., :2] = (scaled[..., :2] + 0.5) * scale - 0.5
        points[: len(scaled)] = scaled
        anchors[: len(scaled)] = truth.boxes[chosen] * np.tile(scale, 2)
        instances[: len(scaled)] = np.flatnonzero(chosen[~truth.crowd])
        for index in np.flatnonzero(~chosen):
            _cover(covered, truth, int(index), scale / _MASK_STRIDE)
    return {"keypoints": points, "anchors": anchors, "instances": instances, "unlabelled": covered}


def joined(labels: Mapping[str, Tensor], source: Skeleton | Palette, skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """The data's keypoints in a network's skeleton, matched by name.

    A neck that the data does not label is the middle of two labelled shoulders. In a mirrored view left and right change
    places.

    Args:
        labels: "keypoints" [B, P, K, 3] in pixels as stored, "matrix" [B, 2, 3] and "flipped" [B].
        source: skeleton of the data.
        skeleton: skeleton of the network.

    Returns:
        Points in pixels of the views [B, P, K, 2], and which of them are labelled [B, P, K].

    Raises:
        UserError: the data labels classes, or no keypoint of a name that the network has.
    """
    if not isinstance(source, Skeleton):
        raise UserError("the data labels classes and no keypoints; give data with keypoints")
    sources = [_sources(name, source, skeleton) for name in skeleton.names]
    matrix, keypoints = labels["matrix"], labels["keypoints"]
    points = keypoints[..., :2] @ matrix[:, None, :, :2].transpose(-1, -2) + matrix[:, None, None, :, 2]
    seen = keypoints[..., 2] > 0
    mirror = torch.tensor(source.flip, device=points.device)
    turned = labels["flipped"][:, None, None]
    points = torch.where(turned[..., None], points[:, :, mirror], points)
    seen = torch.where(turned, seen[:, :, mirror], seen)
    first, second = ([pair[side] for pair in sources] for side in (0, 1))
    return (points[:, :, first] + points[:, :, second]) / 2, seen[:, :, first] & seen[:, :, second]


def of_view(labels: Mapping[str, Tensor], source: Skeleton | Palette, skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """The keypoints of the one person that each view was cut around, in a network's skeleton.

    Args:
        labels: as `joined`, and "instances" [B, P] and "base" [B].
        source: skeleton of the data.
        skeleton: skeleton of the network.

    Returns:
        Points in pixels of the views [B, K, 2], and which of them are labelled [B, K]. None is in a view without such a person.

    Raises:
        UserError: as `joined`.
    """
    points, seen = joined(labels, source, skeleton)
    own = (labels["instances"] == labels["base"][:, None]) & labels["labelled"][:, None]
    person = own.int().argmax(dim=1)
    rows = torch.arange(len(person), device=person.device)
    return points[rows, person], seen[rows, person] & own.any(dim=1)[:, None]


def inside(points: Tensor, size: Resolution) -> Tensor:
    """Which points [..., 2] lie on a pixel of a view."""
    most = torch.tensor([size.width - 0.5, size.height - 0.5], device=points.device)
    return ((points >= -0.5) & (points < most)).all(dim=-1)


def expected(fields: Mapping[str, Tensor], name: str) -> Tensor:
    """An output of the teacher, for distillation.

    Raises:
        UserError: the teacher does not have it.
    """
    if name not in fields:
        raise UserError(f"distillation: the teacher has no output '{name}' ({', '.join(fields)}); give another teacher")
    return fields[name].float()


def _sources(name: str, source: Skeleton, skeleton: Skeleton) -> tuple[int, int]:
    """Indices of the one or two keypoints of the data that make a network's keypoint.

    Raises:
        UserError: the data does not label them.
    """
    names = source.names
    if name in names:
        return names.index(name), names.index(name)
    if name in _MIDDLES and set(_MIDDLES[name]) <= set(names):
        first, second = _MIDDLES[name]
        return names.index(first), names.index(second)
    raise UserError(
        f"spec's labels name the keypoint '{name}'{nearest(name, names)}; the data does not label it: the network has "
        f"{len(skeleton.names)} keypoints ({enumerated(skeleton.names)}), the data {len(names)} ({enumerated(names)}); "
        "give skeleton=FILE.json with the data's keypoints, or other data"
    )


def mask(labels: Mapping[str, Tensor], cells: Resolution, spec: OutputSpec) -> Tensor:
    """Where the targets of a map count, float [B, 1, h, w].

    Returns:
        0 on crowds, on people without labelled keypoints, and on images without labels; else 1.
    """
    source = (labels["unlabelled"].shape[1] * _MASK_STRIDE, labels["unlabelled"].shape[2] * _MASK_STRIDE)
    grid = sampling_grid(labels["matrix"], cells, source, spec.stride, spec.shift)
    hidden = F.grid_sample(labels["unlabelled"][:, None].float(), grid, padding_mode="zeros", align_corners=False)
    return (hidden < 0.01).float() * labels["labelled"][:, None, None, None]


def imitation(fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
    """Squared error of a student's outputs to its teacher's, summed over channels and stages, averaged over cells and images.

    Args:
        fields: outputs of the student [B, C, ...], by name.
        expected: outputs of the teacher; those that the student does not have are left out.
    """
    errors = [
        (field.float() - expected[name].float()).square().sum(1).mean() for name, field in fields.items() if name in expected
    ]
    if not errors:
        raise UserError(
            f"distillation: the teacher has none of the student's outputs ({', '.join(fields)}); give another teacher"
        )
    return torch.stack(errors).sum()


def _cover(mask: NDArray[np.uint8], truth: People, index: int, scale: NDArray[np.float64]) -> None:
    """Set the cells of a mask that a person covers."""
    import cv2

    shape: Any = truth.masks[index] if index < len(truth.masks) else None
    if isinstance(shape, dict):
        pixels = _decode(shape)
        inside = (max(1, round(pixels.shape[1] * scale[0])), max(1, round(pixels.shape[0] * scale[1])))
        small = cv2.resize(pixels * np.uint8(255), inside, interpolation=cv2.INTER_AREA) > 0
        h, w = min(mask.shape[0], small.shape[0]), min(mask.shape[1], small.shape[1])
        mask[:h, :w] |= small[:h, :w]
        return
    if isinstance(shape, list) and shape:
        outlines = [np.asarray(p, np.float64).reshape(-1, 2) for p in shape]
    else:
        x, y, width, height = truth.boxes[index]
        outlines = [np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])]
    for outline in outlines:
        cv2.fillPoly(mask, [np.rint((outline + 0.5) * scale - 0.5).astype(np.int32)], (1.0,))


def _decode(mask: Mapping[str, Any]) -> NDArray[np.uint8]:
    """COCO run lengths to a mask [H, W]."""
    counts = mask["counts"]
    if not isinstance(counts, list):
        from pycocotools.mask import decode

        return np.asarray(decode(mask), np.uint8)
    height, width = mask["size"]
    values = np.arange(len(counts)) % 2
    return np.repeat(values, counts).astype(np.uint8).reshape(width, height).T.copy()
