"""Intervals: the uncertainty of a figure that comes from the choice of the evaluated images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

_TOGETHER = 50  # resamples drawn at once


@dataclass(frozen=True)
class Interval:
    """A figure and the 95 % interval of its bootstrap distribution."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Resampled(Protocol):
    """An evaluated data set whose figure can be computed over any multiset of its images."""

    @property
    def images(self) -> Sequence[str]:
        """The images' ids, in order."""
        ...

    def resampled(self, counts: NDArray[Any]) -> F64:
        """The figure of every resample, NaN if it is undefined; `counts` [R, I] says how often each image counts."""
        ...


@dataclass(frozen=True)
class Draws:
    """A figure, and its value in every resample of the images.

    Two engines evaluated on the same images drew the same resamples, so the differences of their draws are paired.

    Attributes:
        images: ids of the images.
        value: the figure over all images; -1 if it is undefined.
        values: float64 [R], the figure over each resample; NaN if it is undefined.
    """

    images: tuple[str, ...]
    value: float
    values: F64

    @property
    def interval(self) -> Interval:
        """The 95 % percentile interval (Efron 1979)."""
        return _interval(self.value, self.values)

    def save(self, file: Path) -> None:
        """Write the draws to an .npz file."""
        np.savez_compressed(file, images=np.array(self.images, dtype=str), value=self.value, values=self.values)

    @classmethod
    def load(cls, file: Path) -> "Draws":
        """Read what `save` wrote."""
        with np.load(file, allow_pickle=False) as stored:
            return cls(tuple(stored["images"].tolist()), float(stored["value"]), stored["values"])


def _interval(value: float, draws: F64) -> Interval:
    known = draws[np.isfinite(draws)]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (value, value)
    return Interval(value, float(low), float(high))


def bootstrap(data: Resampled, resamples: int = 500, seed: int = 0) -> Draws:
    """The figure over data sets of the same size, drawn image by image with replacement.

    Args:
        data: the evaluated images.
        resamples: number of data sets to draw.
        seed: seed of the draws; the first resamples do not depend on the number of resamples.
    """
    draw = np.random.default_rng(seed)
    n = len(data.images)
    values = []
    for start in range(0, resamples if n else 0, _TOGETHER):
        chosen = [draw.integers(0, n, n) for _ in range(min(_TOGETHER, resamples - start))]
        values.append(data.resampled(np.array([np.bincount(c, minlength=n) for c in chosen])))
    (value,) = data.resampled(np.ones((1, n)))
    return Draws(tuple(data.images), float(value) if np.isfinite(value) else -1.0, np.concatenate([np.zeros(0), *values]))


def paired(ours: Draws, theirs: Draws) -> Interval:
    """The difference ours - theirs, both taken from the same images in every resample.

    Raises:
        ValueError: the two were not evaluated on the same images.
    """
    if ours.images != theirs.images:
        only = sorted(set(ours.images) ^ set(theirs.images))
        raise ValueError(
            f"the two engines were evaluated on different images ({len(ours.images)} and {len(theirs.images)}; "
            f"{len(only)} are in one only): evaluate both on the same data"
        )
    n = min(len(ours.values), len(theirs.values))
    return _interval(ours.value - theirs.value, ours.values[:n] - theirs.values[:n])


def spearman(one: F64, other: F64) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; None for a constant side or fewer than three values."""

    def ranks(values: F64) -> F64:
        below, equal = (values[:, None] > values).sum(1), (values[:, None] == values).sum(1)
        positions: F64 = below + (equal + 1) / 2
        return positions

    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(ranks(np.asarray(one, np.float64)), ranks(np.asarray(other, np.float64)))[0, 1])
