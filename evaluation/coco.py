"""COCO keypoint metrics: the ten figures, streamed image by image, over any multiset of images.

The rules are those of COCO's evaluation (https://cocodataset.org/#keypoints-eval), including how its reference code breaks
ties; tests compare the figures with pycocotools to 1e-9. Matching is done as each image arrives, so that an interval or a
paired comparison only accumulates again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.compiled import compiled
from evaluation.types import People, Poses, Skeleton

F64 = NDArray[np.float64]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"all": (0.0, 1e10), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
FIGURES = ("ap", "ap50", "ap75", "ap_medium", "ap_large", "ar", "ar50", "ar75", "ar_medium", "ar_large")
MOST_FOUND = 20  # people an image that count, as in COCO


@compiled
def oks(found: F64, truth: F64, boxes: F64, areas: F64, sigmas: F64) -> F64:
    """Object keypoint similarity [D, G] of found [D, K, 2] and true [G, K, 3] people.

    A person without labelled keypoints (a crowd) is compared by how far points lie outside its doubled box, as COCO does.
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


@compiled
def _match(
    similarity: F64, ignored: NDArray[np.bool_], crowd: NDArray[np.bool_], thresholds: F64
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Match found people, best score first, to true ones, ignored ones last.

    Returns:
        matched and matched-to-an-ignored-person, each bool [T, D].
    """
    D, G = similarity.shape
    T = thresholds.shape[0]
    matched, to_ignored = np.zeros((T, D), np.bool_), np.zeros((T, D), np.bool_)
    for t in range(T):
        taken = np.zeros(G, np.bool_)
        for d in range(D):
            best, at = min(thresholds[t], 1 - 1e-10), -1
            for g in range(G):
                if taken[g] and not crowd[g]:
                    continue
                if at > -1 and not ignored[at] and ignored[g]:
                    break
                if similarity[d, g] < best:
                    continue
                best, at = similarity[d, g], g
            if at > -1:
                taken[at] = True
                matched[t, d] = True
                to_ignored[t, d] = ignored[at]
    return matched, to_ignored


@compiled
def _average_precision(
    hits: NDArray[np.bool_], misses: NDArray[np.bool_], weights: F64, positives: float, recalls: F64
) -> tuple[float, float]:
    """Interpolated average precision and final recall of detections sorted by score."""
    n = hits.shape[0]
    precision, recall = np.empty(n), np.empty(n)
    tp = fp = 0.0
    for d in range(n):
        if hits[d]:
            tp += weights[d]
        elif misses[d]:
            fp += weights[d]
        recall[d] = tp / positives
        precision[d] = tp / (fp + tp + np.spacing(1.0))
    for d in range(n - 2, -1, -1):
        precision[d] = max(precision[d], precision[d + 1])
    total = 0.0
    d = 0
    for r in range(recalls.shape[0]):
        while d < n and recall[d] < recalls[r]:
            d += 1
        if d == n:
            break
        total += precision[d]
    return total / recalls.shape[0], (recall[n - 1] if n else 0.0)


@dataclass(frozen=True)
class Matches:
    """What is left of a data set once every image is matched; all that a figure needs.

    Attributes:
        images: the ids, in order.
        image: int64 [D], index of each detection's image.
        scores: float64 [D].
        hits: bool [A, T, D], a true person found, for each area range and threshold.
        misses: bool [A, T, D], false alarms; the rest is ignored.
        positives: int64 [A, I], people to be found in each image.
    """

    images: tuple[str, ...]
    image: NDArray[np.int64]
    scores: F64
    hits: NDArray[np.bool_]
    misses: NDArray[np.bool_]
    positives: NDArray[np.int64]

    def save(self, file: Path) -> None:
        """Write as .npz."""
        np.savez_compressed(
            file,
            images=np.array(self.images, dtype=str),
            image=self.image,
            scores=self.scores,
            hits=self.hits,
            misses=self.misses,
            positives=self.positives,
        )

    @classmethod
    def load(cls, file: Path) -> "Matches":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return cls(images=tuple(arrays.pop("images").tolist()), **arrays)

    def figures(self, counts: NDArray[Any] | None = None, names: Sequence[str] = FIGURES) -> dict[str, float]:
        """COCO's figures in 0..1; -1 where there is nobody to find.

        Args:
            counts: how often each image counts, [I]; None counts each once.
            names: which figures, of `FIGURES`.
        """
        weight = np.ones(len(self.images)) if counts is None else np.asarray(counts, np.float64)
        order = np.argsort(-self.scores, kind="mergesort")
        order = order[weight[self.image[order]] > 0]
        weights = weight[self.image[order]]
        table: dict[tuple[str, int], tuple[float, float]] = {}

        def cell(area: str, t: int) -> tuple[float, float]:
            if (area, t) not in table:
                a = list(AREAS).index(area)
                positives = float(self.positives[a] @ weight)
                hits, misses = self.hits[a, t, order], self.misses[a, t, order]
                table[area, t] = (
                    _average_precision(hits, misses, weights, positives, RECALLS) if positives > 0 else (-1.0, -1.0)
                )
            return table[area, t]

        figures = {}
        for name in names:
            kind = int(name.startswith("ar"))
            suffix = name[2:].lstrip("_")
            area = suffix if suffix in AREAS else "all"
            steps = {"50": [0], "75": [5]}.get(suffix, list(range(len(THRESHOLDS))))
            figures[name] = float(np.mean([cell(area, t)[kind] for t in steps]))
        return figures


@dataclass
class CocoKeypoints:
    """COCO keypoint average precision, filled image by image.

    Attributes:
        labels: skeleton of the ground truth, with its sigmas.
        found_labels: skeleton of the found poses; keypoints are joined by name, others dropped.
    """

    labels: Skeleton
    found_labels: Skeleton
    primary: str = "ap"
    _rows: dict[str, tuple[F64, NDArray[np.bool_], NDArray[np.bool_], NDArray[np.int64]]] = field(default_factory=dict)
    _results: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Join the two skeletons.

        Raises:
            ValueError: the network has none of the ground truth's keypoints.
        """
        names = self.found_labels.names
        self._columns = [names.index(name) if name in names else -1 for name in self.labels.names]
        if max(self._columns) < 0:
            raise ValueError(
                f"the network's keypoints ({', '.join(names[:4])}, ...) share no name with the ground truth's "
                f"({', '.join(self.labels.names[:4])}, ...)"
            )

    def reset(self) -> None:
        """Forget every image."""
        self._rows.clear()
        self._results.clear()

    def keypoints(self, found: Poses) -> NDArray[np.float32]:
        """Found poses in the ground truth's skeleton, [N, K, 3]; missing keypoints are zeros."""
        columns = np.array(self._columns)
        return np.where((columns >= 0)[:, None], found.keypoints[:, columns], np.float32(0))

    def process(self, id: str, truth: People, found: Poses) -> None:  # noqa: A002
        """Match the people found in an image.

        Raises:
            ValueError: the image came before, or a score or a point is not finite.
        """
        if id in self._rows:
            raise ValueError(f"image {id} is evaluated twice")
        keypoints = self.keypoints(found)
        if not (np.isfinite(found.scores).all() and np.isfinite(keypoints).all()):
            raise ValueError(f"image {id}: a found person has a score or a point that is not finite")
        order = np.argsort(-found.scores, kind="mergesort")[:MOST_FOUND]
        keypoints, scores = keypoints[order], found.scores[order].astype(np.float64)
        self._results += coco_results(id, keypoints, scores)

        points = keypoints[..., :2].astype(np.float64)
        extent = np.prod(points.max(axis=1, initial=0) - points.min(axis=1, initial=np.inf), axis=1)
        extent = np.where(np.isfinite(extent), extent, 0.0)
        unlabelled = (truth.keypoints[..., 2] > 0).sum(axis=1) == 0
        never = truth.crowd | unlabelled
        sigmas = np.array(self.labels.sigmas)
        similarity = oks(points, truth.keypoints, truth.boxes, truth.areas, sigmas)
        hits, misses, positives = [], [], []
        for low, high in AREAS.values():
            ignored = never | (truth.areas < low) | (truth.areas > high)
            last = np.argsort(ignored, kind="mergesort")
            matched, to_ignored = _match(
                np.ascontiguousarray(similarity[:, last]), ignored[last], truth.crowd[last], THRESHOLDS
            )
            outside = (extent < low) | (extent > high)
            dropped = to_ignored | (~matched & outside)
            hits.append(matched & ~dropped)
            misses.append(~matched & ~dropped)
            positives.append(int((~ignored).sum()))
        self._rows[id] = (scores, np.array(hits), np.array(misses), np.array(positives, np.int64))

    def matches(self) -> Matches:
        """The matched images, in the order of their ids, as COCO's own evaluation takes them."""
        numeric = all(key.isdigit() for key in self._rows)
        ids = sorted(self._rows, key=int) if numeric else sorted(self._rows)
        rows = [self._rows[i] for i in ids]
        shape = (len(AREAS), len(THRESHOLDS), 0)
        return Matches(
            images=tuple(ids),
            image=np.repeat(np.arange(len(rows)), [len(r[0]) for r in rows]).astype(np.int64),
            scores=np.concatenate([r[0] for r in rows] or [np.zeros(0)]),
            hits=np.concatenate([r[1] for r in rows] or [np.zeros(shape, bool)], axis=2),
            misses=np.concatenate([r[2] for r in rows] or [np.zeros(shape, bool)], axis=2),
            positives=np.array([r[3] for r in rows], np.int64).reshape(-1, len(AREAS)).T,
        )

    def results(self) -> list[dict[str, Any]]:
        """Everything found, in COCO's result format."""
        return list(self._results)

    def evaluate(self, images: NDArray[np.intp] | None = None) -> Mapping[str, float]:
        """The ten figures, over all images or over those at the given indices (repeats count)."""
        matches = self.matches()
        counts = None if images is None else np.bincount(images, minlength=len(matches.images))
        return matches.figures(counts)


def coco_results(id: str, keypoints: NDArray[np.float32], scores: F64) -> list[dict[str, Any]]:  # noqa: A002
    """People of one image in COCO's result format."""
    return [
        {
            "image_id": int(id) if id.isdigit() else id,
            "category_id": 1,
            "keypoints": [round(float(v), 3) for v in points.ravel()],
            "score": float(score),
        }
        for points, score in zip(keypoints, scores, strict=True)
    ]
