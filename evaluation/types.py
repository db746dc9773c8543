"""The data that travels between stages: sizes, views, poses, ground truth and the description of a network.

Sizes are (height, width). Points are (x, y) in pixels, with the centre of the first pixel at (0, 0).
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = Any  # numpy, or a torch tensor left on the device where the network ran
Fields = Mapping[str, Array]  # field name -> [B, C, H / stride, W / stride]

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Resolution:
    """A size in pixels."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Resolution":
        """Read "288x384", height first.

        Raises:
            ValueError: the text is not two positive integers joined by an x.
        """
        match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", str(text).strip())
        if match is None:
            raise ValueError(f"resolution={text}: not HEIGHTxWIDTH in pixels; write it like resolution=288x384")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


@dataclass(frozen=True)
class InputSpec:
    """How an RGB image of 0..255 becomes the network's input: (value / 255 * range - mean) / std, in `order`.

    Attributes:
        name: the input's name in the ONNX file.
        order: "RGB" or "BGR"; mean and std follow it.
        range: the value a full-scale pixel (255) is scaled to, before mean and std: 1 or 255.
        mean: one number a channel, in units of `range`.
        std: likewise.
        pad: the grey level (0..255) outside the image.
        multiple: height and width must be k * multiple + offset.
        offset: 0, or 1 for networks of 16k + 1.
    """

    name: str
    order: Literal["RGB", "BGR"] = "RGB"
    range: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    pad: int = 128
    multiple: int = 8
    offset: int = 0
    layout: Literal["NCHW"] = "NCHW"
    dtype: Literal["float32"] = "float32"

    def fits(self, resolution: Resolution) -> bool:
        """Whether the network takes this resolution."""
        return all((n - self.offset) % self.multiple == 0 for n in (resolution.height, resolution.width))

    def fit(self, pixels: float) -> int:
        """The least side the network takes that is at least `pixels`."""
        steps = int(np.ceil((pixels - self.offset) / self.multiple - 1e-9))
        return max(steps, 1) * self.multiple + self.offset

    def form(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """How RGB pixels become inputs: the channels' order, and factor and offset [3] of value * factor - offset."""
        order = np.arange(3) if self.order == "RGB" else np.arange(3)[::-1].copy()
        factor = (np.float32(self.range / 255) / np.asarray(self.std, np.float32)).astype(np.float32)
        offset = (np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)).astype(np.float32)
        return order, factor, offset


@dataclass(frozen=True)
class FieldSpec:
    """One output of a network.

    Attributes:
        name: the output's name in the ONNX file: "heatmaps", "pafs", ...
        stride: input pixels a cell.
        channels: maps in the field.
        shift: where the first cell's sample lies, in cells from the centre of the first cell; heatmaps and PAFs can differ.
    """

    name: str
    stride: int
    channels: int
    shift: float = 0.0


