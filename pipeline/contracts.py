"""The interfaces of networks, data sets, objectives, backends, quantizers and samplers."""

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
    """A torch.nn.Module with a description. In training it may also return the fields of earlier stages, as "heatmaps.0"."""

    spec: NetworkSpec

    @property
    def ignored_layers(self) -> Sequence[Any]:
        """The heads: modules that must keep all output channels."""
        ...

    def __call__(self, images: Array) -> Fields:
        """Compute fields from images [B, C, H, W] that are preprocessed as `spec.input` says."""
        ...


class Splits(Protocol):
    """A data set divided into splits: train, unlabelled, tune, agreement and validation."""

    def open(self, split: str) -> Dataset[Any]:
        """Return the images of a split, after a check that no other split contains one of them."""
        ...

    def __contains__(self, split: str) -> bool:
        """Whether the split has images."""
        ...

    def digest(self, splits: Sequence[str]) -> str:
        """Return a digest of the images and labels of the given splits."""
        ...


class Objective(Protocol[Truth_contra]):
    """The training objective of a family of networks."""

    def people(self, truth: Truth_contra | None) -> int:
        """Number of labelled people of an image that training uses."""
        ...

    def labels(
        self, truth: Truth_contra | None, size: Resolution, stored: Resolution, whole: Resolution, most: int
    ) -> dict[str, NDArray[Any]]:
        """Convert the ground truth of an image to the arrays of a training shard. Their shapes are equal for all images.

        Args:
            truth: ground truth of the image; None for an image without labels.
            size: size of the image in the coordinates of the ground truth.
            stored: size of the image in the shard.
            whole: size of the shard's array, which contains the stored image and its padding.
            most: largest number of people in any image.
        """
        ...

    def targets(self, labels: Mapping[str, Array], size: Resolution, spec: NetworkSpec) -> dict[str, Array]:
        """Return the fields of a perfect network for a batch of views, and the masks of the values that the loss uses.

        Args:
            labels: arrays of `labels`, "matrix" [B, 2, 3] from stored image to view, "flipped" [B] and "labelled" [B].
            size: size of the views, in pixels.
            spec: description of the network.
        """
        ...

    def loss(self, fields: Fields, targets: Fields) -> Mapping[str, Array]:
        """Return the losses by name; training minimizes their sum."""
        ...


class Backend(Protocol):
    """Builds and runs engines."""

    @property
    def name(self) -> str:
        """Name of the backend in reports: "onnxruntime", "tensorrt", "tensorrt-double"."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on a GPU."""
        ...

    @property
    def timeable(self) -> bool:
        """Whether the latencies of this backend are real measurements."""
        ...

    def in_fp32(self) -> "Backend":
        """Return a backend with equal options for FP32 networks."""
        ...

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:
        """Build an engine in the folder `out` and return its file."""
        ...

    def load(self, engine: Path, threads: int = 0) -> Runner:
        """Load an engine. With `threads` 0, the backend chooses the number of threads."""
        ...

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> Sequence[Mapping[str, Any]]:
        """Return one record for each layer of the optimized engine: name, op, precision, macs.

        Args:
            engine: file of the engine.
            resolution: input resolution at which the engine runs.
            scratch: folder for temporary files; None uses the system's.
        """
        ...


@dataclass(frozen=True)
class CalibrationFeed:
    """Calibration images as network inputs.

    Attributes:
        read: returns the first n images, or all for None, as batches [B, 3, H, W].
        frames: returns the images before normalisation, as RGB uint8 batches [B, H, W, 3].
        images: digest of the list of images.
        preprocessing: digest of the preprocessing.
    """

    read: Callable[[int | None], Iterable[Array]]
    frames: Callable[[int | None], Iterable[NDArray[Any]]]
    images: str
    preprocessing: str


class Quantizer(Protocol):
    """Writes precision into an ONNX file."""

    def quantize(self, onnx: Path, feed: CalibrationFeed | None, probe: Any, out: Path) -> Mapping[str, Any]:
        """Write the typed ONNX file of each runtime variant into `out`, and return a report of plain data.

        Args:
            onnx: file of the floating-point network.
            feed: calibration images; None if the quantizer needs none.
            probe: a `pipeline.probing.probe.Probe`, the candidate evaluator; None if the quantizer measures nothing.
            out: output folder.
        """
        ...


class Sampler(Protocol):
    """Chooses calibration images."""

    def sample(self, table: Mapping[str, NDArray[Any]]) -> Any:
        """Choose rows of a data set's table."""
        ...
