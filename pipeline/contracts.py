"""What networks, data sets, objectives, backends, quantizers and samplers must offer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from evaluation.contracts import Truth_contra
from pipeline.onnx_files.files import ModelFiles, Shapes
from posepress.contracts import Dataset, Runner
from posepress.spec import Array, Fields, NetworkSpec, Resolution


class Network(Protocol):
    """A torch.nn.Module with a description; in training its fields may include those of earlier stages, "heatmaps.0"."""

    spec: NetworkSpec

    @property
    def ignored_layers(self) -> Sequence[Any]:
        """Modules whose outputs must keep their channels: the heads."""
        ...

    def __call__(self, images: Array) -> Fields:
        """Images [B, C, H, W] in the form of `spec.input` to fields."""
        ...


class Splits(Protocol):
    """A data set and what each of its images is for: train, unlabelled, tune, agreement, validation."""

    def open(self, split: str) -> Dataset[Any]:
        """The images of a split, after checking that no other split has one of them."""
        ...

    def __contains__(self, split: str) -> bool:
        """Whether there are images for this."""
        ...

    def digest(self, splits: Sequence[str]) -> str:
        """A digest of the images and labels of some splits."""
        ...


class Objective(Protocol[Truth_contra]):
    """What a family of networks is trained for."""

    def people(self, truth: Truth_contra | None) -> int:
        """How many people of an image are learnt from."""
        ...

    def labels(
        self, truth: Truth_contra | None, size: Resolution, stored: Resolution, whole: Resolution, most: int
    ) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's truth, arrays of one shape for all images.

        Args:
            truth: None for an image without labels.
            size: of the image that the truth speaks of.
            stored: the size it is kept at.
            whole: of the array it is kept in.
            most: people that any image has.
        """
        ...

    def targets(self, labels: Mapping[str, Array], size: Resolution, spec: NetworkSpec) -> dict[str, Array]:
        """The fields a perfect network would return for a batch of views, and the masks of where they count.

        Args:
            labels: what `labels` kept, "matrix" [B, 2, 3] from stored image to view, "flipped" [B] and "labelled" [B].
            size: of the views, in pixels.
            spec: of the network.
        """
        ...

    def loss(self, fields: Fields, targets: Fields) -> Mapping[str, Array]:
        """Named losses, to be summed."""
        ...


class Backend(Protocol):
    """Builds and runs engines."""

    @property
    def name(self) -> str:
        """What ran, as figures say it: "onnxruntime", "tensorrt", "tensorrt-double"."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        ...

    @property
    def timeable(self) -> bool:
        """Whether latencies of this backend mean anything."""
        ...

    def in_fp32(self) -> "Backend":
        """The same for FP32 networks."""
        ...

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:
        """Build an engine into the folder `out`; returns its file."""
        ...

    def load(self, engine: Path, threads: int = 0) -> Runner:
        """Load an engine; `threads` 0 is the backend's own choice."""
        ...

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> Sequence[Mapping[str, Any]]:
        """One record a layer of the engine as it runs: name, op, precision, macs.

        Args:
            engine: to look at.
            resolution: it runs at.
            scratch: a folder for files that are gone afterwards; None is the system's.
        """
        ...


@dataclass(frozen=True)
class CalibrationFeed:
    """Calibration images as network inputs.

    Attributes:
        read: the first so many of them, or all for None, as batches [B, 3, H, W].
        frames: the same before they are normalised, RGB uint8 [B, H, W, 3].
        images: digest of their list.
        preprocessing: digest of how they become inputs.
    """

    read: Callable[[int | None], Iterable[Array]]
    frames: Callable[[int | None], Iterable[NDArray[Any]]]
    images: str
    preprocessing: str


class Quantizer(Protocol):
    """Writes precision into an ONNX file."""

    def quantize(self, onnx: Path, feed: CalibrationFeed | None, probe: Any, out: Path) -> Mapping[str, Any]:
        """Write the typed ONNX of both flavours into `out`; returns a report of plain data.

        Args:
            onnx: a float network.
            feed: calibration images; None where the quantizer was given none.
            probe: a `pipeline.probing.probe.Probe`; None where the quantizer measures nothing.
            out: a folder.
        """
        ...


class Sampler(Protocol):
    """Chooses calibration images."""

    def sample(self, table: Mapping[str, NDArray[Any]]) -> Any:
        """Choose rows of a data set's table."""
        ...
