"""Ground truth of an image."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class People:
    """Ground truth of an image, as COCO defines it.

    Attributes:
        keypoints: float64 [N, K, 3]: x, y, visibility (0 not labelled, 1 hidden, 2 visible).
        boxes: float64 [N, 4]: x, y, width, height.
        areas: float64 [N], areas of the people's masks in pixels.
        crowd: bool [N]; a crowd region has no keypoints.
        masks: one for each person: COCO's polygons or run lengths; None if the file has none.
        ignored: bool [N], ignored people: neither missing nor predicting them counts as an error. None ignores people
            without labelled keypoints.
    """

    keypoints: NDArray[np.float64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    masks: tuple[Any, ...] = ()
    ignored: NDArray[np.bool_] | None = None

    @property
    def never(self) -> NDArray[np.bool_]:
        """Whether a person is a crowd or ignored, bool [N]."""
        without = ~(self.keypoints[..., 2] > 0).any(axis=1) if self.ignored is None else self.ignored
        return np.asarray(self.crowd | without, bool)
