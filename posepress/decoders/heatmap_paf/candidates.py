"""Peaks and limbs of an image, before people are made of them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

I32 = NDArray[np.int32]


@dataclass(frozen=True)
class Candidates:
    """Peaks and limbs of an image, before anybody is made of them.

    Attributes:
        peaks: float32 [K, P, 3]: x, y in cells and the map's value.
        counts: int32 [K], peaks in each map.
        scores: float32 [n], of pairs of peaks.
        pairs: int32 [n, 2], their peaks.
        starts: int32 [L + 1], where each limb's pairs begin.
        dropped: peaks that the maps had beyond P.
        not_finite: a heatmap held NaN or infinity.
    """

    peaks: F32
    counts: I32
    scores: F32
    pairs: I32
    starts: I32
    dropped: int
    not_finite: bool
