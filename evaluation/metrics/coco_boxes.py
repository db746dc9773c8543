"""COCO's box AP, for detectors."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.contracts import MetricInfo
from evaluation.metrics.oks import F64, I64, NOT_MEASURED, NUMBER, THRESHOLDS, Matches, assign
from evaluation.truth import People
from posepress.compiled import compiled
from posepress.labels import Palette, Skeleton
from posepress.results import Boxes

AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar", "ar_small", "ar_medium", "ar_large")
MOST_FOUND = 100  # largest number of boxes that count in an image, as in COCO


class Rows(NamedTuple):
    """Boxes of all images.

    Attributes:
        boxes: x, y, width and height, [N, 4], those of an image together.
        starts: where each image's boxes begin, [I + 1].
    """

    boxes: F64
    starts: I64


@compiled
def _overlaps(found: F64, truth: F64, crowd: NDArray[np.bool_]) -> F64:
    """Intersection over union [D, G] of predicted boxes [D, 4] and ground truth [G, 4].

    Relative to a crowd the share of the predicted box inside it counts, as in COCO.
    """
    overlaps = np.zeros((found.shape[0], truth.shape[0]))
    for d in range(found.shape[0]):
        for g in range(truth.shape[0]):
            a, b = found[d], truth[g]
            width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
            height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
            if width > 0 and height > 0:
                own = a[2] * a[3]
                union = own if crowd[g] else own + b[2] * b[3] - width * height
                overlaps[d, g] = width * height / union
    return overlaps


def _match(
    found: Rows, truth: Rows, crowd: NDArray[np.bool_], ignored: NDArray[np.bool_], outside: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Match boxes image by image by intersection over union; see `evaluation.metrics.oks.match`.

    Plain Python calls `assign`: numba's cache of a compiled caller would miss edits in that other file.
    """
    outcome = np.zeros((len(ignored), len(found.boxes), len(THRESHOLDS)), np.uint8)
    for d0, d1, g0, g1 in zip(found.starts, found.starts[1:], truth.starts, truth.starts[1:], strict=False):
        d, g = slice(d0, d1), slice(g0, g1)
        overlaps = _overlaps(found.boxes[d], truth.boxes[g], crowd[g])
        assign(overlaps, crowd[g], ignored[:, g], outside[:, d], THRESHOLDS, outcome[:, d])
    return outcome


@dataclass
class CocoBoxes:
    """COCO box average precision of the people of a data set, filled image by image.

    Attributes:
        labels: skeleton of the ground truth; not used.
        found_labels: labels of the network; not used.
    """

    labels: Skeleton | Palette
    found_labels: Skeleton | Palette
    info: ClassVar[MetricInfo] = MetricInfo(
        "ap", "COCO box AP (IoU 0.50:0.95)", "box AP", NOT_MEASURED, ("ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    )
    _rows: dict[str, tuple[People, F64, F64]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget every image."""
        self._rows.clear()
        self._counts.clear()

    def process(self, id: str, truth: People, found: Boxes) -> None:  # noqa: A002
        """Add the boxes and the ground truth of an image.

        Raises:
            ValueError: the image was added before, or a number is not finite.
        """
        if id in self._rows:
            raise ValueError(f"image {id} is evaluated twice")
        scores = np.ones(len(found.xywh)) if found.scores is None else found.scores.astype(np.float64)
        if not (np.isfinite(found.xywh).all() and np.isfinite(scores).all()):
            raise ValueError(f"image {id}: a predicted box has a score or a side that is not finite")
        order = np.argsort(-scores, kind="mergesort")[:MOST_FOUND]
        self._rows[id] = (truth, found.xywh[order].astype(np.float64), scores[order])
        for name, count in found.counts.items():
            self._counts[name] = self._counts.get(name, 0) + int(count)

    @property
    def images(self) -> list[str]:
        """The ids, in the order in which COCO's own evaluation takes them."""
        return sorted(self._rows, key=int) if all(NUMBER.fullmatch(key) for key in self._rows) else sorted(self._rows)

    def matches(self) -> Matches:
        """The matched images."""
        ids = self.images
        rows = [self._rows[i] for i in ids]
        truths = [truth for truth, _, _ in rows]
        found = np.concatenate([np.zeros((0, 4)), *(boxes for _, boxes, _ in rows)])
        scores = np.concatenate([np.zeros(0), *(own for _, _, own in rows)])
        found_starts = np.cumsum([0, *(len(own) for _, _, own in rows)])
        true_starts = np.cumsum([0, *(len(t.crowd) for t in truths)])
        boxes = np.concatenate([np.zeros((0, 4)), *(t.boxes for t in truths)])
        areas = np.concatenate([np.zeros(0), *(t.areas for t in truths)])
        crowd = np.concatenate([np.zeros(0), *(t.crowd for t in truths)]).astype(bool)
        size = found[:, 2] * found[:, 3]
        ignored = np.array([crowd | (areas < least) | (areas > most) for least, most in AREAS.values()])
        outside = np.array([(size < least) | (size > most) for least, most in AREAS.values()])
        outcome = _match(Rows(found, found_starts), Rows(boxes, true_starts), crowd, ignored, outside)
        of_true = np.repeat(np.arange(len(ids)), np.diff(true_starts))
        positives = np.array([np.bincount(of_true[~row], minlength=len(ids)) for row in ignored], np.int64)
        image = np.repeat(np.arange(len(ids)), np.diff(found_starts)).astype(np.int64)
        return Matches(tuple(ids), image, scores, outcome, positives.reshape(len(AREAS), len(ids)), tuple(AREAS))

    def write(self, file: Path, named: Callable[[str], Mapping[str, Any]]) -> None:
        """Write the boxes in COCO's result format (https://cocodataset.org/#format-results); data.boxes reads them."""
        rows = [
            {**named(image), "bbox": [round(side, 3) for side in box], "score": score}
            for image in self.images
            for box, score in zip(self._rows[image][1].tolist(), self._rows[image][2].tolist(), strict=True)
        ]
        file.write_text("[" + ",\n".join(map(json.dumps, rows)) + "]")

    def evaluate(self, images: NDArray[np.intp] | None = None) -> dict[str, float]:
        """COCO's figures over all images, or over the images at the given indices; a repeated index counts again."""
        matches = self.matches()
        counts = None if images is None else np.bincount(images, minlength=len(matches.images))
        return matches.figures(counts, FIGURES)

    def counts(self) -> dict[str, int]:
        """Counts of problems: images for which the network returned NaN or infinity."""
        return {"images_not_finite": 0, **self._counts}

    def doubts(self) -> list[str]:
        """Possible causes of unexpected figures, each with what to check."""
        true = sum(int((~truth.crowd).sum()) for truth, _, _ in self._rows.values())
        found = sum(len(boxes) for _, boxes, _ in self._rows.values())
        if true and not found:
            return [
                f"no box is found, and {true} people are labelled: lower decoder.score_threshold, and compare order, range, "
                "mean and std in model.spec with the network's training"
            ]
        return []

    def details(self) -> dict[str, dict[str, float]]:
        """Average precision at each threshold."""
        precision, recall = self.matches().curves("all")
        return {f"IoU {t:.2f}": {"ap": float(p), "ar": float(r)} for t, p, r in zip(THRESHOLDS, precision, recall, strict=True)}
