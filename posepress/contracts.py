"""Protocols of data sets, framings, decoders and runners."""

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
        """Columns with one row for each image, from which strata are made."""
        ...


class Framing(Protocol):
    """A rule that turns an image into network inputs."""

    @property
    def one_size(self) -> bool:
        """Whether every view has the resolution's size."""
        ...

    @property
    def averaged(self) -> bool:
        """Whether the fields of an image's views are averaged before decoding."""
        ...

    def views(self, size: Resolution, resolution: Resolution, spec: InputSpec, boxes: NDArray[Any] | None = None) -> list[View]:
        """The views of an image; `boxes` [N, 4] are those of its people: x, y, width, height."""
        ...


class Decoder(Protocol[Found]):
    """A decoder turns fields into predictions."""

    def decode(self, fields: Fields, views: Sequence[View]) -> list[Found]:
        """One prediction for each view."""
        ...

    def merge(self, parts: Sequence[Found], views: Sequence[View]) -> Found:
        """The prediction for an image, merged from those of its views."""
        ...

    def draw(self, image: NDArray[Any], found: Found) -> NDArray[Any]:
        """The image uint8 [H, W, 3] with the prediction drawn on it."""
        ...

    def variants(self, found: Found) -> Mapping[str, Found]:
        """Alternative versions of an image's prediction, by name; each is evaluated, too."""
        ...


class Runner(Protocol):
    """A loaded engine.

    Attributes:
        spec: the network's description.
        workers: number of threads that may call the runner at the same time.
    """

    spec: NetworkSpec
    workers: int

    def __enter__(self) -> "Runner": ...

    def __exit__(self, *_: object) -> None: ...

    def upload(self, images: NDArray[Any]) -> Array:
        """Convert RGB images uint8 [B, H, W, 3] to the network's input form, in the engine's memory; complete on return."""
        ...

    def __call__(self, images: Array) -> Fields:
        """Run the network on uploaded images. The fields [B, C, h, w] stay in the engine's memory; complete on return."""
        ...

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Copy fields to host memory."""
        ...
