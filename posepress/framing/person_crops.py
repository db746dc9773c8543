"""One view for each person, cut around a given box."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval

from posepress.checks import number
from posepress.contracts import Decoder, Result
from posepress.errors import UserError
from posepress.geometry import View, mirrored
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.spec import InputSpec, NetworkSpec


@dataclass(frozen=True)
class PersonCrops:
    """Framing of top-down networks: one view for each person, cut around the given box.

    Attributes:
        padding: factor by which the crop is larger than the person's box. The box is first widened to the network's aspect
            ratio.
        flip: whether each person has a mirrored view, too, whose fields are averaged with those of the plain view; a research
            setting that no engine offers.
    """

    bases_use: ClassVar[tuple[str, ...]] = ("padding",)  # options on which `bases` depends
    padding: Annotated[float, Interval(ge=0.1, le=10)] = 1.25
    flip: bool = False

    def __post_init__(self) -> None:
        """Check the padding.

        Raises:
            ValueError: the padding is not a number from 0.1 to 10.
        """
        number("framing.padding", self.padding, 0.1, 10)

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The framing's label in an address: crop1.25."""
        return f"crop{options['padding']}{'-flip' if options.get('flip') else ''}"

    @property
    def one_size(self) -> bool:
        """Always true: every crop has the resolution's size."""
        return True

    @property
    def averaged(self) -> bool:
        """Whether a person has several views."""
        return self.flip

    def views(
        self,
        size: Resolution,
        resolution: Resolution,
        spec: InputSpec,  # noqa: ARG002 - only framings that choose the size need it
        boxes: Boxes | None = None,
    ) -> list[View]:
        """A view for each box, in their order.

        Raises:
            ValueError: `boxes` is None, or a box is not finite. An empty array is accepted: the image shows no people.
        """
        plain = self.bases(size, resolution, boxes)
        return [view for one in plain for view in (one, mirrored(one, size))] if self.flip else plain

    def bases(
        self,
        size: Resolution,  # noqa: ARG002 - only framings of the whole image need it
        resolution: Resolution,
        boxes: Boxes | None = None,
    ) -> list[View]:
        """The crops that training starts from: those of `views`.

        Raises:
            ValueError: as `views`.
        """
        if boxes is None:
            raise ValueError(
                "a top-down network needs a box for each person, and these images have none; give detector=FILE or data.boxes"
            )
        if not np.isfinite(boxes.xywh).all():
            raise ValueError("a person's box is not finite; correct the annotation file")
        views = []
        scores = np.ones(len(boxes.xywh)) if boxes.scores is None else boxes.scores
        for (x, y, width, height), score in zip(boxes.xywh.tolist(), scores.tolist(), strict=True):
            across = max(width, height * resolution.width / resolution.height, 1.0) * self.padding
            scale = resolution.width / across
            middle = np.array([x + (width - 1) / 2, y + (height - 1) / 2])
            target = np.array([(resolution.width - 1) / 2, (resolution.height - 1) / 2])
            matrix = np.column_stack((np.eye(2) * scale, target - scale * middle))
            views.append(View(matrix, resolution, (x, y, width, height), score=score))
        return views

    def reader(self, decoder: Decoder[Result], spec: NetworkSpec) -> Decoder[Any]:
        """The decoder itself, or one that averages the outputs of a person's views first.

        Raises:
            UserError: an output is a set or a class map, and views are to be averaged.
        """
        from posepress.decoders.averaged import AveragedFields

        if not self.flip:
            return decoder
        if other := [field.name for field in spec.fields if field.axes not in ("CHW", "CX", "CY")]:
            raise UserError(f"flip averages maps and lines alone, and '{other[0]}' is neither; set flip=false")
        return AveragedFields(decoder, spec)
