"""Fit of a person's score on the tune images: AP rewards scores that order people by their OKS."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import oks
from evaluation.truth import People
from posepress.results import Poses

_STRENGTH = 10.0  # strength of the ridge penalty, in people; it limits the influence of few tune images
_LEAST = 20  # least number of predictions for a fit


def placed(metric: CocoKeypoints, truth: People, found: Poses) -> NDArray[np.float64]:
    """The greatest OKS of each prediction, [N]; NaN for a prediction that matches a person ignored by COCO."""
    points = metric.keypoints(found)[..., :2].astype(np.float64)
    similarity = oks(points, truth.keypoints, truth.boxes, truth.areas, np.array(metric.labels.oks_sigmas))
    best: NDArray[np.float64] = similarity[:, ~truth.never].max(axis=1, initial=0)
    ignored = similarity[:, truth.never].max(axis=1, initial=0)
    return np.where((ignored > best) & (ignored > 0.5), np.nan, best)


def fit(metric: CocoKeypoints, results: Sequence[tuple[People, Poses]]) -> list[float] | None:
    """Weights of `Poses.notes["features"]` that predict a person's OKS, by ridge regression.

    Args:
        metric: matches the keypoints of the skeletons.
        results: ground truth and predictions of each tune image; the predictions have features, the last of which is 1.

    Returns:
        One weight for each feature; None if there are too few predictions for a fit. The weighted sum may be negative.
    """
    known = [found.notes["features"] for _, found in results if "features" in found.notes]
    features = np.concatenate(known or [np.zeros((0, 1), np.float32)])
    target = np.concatenate([placed(metric, truth, found) for truth, found in results] or [np.zeros(0)])
    counted = np.isfinite(target)
    if counted.sum() < _LEAST:
        return None
    x, y = features[counted, :-1].astype(np.float64), target[counted]
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread < 1e-9, 1, spread)
    scaled = (x - mean) / spread
    solved = np.linalg.solve(scaled.T @ scaled + _STRENGTH * np.eye(x.shape[1]), scaled.T @ (y - y.mean())) / spread
    return [*solved.tolist(), float(y.mean() - solved @ mean)]
