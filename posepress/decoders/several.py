"""Several decoders for the same fields, to compare settings with a single pass of the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Decoder
from posepress.geometry import View
from posepress.spec import Array


@dataclass(frozen=True)
class Together:
    """A decoder whose result is the list of the results of several decoders."""

    decoders: Sequence[Decoder[Any]]
    needs: ClassVar[Mapping[str, str]] = {}
    result: ClassVar[type] = list

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[list[Any]]:
        """One list for each view, with one result of each decoder."""
        return [list(found) for found in zip(*(decoder.decode(fields, views) for decoder in self.decoders), strict=True)]

    def merge(self, parts: Sequence[Sequence[Any]], views: Sequence[View]) -> list[Any]:
        """One list for the image, with one result of each decoder."""
        return [decoder.merge([part[n] for part in parts], views) for n, decoder in enumerate(self.decoders)]

    def draw(self, image: NDArray[np.uint8], found: Sequence[Any]) -> NDArray[np.uint8]:
        """The result of the first decoder, drawn over its image."""
        return self.decoders[0].draw(image, found[0])

    def readings(self, found: Sequence[Any]) -> Mapping[str, Any]:  # noqa: ARG002 - readings are not compared
        """No alternative versions of a prediction."""
        return {}

    def plain(self, found: Sequence[Any]) -> list[Any]:
        """The plain reading of each result."""
        return [decoder.plain(one) for decoder, one in zip(self.decoders, found, strict=True)]

    def mirror(self, name: str, field: NDArray[np.float32]) -> NDArray[np.float32]:
        """An output of a mirrored view, as the first decoder turns it."""
        return self.decoders[0].mirror(name, field)
