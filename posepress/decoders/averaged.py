"""Decoder for a research setting: the fields of several views of an image are averaged on one grid, then decoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Decoder
from posepress.geometry import View, cells_to_input, input_to_cells
from posepress.labels import Skeleton
from posepress.spec import Array, NetworkSpec

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
        """Average the fields of an image's views on the grid of the largest view, and decode them."""
        largest = max((view for view in views if not view.flipped), key=lambda view: view.size.height * view.size.width)
        mean = {}
        for field in self.spec.fields:
            h, w = next(part[field.name].shape[1:] for part, view in zip(parts, views, strict=True) if view is largest)
            total = np.zeros((field.channels, h, w), np.float32)
            for part, view in zip(parts, views, strict=True):
                source = part[field.name]
                grid = np.stack((np.arange(max(h, w)) % w, np.arange(max(h, w)) % h), axis=-1).astype(np.float64)
                image = largest.to_image(cells_to_input(grid, field, largest.size))
                cells = input_to_cells(view.to_input(image), field, view.size)
                across = _interpolation(cells[:w, 0], source.shape[2])
                down = _interpolation(cells[:h, 1], source.shape[1])
                read: F32 = (down @ source @ across.T).astype(np.float32)
                total += self.decoder.mirror(field.name, read) if view.flipped else read
            mean[field.name] = total[None] / len(parts)
        decoded = self.decoder.decode(mean, [largest])
        return self.decoder.merge(decoded, [largest])

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
