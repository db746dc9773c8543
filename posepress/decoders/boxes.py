"""Decoder of detectors: boxes of one class from a set of candidates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from posepress.checks import choice, number, whole
from posepress.decoders.sets import Form, entries, to_image
from posepress.decoders.suppression import suppress
from posepress.draw import SHOWN
from posepress.geometry import View
from posepress.results import Boxes
from posepress.spec import Array, Fields, NetworkSpec

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class BoxDecoder:
    """Decoder of detectors that return the sets "boxes" [4] and "scores", one for each class.

    A network with the set "classes" [1] has one score an entry, of the class whose number stands there.

    Attributes:
        spec: the network's description.
        form: "xyxy" for corners, "cxcywh" for middle and size.
        category: class to find: its name in the network's labels, or its number.
        score_threshold: least score of a box.
        nms_iou: greatest intersection over union with a better box; 1 for networks that suppress boxes themselves.
        max_candidates: greatest number of boxes that are compared; it bounds the time.
        max_detections: greatest number of boxes of an image.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"boxes": "NC", "scores": "NC"}
    result: ClassVar[type] = Boxes
    shown: ClassVar[float] = SHOWN
    form: Form = "xyxy"
    category: str | int = 0
    score_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.025
    nms_iou: Annotated[float, Interval(gt=0, le=1)] = 0.6
    max_candidates: Annotated[int, Interval(ge=1, le=100000)] = 1000
    max_detections: Annotated[int, Interval(ge=1, le=10000)] = 100

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option is unknown or out of range, or the network lacks an output or the class.
        """
        choice("decoder.form", self.form, ("xyxy", "cxcywh"))
        number("decoder.score_threshold", self.score_threshold, 0, 1)
        number("decoder.nms_iou", self.nms_iou, 1e-6, 1)
        whole("decoder.max_candidates", self.max_candidates, 1, 100000)
        whole("decoder.max_detections", self.max_detections, 1, 10000)
        self.spec.offers(self.needs)
        if (given := self.spec.field("boxes").channels) != 4:
            raise ValueError(f"'boxes' has {given} values an entry, and a box has 4; correct model.spec")
        _ = self._class

    @property
    def _classes(self) -> bool:
        """Whether each entry names its class."""
        return any(field.name == "classes" for field in self.spec.fields)

    @property
    def _class(self) -> int:
        """Number of the class.

        Raises:
            ValueError: the network has no such class.
        """
        names = self.spec.labels.names
        classes = len(names) if self._classes else self.spec.field("scores").channels
        known = isinstance(self.category, str)
        if known and self.category not in names:
            raise ValueError(f"category={self.category}: the network's classes are {', '.join(names[:8])}; choose one")
        number_of = names.index(str(self.category)) if known else int(self.category)
        if not 0 <= number_of < classes:
            raise ValueError(f"category={self.category}: there are {classes} classes; choose 0 to {classes - 1}")
        return number_of

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Boxes]:
        """Find the boxes in each view.

        Args:
            fields: "boxes" [B, N, 4] and "scores" [B, N, classes]; numpy arrays or torch tensors.
            views: B views.

        Returns:
            Boxes in image pixels, best first. Boxes and scores that are not finite are left out, and the image is counted.

        Raises:
            ValueError: a field has another shape.
        """
        field = self.spec.field("boxes")
        every = entries(fields, field, len(views))
        scores = self._scores(fields, len(views))
        found = []
        for boxes, score, view in zip(every, scores, views, strict=True):
            most = (self.max_candidates, self.max_detections)
            rows, corners = suppress(boxes, score, self.form == "cxcywh", self.score_threshold, self.nms_iou, most)
            counts = {"images_not_finite": int(not (np.isfinite(score.sum()) and np.isfinite(boxes.sum())))}
            found.append(Boxes(to_image(corners, field, view), score[rows].astype(np.float64), counts))
        return found

    def _scores(self, fields: Fields, views: int) -> F32:
        """Scores of the class, [B, N]."""
        scores = entries(fields, self.spec.field("scores"), views)
        if not self._classes:
            return scores[..., self._class]
        own = entries(fields, self.spec.field("classes"), views)[..., 0] == self._class
        return np.where(own, scores[..., 0], np.float32(0))

    def merge(self, parts: Sequence[Boxes], views: Sequence[View]) -> Boxes:  # noqa: ARG002 - there is one view
        """All boxes of an image."""
        return Boxes(
            np.concatenate([np.zeros((0, 4)), *(part.xywh for part in parts)]),
            np.concatenate([np.zeros(0), *(part.scores for part in parts if part.scores is not None)]),
            {"images_not_finite": int(any(part.counts["images_not_finite"] for part in parts))},
        )

    def draw(self, image: NDArray[np.uint8], found: Boxes) -> NDArray[np.uint8]:
        """The boxes drawn over their image [H, W, 3]."""
        return found.draw(image, SHOWN)

    def readings(self, found: Boxes) -> dict[str, Boxes]:  # noqa: ARG002 - there are no other readings
        """No alternative versions of a prediction."""
        return {}

    def plain(self, found: Boxes) -> Boxes:
        """The prediction itself: nothing is added to it."""
        return found

    def mirror(self, name: str, field: F32) -> F32:  # noqa: ARG002 - sets have no mirror image
        """Sets cannot be averaged over mirrored views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"'{name}' is a set, which has no mirror image; set flip=false")
