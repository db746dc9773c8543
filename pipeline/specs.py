"""What stages and components promise each other. The data itself is in `evaluation.types`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from evaluation.skeletons import COCO_17, OPENPOSE_18
from evaluation.statistics import Resampled
from evaluation.types import Array, Fields, InputSpec, NetworkSpec, Resolution, Sample, Skeleton, View
from pipeline.errors import UserError, nearest

Truth = TypeVar("Truth")
Found = TypeVar("Found")
Truth_contra = TypeVar("Truth_contra", contravariant=True)
Found_contra = TypeVar("Found_contra", contravariant=True)

FLAVOURS = ("tensorrt", "onnxruntime")
CALIBRATION, CALIBRATION_INPUTS = "calibrator.json", "calibration_inputs.npy"  # beside a network that TensorRT calibrates
FIELDS = ("heatmaps", "pafs")  # the decoders' names of a pose network's fields
SKELETONS: Mapping[str, Skeleton] = {"openpose_18": OPENPOSE_18, "coco_17": COCO_17}
SPEC_KEY = "posepress.spec"  # metadata of every ONNX file we write: NetworkSpec as JSON


@dataclass(frozen=True)
class Shapes:
    """The input shapes an engine serves.

    Attributes:
        resolution: least, tuned-for and greatest input size.
        batch: likewise.
        more: further shapes that the same engine is tuned for.
    """

    resolution: tuple[Resolution, Resolution, Resolution]
    batch: tuple[int, int, int]
    more: tuple["Shapes", ...] = ()

    @classmethod
    def of(cls, framing: "Framing", size: Resolution, spec: InputSpec, batch: int, more: tuple["Shapes", ...] = ()) -> "Shapes":
        """What a framing asks of an engine of a resolution: up to `batch` images, of free width where their widths differ."""
        narrow, wide = size, size
        if not framing.one_size:  # images between a third as wide as high and three times as wide
            narrow = Resolution(size.height, spec.fit(size.height / 3))
            wide = Resolution(size.height, max(spec.fit(size.height * 3), size.width))
        return cls((narrow, size, wide), (1, batch, batch), more)

    @classmethod
    def parse(cls, given: Any) -> "Shapes":
        """A profile as the configuration writes it, {min: 1x224x320, opt: 4x288x384, max: 8x368x656}.

        Raises:
            UserError: it is none.
        """
        form = "give it as {min: 1x224x320, opt: 4x288x384, max: 8x368x656}, batch x height x width"
        try:
            parts = [str(given[key]).lower().partition("x") for key in ("min", "opt", "max")]
            least, best, most = (Resolution.parse(rest) for _, _, rest in parts)
            batch = [int(count) for count, _, _ in parts]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"stages.build.profiles: {given} is no profile; {form}") from error
        sizes = [batch, [r.height for r in (least, best, most)], [r.width for r in (least, best, most)]]
        if any(not 0 < a <= b <= c for a, b, c in sizes):
            raise UserError(f"stages.build.profiles: {given} is not min <= opt <= max; {form}")
        return cls((least, best, most), (batch[0], batch[1], batch[2]))


@dataclass(frozen=True)
class ModelFiles:
    """A network ready to be built.

    Attributes:
        onnx: the typed ONNX file of each flavour, "tensorrt" and "onnxruntime".
        checkpoint: the folder of the torch network; None where there is none.
        calibration: the folder of what TensorRT calibrates the network with; None where the file says its precision.
    """

    onnx: Mapping[str, Path]
    checkpoint: Path | None = None
    calibration: Path | None = None

    @classmethod
    def in_folder(cls, folder: Path, checkpoint: Path | None = None) -> "ModelFiles":
        """The files of a quantized network's folder."""
        calibrated = folder if (folder / CALIBRATION).exists() else None
        return cls({flavour: folder / f"model.{flavour}.onnx" for flavour in FLAVOURS}, checkpoint, calibrated)


