"""The objective of bottom-up networks: Gaussian heatmaps and part affinity fields (arXiv:1812.08008)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Interval
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluation.truth import People
from pipeline.training.augment import sampling_grid
from posepress.errors import UserError
from posepress.skeletons import COCO_17
from posepress.spec import NetworkSpec, OutputSpec, Resolution, Skeleton

_MASK_STRIDE = 4  # stored pixels a cell of the mask of unlabelled people


@dataclass(frozen=True)
class HeatmapPafObjective:
    """Squared error of heatmaps and PAFs, at every stage of the network.

    Attributes:
        sigma: standard deviation of a keypoint's Gaussian, in cells.
        paf_width: a PAF is non-zero up to this distance from its limb, in cells.
        foreground: extra weight of cells whose target is not zero.
    """

    sigma: Annotated[float, Interval(gt=0, le=100)] = 0.9
    paf_width: Annotated[float, Interval(gt=0, le=100)] = 1.0
    foreground: Annotated[float, Ge(0)] = 4.0

    def people(self, truth: People | None) -> int:
        """How many people of an image are learnt from."""
        return 0 if truth is None else int(_labelled(truth).sum())

    def labels(
        self, truth: People | None, size: Resolution, stored: Resolution, whole: Resolution, most: int
    ) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's truth; the arguments are those of `pipeline.contracts.Objective.labels`.

        Returns:
            "keypoints" float32 [most, 17, 3] and "boxes" [most, 4] of labelled people, in pixels as stored, and "unlabelled"
            uint8 [H / 4, W / 4]: 1 on crowds and people without keypoints.

        Raises:
            UserError: the labels are of another skeleton than COCO's.
        """
        keypoints, boxes = np.zeros((most, len(COCO_17.names), 3), np.float32), np.zeros((most, 4), np.float32)
        mask = np.zeros((-(-whole.height // _MASK_STRIDE), -(-whole.width // _MASK_STRIDE)), np.uint8)
        if truth is not None:
            if truth.keypoints.shape[1] != len(COCO_17.names):
                raise UserError(
                    f"training needs COCO's {len(COCO_17.names)} keypoints; these annotations have {truth.keypoints.shape[1]}"
                )
            chosen, scale = _labelled(truth), np.array([stored.width / size.width, stored.height / size.height])
            kept = truth.keypoints[chosen].astype(np.float64)
            kept[..., :2] = (kept[..., :2] + 0.5) * scale - 0.5
            keypoints[: len(kept)] = kept
            boxes[: len(kept)] = truth.boxes[chosen] * np.tile(scale, 2)
            for index in np.flatnonzero(~chosen):
                _cover(mask, truth, int(index), scale / _MASK_STRIDE)
        return {"keypoints": keypoints, "boxes": boxes, "unlabelled": mask}

    def targets(self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec) -> dict[str, Tensor]:
        """Fields of a perfect network for a batch of views.

        Args:
            labels: what `labels` kept [B, ...], "matrix" [B, 2, 3] from stored image to view, "flipped" [B] and "labelled" [B].
            size: of the views, in pixels.
            spec: of the network.

        Returns:
            "heatmaps" [B, K + 1, h, w] with the background last, "pafs" [B, 2 L, h, w], and "mask" [B, 1, h, w]: 0 on crowds,
            people without labels and images without any, else 1.

        Raises:
            UserError: the network has other fields, or another skeleton than can be made of COCO's.
        """
        heat, paf = _fields(spec)
        points, seen = _named(labels, spec.skeleton)
        cells = heat.cells(size)
        source = (labels["unlabelled"].shape[1] * _MASK_STRIDE, labels["unlabelled"].shape[2] * _MASK_STRIDE)
        grid = sampling_grid(labels["matrix"], cells, source, heat.stride, heat.shift)
        hidden = F.grid_sample(labels["unlabelled"][:, None].float(), grid, padding_mode="zeros", align_corners=False)
        return {
            "heatmaps": self._heatmaps(_cells(points, heat), seen, cells),
            "pafs": self._pafs(_cells(points, paf), seen, spec.skeleton, cells),
            "mask": (hidden < 0.01).float() * labels["labelled"][:, None, None, None],
        }

    def _heatmaps(self, cells: Tensor, seen: Tensor, size: Resolution) -> Tensor:
        far = torch.where(seen[..., None], cells, -1e3)
        xs, ys = (torch.arange(n, device=cells.device) for n in (size.width, size.height))
        gx = torch.exp(-0.5 / self.sigma**2 * (xs - far[..., :1]) ** 2)  # [B, P, K, w]
        gy = torch.exp(-0.5 / self.sigma**2 * (ys - far[..., 1:]) ** 2)  # [B, P, K, h]
        B, P, K = seen.shape
        out = torch.zeros(B, K + 1, size.height, size.width, device=cells.device)
        for person in range(P):  # all people at once would take P times the memory
            joints = gy[:, person, :, :, None] * gx[:, person, :, None, :]
            out[:, :K] = torch.maximum(out[:, :K], joints)
        out[out < 0.01] = 0
        out[:, K] = 1 - out[:, :K].amax(dim=1)
        return out

    def _pafs(self, cells: Tensor, seen: Tensor, skeleton: Skeleton, size: Resolution) -> Tensor:
        """Unit vectors along each limb near it; where limbs of a kind overlap, their mean."""
        limbs = torch.tensor(skeleton.limbs, device=cells.device)
        a, b = cells[:, :, limbs[:, 0]], cells[:, :, limbs[:, 1]]  # [B, P, L, 2]
        length = (b - a).norm(dim=-1)
        there = seen[:, :, limbs[:, 0]] & seen[:, :, limbs[:, 1]] & (length >= 1e-3)
        unit = (b - a) / length.clamp(min=1e-3)[..., None]
        B, P, L = there.shape
        xs = torch.arange(size.width, device=cells.device, dtype=torch.float32)
        ys = torch.arange(size.height, device=cells.device, dtype=torch.float32)
        total = torch.zeros(B, L, 2, size.height, size.width, device=cells.device)
        count = torch.zeros(B, L, 1, size.height, size.width, device=cells.device)
        for person in range(P):
            u = unit[:, person, :, :, None, None]  # [B, L, 2, 1, 1]
            px = xs - a[:, person, :, 0, None, None]  # [B, L, 1, w]
            py = ys[:, None] - a[:, person, :, 1, None, None]  # [B, L, h, 1]
            along = px * u[:, :, 0] + py * u[:, :, 1]
            across = (px * u[:, :, 1] - py * u[:, :, 0]).abs()
            reach = length[:, person, :, None, None] + self.paf_width
            near = (across <= self.paf_width) & (along >= -self.paf_width) & (along <= reach)
            covered = (near & there[:, person, :, None, None])[:, :, None].float()
            total += covered * u
            count += covered
        return (total / count.clamp(min=1)).flatten(1, 2)

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared errors summed over channels and averaged over cells and images, of all stages together.

        Args:
            fields: "heatmaps", "pafs" and those of earlier stages, "heatmaps.0", ..., each [B, C, h, w].
            targets: "heatmaps", "pafs", "mask".

        Returns:
            One loss for "heatmaps" and one for "pafs".
        """
        losses: dict[str, Tensor] = {}
        for name, field in fields.items():
            kind = name.partition(".")[0]
            target = targets[kind]
            weight = targets["mask"] * (1 + self.foreground * (target.abs() > 0.01))
            if kind == "heatmaps":  # the background is nearly everywhere in the foreground
                weight[:, -1:] = targets["mask"]
            error = ((field.float() - target).square() * weight).sum(dim=1).mean()
            losses[kind] = losses[kind] + error if kind in losses else error
        return losses


def _fields(spec: NetworkSpec) -> tuple[OutputSpec, OutputSpec]:
    """The fields of heatmaps and PAFs, once they are those of the skeleton."""
    named, skeleton = {field.name: field for field in spec.fields}, spec.skeleton
    wanted = {
        "heatmaps": (len(skeleton.names) + 1, f"one a keypoint ({len(skeleton.names)}) and the background"),
        "pafs": (2 * len(skeleton.limbs), f"two a limb ({len(skeleton.limbs)})"),
    }
    for name, (channels, why) in wanted.items():
        if name not in named:
            raise UserError(f"spec has no field '{name}', which training needs; it has {', '.join(named)}")
        if named[name].channels != channels:
            raise UserError(f"spec says {named[name].channels} channels of '{name}'; its labels make {channels}: {why}")
    if len({named[name].stride for name in wanted}) > 1:
        raise UserError("spec says other strides for 'heatmaps' and 'pafs'; training needs one")
    unknown = [name for name in skeleton.names if name not in (*COCO_17.names, "neck")]
    if unknown:
        raise UserError(
            f"spec's labels name the keypoint '{unknown[0]}'; training knows neck and COCO's: {', '.join(COCO_17.names)}"
        )
    return named["heatmaps"], named["pafs"]


def _labelled(truth: People) -> NDArray[np.bool_]:
    labelled: NDArray[np.bool_] = ~truth.crowd & (truth.keypoints[..., 2] > 0).any(axis=1)
    return labelled


def _named(labels: Mapping[str, Tensor], skeleton: Skeleton) -> tuple[Tensor, Tensor]:
    """COCO's keypoints in a network's skeleton and in the pixels of the views [B, P, K, 2], and which are labelled [B, P, K].

    A neck is the middle of two labelled shoulders; in a mirrored view left and right change places.
    """
    matrix, keypoints = labels["matrix"], labels["keypoints"]
    points = keypoints[..., :2] @ matrix[:, None, :, :2].transpose(-1, -2) + matrix[:, None, None, :, 2]
    seen = keypoints[..., 2] > 0
    mirror = torch.tensor(COCO_17.flip, device=points.device)
    turned = labels["flipped"][:, None, None]
    points = torch.where(turned[..., None], points[:, :, mirror], points)
    seen = torch.where(turned, seen[:, :, mirror], seen)
    first, second = [], []
    for name in skeleton.names:
        sources = ["left_shoulder", "right_shoulder"] if name == "neck" else [name, name]
        first.append(COCO_17.names.index(sources[0]))
        second.append(COCO_17.names.index(sources[1]))
    return (points[:, :, first] + points[:, :, second]) / 2, seen[:, :, first] & seen[:, :, second]


def _cells(points: Tensor, spec: OutputSpec) -> Tensor:
    """`posepress.geometry.input_to_cells`, where the tensor is."""
    return (points + 0.5) / spec.stride - 0.5 - spec.shift


def _cover(mask: NDArray[np.uint8], truth: People, index: int, scale: NDArray[np.float64]) -> None:
    """Set the cells of a mask that show a person."""
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
