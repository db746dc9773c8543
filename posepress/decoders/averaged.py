"""Decoder for a research setting: the fields of several views of an image are averaged on one grid, then decoded."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Decoder
from posepress.geometry import View, cells_to_input, input_to_cells
from posepress.labels import Skeleton
from posepress.spec import Array, NetworkSpec, OutputSpec

F32 = NDArray[np.float32]


def _interpolation(at: NDArray[np.float64], cells: int) -> F32:
    """The matrix [len(at), cells] that interpolates a line of cells at positions by Keys' cubic convolution (a = -1/2)."""
    matrix = np.zeros((len(at), cells), np.float32)
    first = np.floor(at).astype(int)
    for tap in range(-1, 3):
        d = np.abs(at - (first + tap))
        weight = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, np.where(d < 2, ((-0.5 * d + 2.5) * d - 4) * d + 2, 0))
        np.add.at(matrix, (np.arange(len(at)), np.clip(first + tap, 0, cells - 1)), weight)
    return matrix


def mirrored_heatmaps(field: F32, skeleton: Skeleton) -> F32:
    """Heatmaps [C, h, w] of a mirrored view in the order of the other view; a map beyond the keypoints keeps its place."""
    flip = skeleton.flip
    ordered: F32 = np.take(field, [*flip, *range(len(flip), len(field))], axis=0)
    return ordered


def _to_input(grid: NDArray[np.float64], field: OutputSpec, view: View) -> NDArray[np.float64]:
    """X and y [N, 2] in cells of a map, or in cells of a line along its axis and in pixels along the other, in input pixels."""
    if field.is_map:
        return cells_to_input(grid, field, view.size)
    at = int(field.axes == "CY")
    made = grid.copy()
    made[:, at] = cells_to_input(grid[:, at], field, view.size)
    return made


def _to_cells(points: NDArray[np.float64], field: OutputSpec, view: View) -> NDArray[np.float64]:
    """The inverse of `_to_input`."""
    if field.is_map:
        return input_to_cells(points, field, view.size)
    at = int(field.axes == "CY")
    made = points.copy()
    made[:, at] = input_to_cells(points[:, at], field, view.size)
    return made


@dataclass(frozen=True)
class AveragedFields:
    """A decoder for images with several views: at several scales, or mirrored.

    Attributes:
        decoder: decodes the averaged fields.
        spec: the network's description.
    """

    decoder: Decoder[Any]
    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {}
    result: ClassVar[type] = dict

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[dict[str, F32]]:
        """The fields of each view, in host memory; `merge` decodes them once all views of the image are there."""
        host = {
            name: field.float().cpu().numpy() if hasattr(field, "is_cuda") else np.asarray(field)
            for name, field in fields.items()
        }
        return [{name: field[n].astype(np.float32) for name, field in host.items()} for n in range(len(views))]

    def merge(self, parts: Sequence[Mapping[str, F32]], views: Sequence[View]) -> Any:
        """Average the fields of the views of each instance, or of the whole image, and decode them.

        The grid is that of the largest view. An instance's views follow each other, the plain one first.
        """
        starts = [n for n, view in enumerate(views) if n == 0 or (view.box is not None and not view.flipped)]
        decoded, shown = [], []
        for start, end in itertools.pairwise([*starts, len(views)]):
            own = views[start:end]
            largest = max((view for view in own if not view.flipped), key=lambda view: view.size.height * view.size.width)
            mean = {field.name: self._mean(field, parts[start:end], own, largest)[None] for field in self.spec.fields}
            decoded += self.decoder.decode(mean, [largest])
            shown.append(largest)
        return self.decoder.merge(decoded, shown)

    def _mean(self, field: OutputSpec, parts: Sequence[Mapping[str, F32]], views: Sequence[View], largest: View) -> F32:
        """The mean of a field over views, on the grid of the largest: maps [C, h, w] or lines [C, cells]."""
        shape = next(part[field.name].shape for part, view in zip(parts, views, strict=True) if view is largest)
        down = shape[1] if field.axes != "CX" else 1
        across = shape[2] if field.is_map else shape[1] if field.axes == "CX" else 1
        most = max(down, across)
        grid = np.stack((np.arange(most) % across, np.arange(most) % down), axis=-1).astype(np.float64)
        image = largest.to_image(_to_input(grid, field, largest))
        total: NDArray[Any] = np.zeros(shape, np.float32)
        for part, view in zip(parts, views, strict=True):
            source: NDArray[Any] = part[field.name]
            cells = _to_cells(view.to_input(image), field, view)
            if field.axes != "CY":
                source = source @ _interpolation(cells[:across, 0], source.shape[-1]).T
            if field.axes != "CX":
                rows = _interpolation(cells[:down, 1], source.shape[1])
                source = rows @ source if field.is_map else source @ rows.T
            total += self.decoder.mirror(field.name, source.astype(np.float32)) if view.flipped else source
        mean: F32 = (total / len(parts)).astype(np.float32)
        return mean

    def draw(self, image: NDArray[np.uint8], found: Any) -> NDArray[np.uint8]:
        """Draw the prediction as `decoder` does."""
        drawn: NDArray[np.uint8] = self.decoder.draw(image, found)
        return drawn

    def readings(self, found: Any) -> Mapping[str, Any]:
        """The readings of the inner decoder."""
        return self.decoder.readings(found)

    def plain(self, found: Any) -> Any:
        """The plain reading of the inner decoder."""
        return self.decoder.plain(found)

    def mirror(self, name: str, field: F32) -> F32:
        """A field of a mirrored view, as the inner decoder turns it."""
        return self.decoder.mirror(name, field)
