"""What a metric must offer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from evaluation.statistics import Resampled

Truth_contra = TypeVar("Truth_contra", contravariant=True)

Found_contra = TypeVar("Found_contra", contravariant=True)


class Metric(Protocol[Truth_contra, Found_contra]):
    """Figures of a data set, filled image by image.

    Attributes:
        primary: the figure that matters most, for which intervals are made.
    """

    primary: str

    def reset(self) -> None:
        """Forget every image."""
        ...

    def process(self, id: str, truth: Truth_contra, found: Found_contra) -> None:  # noqa: A002
        """Take one image."""
        ...

    def evaluate(self, images: NDArray[Any] | None = None) -> Mapping[str, float]:
        """The figures, of all images or of those at the given indices."""
        ...

    def matches(self) -> Resampled:
        """The images ready for resampling the primary figure."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What went wrong on the way, counted."""
        ...

    def results(self) -> Iterator[Mapping[str, Any]]:
        """Everything found, as plain data."""
        ...

    def doubts(self) -> Sequence[str]:
        """What may have made the figures other than expected, each with what to look at; to be shown."""
        ...

    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the figures are made of, in named tables."""
        ...
