"""Decoder of top-down networks: one person in each view, from one heatmap for each keypoint, on the network's grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from posepress.checks import number
from posepress.compiled import compiled
from posepress.decoders.averaged import mirrored_heatmaps
from posepress.decoders.one_person import merged, poses
from posepress.geometry import View, cells_to_input
from posepress.results import Poses
from posepress.spec import Array, NetworkSpec

F32 = NDArray[np.float32]

_REFINEMENTS = ("none", "shift", "dark")


def _gaussian(sigma: float) -> F32:
    """Weights of a Gaussian, cut at 2.5 sigma, [2 r + 1]."""
    reach = max(int(np.ceil(2.5 * sigma)), 1)
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel: F32 = (weights / weights.sum()).astype(np.float32)
    return kernel


@compiled
def _smoothed(heatmap: F32, kernel: F32, i: int, j: int) -> F32:
    """Logarithms of the smoothed map around a cell, [5, 5]; values outside the map count as zero."""
    H, W = heatmap.shape
    reach = kernel.shape[0] // 2
    side = 5 + 2 * reach
    rows = np.zeros((side, 5), np.float32)
    for r in range(side):
        y = i - 2 - reach + r
        if not 0 <= y < H:
            continue
        for c in range(5):
            total = np.float32(0)
            for t in range(kernel.shape[0]):
                x = j - 2 + c - reach + t
                if 0 <= x < W:
                    total += kernel[t] * heatmap[y, x]
            rows[r, c] = total
    out = np.empty((5, 5), np.float32)
    for r in range(5):
        for c in range(5):
            total = np.float32(0)
            for t in range(kernel.shape[0]):
                total += kernel[t] * rows[r + t, c]
            out[r, c] = np.log(max(total, np.float32(1e-10)))
    return out


@compiled
def _offset(heatmap: F32, i: int, j: int, refinement: int, kernel: F32) -> tuple[float, float]:
    """The offset (dx, dy), in cells, from the highest cell (i, j) to the keypoint; 0 at the border of the map.

    Args:
        heatmap: [H, W].
        i: row.
        j: column.
        refinement: 0 gives no offset; 1 a quarter of a cell towards the greater neighbour; 2 the top of a Gaussian.
        kernel: a Gaussian that smooths the map for refinement 2.
    """
    H, W = heatmap.shape
    dx = dy = 0.0
    if refinement == 1:
        if 0 < j < W - 1:
            dx = 0.25 * np.sign(heatmap[i, j + 1] - heatmap[i, j - 1])
        if 0 < i < H - 1:
            dy = 0.25 * np.sign(heatmap[i + 1, j] - heatmap[i - 1, j])
    elif refinement == 2 and 1 < j < W - 2 and 1 < i < H - 2:
        v = _smoothed(heatmap, kernel, i, j)
        gx, gy = (v[2, 3] - v[2, 1]) / 2, (v[3, 2] - v[1, 2]) / 2
        xx, yy = (v[2, 4] - 2 * v[2, 2] + v[2, 0]) / 4, (v[4, 2] - 2 * v[2, 2] + v[0, 2]) / 4
        xy = (v[3, 3] - v[1, 3] - v[3, 1] + v[1, 1]) / 4
        determinant = xx * yy - xy * xy
        if determinant > 1e-12 and xx < 0:  # a top, not a saddle
            dx = min(max(-(yy * gx - xy * gy) / determinant, -1.0), 1.0)
            dy = min(max(-(xx * gy - xy * gx) / determinant, -1.0), 1.0)
    return dx, dy


@compiled
def _refined(
    maps: NDArray[np.float32], best: NDArray[np.int64], refinement: int, kernel: F32
) -> tuple[NDArray[np.float64], F32, NDArray[np.int64]]:
    """The highest cells of maps, refined.

    Args:
        maps: [B, K or more, h, w].
        best: number of the highest cell of each map, [B, K]; a value that is not a number counts as the highest.
        refinement: as in `_offset`.
        kernel: as in `_offset`.

    Returns:
        x and y in cells [B, K, 2], the greatest finite values [B, K], and 1 for views with values that are not finite [B].
    """
    B, K = best.shape
    w = maps.shape[3]
    at, values, odd = np.zeros((B, K, 2)), np.zeros((B, K), np.float32), np.zeros(B, np.int64)
    for b in range(B):
        for k in range(K):
            one, place = maps[b, k], best[b, k]
            flat = one.reshape(-1)
            value = flat[place]
            if not np.isfinite(value):
                odd[b] = 1
                value = np.float32(-np.inf)
                for n in range(flat.shape[0]):
                    if np.isfinite(flat[n]) and flat[n] > value:
                        value, place = flat[n], n
                if value == -np.inf:
                    continue
            i, j = place // w, place % w
            dx, dy = _offset(one, i, j, refinement, kernel)
            at[b, k, 0], at[b, k, 1], values[b, k] = j + dx, i + dy, value
    return at, values, odd


@dataclass(frozen=True)
class TopDownDecoder:
    """Decoder of networks that see one person in each view and return the field "heatmaps".

    Attributes:
        spec: the network's description.
        refinement: "none" takes the highest cell; "shift" moves it by a quarter of a cell towards its greater neighbour on each
            axis (Newell et al., arXiv:1603.06937); "dark" takes the top of the Gaussian that fits the smoothed map there
            (Zhang et al., arXiv:1910.06278).
        sigma: standard deviation, in cells, of the Gaussians that the network was trained on; "dark" smooths with it.
        keypoint_threshold: threshold below which a keypoint's value does not count in the person's score.
        nms_oks: of two people whose OKS is greater, the one with the lower score is left out; 1 keeps all.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"heatmaps": "CHW"}
    result: ClassVar[type] = Poses
    refinement: Literal["none", "shift", "dark"] = "dark"
    sigma: Annotated[float, Interval(ge=0.3, le=16)] = 2.0
    keypoint_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.2
    nms_oks: Annotated[float, Interval(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        """Check the options, and that each keypoint has a heatmap.

        Raises:
            ValueError: the refinement is unknown, a number is out of range, or there are fewer maps than keypoints.
        """
        if self.refinement not in _REFINEMENTS:
            raise ValueError(f"decoder.refinement={self.refinement}: unknown; use {', '.join(_REFINEMENTS)}")
        number("decoder.sigma", self.sigma, 0.3, 16)
        number("decoder.keypoint_threshold", self.keypoint_threshold, 0, 1)
        number("decoder.nms_oks", self.nms_oks, 1e-6, 1)
        self.spec.offers(self.needs)
        maps, names = self.spec.field("heatmaps").channels, self.spec.skeleton.names
        if maps < len(names):
            raise ValueError(f"{maps} heatmaps do not fit a skeleton of {len(names)} keypoints; correct model.spec")

    @cached_property
    def _kernel(self) -> F32:
        return _gaussian(self.sigma)

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Poses]:
        """Predict the person in each view.

        Args:
            fields: "heatmaps" [B, K or more, h, w]; a numpy array or a torch tensor.
            views: B views.

        Returns:
            For each view, the poses of at most one person; see `posepress.decoders.one_person.poses`.
        """
        heatmaps: Any = fields["heatmaps"]
        if hasattr(heatmaps, "is_cuda"):
            heatmaps = heatmaps.float().cpu().numpy()
        K, heat = len(self.spec.skeleton.names), self.spec.field("heatmaps")
        maps = np.ascontiguousarray(heatmaps, np.float32)
        if maps.ndim != 4 or maps.shape[1] < K or not maps.size:
            raise ValueError(f"heatmaps {list(maps.shape[1:])} are not the maps [C, h, w] of {K} keypoints; correct model.spec")
        best = maps.reshape(*maps.shape[:2], -1)[:, :K].argmax(axis=2)
        at, values, odd = _refined(maps, best, _REFINEMENTS.index(self.refinement), self._kernel)
        points = cells_to_input(at, heat, views[0].size)
        return poses(points, values, views, self.keypoint_threshold, odd)

    def merge(self, parts: Sequence[Poses], views: Sequence[View]) -> Poses:
        """All people of an image."""
        return merged(parts, views, self.spec.skeleton, self.nms_oks)

    def draw(self, image: NDArray[np.uint8], found: Poses) -> NDArray[np.uint8]:
        """The people drawn over their image [H, W, 3]."""
        return found.draw(image, self.spec.skeleton, captions=False)

    def readings(self, found: Poses) -> dict[str, Poses]:  # noqa: ARG002 - there are no other readings
        """No alternative versions of a prediction."""
        return {}

    def plain(self, found: Poses) -> Poses:
        """The prediction itself: nothing is added to it."""
        return found

    def mirror(self, name: str, field: F32) -> F32:  # noqa: ARG002 - there is one field
        """The heatmaps [C, h, w] of a mirrored view with left and right exchanged."""
        return mirrored_heatmaps(field, self.spec.skeleton)
