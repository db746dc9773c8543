"""Views: matrices that map image points to network inputs. Only this module handles the half-pixel shift of centres.

Points are (x, y) in pixels, with the centre of the first pixel at (0, 0).
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from posepress.resolution import Resolution
from posepress.spec import OutputSpec

Interpolation = Literal["linear", "cubic"]


@dataclass(frozen=True)
class View:
    """One network input cut from an image.

    Attributes:
        matrix: float64 [2, 3], from image points to input points.
        size: the input's size.
        box: the shown part of the image, (x, y, width, height) in image pixels; None is the whole image.
        flipped: whether the skeleton's left and right are swapped in this view.
        score: a detector's confidence in the box, 0 to 1; 1 for annotated boxes and whole images.
        interpolation: how its pixels are computed from the image's.
    """

    matrix: NDArray[np.float64]
    size: Resolution
    box: tuple[float, float, float, float] | None = None
    flipped: bool = False
    score: float = 1.0
    interpolation: Interpolation = "linear"

    def to_input(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map image points [..., 2] to input points."""
        return np.asarray(points, np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def to_image(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map input points [..., 2] to image points."""
        (a, b, x), (c, d, y) = self.matrix.tolist()
        inverse = np.array([[d, -c], [-b, a]]) / (a * d - b * c)  # transposed; takes a fifth of the time of a general inverse
        mapped: NDArray[np.float64] = (np.asarray(points, np.float64) - (x, y)) @ inverse
        return mapped


Points = TypeVar("Points")  # a numpy array, or a torch tensor


def cells_to_input(points: Points, spec: OutputSpec, size: Resolution | None = None) -> Points:
    """Map points of a field's grid in cells to input pixels.

    A cell covers `stride` pixels, so its centre lies at (cell + 0.5) * stride - 0.5 (align_corners=False); `shift` moves
    the sample inside the cell. With `udp` the first and last cells lie on the first and last pixels (align_corners=True).

    Args:
        points: [..., 2], x and y. For a line ("CX", "CY"): [...], coordinates along its axis.
        spec: the field.
        size: the input's size; needed if the field has `udp`.
    """
    given: Any = points  # both kinds of arrays have the same operators
    if spec.udp:
        steps = _steps(spec, size)
        return cast("Points", (given + spec.shift) * _like(given, steps))
    return cast("Points", (given + spec.shift + 0.5) * spec.stride - 0.5)


def input_to_cells(points: Points, spec: OutputSpec, size: Resolution | None = None) -> Points:
    """The inverse of `cells_to_input`."""
    given: Any = points
    if spec.udp:
        return cast("Points", given / _like(given, _steps(spec, size)) - spec.shift)
    return cast("Points", (given + 0.5) / spec.stride - 0.5 - spec.shift)


def _steps(spec: OutputSpec, size: Resolution | None) -> tuple[float, ...]:
    """Pixels from cell to cell of a field with corners in place: along x and y, or along a line."""
    if size is None:
        raise ValueError(f"the cells of '{spec.name}' depend on the input's size (udp); give the size")
    sides = {"CX": (size.width,), "CY": (size.height,)}.get(spec.axes, (size.width, size.height))
    return tuple((side - 1) / max(round(side / spec.stride) - 1, 1) for side in sides)


def _like(points: Any, steps: tuple[float, ...]) -> Any:
    """Numbers as an array of the kind of `points`; a single one stays a number."""
    if len(steps) == 1:
        return steps[0]
    return points.new_tensor(steps) if hasattr(points, "new_tensor") else np.array(steps)


def resized(size: Resolution, to: tuple[float, float]) -> NDArray[np.float64]:
    """The matrix [2, 3] that resizes a whole image to (height, width). It keeps the pixels' *edges* in place."""
    sy, sx = to[0] / size.height, to[1] / size.width
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5]], np.float64)


def mirrored(view: View, size: Resolution) -> View:
    """The same view of the mirrored image; `size` is the image's size."""
    turned = view.matrix.copy()
    turned[:, 0] = -view.matrix[:, 0]
    turned[:, 2] = view.matrix[:, 2] + view.matrix[:, 0] * (size.width - 1)
    return replace(view, matrix=turned, flipped=not view.flipped)
