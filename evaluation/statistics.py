"""Intervals: what the images chosen for an evaluation leave uncertain."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.coco import Matches


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval of its bootstrap distribution."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _interval(value: float, draws: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(value, float(low), float(high))


def bootstrap(matches: Matches, figure: str = "ap", resamples: int = 500, seed: int = 0) -> Interval:
    """95 % percentile bootstrap over images (Efron 1979) of a figure.

    Args:
        matches: the evaluated data set.
        figure: one of `evaluation.coco.FIGURES`.
        resamples: how many data sets of the same size are drawn, with repetition.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    n = len(matches.images)
    draws = [matches.figures(np.bincount(draw.integers(0, n, n), minlength=n), [figure])[figure] for _ in range(resamples)]
    return _interval(matches.figures(None, [figure])[figure], np.array(draws))


def paired(ours: Matches, theirs: Matches, figure: str = "ap", resamples: int = 500, seed: int = 0) -> Interval:
    """The difference ours - theirs of a figure, both drawn from the same images in every resample.

    Raises:
        ValueError: the two were not evaluated on the same images.
    """
    if ours.images != theirs.images:
        only = sorted(set(ours.images) ^ set(theirs.images))
        raise ValueError(
            f"the two engines were evaluated on different images ({len(ours.images)} and {len(theirs.images)}; "
            f"{len(only)} are in one only): evaluate both on the same data"
        )
    draw = np.random.default_rng(seed)
    n = len(ours.images)
    draws = []
    for _ in range(resamples):
        counts = np.bincount(draw.integers(0, n, n), minlength=n)
        draws.append(ours.figures(counts, [figure])[figure] - theirs.figures(counts, [figure])[figure])
    value = ours.figures(None, [figure])[figure] - theirs.figures(None, [figure])[figure]
    return _interval(value, np.array(draws))
