"""How far two computations of the same network are apart, tensor by tensor, and where they part."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Difference:
    """Accumulated over images: one tensor as computed by a reference and by another.

    Attributes:
        dot: sum of products.
        squares: sums of squares of the reference and of the other.
        apart: sum of squares of the difference.
        absolute: sum of absolute differences.
        greatest: the greatest one.
        count: of values.
        not_finite: values of the other that are NaN or infinite where the reference's are not.
    """

    dot: float = 0.0
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    apart: float = 0.0
    absolute: float = 0.0
    greatest: float = 0.0
    count: int = 0
    not_finite: int = 0

    def add(self, reference: NDArray[np.floating], other: NDArray[np.floating]) -> None:
        """Take a tensor of one image.

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
        """Cosine similarity, greatest and mean absolute difference, its RMS over the reference's; 1 where NaN appeared."""
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
    """Figures of every tensor that both sides have, over (reference, other) of some images."""
    found: dict[str, Difference] = {}
    for reference, other in batches:
        for name in (name for name in reference if name in other):
            found.setdefault(name, Difference()).add(reference[name], other[name])
    return {name: difference.figures() for name, difference in found.items()}


def first_apart(order: Sequence[str], apart: Callable[[str], bool]) -> str | None:
    """The first tensor that differs, by bisection; None if the last does not.

    Args:
        order: names, inputs before what is computed from them.
        apart: whether a tensor differs; what follows one that differs is taken to differ, too.
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
