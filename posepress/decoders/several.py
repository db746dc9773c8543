"""Several decoders over the same fields, so that settings are compared on one pass of the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posepress.geometry import View
from posepress.spec import Array


@dataclass(frozen=True)
class Together:
    """A decoder whose result is the list of the results of some."""

    decoders: Sequence[Any]

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[list[Any]]:
        """One list a view, one result a decoder."""
        return [list(found) for found in zip(*(decoder.decode(fields, views) for decoder in self.decoders), strict=True)]

    def merge(self, parts: Sequence[Sequence[Any]], views: Sequence[View]) -> list[Any]:
        """One list an image."""
        return [decoder.merge([part[n] for part in parts], views) for n, decoder in enumerate(self.decoders)]

    def variants(self, found: Sequence[Any]) -> Mapping[str, Any]:  # noqa: ARG002 - settings are compared as they are
        """None."""
        return {}
