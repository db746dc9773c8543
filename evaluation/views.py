"""Framing: which part of an image becomes which network input, and the one place where pixel centres are shifted."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from evaluation.types import FieldSpec, InputSpec, Resolution, View

KeepAspectRatioMode = Literal["pad_image_input", "adjust_network_input"]


def cells_to_input(points: NDArray[np.float64], spec: FieldSpec) -> NDArray[np.float64]:
    """Map points of a field's grid [..., 2], in cells, to input pixels.

    A cell covers `stride` pixels, so its centre lies at (cell + 0.5) * stride - 0.5 (align_corners=False); `shift` moves
    the sample inside the cell.
    """
    return (points + spec.shift + 0.5) * spec.stride - 0.5


def input_to_cells(points: NDArray[np.float64], spec: FieldSpec) -> NDArray[np.float64]:
    """The inverse of `cells_to_input`."""
    return (points + 0.5) / spec.stride - 0.5 - spec.shift


def resized(size: Resolution, to: tuple[float, float]) -> NDArray[np.float64]:
    """The matrix [2, 3] of a resize of a whole image to (height, width), keeping pixel *edges* in place."""
    sy, sx = to[0] / size.height, to[1] / size.width
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5]], np.float64)


@dataclass(frozen=True)
class WholeImage:
    """Framing of bottom-up networks: one view an image.

    Attributes:
        keep_aspect_ratio_mode: None stretches the image to the resolution; "pad_image_input" keeps the aspect and pads
            on the right and below (letterbox); "adjust_network_input" keeps the resolution's height and lets the width
            follow the image, padded on the right to what the network takes.
    """

    keep_aspect_ratio_mode: KeepAspectRatioMode | None = "pad_image_input"

    def __post_init__(self) -> None:
        """Check the mode's name."""
        known = (None, "pad_image_input", "adjust_network_input")
        if self.keep_aspect_ratio_mode not in known:
            raise ValueError(
                f"keep_aspect_ratio_mode={self.keep_aspect_ratio_mode}: unknown; use null, pad_image_input or "
                "adjust_network_input"
            )

    @property
    def one_size(self) -> bool:
        """Whether every view has the same size."""
        return self.keep_aspect_ratio_mode != "adjust_network_input"

    def views(self, size: Resolution, resolution: Resolution, spec: InputSpec) -> list[View]:
        """The views of an image of `size` for a network run at `resolution`."""
        if self.keep_aspect_ratio_mode is None:
            return [View(resized(size, (resolution.height, resolution.width)), resolution)]
        if self.keep_aspect_ratio_mode == "pad_image_input":
            scale = min(resolution.height / size.height, resolution.width / size.width)
            inside = (round(size.height * scale), round(size.width * scale))
            return [View(resized(size, inside), resolution)]
        width = round(size.width * resolution.height / size.height)
        return [View(resized(size, (resolution.height, width)), Resolution(resolution.height, spec.fit(width)))]
