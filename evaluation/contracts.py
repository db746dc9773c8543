"""Protocol of metrics, and the description of their figures."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from numpy.typing import NDArray

from evaluation.statistics import Resampled
from posepress.errors import UserError

Truth_contra = TypeVar("Truth_contra", contravariant=True)

Found_contra = TypeVar("Found_contra", contravariant=True)


FIRST = "ap"  # primary figure of results of version 0.1, which knew one metric and did not name it


@dataclass(frozen=True)
class MetricInfo:
    """Names of a metric's figures in tables, pages and results.csv.

    Attributes:
        primary: key of the most important figure, for which intervals are computed: "ap".
        title: full name of the primary figure.
        short: short name of the primary figure, for table heads.
        nothing: value of the primary figure if nothing could be measured.
        columns: keys of further figures that tables hold, in order.
        digits: decimals of a figure in tables.
    """

    primary: str
    title: str
    short: str
    nothing: float = -1.0
    columns: tuple[str, ...] = ()
    digits: int = 3

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> "MetricInfo":
        """The description in an evaluation's figures. For files of version 0.1 it is derived from the figures' keys.

        Raises:
            ValueError: the figures hold no valid description of a metric.
        """
        if (kept := figures.get("metric")) is None:
            if not isinstance(name := figures.get("primary"), str) or not name:
                raise ValueError("primary: the key is missing, or its value is no text")
            more = [key for key in figures if key.startswith(name) and not re.search(r"_lo$|_hi$|_vs_", key) and key != name]
            return cls(name, name.upper(), name.upper(), columns=tuple(more))
        try:
            info = cls(**{**kept, "columns": tuple(kept["columns"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"metric: the value describes no metric ({error})") from error
        values: tuple[Any, ...] = (info.primary, *info.columns)
        if not all(isinstance(key, str) and re.fullmatch(r"[a-z]\w{0,60}", key) for key in values):
            raise ValueError("metric: its keys are no names")
        titles: tuple[Any, ...] = (info.title, info.short)
        if not all(isinstance(text, str) and len(text) < 120 and text.isprintable() for text in titles):
            raise ValueError("metric: its titles are no texts")
        numbers: tuple[Any, ...] = (info.digits, info.nothing)
        if not all(isinstance(number, (int, float)) for number in numbers) or info.digits not in range(10):
            raise ValueError("metric: digits or nothing is no number")
        return info


class Metric(Protocol[Truth_contra, Found_contra]):
    """A metric computes figures of a data set that is added image by image.

    Attributes:
        info: names of the figures.
    """

    info: ClassVar[MetricInfo]

    def reset(self) -> None:
        """Forget every image."""
        ...

    def process(self, id: str, truth: Truth_contra, found: Found_contra) -> None:  # noqa: A002
        """Add one image."""
        ...

    def evaluate(self, images: NDArray[Any] | None = None) -> Mapping[str, float]:
        """The figures, of all images or of those at the given indices."""
        ...

    def matches(self) -> Resampled:
        """The images ready for resampling the primary figure."""
        ...

    def counts(self) -> Mapping[str, int]:
        """Counts of problems during the evaluation."""
        ...

    def write(self, file: Path, named: Callable[[str], Mapping[str, Any]]) -> None:
        """Write the predictions in the metric's own format.

        Args:
            file: the file, which does not exist yet.
            named: what the data set calls an image, by its id: for COCO "image_id" and "category_id".
        """
        ...

    def doubts(self) -> Sequence[str]:
        """Possible causes of unexpected figures, each with what to check; they are shown to the user."""
        ...

    def details(self) -> Mapping[str, Mapping[str, float]]:
        """Breakdowns of the figures, in named tables."""
        ...


def checked(measure: Metric[Any, Any]) -> Mapping[str, float]:
    """The figures of a metric, after a check that they are what tables and comparisons expect.

    Raises:
        UserError: the primary figure is missing, or a figure lies outside -1 to 1.
    """
    figures = measure.evaluate()
    kind, primary = type(measure).__name__, measure.info.primary
    if primary not in figures:
        listed = ", ".join(figures)
        raise UserError(f"metric {kind}: info.primary is '{primary}', but evaluate() returns {listed}; correct one of them")
    for name, value in figures.items():
        if not -1 <= value <= 1:
            raise UserError(f"metric {kind}: '{name}' is {value:g}; figures lie between -1 and 1, a higher one is better")
    return figures
