"""What a framing, a decoder and a runner must offer."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from posepress.geometry import View
from posepress.resolution import Resolution
from posepress.results import Boxes, Sample
from posepress.spec import Array, Fields, InputSpec, NetworkSpec

Truth = TypeVar("Truth")
Result = TypeVar("Result")  # a dataclass of arrays, numbers and mappings of these


class Samples(Protocol[Truth]):
    """Images with their labels, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample[Truth]: ...


class Framing(Protocol):
    """How an image becomes network inputs."""

    @property
    def one_size(self) -> bool:
        """Whether every view has the resolution's size."""
        ...

    @property
    def averaged(self) -> bool:
        """Whether the fields of an image's views are averaged before they are decoded; no engine runs like this."""
        ...

    def views(self, size: Resolution, resolution: Resolution, spec: InputSpec, boxes: Boxes | None = None) -> list[View]:
        """The views of an image.

        Args:
            size: of the image.
            resolution: of the network's input.
            spec: the network's input.
            boxes: of the instances; a framing of the whole image does not need them.

        Raises:
            ValueError: the framing needs boxes, and there are none, or one is not finite.
        """
        ...

    def bases(self, size: Resolution, resolution: Resolution, boxes: Boxes | None = None) -> list[View]:
        """The views of an image that training starts from; an augmentation turns, scales and shifts them.

        Each shows its object in the middle. The arguments are those of `views`.
        """
        ...

    def reader(self, decoder: "Decoder[Result]", spec: NetworkSpec) -> "Decoder[Result]":
        """The decoder of an image's views: the given one, or one that averages the outputs of several views first."""
        ...


class Decoder(Protocol[Result]):
    """Turns the outputs of a network into results.

    Attributes:
        needs: axes of each output that is read, by name, as `posepress.spec.OutputSpec.axes`.
        result: the class of the results.
    """

    needs: ClassVar[Mapping[str, str]]
    result: ClassVar[type]

    def decode(self, fields: Fields, views: Sequence[View]) -> list[Result]:
        """One result for each view of a batch."""
        ...

    def merge(self, parts: Sequence[Result], views: Sequence[View]) -> Result:
        """One result for an image, from those of its views; an image without views has an empty result."""
        ...

    def draw(self, image: NDArray[np.uint8], found: Result) -> NDArray[np.uint8]:
        """A result drawn over its image, RGB [H, W, 3]."""
        ...

    def readings(self, found: Result) -> Mapping[str, Result]:
        """Alternative versions of a result, by name; metrics score them beside it."""
        ...

    def plain(self, found: Result) -> Result:
        """The result without what post-processing adds; agreement compares it."""
        ...

    def mirror(self, name: str, field: NDArray[np.float32]) -> NDArray[np.float32]:
        """The output `name` [C, ...] of a mirrored view, with left and right exchanged."""
        ...


class Runner(Protocol):
    """A loaded engine.

    Attributes:
        spec: the network's description.
        workers: number of threads that may call it at once.
    """

    spec: NetworkSpec
    workers: int

    def __enter__(self) -> "Runner": ...

    def __exit__(self, *_: object) -> None: ...

    def upload(self, images: NDArray[Any]) -> Array:
        """RGB images uint8 [B, H, W, 3] in the network's input form, where the engine reads them."""
        ...

    def __call__(self, images: Array) -> Fields:
        """Outputs for uploaded images, where the engine leaves them; they are complete when the call returns."""
        ...

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Outputs in host memory."""
        ...
