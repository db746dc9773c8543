"""Decoder of one-stage networks: a box, a score and keypoints in each entry of a set (YOLO-pose, arXiv:2204.06806)."""

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
from posepress.geometry import View, cells_to_input
from posepress.results import Poses
from posepress.spec import Array, NetworkSpec

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class OneStageDecoder:
    """Decoder of networks that return the sets "boxes" [4], "scores" [1] and "keypoints" [3 K].

    An entry's keypoints are x, y and a score for each. Boxes and points are in pixels of the input.

    Attributes:
        spec: the network's description.
        form: "xyxy" for corners, "cxcywh" for middle and size.
        score_threshold: least score of a person.
        nms_iou: greatest intersection over union with the box of a better person; 1 for networks that suppress people
            themselves.
        max_candidates: greatest number of entries that are compared; it bounds the time.
        max_detections: greatest number of people in an image.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"boxes": "NC", "scores": "NC", "keypoints": "NC"}
    result: ClassVar[type] = Poses
    shown: ClassVar[float] = SHOWN
    form: Form = "xyxy"
    score_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.01
    nms_iou: Annotated[float, Interval(gt=0, le=1)] = 0.65
    max_candidates: Annotated[int, Interval(ge=1, le=100000)] = 1000
    max_detections: Annotated[int, Interval(ge=1, le=10000)] = 100

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: an option is unknown or out of range, or an output is missing or has another number of channels.
        """
        choice("decoder.form", self.form, ("xyxy", "cxcywh"))
        number("decoder.score_threshold", self.score_threshold, 0, 1)
        number("decoder.nms_iou", self.nms_iou, 1e-6, 1)
        whole("decoder.max_candidates", self.max_candidates, 1, 100000)
        whole("decoder.max_detections", self.max_detections, 1, 10000)
        self.spec.offers(self.needs)
        K = len(self.spec.skeleton.names)
        for name, wanted in (("boxes", 4), ("scores", 1), ("keypoints", 3 * K)):
            if (given := self.spec.field(name).channels) != wanted:
                why = f" (x, y and score of {K} keypoints)" if name == "keypoints" else ""
                raise ValueError(f"'{name}' has {given} values an entry, and needs {wanted}{why}; correct model.spec")

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Poses]:
        """Find the people in each view.

        Args:
            fields: "boxes" [B, N, 4], "scores" [B, N, 1] and "keypoints" [B, N, 3 K]; numpy arrays or torch tensors.
            views: B views.

        Returns:
            Poses in image pixels with their boxes, best first. Keypoints with a score of 0 or less, or that are not finite, are
            missing.

        Raises:
            ValueError: a field has another shape.
        """
        box, point = self.spec.field("boxes"), self.spec.field("keypoints")
        every = entries(fields, box, len(views))
        scores = entries(fields, self.spec.field("scores"), len(views))[..., 0]
        points = entries(fields, point, len(views))
        found = []
        for boxes, score, values, view in zip(every, scores, points, views, strict=True):
            most = (self.max_candidates, self.max_detections)
            rows, corners = suppress(boxes, score, self.form == "cxcywh", self.score_threshold, self.nms_iou, most)
            chosen = values[rows].reshape(len(rows), len(self.spec.skeleton.names), 3)
            image = view.to_image(cells_to_input(chosen[..., :2].astype(np.float64), point, view.size))
            keypoints = np.concatenate((image, chosen[..., 2:]), axis=-1).astype(np.float32)
            there = np.isfinite(keypoints).all(axis=-1) & (keypoints[..., 2] > 0)
            keypoints = np.where(there[..., None], keypoints, np.float32(0))
            finite = np.isfinite(score.sum()) and np.isfinite(boxes.sum()) and np.isfinite(chosen).all()
            counts = {"images_not_finite": int(not finite)}
            boxed = to_image(corners, box, view).astype(np.float32)
            found.append(Poses(keypoints, score[rows], counts=counts, boxes=boxed))
        return found

    def merge(self, parts: Sequence[Poses], views: Sequence[View]) -> Poses:  # noqa: ARG002 - there is one view
        """All people of an image."""
        K = len(self.spec.skeleton.names)
        return Poses(
            np.concatenate([np.zeros((0, K, 3), np.float32), *(part.keypoints for part in parts)]),
            np.concatenate([np.zeros(0, np.float32), *(part.scores for part in parts)]),
            counts={"images_not_finite": int(any(part.counts["images_not_finite"] for part in parts))},
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(part.boxes for part in parts if part.boxes is not None)]),
        )

    def draw(self, image: NDArray[np.uint8], found: Poses) -> NDArray[np.uint8]:
        """The people drawn over their image [H, W, 3]; those with a score below `posepress.draw.SHOWN` are left out."""
        return found.above(SHOWN).draw(image, self.spec.skeleton, captions=False)

    def readings(self, found: Poses) -> dict[str, Poses]:  # noqa: ARG002 - there are no other readings
        """No alternative versions of a prediction."""
        return {}

    def plain(self, found: Poses) -> Poses:
        """The prediction itself: nothing is added to it."""
        return found

    def mirror(self, name: str, field: F32) -> F32:  # noqa: ARG002 - sets have no mirror image
        """Sets cannot be averaged over mirrored views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"'{name}' is a set, which has no mirror image; set flip=false")
