"""Peaks and limbs of an image before they are grouped into people."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Candidates:
    """Peaks and limbs of an image before they are grouped into people.

    Attributes:
        peaks: float32 [K, P, 3]: x, y in cells and the map's value.
        counts: int32 [K], peaks in each map.
        scores: float32 [n], scores of pairs of peaks.
        pairs: int32 [n, 2], indices of the two peaks of each pair.
        starts: int32 [L + 1], where each limb's pairs begin.
        dropped: number of peaks beyond the first P of a map.
        not_finite: whether a heatmap held NaN or infinity.
    """

    peaks: F32
    counts: I32
    scores: F32
    pairs: I32
    starts: I32
    dropped: int
    not_finite: bool
