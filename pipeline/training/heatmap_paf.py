"""The objective of bottom-up networks: Gaussian heatmaps and part affinity fields (arXiv:1812.08008)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluation.compiled import compiled
from evaluation.skeletons import COCO_17
from evaluation.types import FieldSpec, NetworkSpec, People, Skeleton, View
from evaluation.views import input_to_cells
from pipeline.errors import UserError

F32 = NDArray[np.float32]


@compiled
def _draw_pafs(cells: F32, seen: NDArray[np.bool_], limbs: NDArray[np.int64], width: np.float32, out: F32) -> None:
    """Add the limbs [L, 2] of people [N, K, 2] to empty PAFs [2 L, h, w]; where limbs of a kind overlap, their mean."""
    h, w = out.shape[1], out.shape[2]
    count = np.zeros((h, w), np.int32)
    for limb in range(limbs.shape[0]):
        a, b = limbs[limb, 0], limbs[limb, 1]
        count[:] = 0
        for person in range(cells.shape[0]):
            ax, ay = cells[person, a]
            dx, dy = cells[person, b, 0] - ax, cells[person, b, 1] - ay
            length = np.float32(np.hypot(dx, dy))
            if not (seen[person, a] and seen[person, b]) or length < 1e-3:
                continue
            ux, uy = dx / length, dy / length
            x0, x1 = max(int(np.floor(min(ax, ax + dx) - width)), 0), min(int(np.ceil(max(ax, ax + dx) + width)) + 1, w)
            y0, y1 = max(int(np.floor(min(ay, ay + dy) - width)), 0), min(int(np.ceil(max(ay, ay + dy) + width)) + 1, h)
            for y in range(y0, y1):
                for x in range(x0, x1):
                    px, py = np.float32(x) - ax, np.float32(y) - ay
                    along, across = px * ux + py * uy, abs(px * uy - py * ux)
                    if across <= width and -width <= along <= length + width:
                        out[2 * limb, y, x] += ux
                        out[2 * limb + 1, y, x] += uy
                        count[y, x] += 1
        for y in range(h):
            for x in range(w):
                if count[y, x] > 1:
                    out[2 * limb, y, x] /= np.float32(count[y, x])
                    out[2 * limb + 1, y, x] /= np.float32(count[y, x])


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
        limbs = np.array(skeleton.limbs, np.int64)
        out = np.zeros((2 * len(limbs), h, w), np.float32)
        _draw_pafs(cells.astype(np.float32), seen, limbs, np.float32(self.paf_width), out)
        return out

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

    Raises:
        UserError: the labels are of another skeleton than COCO's.
    """
    keypoints = truth.keypoints[~truth.crowd]
    if keypoints.shape[1] != len(COCO_17.names):
        raise UserError(f"training needs COCO's {len(COCO_17.names)} keypoints; these annotations have {keypoints.shape[1]}")
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
