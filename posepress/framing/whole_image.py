"""The whole image as one view, or as several whose fields are averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Interval, MinLen
from numpy.typing import NDArray

from posepress.checks import choice, number
from posepress.contracts import Decoder, Result
from posepress.errors import UserError
from posepress.geometry import Interpolation, View, mirrored, resized
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.spec import InputSpec, NetworkSpec

KeepAspectRatioMode = Literal["pad_image_input", "adjust_network_input"]

_LABELS = {None: "stretch", "pad_image_input": "pad", "adjust_network_input": "adjust"}


@dataclass(frozen=True)
class WholeImage:
    """Framing of bottom-up networks: one view of an image, or several views whose fields are averaged.

    Attributes:
        keep_aspect_ratio_mode: None stretches the image to the resolution; "pad_image_input" keeps the aspect and pads
            on the right and below (letterbox); "adjust_network_input" keeps the resolution's height and chooses
            the width by the image, padded on the right to a width that the network accepts.
        scales: sizes of the views, as factors of the resolution. Several scales are a research setting that no engine offers.
        flip: whether the mirrored image is a further view; a research setting.
        interpolation: "linear" or "cubic", how pixels are computed.
    """

    bases_use: ClassVar[tuple[str, ...]] = ()  # options on which `bases` depends
    keep_aspect_ratio_mode: KeepAspectRatioMode | None = "pad_image_input"
    scales: Annotated[Sequence[Annotated[float, Interval(ge=0.1, le=8)]], MinLen(1)] = (1.0,)
    flip: bool = False
    interpolation: Interpolation = "linear"

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
        choice("framing.interpolation", self.interpolation, ("linear", "cubic"))

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The framing's label in an address: pad, or pad-x0.5-1-1.5-flip if several views are averaged."""
        mode, scales = options.get("keep_aspect_ratio_mode"), options.get("scales", [1])
        scales = scales if isinstance(scales, Sequence) else [scales]  # a wrong type is refused later
        several = "" if list(scales) == [1] else "-x" + "-".join(f"{scale:g}" for scale in scales)
        pixels = options.get("interpolation", "linear")
        words = [f"{_LABELS.get(mode, mode)}{several}", *(["flip"] if options.get("flip") else [])]
        return "-".join([*words, *([str(pixels)] if pixels != "linear" else [])])

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
        boxes: Boxes | None = None,  # noqa: ARG002 - only framings that crop need it
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

    def bases(self, size: Resolution, resolution: Resolution, boxes: Boxes | None = None) -> list[View]:  # noqa: ARG002
        """The whole image, as large as the resolution allows, in the middle of the view."""
        scale = min(resolution.width / size.width, resolution.height / size.height)
        middle = np.array([(size.width - 1) / 2, (size.height - 1) / 2])
        target = np.array([(resolution.width - 1) / 2, (resolution.height - 1) / 2])
        return [View(np.column_stack((np.eye(2) * scale, target - scale * middle)), resolution)]

    def reader(self, decoder: Decoder[Result], spec: NetworkSpec) -> Decoder[Any]:
        """The decoder itself, or one that averages the outputs of several views first.

        Raises:
            UserError: an output is no map, and several views are to be averaged.
        """
        from posepress.decoders.averaged import AveragedFields

        if not self.averaged:
            return decoder
        if other := [field.name for field in spec.fields if not field.is_map]:
            raise UserError(f"scales and flip average maps alone, and '{other[0]}' is none; set 'scales=[1.0]' flip=false")
        return AveragedFields(decoder, spec)

    def _view(self, size: Resolution, resolution: Resolution, spec: InputSpec) -> View:
        if self.keep_aspect_ratio_mode is None:
            return self._of(resized(size, (resolution.height, resolution.width)), resolution)
        if self.keep_aspect_ratio_mode == "pad_image_input":
            scale = min(resolution.height / size.height, resolution.width / size.width)
            inside = (max(round(size.height * scale), 1), max(round(size.width * scale), 1))
            return self._of(resized(size, inside), resolution)
        width = max(round(size.width * resolution.height / size.height), 1)
        return self._of(resized(size, (resolution.height, width)), Resolution(resolution.height, spec.fit(width)))

    def _of(self, matrix: NDArray[np.float64], size: Resolution) -> View:
        return View(matrix, size, interpolation=self.interpolation)
