"""Agreement: how well an engine's predictions match those of the FP32 network, on images without labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evaluation.contracts import MetricInfo
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import NOT_MEASURED, Matches
from evaluation.truth import People
from posepress.labels import Skeleton
from posepress.results import Poses

SURE = 0.5  # least mean keypoint score of a reference person


def reference_people(found: Poses) -> People:
    """The FP32 network's predictions as ground truth.

    Predicted keypoints count as labelled. A person's area is half that of the keypoints' box. People with a mean keypoint
    score below `SURE` are ignored: neither missing nor predicting them counts as an error.
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
    """Average precision of an engine against the FP32 network's predictions, both without filled-in keypoints.

    Attributes:
        labels: the network's skeleton.
    """

    labels: Skeleton
    info: ClassVar[MetricInfo] = MetricInfo("ap", "AP against FP32's predictions", "agreement", NOT_MEASURED)
    _inner: CocoKeypoints = field(init=False)

    def __post_init__(self) -> None:
        """Count all predictions, not only the 20 of each image with the highest scores."""
        self._inner = CocoKeypoints(self.labels, self.labels, most_found=10**9)

    def reset(self) -> None:
        """Forget every image."""
        self._inner.reset()

    def process(self, id: str, truth: Poses, found: Poses) -> None:  # noqa: A002
        """Add the predictions of FP32 (`truth`) and of the engine (`found`) for an image."""
        self._inner.process(id, reference_people(truth.as_found()), found.as_found())

    def evaluate(self, images: NDArray[np.intp] | None = None) -> dict[str, float]:
        """AP; -1 if there is no reference person in FP32's predictions."""
        return {"ap": self._inner.evaluate(images)["ap"]}

    def matches(self) -> Matches:
        """The matched images, for resampling."""
        return self._inner.matches()

    def counts(self) -> dict[str, int]:
        """The number of reference people that are not ignored, and counts of problems."""
        return {"people": int((~self._inner.people().never).sum()), **self._inner.counts()}

    def write(self, file: Path, named: Callable[[str], Mapping[str, Any]]) -> None:
        """Write the engine's predictions in COCO's result format."""
        self._inner.write(file, named)

    def doubts(self) -> list[str]:
        """The reason why agreement was not measured; empty if it was."""
        if self.counts()["people"]:
            return []
        return [
            f"agreement is not measured: FP32 predicts no person with a mean keypoint score of {SURE} or more in the agreement "
            "images. If its scores are low on all images, compare AP instead; else add images with people"
        ]

    def details(self) -> Mapping[str, Mapping[str, float]]:
        """No tables: strata need labelled images."""
        return {}
