"""The interfaces of networks, data sets, objectives, backends, quantizers and samplers."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from numpy.typing import NDArray

from evaluation.contracts import Truth_contra
from pipeline.onnx_files.files import ModelFiles, Shapes
from posepress.contracts import Runner, Samples, Truth
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.spec import Array, Fields, NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor


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


@dataclass(frozen=True)
class ImageRecord:
    """What a data set says of an image, beside its labels.

    Attributes:
        id: name that is unique in the data set.
        file: name of the image file, relative to the split's folder.
        size: height and width; None where the labels do not give them.
        credit: address of the image's source; empty where the data set gives none.
    """

    id: str
    file: str
    size: Resolution | None = None
    credit: str = ""


class Split(Samples[Truth], Protocol[Truth]):
    """The images of one split, with their labels."""

    @property
    def labels(self) -> Skeleton | Palette:
        """The names of what is labelled."""
        ...

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        ...

    @property
    def subject(self) -> str:
        """The name of what is labelled, as "person"."""
        ...

    def named(self, image: str) -> Mapping[str, Any]:
        """What files of predictions call an image, by its id: for COCO "image_id" and "category_id"."""
        ...

    @property
    def images(self) -> Sequence[ImageRecord]:
        """The images, in order."""
        ...

    def contents(self, cache: Path) -> Mapping[str, str]:
        """The SHA-256 of every image file, by its name.

        Args:
            cache: a folder that keeps digests.

        Raises:
            UserError: a file is missing or damaged.
        """
        ...

    def doubts(self, cache: Path) -> Sequence[str]:
        """What in the labels and images may distort figures, in sentences that name the fix."""
        ...

    def table(self) -> Mapping[str, NDArray[Any]]:
        """Columns with one row for each image, from which strata are made."""
        ...


class Splits(Protocol):
    """A data set and what each of its images is for: train, unlabelled, tune, agreement, validation."""

    def open(self, split: str) -> Split[Any]:
        """The images of a split, after a check that no other split has one of them.

        Raises:
            UserError: there is no such split, it is empty, or two splits share an image.
        """
        ...

    def __contains__(self, split: str) -> bool:
        """Whether the split has images."""
        ...

    def digest(self, splits: Sequence[str]) -> str:
        """A digest of the images and labels of some splits."""
        ...


class Objective(Protocol[Truth_contra]):
    """What a family of networks is trained for.

    Attributes:
        needs: axes of each output that is learnt, by name, as `posepress.spec.OutputSpec.axes`.
    """

    needs: ClassVar[Mapping[str, str]]

    def capacity(self, truth: Truth_contra) -> int:
        """Number of labelled instances in an image; the greatest of a data set sizes the arrays of the shard."""
        ...

    def labels(self, truth: Truth_contra | None, stored: "Stored", capacity: int) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's labels: arrays of one shape for all images.

        An entry "anchors" [capacity, 4], boxes in pixels as stored (width 0 where there are fewer), lets views that enlarge
        their image stay on an instance.

        Args:
            truth: None for an image without labels.
            stored: how the image is kept.
            capacity: the greatest `capacity` of the data set.
        """
        ...

    def targets(
        self, labels: Mapping[str, "Tensor"], size: Resolution, spec: NetworkSpec, source: Skeleton | Palette
    ) -> dict[str, "Tensor"]:
        """The outputs of a perfect network for a batch of views, and masks of where they count.

        Args:
            labels: what `labels` kept [B, ...], and "matrix" [B, 2, 3] from stored image to view, "flipped" [B], "labelled" [B]
                and "base" [B], the number of the view's base in its image.
            size: size of the views, in pixels.
            spec: the network's description.
            source: labels of the data set; keypoints and classes are matched by name.

        Raises:
            UserError: the network has other outputs, or names that the data set does not have.
        """
        ...

    def loss(self, fields: Mapping[str, "Tensor"], targets: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
        """Named losses, which are summed; `fields` may hold those of earlier stages, "heatmaps.0"."""
        ...

    def imitation(self, fields: Mapping[str, "Tensor"], expected: Mapping[str, "Tensor"]) -> "Tensor":
        """How far the outputs of a student are from its teacher's, for distillation."""
        ...


@dataclass(frozen=True)
class Stored:
    """How a training shard keeps an image.

    Attributes:
        original: size of the image that its labels speak of.
        size: size that it is kept at.
        whole: size of the array that holds it, in the upper left corner.
        labels: labels of the data set.
    """

    original: Resolution
    size: Resolution
    whole: Resolution
    labels: Skeleton | Palette


class Backend(Protocol):
    """Builds and runs engines.

    Attributes:
        kind: "onnxruntime", "tensorrt", "tensorrt_rtx" or "torch"; decides which options fit, and which typed file is built.
    """

    kind: ClassVar[str]

    @property
    def name(self) -> str:
        """Name of the backend in reports: "onnxruntime", "tensorrt", "tensorrt-double"."""
        ...

    @property
    def simulated(self) -> bool:
        """Whether a double of the tests computes, so that figures are no measurements."""
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

    def adopt(self, plan: Path, spec: NetworkSpec, tensors: Mapping[str, str], out: Path) -> Path:
        """Copy an engine that another program built into `out`, and return its file.

        Args:
            plan: file of the engine.
            spec: description of the network.
            tensors: names of the engine's tensors by the name of input or field, where they differ.
            out: output folder.

        Raises:
            UserError: the backend adopts no engines, or this one does not fit.
        """
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
        """Choose rows of a data set's table.

        Returns:
            A `calib_samplers.stratified.CalibrationSet`. It is not imported here: what every stage imports makes all stale.
        """
        ...


class Detector(Protocol):
    """Finds the boxes of people, for networks that see one person at a time."""

    @property
    def identity(self) -> str:
        """Digest of everything that the boxes depend on, but for the images and the code."""
        ...

    def boxes(self, images: Samples[Any], digest: str, cache: Path) -> dict[str, Boxes]:
        """Return the boxes of each image, by its id.

        Args:
            images: the images.
            digest: of the images.
            cache: folder that keeps boxes.
        """
        ...

    def timed(self, image: NDArray[Any], threads: int, cache: Path) -> Callable[[], None]:
        """Return a call that finds the boxes in an image, RGB uint8 [H, W, 3], on a number of CPU threads."""
        ...
