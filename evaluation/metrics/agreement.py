"""Agreement: how well an engine finds the people that the FP32 network finds, on images that nobody labelled."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evaluation.contracts import MetricInfo
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import NOT_MEASURED, Matches
from evaluation.truth import People
from posepress.results import Poses
from posepress.spec import Skeleton

SURE = 0.5  # least mean score of the found keypoints of a reference person


def reference_people(found: Poses) -> People:
    """The people an FP32 network found, as if somebody had labelled them.

    Found keypoints count as labelled. The area is half the box of these. People whose keypoints' mean score is below `SURE`
    are ignored: nobody has to find them, and nobody is blamed for finding them.
    """
    seen = np.array(found.keypoints[..., 2] > 0, dtype=np.bool_, ndmin=2)
    points = found.keypoints[..., :2].astype(np.float64)
    low = np.where(seen[..., None], points, np.inf).min(axis=1, initial=np.inf)
    high = np.where(seen[..., None], points, -np.inf).max(axis=1, initial=-np.inf)
    count = seen.sum(axis=1)
    some = count > 0
    size = np.where(some[:, None], high - low, 0)
    scores = np.where(seen, found.keypoints[..., 2], 0).sum(axis=1) / np.maximum(count, 1)
    return People(
        keypoints=np.concatenate([np.where(seen[..., None], points, 0), 2.0 * seen[..., None]], axis=-1),
        boxes=np.concatenate([np.where(some[:, None], low, 0), size], axis=1),
        areas=0.5 * size.prod(axis=1),
        crowd=np.zeros(len(seen), bool),
        ignored=scores < SURE,
    )


@dataclass
class PoseAgreement:
    """Average precision of an engine's people against the FP32 network's, both as found, without guesses.

    Attributes:
        labels: the network's skeleton.
    """

    labels: Skeleton
    info: ClassVar[MetricInfo] = MetricInfo("ap", "AP against what FP32 finds", "agreement", NOT_MEASURED)
    _inner: CocoKeypoints = field(init=False)

    def __post_init__(self) -> None:
        """Everything found counts, not the 20 surest people alone."""
        self._inner = CocoKeypoints(self.labels, self.labels, most_found=10**9)

    def reset(self) -> None:
        """Forget every image."""
        self._inner.reset()

    def process(self, id: str, truth: Poses, found: Poses) -> None:  # noqa: A002
        """Take what FP32 (`truth`) and the engine found in an image."""
        self._inner.process(id, reference_people(truth.as_found()), found.as_found())

    def evaluate(self, images: NDArray[np.intp] | None = None) -> dict[str, float]:
        """AP; -1 where FP32 is sure of nobody."""
        return {"ap": self._inner.evaluate(images)["ap"]}

    def matches(self) -> Matches:
        """The images, ready for resampling."""
        return self._inner.matches()

    def counts(self) -> dict[str, int]:
        """Reference people that count, and what went wrong."""
        return {"people": int((~self._inner.people().never).sum()), **self._inner.counts()}

    def results(self) -> Iterator[dict[str, Any]]:
        """Everything found, in COCO's result format."""
        return self._inner.results()

    def doubts(self) -> list[str]:
        """Why there is no figure, where there is none."""
        if self.counts()["people"]:
            return []
        return [
            f"agreement is not measured: FP32 finds no person with a mean keypoint score of {SURE} or more in the agreement "
            "images. Where its scores are low on all images, compare AP instead; else add images with people"
        ]

    def details(self) -> Mapping[str, Mapping[str, float]]:
        """None: the keypoints' strata are those of labelled images."""
        return {}
