"""COCO keypoint metrics: the ten figures over any multiset of images, and the matches that they are computed from.

The rules are those of COCO's evaluation (https://cocodataset.org/#keypoints-eval), including how its reference code breaks
ties; tests compare the figures with pycocotools to 1e-9. All images are matched in one
compiled call. Its outcome serves the figures, their intervals and paired comparisons.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled, inlined

F64 = NDArray[np.float64]

I64 = NDArray[np.int64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)

RECALLS = np.linspace(0.0, 1.0, 101)

AREAS = {"all": (0.0, 1e10), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}

FIGURES = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75", "ar_medium", "ar_large")

MOST_FOUND = 20  # largest number of predictions that count in an image, as in COCO

HIT, MISS = 1, 2

NOT_MEASURED = -1  # value of a figure without ground truth, as in COCO's reference code

NUMBER = re.compile(r"0|-?[1-9][0-9]{0,18}")  # an image id that is a whole number; 007 is text


@compiled
def oks(found: F64, truth: F64, boxes: F64, areas: F64, sigmas: F64) -> F64:
    """Object keypoint similarity [D, G] of predictions [D, K, 2] and ground truth [G, K, 3].

    For a person without labelled keypoints (a crowd), the distance is that of points outside its doubled box, as in COCO.
    """
    D, G, K = found.shape[0], truth.shape[0], truth.shape[1]
    out = np.zeros((D, G))
    for g in range(G):
        labelled = 0
        for k in range(K):
            labelled += truth[g, k, 2] > 0
        x0, x1 = boxes[g, 0] - boxes[g, 2], boxes[g, 0] + boxes[g, 2] * 2
        y0, y1 = boxes[g, 1] - boxes[g, 3], boxes[g, 1] + boxes[g, 3] * 2
        for d in range(D):
            total = 0.0
            for k in range(K):
                if labelled > 0:
                    if truth[g, k, 2] <= 0:
                        continue
                    dx, dy = found[d, k, 0] - truth[g, k, 0], found[d, k, 1] - truth[g, k, 1]
                else:
                    dx = max(0.0, x0 - found[d, k, 0]) + max(0.0, found[d, k, 0] - x1)
                    dy = max(0.0, y0 - found[d, k, 1]) + max(0.0, found[d, k, 1] - y1)
                variance = (sigmas[k] * 2) ** 2
                total += np.exp(-(dx * dx + dy * dy) / variance / (areas[g] + np.spacing(1.0)) / 2)
            out[d, g] = total / (labelled if labelled > 0 else K)
    return out


class Predictions(NamedTuple):
    """Predictions of all images.

    Attributes:
        points: [D, K, 2], those of an image together and sorted by falling score.
        starts: where each image's predictions begin, [I + 1].
    """

    points: F64
    starts: I64


class People(NamedTuple):
    """Ground truth of all images.

    Attributes:
        keypoints: [G, K, 3].
        starts: where each image's ground truth begins, [I + 1].
        boxes: [G, 4].
        areas: [G].
        crowd: whether an entry is a crowd, [G].
    """

    keypoints: F64
    starts: I64
    boxes: F64
    areas: F64
    crowd: NDArray[np.bool_]


@inlined
def _best(similarity: F64, d: int, order: I64, open_to: NDArray[np.bool_], ignored: NDArray[np.bool_], least: float) -> int:
    """The ground-truth person that a prediction matches; -1 if it matches none.

    Args:
        similarity: of each prediction with each person, [D, G].
        d: index of the prediction.
        order: the people, ignored ones last, [G].
        open_to: whether a person can still be matched, [G].
        ignored: [G].
        least: OKS threshold.
    """
    best, at = min(least, 1 - 1e-10), -1
    for g in order:
        if not open_to[g]:
            continue
        if at > -1 and not ignored[at] and ignored[g]:
            break
        if similarity[d, g] < best:
            continue
        best, at = similarity[d, g], g
    return at


@inlined
def assign(
    similarity: F64,
    crowd: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
    outside: NDArray[np.bool_],
    thresholds: F64,
    outcome: NDArray[np.uint8],
) -> None:
    """Match the predictions of an image, the highest score first; ignored people come last.

    Args:
        similarity: of each prediction with each person, [D, G].
        crowd: whether a person is a crowd, which several predictions may match, [G].
        ignored: whether a person lies outside a stratum, [S, G].
        outside: whether a prediction without a match is no false positive of a stratum, [S, D].
        thresholds: of the similarity, [T].
        outcome: [S, D, T], of zeros; gets HIT and MISS.
    """
    D, G = similarity.shape
    order = np.empty(G, np.int64)
    for s in range(ignored.shape[0]):
        n, far = 0, ignored[s]
        for last in range(2):
            for g in range(G):
                if far[g] == (last == 1):
                    order[n] = g
                    n += 1
        for t in range(thresholds.shape[0]):
            open_to = np.ones(G, np.bool_)
            for d in range(D):
                at = _best(similarity, d, order, open_to, far, thresholds[t])
                if at > -1:
                    open_to[at] = crowd[at]
                    if not far[at]:
                        outcome[s, d, t] = HIT
                elif not outside[s, d]:
                    outcome[s, d, t] = MISS


@compiled
def match(
    found: Predictions,
    truth: People,
    sigmas: F64,
    ignored: NDArray[np.bool_],
    outside: NDArray[np.bool_],
    thresholds: F64,
) -> NDArray[np.uint8]:
    """Match predictions, the highest score first, to ground-truth people, image by image; ignored people come last.

    Args:
        found: the predictions.
        truth: the ground truth.
        sigmas: OKS standard deviations of the keypoints, [K].
        ignored: whether a ground-truth person lies outside a stratum, [S, G].
        outside: whether a prediction without a match is no false positive of a stratum, [S, D].
        thresholds: OKS thresholds, [T].

    Returns:
        [S, D, T]: HIT, MISS (a false positive) or 0 (does not count).
    """
    outcome = np.zeros((ignored.shape[0], found.points.shape[0], thresholds.shape[0]), np.uint8)
    for image in range(found.starts.shape[0] - 1):
        d0, d1, g0, g1 = found.starts[image], found.starts[image + 1], truth.starts[image], truth.starts[image + 1]
        similarity = oks(found.points[d0:d1], truth.keypoints[g0:g1], truth.boxes[g0:g1], truth.areas[g0:g1], sigmas)
        assign(similarity, truth.crowd[g0:g1], ignored[:, g0:g1], outside[:, d0:d1], thresholds, outcome[:, d0:d1])
    return outcome


@compiled
def _precision_recall(outcome: NDArray[np.uint8], image: I64, weight: F64, positives: float, recalls: F64) -> tuple[F64, F64]:
    """Interpolated average precision and final recall, each [T], of predictions [D, T] sorted by falling score."""
    D, T = outcome.shape
    tp, fp = np.zeros(T), np.zeros(T)
    hits = np.zeros(T, np.int64)
    at_recall, at_precision = np.empty((T, D)), np.empty((T, D))
    for d in range(D):
        w = weight[image[d]]
        if w == 0:
            continue
        for t in range(T):
            if outcome[d, t] == MISS:
                fp[t] += w
            elif outcome[d, t] == HIT:
                # Precision only matters where recall rises, which is at hits.
                tp[t] += w
                at_recall[t, hits[t]] = tp[t] / positives
                at_precision[t, hits[t]] = tp[t] / (fp[t] + tp[t] + np.spacing(1.0))
                hits[t] += 1
    ap, ar = np.zeros(T), np.zeros(T)
    for t in range(T):
        n = hits[t]
        for d in range(n - 2, -1, -1):
            at_precision[t, d] = max(at_precision[t, d], at_precision[t, d + 1])
        d = 0
        for r in range(recalls.shape[0]):
            while d < n and at_recall[t, d] < recalls[r]:
                d += 1
            if d == n:
                break
            ap[t] += at_precision[t, d]
        ap[t] /= recalls.shape[0]
        ar[t] = at_recall[t, n - 1] if n else 0.0
    return ap, ar


@dataclass(frozen=True)
class Matches:
    """The matches of a data set: everything that a figure needs.

    Attributes:
        images: the ids, in order.
        image: int64 [D], index of each prediction's image.
        scores: float64 [D], scores of the predictions.
        outcome: uint8 [S, D, T]: HIT, MISS or 0 (ignored), for each stratum and threshold.
        positives: int64 [S, I], number of people in each image that are not ignored.
        strata: names of the strata.
        primary: name of the figure that is resampled.
    """

    images: tuple[str, ...]
    image: I64
    scores: F64
    outcome: NDArray[np.uint8]
    positives: I64
    strata: tuple[str, ...] = tuple(AREAS)
    primary: str = "ap"

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint8], I64]:
        order = np.argsort(-self.scores, kind="mergesort")
        return np.ascontiguousarray(self.outcome[:, order]), self.image[order]

    def curves(self, stratum: str, counts: NDArray[Any] | None = None) -> tuple[F64, F64]:
        """Average precision and recall at each threshold, [T]; -1 if there is no ground truth.

        Args:
            stratum: one of `strata`.
            counts: how often each image counts, [I]; None counts each once.
        """
        weight = np.ones(len(self.images)) if counts is None else np.asarray(counts, np.float64)
        s = self.strata.index(stratum)
        outcome, image = self._sorted
        positives = float(self.positives[s] @ weight)
        if positives == 0:
            undefined = np.full(len(THRESHOLDS), float(NOT_MEASURED))
            return undefined, undefined
        return _precision_recall(outcome[s], image, weight, positives, RECALLS)

    def figures(self, counts: NDArray[Any] | None = None, names: Sequence[str] = FIGURES) -> dict[str, float]:
        """COCO's figures in 0..1; -1 if there is no ground truth.

        Args:
            counts: how often each image counts, [I]; None counts each once.
            names: which figures, of `FIGURES`.
        """
        curves: dict[str, tuple[F64, F64]] = {}
        figures = {}
        for name in names:
            suffix = name[2:].lstrip("_")
            area = suffix if suffix in self.strata else "all"
            if area not in curves:
                curves[area] = self.curves(area, counts)
            steps = {"50": [0], "75": [5]}.get(suffix, list(range(len(THRESHOLDS))))
            figures[name] = float(np.mean(curves[area][int(name.startswith("ar"))][steps]))
        return figures

    def resampled(self, counts: NDArray[Any]) -> F64:
        """The primary figure of every resample; `counts` [R, I] says how often each image counts in it.

        A resample without ground truth gives NaN, while a data set without ground truth gives -1.
        """
        values = np.array([self.figures(row, [self.primary])[self.primary] for row in counts])
        return np.where(values < 0, np.nan, values)


@dataclass(frozen=True)
class Everybody:
    """Predictions and ground truth of all images, as the compiled functions need them.

    Attributes:
        images: the ids, in order.
        found: float64 [D, K, 2], predictions, those of an image sorted by falling score.
        scores: float64 [D], scores of the predictions.
        found_starts: int64 [I + 1], where each image's predictions begin.
        truth: float64 [G, K, 3], keypoints of the ground truth.
        true_starts: int64 [I + 1], where each image's ground truth begins.
        boxes: float64 [G, 4], boxes of the ground truth.
        areas: float64 [G], areas of the ground truth.
        crowd: bool [G], whether a ground-truth entry is a crowd.
        never: bool [G], ignored people: crowds and people without labelled keypoints.
        sigmas: float64 [K], OKS standard deviations of the keypoints.
    """

    images: tuple[str, ...]
    found: F64
    scores: F64
    found_starts: I64
    truth: F64
    true_starts: I64
    boxes: F64
    areas: F64
    crowd: NDArray[np.bool_]
    never: NDArray[np.bool_]
    sigmas: F64

    def matches(self, strata: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]] | None = None) -> Matches:
        """Match every image.

        Args:
            strata: for each name, whether a ground-truth person lies outside the stratum [G], and whether a prediction is no
                false positive of it [D]. None takes COCO's area ranges.
        """
        if strata is None:
            size = np.prod(self.found.max(axis=1) - self.found.min(axis=1), axis=1)
            strata = {
                name: ((self.areas < least) | (self.areas > most), (size < least) | (size > most))
                for name, (least, most) in AREAS.items()
            }
        ignored = np.array([self.never | away for away, _ in strata.values()])
        outside = np.array([free for _, free in strata.values()])
        truth = People(self.truth, self.true_starts, self.boxes, self.areas, self.crowd)
        outcome = match(Predictions(self.found, self.found_starts), truth, self.sigmas, ignored, outside, THRESHOLDS)
        I = len(self.images)  # noqa: E741 - the number of images
        image_of_true = np.repeat(np.arange(I), np.diff(self.true_starts))
        positives = np.array([np.bincount(image_of_true[~row], minlength=I) for row in ignored], np.int64)
        image = np.repeat(np.arange(I), np.diff(self.found_starts)).astype(np.int64)
        return Matches(self.images, image, self.scores, outcome, positives.reshape(len(strata), I), tuple(strata))