def read_spec(file: Path) -> NetworkSpec:
    """The description in an ONNX file's metadata.

    Raises:
        UserError: there is none.
    """
    import onnx

    for entry in onnx.load(file, load_external_data=False).metadata_props:
        if entry.key == SPEC_KEY:
            try:
                return NetworkSpec.from_json(entry.value)
            except ValueError as error:
                raise UserError(f"{file}: {error}; make the file again with the stage 'export'") from error
    raise UserError(f"{file}: no network description in its metadata; the stage 'export' writes it (model=onnx adopts a file)")


def described(raw: object) -> NetworkSpec:
    """The description given in the configuration, `model.spec`.

    Raises:
        UserError: it is not one; the message names the option, its value and what it takes.
    """
    labels = raw.get("labels") if isinstance(raw, Mapping) else None
    if isinstance(raw, Mapping) and isinstance(labels, str):
        if labels not in SKELETONS:
            raise UserError(
                f"model.spec.labels={labels}: unknown{nearest(labels, SKELETONS)}; choose {', '.join(SKELETONS)} or give "
                "names, limbs and sigmas"
            )
        raw = {**raw, "labels": SKELETONS[labels].__dict__}
    elif isinstance(labels, Mapping) and "names" in labels and not {"sigmas", "colours"} & set(labels):
        raise UserError("model.spec.labels.sigmas is missing: add OKS's standard deviations, one a keypoint")
    try:
        return NetworkSpec.from_dict(raw)
    except ValueError as error:
        separator = "=" if not isinstance(raw, Mapping) else "."
        raise UserError(f"model.spec{separator}{error}; conf/model/onnx.yaml shows a description") from error


def named(spec: NetworkSpec) -> tuple[NetworkSpec, dict[str, str]]:
    """A pose network's description whose fields have the decoders' names, and the names that were given, by the new ones.

    One or two fields of other names are, in order, heatmaps and PAFs; PAFs are known by their two channels a limb.
    """
    roles = [role for role in FIELDS[: len(spec.fields)] if role not in {field.name for field in spec.fields}]
    strange = [field for field in spec.fields if field.name not in FIELDS]
    if not isinstance(spec.labels, Skeleton) or len(spec.fields) > len(FIELDS) or not strange or spec.input.name in roles:
        return spec, {}
    counts = [field.channels for field in spec.fields]
    if len(strange) == len(roles) == 2 and counts[0] == 2 * len(spec.labels.limbs) != counts[1]:
        roles.reverse()
    new = dict(zip((field.name for field in strange), roles, strict=False))
    fields = tuple(replace(field, name=new.get(field.name, field.name)) for field in spec.fields)
    return replace(spec, fields=fields), {name: given for given, name in new.items()}


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


class Dataset(Protocol[Truth]):
    """Images of one split."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample[Truth]: ...

    def table(self) -> Mapping[str, NDArray[Any]]:
        """Columns with one row an image, for strata."""
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


class Metric(Protocol[Truth_contra, Found_contra]):
    """Figures of a data set, filled image by image.

    Attributes:
        primary: the figure that matters most, for which intervals are made.
    """

    primary: str

    def reset(self) -> None:
        """Forget every image."""
        ...

    def process(self, id: str, truth: Truth_contra, found: Found_contra) -> None:  # noqa: A002
        """Take one image."""
        ...

    def evaluate(self, images: NDArray[Any] | None = None) -> Mapping[str, float]:
        """The figures, of all images or of those at the given indices."""
        ...

    def matches(self) -> Resampled:
        """The images ready for resampling the primary figure."""
        ...

    def counts(self) -> Mapping[str, int]:
        """What went wrong on the way, counted."""
        ...

    def results(self) -> Iterator[Mapping[str, Any]]:
        """Everything found, as plain data."""
        ...

    def doubts(self) -> Sequence[str]:
        """What may have made the figures other than expected, each with what to look at; to be shown."""
        ...

    def details(self) -> Mapping[str, Mapping[str, float]]:
        """What the figures are made of, in named tables."""
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
            probe: a `pipeline.quantization.probe.Probe`; None where the quantizer measures nothing.
            out: a folder.
        """
        ...


class Sampler(Protocol):
    """Chooses calibration images."""

    def sample(self, table: Mapping[str, NDArray[Any]]) -> Any:
        """Choose rows of a data set's table."""
        ...
