"""Framing: which part of an image becomes which network input, and the one place where pixel centres are shifted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval, MinLen
from numpy.typing import NDArray

from evaluation.types import FieldSpec, InputSpec, Resolution, View, number

KeepAspectRatioMode = Literal["pad_image_input", "adjust_network_input"]
_LABELS = {None: "stretch", "pad_image_input": "pad", "adjust_network_input": "adjust"}


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


def mirrored(view: View, size: Resolution) -> View:
    """The same view of the image of `size` turned left to right."""
    turned = view.matrix.copy()
    turned[:, 0] = -view.matrix[:, 0]
    turned[:, 2] = view.matrix[:, 2] + view.matrix[:, 0] * (size.width - 1)
    return View(turned, view.size, view.box, not view.flipped)


@dataclass(frozen=True)
class WholeImage:
    """Framing of bottom-up networks: one view an image, or several whose fields are averaged.

    Attributes:
        keep_aspect_ratio_mode: None stretches the image to the resolution; "pad_image_input" keeps the aspect and pads
            on the right and below (letterbox); "adjust_network_input" keeps the resolution's height and lets the width
            follow the image, padded on the right to what the network takes.
        scales: of the resolution; more than [1] is a research setting, for no engine runs that way.
        flip: see the mirrored image too; a research setting.
    """

    keep_aspect_ratio_mode: KeepAspectRatioMode | None = "pad_image_input"
    scales: Annotated[Sequence[Annotated[float, Interval(ge=0.1, le=8)]], MinLen(1)] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        """Check the mode's name and the scales."""
        known = (None, "pad_image_input", "adjust_network_input")
        if self.keep_aspect_ratio_mode not in known:
            raise ValueError(
                f"keep_aspect_ratio_mode={self.keep_aspect_ratio_mode}: unknown; use null, pad_image_input or "
                "adjust_network_input"
            )
        scales: object = self.scales
        if not isinstance(scales, (list, tuple)):
            raise ValueError(f"scales={scales}: give a list, like 'scales=[{scales}]'")  # noqa: TRY004
        if not scales:
            raise ValueError("scales=[]: choose at least one, each from 0.1 to 8")
        for place, scale in enumerate(scales):
            number(f"scales[{place}]", scale, 0.1, 8)
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip={self.flip}: choose true or false")  # noqa: TRY004

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The framing in a word of an address: pad, or pad-x0.5-1-1.5-flip where several views are averaged."""
        mode, scales = options.get("keep_aspect_ratio_mode"), options.get("scales", [1])
        scales = scales if isinstance(scales, Sequence) else [scales]  # which is refused later
        several = "" if list(scales) == [1] else "-x" + "-".join(f"{scale:g}" for scale in scales)
        return f"{_LABELS.get(mode, mode)}{several}{'-flip' if options.get('flip') else ''}"

    @property
    def one_size(self) -> bool:
        """Whether every view has the same size."""
        return self.keep_aspect_ratio_mode != "adjust_network_input" and len(self.scales) == 1

    @property
    def averaged(self) -> bool:
        """Whether an image has several views."""
        return len(self.scales) > 1 or self.flip

    def views(
        self,
        size: Resolution,
        resolution: Resolution,
        spec: InputSpec,
        boxes: NDArray[np.float64] | None = None,  # noqa: ARG002 - of people, for framings that crop
    ) -> list[View]:
        """The views of an image of `size` for a network run at `resolution`."""
        views = []
        for scale in self.scales:
            height, width = resolution.height, resolution.width
            if scale != 1:
                height, width = spec.fit(height * scale), spec.fit(width * scale)
            view = self._view(size, Resolution(height, width), spec)
            views += [view, mirrored(view, size)] if self.flip else [view]
        return views

    def _view(self, size: Resolution, resolution: Resolution, spec: InputSpec) -> View:
        if self.keep_aspect_ratio_mode is None:
            return View(resized(size, (resolution.height, resolution.width)), resolution)
        if self.keep_aspect_ratio_mode == "pad_image_input":
            scale = min(resolution.height / size.height, resolution.width / size.width)
            inside = (max(round(size.height * scale), 1), max(round(size.width * scale), 1))
            return View(resized(size, inside), resolution)
        width = max(round(size.width * resolution.height / size.height), 1)
        return View(resized(size, (resolution.height, width)), Resolution(resolution.height, spec.fit(width)))


@dataclass(frozen=True)
class PersonCrops:
    """Framing of top-down networks: one view a person, cut around the given box.

    Attributes:
        padding: the crop is the box of the network's aspect around the person's, larger by this factor.
    """

    padding: Annotated[float, Interval(ge=0.1, le=10)] = 1.25

    def __post_init__(self) -> None:
        """Check the padding.

        Raises:
            ValueError: it is no number from 0.1 to 10.
        """
        number("framing.padding", self.padding, 0.1, 10)

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The framing in a word of an address: crop1.25."""
        return f"crop{options['padding']}"

    @property
    def one_size(self) -> bool:
        """Every crop has the resolution's size."""
        return True

    @property
    def averaged(self) -> bool:
        """A person has one view."""
        return False

    def views(
        self,
        size: Resolution,  # noqa: ARG002 - of the image, for framings that see all of it
        resolution: Resolution,
        spec: InputSpec,  # noqa: ARG002 - for framings that choose the size
        boxes: NDArray[np.float64] | None = None,
    ) -> list[View]:
        """A view for each box [N, 4] (x, y, width, height) in image pixels.

        Raises:
            ValueError: the image has no boxes, as opposed to none in it, or one is not finite.
        """
        if boxes is None:
            raise ValueError("a top-down network needs a box for each person, and these images have none")
        if not np.isfinite(boxes).all():
            raise ValueError("a person's box is not finite; mend the annotation file")
        views = []
        for x, y, width, height in boxes.tolist():
            across = max(width, height * resolution.width / resolution.height, 1.0) * self.padding
            scale = resolution.width / across
            middle = np.array([x + (width - 1) / 2, y + (height - 1) / 2])
            target = np.array([(resolution.width - 1) / 2, (resolution.height - 1) / 2])
            matrix = np.column_stack((np.eye(2) * scale, target - scale * middle))
            views.append(View(matrix, resolution, (x, y, width, height)))
        return views
