"""The objective of bottom-up networks: Gaussian heatmaps and part affinity fields (arXiv:1812.08008)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.skeletons import COCO_17
from evaluation.types import FieldSpec, NetworkSpec, People, Skeleton, View
from evaluation.views import input_to_cells

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class HeatmapPafObjective:
    """Squared error of heatmaps and PAFs, at every stage of the network.

    Attributes:
        sigma: standard deviation of a keypoint's Gaussian, in cells.
        paf_width: a PAF is non-zero up to this distance from its limb, in cells.
        foreground: extra weight of cells whose target is not zero.
    """

    sigma: float = 0.9
    paf_width: float = 1.0
    foreground: float = 4.0

    def targets(self, truth: People, view: View, spec: NetworkSpec) -> dict[str, F32]:
        """Fields of a perfect network for a view.

        Returns:
            "heatmaps" [K + 1, h, w] with the background last, "pafs" [2 L, h, w], and "mask" [1, h, w]: 0 on crowds and
            people without labels, else 1.
        """
        heat, paf = spec.field("heatmaps"), spec.field("pafs")
        points, seen = named_keypoints(truth, view, spec.skeleton)
        h, w = view.size.height // heat.stride, view.size.width // heat.stride
        return {
            "heatmaps": self._heatmaps(input_to_cells(points, heat), seen, h, w),
            "pafs": self._pafs(input_to_cells(points, paf), seen, spec.skeleton, h, w),
            "mask": 1 - _unlabelled(truth, view, heat, h, w)[None],
        }

    def _heatmaps(self, cells: NDArray[np.float64], seen: NDArray[np.bool_], h: int, w: int) -> F32:
        far = np.where(seen[..., None], cells, -1e3).astype(np.float32)
        scale = np.float32(-0.5 / self.sigma**2)
        gx = np.exp(scale * (np.arange(w, dtype=np.float32) - far[..., :1]) ** 2)  # [N, K, w]
        gy = np.exp(scale * (np.arange(h, dtype=np.float32) - far[..., 1:]) ** 2)  # [N, K, h]
        K = cells.shape[1]
        out = np.zeros((K + 1, h, w), np.float32)
        for y, x in zip(gy, gx, strict=True):
            np.maximum(out[:K], y[:, :, None] * x[:, None, :], out=out[:K])
        out[out < 0.01] = 0
        out[K] = 1 - out[:K].max(axis=0)
        return out

    def _pafs(self, cells: NDArray[np.float64], seen: NDArray[np.bool_], skeleton: Skeleton, h: int, w: int) -> F32:
        a, b = np.array(skeleton.limbs).T
        out = np.zeros((2 * len(a), h, w), np.float32)
        count = np.zeros((len(a), h, w), np.float32)
        ys, xs = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)[None, :]
        for points, visible in zip(cells.astype(np.float32), seen, strict=True):
            for limb in np.flatnonzero(visible[a] & visible[b]):
                start, end = points[a[limb]], points[b[limb]]
                length = float(np.hypot(*(end - start)))
                if length < 1e-3:
                    continue
                x0, y0 = np.maximum(np.floor(np.minimum(start, end) - self.paf_width), 0).astype(int)
                x1, y1 = (np.ceil(np.maximum(start, end) + self.paf_width) + 1).astype(int)
                if x0 >= w or y0 >= h or x1 <= 0 or y1 <= 0:
                    continue
                ux, uy = (end - start) / length
                px, py = xs[:, x0:x1] - start[0], ys[y0:y1] - start[1]
                along, across = px * ux + py * uy, np.abs(px * uy - py * ux)
                inside = (across <= self.paf_width) & (along >= -self.paf_width) & (along <= length + self.paf_width)
                out[2 * limb, y0:y1, x0:x1] += inside * ux
                out[2 * limb + 1, y0:y1, x0:x1] += inside * uy
                count[limb, y0:y1, x0:x1] += inside
        return np.asarray(out / np.repeat(np.maximum(count, 1), 2, axis=0), np.float32)

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


def named_keypoints(truth: People, view: View, skeleton: Skeleton) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """COCO's keypoints of the people of an image in a network's skeleton, in input pixels.

    Returns:
        Points [N, K, 2], and which of them are labelled [N, K]. A neck is the middle of two labelled shoulders.
    """
    keypoints = truth.keypoints[~truth.crowd]
    points = view.to_input(keypoints[..., :2])
    seen = keypoints[..., 2] > 0
    if view.flipped:
        mirror = list(COCO_17.flip)
        points, seen = points[:, mirror], seen[:, mirror]
    K = len(skeleton.names)
    out, labelled = np.zeros((len(points), K, 2)), np.zeros((len(points), K), bool)
    for k, name in enumerate(skeleton.names):
        sources = ["left_shoulder", "right_shoulder"] if name == "neck" else [name]
        columns = [COCO_17.names.index(source) for source in sources]
        out[:, k] = points[:, columns].mean(axis=1)
        labelled[:, k] = seen[:, columns].all(axis=1)
    return out, labelled


def _unlabelled(truth: People, view: View, spec: FieldSpec, h: int, w: int) -> F32:
    """1 in cells [h, w] that show crowds or people without keypoints, else 0."""
    import cv2

    out = np.zeros((h, w), np.float32)
    nobody = truth.crowd | ~(truth.keypoints[..., 2] > 0).any(axis=1)
    to_cells = view.matrix / spec.stride
    to_cells[:, 2] += 0.5 / spec.stride - 0.5 - spec.shift
    for index in np.flatnonzero(nobody):
        mask: Any = truth.masks[index] if index < len(truth.masks) else None
        if isinstance(mask, list) and mask:
            polygons = [np.asarray(p, np.float64).reshape(-1, 2) @ to_cells[:, :2].T + to_cells[:, 2] for p in mask]
            cv2.fillPoly(out, [np.rint(p).astype(np.int32) for p in polygons], (1.0,))
        elif isinstance(mask, dict):
            pixels = cv2.warpAffine(_decode(mask), to_cells, (w, h), flags=cv2.INTER_AREA)
            out = np.maximum(out, (pixels > 0).astype(np.float32))
        else:
            x, y, width, height = truth.boxes[index]
            corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])
            cv2.fillPoly(out, [np.rint(corners @ to_cells[:, :2].T + to_cells[:, 2]).astype(np.int32)], (1.0,))
    return out


def _decode(mask: Mapping[str, Any]) -> NDArray[np.uint8]:
    """COCO run lengths to a mask [H, W]."""
    counts = mask["counts"]
    if not isinstance(counts, list):
        from pycocotools.mask import decode

        return np.asarray(decode(mask), np.uint8)
    height, width = mask["size"]
    values = np.arange(len(counts)) % 2
    return np.repeat(values, counts).astype(np.uint8).reshape(width, height).T.copy()
