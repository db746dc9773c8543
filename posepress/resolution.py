"""A size in pixels."""

import re
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval


@dataclass(frozen=True, order=True)
class Resolution:
    """A size in pixels.

    Attributes:
        height: height of the image or input, in pixels.
        width: width of the image or input, in pixels.
    """

    height: Annotated[int, Interval(ge=1, lt=10**6)]
    width: Annotated[int, Interval(ge=1, lt=10**6)]

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """Read "288x384", height first.

        Raises:
            ValueError: the text is not two positive integers joined by an x.
        """
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", str(text).strip())
        if match is None:
            raise ValueError(f"resolution={text}: not HEIGHTxWIDTH in pixels; write it like resolution=288x384")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"