@dataclass(frozen=True)
class Skeleton:
    """Names of keypoints, and the limbs that join them.

    Attributes:
        names: one a keypoint, left and right told apart by the prefixes `left_` and `right_`.
        limbs: index pairs; a PAF field holds two channels (x, y) for each, in this order.
        sigmas: OKS standard deviations, one a keypoint (COCO's `sigmas`).
    """

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...]
    sigmas: tuple[float, ...]

    @property
    def flip(self) -> tuple[int, ...]:
        """Index of each keypoint's mirror image; its own where it has none."""
        at = {name: n for n, name in enumerate(self.names)}
        return tuple(at.get(_mirrored(name), n) for n, name in enumerate(self.names))

    @property
    def limb_flip(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Index of each limb's mirror image, and -1 where that runs the other way, else 1.

        Raises:
            ValueError: a limb has no mirror image.
        """
        at = {limb: n for n, limb in enumerate(self.limbs)}
        indices, signs = [], []
        for a, b in self.limbs:
            mirror = (self.flip[a], self.flip[b])
            straight = mirror in at
            if not straight and mirror[::-1] not in at:
                raise ValueError(f"the limb {self.names[a]} - {self.names[b]} has no mirror image, so flip=true cannot be used")
            indices.append(at[mirror if straight else mirror[::-1]])
            signs.append(1 if straight else -1)
        return tuple(indices), tuple(signs)


def _mirrored(name: str) -> str:
    for side, other in (("left_", "right_"), ("right_", "left_")):
        if name.startswith(side):
            return other + name.removeprefix(side)
    return name


@dataclass(frozen=True)
class Palette:
    """Names and colours (RGB, 0..255) of segmentation classes."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class NetworkSpec:
    """All there is to know of a network beside its weights; travels in architecture.json and inside the ONNX file.

    Attributes:
        input: the input's form.
        fields: the outputs, in order.
        labels: what the fields speak of.
        dynamic: which input dimensions are free: "batch", "height", "width".
    """

    input: InputSpec
    fields: tuple[FieldSpec, ...]
    labels: Skeleton | Palette
    dynamic: frozenset[str] = field(default_factory=lambda: frozenset({"batch", "height", "width"}))

    def field(self, name: str) -> FieldSpec:
        """The output of that name.

        Raises:
            ValueError: there is none.
        """
        for spec in self.fields:
            if spec.name == name:
                return spec
        raise ValueError(f"the network has no output '{name}'; it has {', '.join(f.name for f in self.fields)}")

    @property
    def skeleton(self) -> Skeleton:
        """The labels of a pose network.

        Raises:
            ValueError: the network is a segmentation network.
        """
        if not isinstance(self.labels, Skeleton):
            raise ValueError("the network's labels are segmentation classes, not a skeleton")  # noqa: TRY004
        return self.labels

    def to_json(self) -> str:
        """The description as one line of JSON; equal descriptions give equal text."""
        return json.dumps({**asdict(self), "dynamic": sorted(self.dynamic)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "NetworkSpec":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not a network description.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a network description: {error}") from error

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "NetworkSpec":
        """The description from plain data, as JSON or a configuration holds it."""
        labels = raw["labels"]
        kind = Skeleton if "limbs" in labels else Palette
        return cls(
            input=InputSpec(**{k: _tuples(v) for k, v in raw["input"].items()}),
            fields=tuple(FieldSpec(**f) for f in raw["fields"]),
            labels=kind(**{k: _tuples(v) for k, v in labels.items()}),
            dynamic=frozenset(raw.get("dynamic", ("batch", "height", "width"))),
        )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class View:
    """One network input cut from an image.

    Attributes:
        matrix: float64 [2, 3], from image points to input points.
        size: the input's size.
        box: (x, y, width, height) in image pixels that the view shows; None is the whole image.
        flipped: left and right of the skeleton are swapped in this view.
    """

    matrix: NDArray[np.float64]
    size: Resolution
    box: tuple[float, float, float, float] | None = None
    flipped: bool = False

    def to_input(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map image points [..., 2] to input points."""
        return np.asarray(points, np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def to_image(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """Map input points [..., 2] to image points."""
        (a, b, x), (c, d, y) = self.matrix.tolist()
        inverse = np.array([[d, -c], [-b, a]]) / (a * d - b * c)  # transposed; a fifth of the time of a general inverse
        mapped: NDArray[np.float64] = (np.asarray(points, np.float64) - (x, y)) @ inverse
        return mapped


@dataclass(frozen=True)
class Poses:
    """People found in an image.

    Attributes:
        keypoints: float32 [N, K, 3]: x and y in image pixels, and the keypoint's own score; (0, 0, 0) where none was found.
            Like the scores, float64 where they come from a file, whose order must not suffer from rounding.
        scores: float32 [N], the greater the surer.
        guessed: bool [N, K], keypoints that were completed rather than found; None where nothing was.
        features: float32 [N, F], what a score can be fitted to; the first is the plain score.
        dropped_peaks: peaks of this image that had no room.
        not_finite: the network returned NaN or infinity.
    """

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    guessed: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None
    dropped_peaks: int = 0
    not_finite: bool = False

    def as_found(self) -> "Poses":
        """The same people without guesses, and with their plain scores."""
        keypoints = self.keypoints if self.guessed is None else np.where(self.guessed[..., None], 0, self.keypoints)
        scores = self.scores if self.features is None else self.features[:, 0]
        return replace(self, keypoints=keypoints, scores=scores, guessed=None)


@dataclass(frozen=True)
class People:
    """Ground truth of an image, as COCO defines it.

    Attributes:
        keypoints: float64 [N, K, 3]: x, y, visibility (0 not labelled, 1 hidden, 2 visible).
        boxes: float64 [N, 4]: x, y, width, height.
        areas: float64 [N], pixels of the person's mask.
        crowd: bool [N]; a crowd region has no keypoints.
        masks: one a person: COCO's polygons or run lengths; None where the file has none.
        ignored: bool [N], people whom nobody has to find and nobody is blamed for finding; None is nobody.
    """

    keypoints: NDArray[np.float64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    masks: tuple[Any, ...] = ()
    ignored: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Mask:
    """Segmentation of an image: uint8 [H, W] class indices."""

    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One image and what is known of it.

    Attributes:
        id: unique in its data set; COCO's image id as text.
        size: the image's size.
        read: reads the pixels, uint8 [H, W, 3], RGB.
        truth: the labels; None for an unlabelled image.
        boxes: float64 [N, 4], people's boxes for top-down networks.
    """

    id: str
    size: Resolution
    read: Callable[[], NDArray[np.uint8]]
    truth: T | None
    boxes: NDArray[np.float64] | None = None
