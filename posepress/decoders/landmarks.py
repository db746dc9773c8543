"""Decoder of networks that regress the keypoints of the one person in each view (BlazePose, arXiv:2006.10204)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from posepress.checks import number, whole
from posepress.decoders.one_person import merged, poses
from posepress.decoders.sets import entries
from posepress.geometry import View, cells_to_input, input_to_cells
from posepress.results import Poses
from posepress.spec import Array, NetworkSpec

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class LandmarkDecoder:
    """Decoder of networks that return the set "landmarks": an entry a keypoint, x and y in pixels of the input, then others.

    The set "presence" [1], if the network has it, is a factor of the person's score.

    Attributes:
        spec: the network's description.
        visibility: number of the value in an entry that is the logit of the keypoint's visibility. It becomes the keypoint's
            score; None gives all keypoints the score 1.
        refine: side in cells, an odd number, of the window of "heatmaps" whose weighted mean replaces a landmark, where the
            window's greatest value is at least .5; 0 keeps the landmarks.
        nms_oks: of two people whose OKS is greater, the one with the lower score is left out; 1 keeps all.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"landmarks": "NC"}
    result: ClassVar[type] = Poses
    visibility: Annotated[int, Interval(ge=2, le=64)] | None = None
    refine: Annotated[int, Interval(ge=0, le=63)] = 0
    nms_oks: Annotated[float, Interval(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a number is out of range, or an entry has fewer values, or the network has no heatmaps to refine with.
        """
        number("decoder.nms_oks", self.nms_oks, 1e-6, 1)
        whole("decoder.refine", self.refine, 0, 63)
        if self.refine and self.refine % 2 == 0:
            raise ValueError(
                f"decoder.refine={self.refine}: a window with a middle has an odd side; choose {self.refine + 1}, or 0 to "
                "keep the landmarks"
            )
        self.spec.offers(self.needs)
        values = self.spec.field("landmarks").channels
        if values < 2 or (self.visibility is not None and not 2 <= self.visibility < values):
            raise ValueError(f"'landmarks' has {values} values an entry; x, y; decoder.visibility lies from 2 to {values - 1}")
        if self.refine and (maps := self.spec.field("heatmaps").channels) < len(self.spec.skeleton.names):
            raise ValueError(f"{maps} heatmaps do not fit {len(self.spec.skeleton.names)} keypoints; correct model.spec")

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Poses]:
        """Predict the person in each view.

        Args:
            fields: "landmarks" [B, K or more, values], and "heatmaps" [B, K or more, h, w] with `refine`.
            views: B views.

        Returns:
            For each view, the poses of at most one person; see `posepress.decoders.one_person.poses`. A keypoint whose
            landmark or visibility is not finite is missing. A person whose presence is not finite is left out.

        Raises:
            ValueError: a field has another shape.
        """
        field, K = self.spec.field("landmarks"), len(self.spec.skeleton.names)
        given = entries(fields, field, len(views))
        if given.shape[1] < K:
            raise ValueError(f"'landmarks' has {given.shape[1]} entries for {K} keypoints; correct model.spec")
        given = given[:, :K]
        points = cells_to_input(given[..., :2].astype(np.float64), field, views[0].size)
        scores = np.ones(points.shape[:2], np.float32)
        if self.visibility is not None:
            logits = given[..., self.visibility].astype(np.float64)
            scores = np.where(np.isfinite(logits), 1 / (1 + np.exp(-logits)), np.nan).astype(np.float32)
        odd = None
        if self.refine:
            points, odd = self._refined(points, fields["heatmaps"], views)
        certain: Any = 1.0
        if any(output.name == "presence" for output in self.spec.fields):
            certain = entries(fields, self.spec.field("presence"), len(views))[:, 0, 0]
        return poses(points, scores, views, 0.0, odd, certain)

    def _refined(self, points: F64, heatmaps: Any, views: Sequence[View]) -> tuple[F64, NDArray[np.int64]]:
        """Points [B, K, 2] moved to the weighted mean of the map around them, and 1 for views with NaN or infinity there [B].

        A point stays where it is not finite, or the map around it is not.
        """
        if hasattr(heatmaps, "is_cuda"):
            heatmaps = heatmaps.float().cpu().numpy()
        spec, reach = self.spec.field("heatmaps"), self.refine // 2
        maps = np.pad(np.asarray(heatmaps, np.float64), ((0, 0), (0, 0), (reach, reach), (reach, reach)))
        last = np.array([heatmaps.shape[3] - 1, heatmaps.shape[2] - 1])
        cells = np.clip(np.rint(np.nan_to_num(input_to_cells(points, spec, views[0].size))), 0, last).astype(int)
        columns, rows = cells[..., 0], cells[..., 1]
        around = np.arange(2 * reach + 1)
        b, k = np.arange(columns.shape[0])[:, None, None, None], np.arange(columns.shape[1])[:, None, None]
        window: F64 = maps[b, k, rows[..., None, None] + around[:, None], columns[..., None, None] + around]
        finite = np.asarray(np.isfinite(window).all(axis=(2, 3)))
        window = np.where(finite[..., None, None], window, 0)
        total = window.sum(axis=(2, 3))
        share = window / np.maximum(total, 1e-9)[..., None, None]
        x = columns - reach + (share * around).sum(axis=(2, 3))
        y = rows - reach + (share * around[:, None]).sum(axis=(2, 3))
        better = cells_to_input(np.stack((x, y), axis=-1), spec, views[0].size)
        sure = (window.max(axis=(2, 3)) >= 0.5) & np.isfinite(points).all(axis=-1)
        return np.where(sure[..., None], better, points), np.asarray((~finite).any(axis=1), np.int64)

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

    def mirror(self, name: str, field: F32) -> F32:  # noqa: ARG002 - sets have no mirror image
        """Sets cannot be averaged over mirrored views.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"'{name}' is a set, which has no mirror image; set flip=false")
