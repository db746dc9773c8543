"""COCO's keypoint AP."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from evaluation.contracts import MetricInfo
from evaluation.metrics.oks import F64, MOST_FOUND, NOT_MEASURED, NUMBER, Everybody, Matches
from evaluation.truth import People
from posepress.labels import SIGMA, Skeleton, enumerated
from posepress.results import Poses


@dataclass
class CocoKeypoints:
    """COCO keypoint average precision, filled image by image.

    Attributes:
        labels: skeleton of the ground truth.
        found_labels: skeleton of the predictions; keypoints are matched by name, and unmatched ones are dropped.
        most_found: largest number of predictions that count in an image, the highest scores first; COCO uses 20.
    """

    labels: Skeleton
    found_labels: Skeleton
    most_found: Annotated[int, Interval(ge=1, le=10**9)] = MOST_FOUND
    info: ClassVar[MetricInfo] = MetricInfo(
        "ap", "COCO keypoint AP (OKS 0.50:0.95)", "AP", NOT_MEASURED, ("ap50", "ap75", "ap_medium", "ap_large")
    )
    _rows: dict[str, tuple[People, NDArray[Any], F64]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Match the keypoints of the two skeletons by name.

        Raises:
            ValueError: the network has none of the ground truth's keypoints.
        """
        names = self.found_labels.names
        self._columns = np.array([names.index(name) if name in names else -1 for name in self.labels.names])
        if self._columns.max() < 0:
            raise ValueError(
                f"the network's {len(names)} keypoints ({enumerated(names)}) share no name with the ground truth's "
                f"{len(self.labels.names)} ({enumerated(self.labels.names)}); name the network's keypoints as the data does"
            )

    def reset(self) -> None:
        """Forget every image."""
        self._rows.clear()
        self._counts.clear()

    def keypoints(self, found: Poses) -> NDArray[Any]:
        """Predictions in the ground truth's skeleton, [N, K, 3]; missing keypoints are zeros."""
        chosen = found.keypoints[:, self._columns]
        chosen[:, self._columns < 0] = 0
        return chosen

    def process(self, id: str, truth: People, found: Poses) -> None:  # noqa: A002
        """Add the predictions and the ground truth of an image.

        Raises:
            ValueError: the image was added before, its labels have another skeleton, or a number is not finite.
        """
        if id in self._rows:
            raise ValueError(f"image {id} is evaluated twice")
        if truth.keypoints.shape[1] != len(self.labels.names):
            raise ValueError(f"image {id}: {truth.keypoints.shape[1]} keypoints a person, not {len(self.labels.names)}")
        keypoints = self.keypoints(found)
        if not (np.isfinite(found.scores).all() and np.isfinite(keypoints).all()):
            raise ValueError(f"image {id}: a predicted person has a score or a point that is not finite")
        if not all(np.isfinite(values).all() for values in (truth.keypoints, truth.boxes, truth.areas)):
            raise ValueError(f"image {id}: the ground truth has a keypoint, a box or an area that is not finite")
        order = np.argsort(-found.scores, kind="mergesort")[: self.most_found]
        self._rows[id] = (truth, keypoints[order], found.scores[order].astype(np.float64))
        for name, count in found.counts.items():
            self._counts[name] = self._counts.get(name, 0) + int(count)

    @property
    def images(self) -> list[str]:
        """The ids, in the order in which COCO's own evaluation takes them."""
        return sorted(self._rows, key=int) if all(NUMBER.fullmatch(key) for key in self._rows) else sorted(self._rows)

    def people(self) -> Everybody:
        """The predictions and the ground truth of all images."""
        ids = self.images
        rows = [self._rows[i] for i in ids]
        K = len(self.labels.names)
        truths = [truth for truth, _, _ in rows]

        def joined(arrays: Sequence[NDArray[Any]], *shape: int) -> NDArray[Any]:
            return np.concatenate([np.zeros((0, *shape)), *arrays])

        truth = joined([t.keypoints for t in truths], K, 3)
        crowd = joined([t.crowd for t in truths]).astype(bool)
        return Everybody(
            images=tuple(ids),
            found=np.ascontiguousarray(joined([k[..., :2] for _, k, _ in rows], K, 2)),
            scores=joined([scores for _, _, scores in rows]),
            found_starts=np.cumsum([0, *(len(scores) for _, _, scores in rows)]),
            truth=truth,
            true_starts=np.cumsum([0, *(len(t.crowd) for t in truths)]),
            boxes=joined([t.boxes for t in truths], 4),
            areas=joined([t.areas for t in truths]),
            crowd=crowd,
            never=joined([t.never for t in truths]).astype(bool),
            sigmas=np.array(self.labels.oks_sigmas),
        )

    def matches(self) -> Matches:
        """The matched images."""
        return self.people().matches()

    def write(self, file: Path, named: Callable[[str], Mapping[str, Any]]) -> None:
        """Write the predictions in COCO's result format (https://cocodataset.org/#format-results)."""
        with file.open("w") as stream:
            between = "["
            for image in self.images:
                _, keypoints, scores = self._rows[image]
                for points, score in zip(keypoints.astype(np.float64).round(3), scores.tolist(), strict=True):
                    row = {**named(image), "keypoints": points.ravel().tolist(), "score": score}
                    stream.write(between + json.dumps(row))
                    between = ",\n"
            stream.write("[]" if between == "[" else "]")

    def evaluate(self, images: NDArray[np.intp] | None = None) -> dict[str, float]:
        """COCO's ten figures over all images, or over the images at the given indices; a repeated index counts again."""
        matches = self.matches()
        counts = None if images is None else np.bincount(images, minlength=len(matches.images))
        return matches.figures(counts)

    def counts(self) -> dict[str, int]:
        """Counts of problems: dropped peaks, images for which the network returned NaN or infinity, and the decoder's own."""
        return {"dropped_peaks": 0, "images_not_finite": 0, **self._counts}

    def doubts(self) -> list[str]:
        """Possible causes of unexpected figures, each with what to check."""
        from evaluation.metrics.plausibility import doubts

        causes, names, given = doubts(self.people(), self.labels, self.found_labels), self.labels.names, self.found_labels
        if not set(names) <= set(given.names):
            causes.append(
                f"the network has {len(given.names)} keypoints ({enumerated(given.names)}), the data {len(names)} "
                f"({enumerated(names)}); give the network's keypoints the names of the data in model.spec.labels"
            )
        if not given.sigmas:
            causes.append(
                f"the network's labels have no sigmas, so agreement and the decoder take {SIGMA} for each of its "
                f"{len(given.names)} keypoints; add sigmas: [...] to model.spec.labels, or give skeleton=FILE.json with them"
            )
        return causes

    def details(self) -> dict[str, dict[str, float]]:
        """AP of each keypoint and stratum, and the kinds of error."""
        from evaluation.metrics.coco_breakdown import details

        return details(self.people(), self.labels)
