"""Several decoders for the same fields, to compare settings with a single pass of the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posepress.geometry import View
from posepress.spec import Array


@dataclass(frozen=True)
class Together:
    """A decoder whose result is the list of the results of several decoders."""

    decoders: Sequence[Any]

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[list[Any]]:
        """One list for each view, with one result of each decoder."""
        return [list(found) for found in zip(*(decoder.decode(fields, views) for decoder in self.decoders), strict=True)]

    def merge(self, parts: Sequence[Sequence[Any]], views: Sequence[View]) -> list[Any]:
        """One list for the image, with one result of each decoder."""
        return [decoder.merge([part[n] for part in parts], views) for n, decoder in enumerate(self.decoders)]

    def variants(self, found: Sequence[Any]) -> Mapping[str, Any]:  # noqa: ARG002 - variants are not compared
        """No alternative versions of a prediction."""
        return {}
