"""What a framing, a decoder and a runner must offer."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from posepress.geometry import View
from posepress.results import Sample
from posepress.spec import Array, Fields, InputSpec, NetworkSpec, Resolution

Truth = TypeVar("Truth")

Found = TypeVar("Found")


class Dataset(Protocol[Truth]):
    """Images of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample[Truth]: ...

    def table(self) -> Mapping[str, NDArray[Any]]:
        """Columns with one row an image, for strata."""
        ...


class Framing(Protocol):
    """How an image becomes network inputs."""

    @property
    def one_size(self) -> bool:
        """Whether every view has the resolution's size."""
        ...

    @property
    def averaged(self) -> bool:
        """Whether the fields of an image's views are averaged before decoding."""
        ...

    def views(self, size: Resolution, resolution: Resolution, spec: InputSpec, boxes: NDArray[Any] | None = None) -> list[View]:
        """The views of an image; `boxes` [N, 4] are of its people, x, y, width, height."""
        ...


class Decoder(Protocol[Found]):
    """Fields to what was found."""

    def decode(self, fields: Fields, views: Sequence[View]) -> list[Found]:
        """One result a view."""
        ...

    def merge(self, parts: Sequence[Found], views: Sequence[View]) -> Found:
        """One result an image, from those of its views."""
        ...

    def draw(self, image: NDArray[Any], found: Found) -> NDArray[Any]:
        """What was found, drawn over its image uint8 [H, W, 3]."""
        ...

    def variants(self, found: Found) -> Mapping[str, Found]:
        """Other readings of an image's result, by name; they are scored beside it."""
        ...


class Runner(Protocol):
    """A loaded engine.

    Attributes:
        spec: the network's description.
        workers: how many threads may call it at once.
    """

    spec: NetworkSpec
    workers: int

    def __enter__(self) -> "Runner": ...

    def __exit__(self, *_: object) -> None: ...

    def upload(self, images: NDArray[Any]) -> Array:
        """RGB images uint8 [B, H, W, 3] in the network's input form where the engine reads them; there when it returns."""
        ...

    def __call__(self, images: Array) -> Fields:
        """Uploaded images to fields [B, C, h, w], where the engine leaves them; they are there when it returns."""
        ...

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Fields in the memory of the host."""
        ...
