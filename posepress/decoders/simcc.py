"""Decoder of SimCC networks: one person in each view, from a line over the columns and one over the rows a keypoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from posepress.checks import number
from posepress.compiled import compiled
from posepress.decoders.one_person import merged, poses
from posepress.geometry import View, cells_to_input
from posepress.results import Poses
from posepress.spec import Array, NetworkSpec

F32 = NDArray[np.float32]
_LINES = ("simcc_x", "simcc_y")

_ENDS = np.array([0.0, 1.0])


@compiled
def _read(
    x: NDArray[Any], y: NDArray[Any], columns: NDArray[np.int64], rows: NDArray[np.int64], steps: NDArray[np.float64]
) -> tuple[NDArray[np.float64], F32]:
    """Points in pixels [B, K, 2] and scores [B, K] at the greatest cells of lines.

    Args:
        x: lines over the columns, [B, K, X].
        y: lines over the rows, [B, K, Y].
        columns: number of the greatest cell of each line of `x`, [B, K].
        rows: the same of `y`.
        steps: pixels of the cells 0 and 1 of both kinds of lines, [2, 2].
    """
    B, K = columns.shape
    points, scores = np.empty((B, K, 2)), np.empty((B, K), np.float32)
    for b in range(B):
        for k in range(K):
            j, i = columns[b, k], rows[b, k]
            points[b, k, 0] = steps[0, 0] + j * (steps[0, 1] - steps[0, 0])
            points[b, k, 1] = steps[1, 0] + i * (steps[1, 1] - steps[1, 0])
            scores[b, k] = (x[b, k, j] + y[b, k, i]) / 2
    return points, scores


@dataclass(frozen=True)
class SimccDecoder:
    """Decoder of networks that return the lines "simcc_x" and "simcc_y" for the one person in each view (arXiv:2107.03332).

    A keypoint lies at the greatest value of each of its lines. Its score is the mean of the two values, as in RTMPose
    (arXiv:2303.07399).

    Attributes:
        spec: the network's description.
        keypoint_threshold: threshold below which a keypoint's score does not count in the person's score.
        nms_oks: of two people whose OKS is greater, the one with the lower score is left out; 1 keeps all.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"simcc_x": "CX", "simcc_y": "CY"}
    result: ClassVar[type] = Poses
    keypoint_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.2
    nms_oks: Annotated[float, Interval(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        """Check the options, and that each keypoint has its lines.

        Raises:
            ValueError: a number is out of range, or the number of lines is not that of the keypoints.
        """
        number("decoder.keypoint_threshold", self.keypoint_threshold, 0, 1)
        number("decoder.nms_oks", self.nms_oks, 1e-6, 1)
        self.spec.offers(self.needs)
        K = len(self.spec.skeleton.names)
        for name in _LINES:
            if (lines := self.spec.field(name).channels) != K:
                raise ValueError(f"{lines} lines of '{name}' do not fit a skeleton of {K} keypoints; correct model.spec")

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Poses]:
        """Predict the person in each view.

        Args:
            fields: "simcc_x" [B, K, X] and "simcc_y" [B, K, Y]; numpy arrays or torch tensors.
            views: B views.

        Returns:
            For each view, the poses of at most one person; see `posepress.decoders.one_person.poses`.

        Raises:
            ValueError: a field has another shape.
        """
        lines, cells, steps = [], [], []
        for name in _LINES:
            given: Any = fields[name]
            if hasattr(given, "is_cuda"):
                given = given.float().cpu().numpy()
            K = len(self.spec.skeleton.names)
            if given.ndim != 3 or given.shape[:2] != (len(views), K) or not given.shape[2]:
                raise ValueError(f"'{name}' is {list(given.shape)}, not lines [{len(views)}, {K}, cells]; correct model.spec")
            lines.append(given)
            cells.append(given.argmax(axis=2))  # a NaN is greater than any number, so it shows in the values
            steps.append(cells_to_input(_ENDS, self.spec.field(name), views[0].size))
        points, scores = _read(lines[0], lines[1], cells[0], cells[1], np.array(steps))
        return poses(points, scores, views, self.keypoint_threshold)

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

    def mirror(self, name: str, field: F32) -> F32:  # noqa: ARG002 - both lines change places alike
        """The lines [K, cells] of a mirrored view with left and right exchanged."""
        return np.take(field, self.spec.skeleton.flip, axis=0)
