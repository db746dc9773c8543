"""Differences of two computations of the same network, tensor by tensor, and the first tensor that differs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Difference:
    """The difference of one tensor between a reference and another computation, accumulated over images.

    Attributes:
        dot: sum of the products of corresponding values.
        squares: sums of squares of the reference and of the other tensor.
        apart: sum of squared differences.
        absolute: sum of absolute differences.
        greatest: greatest absolute difference.
        count: number of compared values.
        not_finite: number of values that are finite in the reference, but NaN or infinite in the other tensor.
    """

    dot: float = 0.0
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    apart: float = 0.0
    absolute: float = 0.0
    greatest: float = 0.0
    count: int = 0
    not_finite: int = 0

    def add(self, reference: NDArray[np.floating], other: NDArray[np.floating]) -> None:
        """Add the tensor of one image.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != other.shape:
            raise ValueError(f"tensors of {reference.shape} and {other.shape} cannot be compared")
        ours, theirs = (values.astype(np.float64).ravel() for values in (reference, other))
        good = np.isfinite(theirs)
        self.not_finite += int((np.isfinite(ours) & ~good).sum())
        ours, theirs = ours[good], theirs[good]
        difference = np.abs(ours - theirs)
        self.dot += float(ours @ theirs)
        self.squares += (float(ours @ ours), float(theirs @ theirs))
        self.apart += float(difference @ difference)
        self.absolute += float(difference.sum())
        self.greatest = max(self.greatest, float(difference.max(initial=0)))
        self.count += len(ours)

    def figures(self) -> dict[str, float]:
        """Cosine similarity, greatest and mean absolute difference, and relative RMS difference, at least 1 if NaN appeared."""
        ours, theirs = np.sqrt(self.squares)
        same = self.apart == 0
        cosine = self.dot / (ours * theirs) if ours * theirs > 0 else float(same)
        relative = float(np.sqrt(self.apart) / ours) if ours > 0 else float(not same)
        return {
            "cosine": float(cosine),
            "max": self.greatest,
            "mean": self.absolute / max(self.count, 1),
            "relative": max(relative, 1.0) if self.not_finite else relative,
        }


def compare(
    batches: Sequence[tuple[Mapping[str, NDArray[np.floating]], Mapping[str, NDArray[np.floating]]]],
) -> dict[str, dict[str, float]]:
    """Figures of every tensor that both sides have, over pairs (reference, other) of images."""
    found: dict[str, Difference] = {}
    for reference, other in batches:
        for name in (name for name in reference if name in other):
            found.setdefault(name, Difference()).add(reference[name], other[name])
    return {name: difference.figures() for name, difference in found.items()}


def first_apart(order: Sequence[str], apart: Callable[[str], bool]) -> str | None:
    """The first tensor that differs, found by bisection; None if the last tensor does not differ.

    Args:
        order: names of tensors; inputs come before the tensors computed from them.
        apart: whether a tensor differs. All tensors after one that differs are assumed to differ, too.
    """
    low, high = 0, len(order) - 1
    if not order or not apart(order[high]):
        return None
    while low < high:
        middle = (low + high) // 2
        if apart(order[middle]):
            high = middle
        else:
            low = middle + 1
    return order[low]
