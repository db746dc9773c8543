"""The data that travels between stages: sizes, views, poses, ground truth and the description of a network.

Sizes are (height, width). Points are (x, y) in pixels, with the centre of the first pixel at (0, 0).
"""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

Array = Any  # numpy, or a torch tensor left on the device where the network ran
Fields = Mapping[str, Array]  # field name -> [B, C, H / stride, W / stride]

T = TypeVar("T")

_MOST_PIXELS, _MOST_CHANNELS, _MOST_VALUE = 4096, 65536, 1e9  # greater ones are mistakes
_FREE = ("batch", "height", "width")


def number(option: str, value: object, least: float = -_MOST_VALUE, most: float = _MOST_VALUE) -> None:
    """Make sure that the value of an option is a finite number of a range.

    Raises:
        ValueError: it is none; the message begins with the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)) or not least <= value <= most:
        bounds = f"from {least:g} to {most:g}" if (least, most) != (-_MOST_VALUE, _MOST_VALUE) else "that is finite"
        raise ValueError(f"{option}={_shown(value)}: choose a number {bounds}")


def whole(option: str, value: object, least: int, most: int) -> None:
    """Make sure that the value of an option is a whole number of a range.

    Raises:
        ValueError: it is none; the message begins with the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise ValueError(f"{option}={_shown(value)}: choose a whole number from {least} to {most}")


def _text(option: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{option}={_shown(value)}: choose a name")


def _choice(option: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise ValueError(f"{option}={_shown(value)}: choose {', '.join(known)}")


def _unique(option: str, names: tuple[object, ...]) -> None:
    for place, name in enumerate(names):
        _text(f"{option}[{place}]", name)
    twice = [str(name) for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{option}: '{twice[0]}' is there {names.count(twice[0])} times; give each a name of its own")


def _listed(value: object) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def _shown(value: object) -> str:
    """A value in an error, shortened."""
    try:
        text = "null" if value is None else str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def _within(path: str) -> Iterator[None]:
    """Put the place of a part in front of its errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def _part(kind: type[T], path: str, raw: object, lists: Iterable[str] = ()) -> T:
    """A part of a description from plain data.

    Raises:
        ValueError: a key is unknown or missing, or a value is wrong.
    """
    known = {f.name: f for f in fields(cast("Any", kind))}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}={_shown(raw)}: give it as {{{', '.join(known)}}}")  # noqa: TRY004 - one kind of error
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"{path}.{_shown(key)}: no such key{hint}; it has {', '.join(known)}")
    needed = [name for name, f in known.items() if f.default is f.default_factory and name not in raw]
    if needed:
        raise ValueError(f"{path}.{needed[0]} is missing; add it")
    values = {key: tuple(value) if key in lists and isinstance(value, (list, tuple)) else value for key, value in raw.items()}
    with _within(f"{path}."):
        return kind(**values)


@dataclass(frozen=True, order=True)
class Resolution:
    """A size in pixels.

    Attributes:
        height: of the image or input.
        width: likewise.
    """

    height: Annotated[int, Interval(ge=1, lt=10**6)]
    width: Annotated[int, Interval(ge=1, lt=10**6)]

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
        mean: one number a channel, or one for all, in units of `range`.
        std: likewise, above 0.
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

    def __post_init__(self) -> None:
        """Check the values; words of another case are taken, and one mean or std stands for all channels.

        Raises:
            ValueError: a value is of another type or out of range; the message begins with its name.
        """
        _text("name", self.name)
        for option, known in (("order", ("RGB", "BGR")), ("layout", ("NCHW",)), ("dtype", ("float32",))):
            value = getattr(self, option)
            word = next((k for k in known if str(value).lower() == k.lower()), value)
            _choice(option, word, known)
            object.__setattr__(self, option, word)
        number("range", self.range, 1e-6, 65536)
        for option, least in (("mean", -_MOST_VALUE), ("std", 1e-6)):
            given = getattr(self, option)
            values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
            for place, value in enumerate(values):
                number(option if len(values) == 1 else f"{option}[{place}]", value, least)
            if len(values) not in (1, 3):
                raise ValueError(f"{option}={_shown(list(values))}: {len(values)} numbers; give one, or three, one a channel")
            object.__setattr__(self, option, values * (3 // len(values)))
        whole("pad", self.pad, 0, 255)
        whole("multiple", self.multiple, 1, _MOST_PIXELS)
        whole("offset", self.offset, 0, _MOST_PIXELS)

    @property
    def doubts(self) -> list[str]:
        """What of these values is allowed but unusual, in sentences that begin with the option; empty if nothing is."""
        low, high = min(self.mean), max(self.mean)
        said = []
        if low < -self.range or high > 2 * self.range or (self.range > 2 and 0 < max(abs(low), abs(high)) <= 1):
            said.append(
                f"mean={list(self.mean)} lies far from the middle of 0 to range={self.range:g}; mean and std are in units of "
                "range (1 or 255)"
            )
        least, most = min(self.std) / self.range, max(self.std) / self.range
        if most > 2 or (least < 0.02 and set(self.std) != {1} and self.range > 2):
            said.append(f"std={list(self.std)} is far from a part of range={self.range:g}; mean and std are in units of range")
        return said

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

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is of another type or out of range; the message begins with its name.
        """
        _text("name", self.name)
        whole("stride", self.stride, 1, _MOST_PIXELS)
        whole("channels", self.channels, 1, _MOST_CHANNELS)
        number("shift", self.shift, -_MOST_PIXELS, _MOST_PIXELS)


@dataclass(frozen=True)
class Skeleton:
    """Names of keypoints, and the limbs that join them.

    Attributes:
        names: one a keypoint, left and right told apart by the prefixes `left_` and `right_`.
        limbs: index pairs, counted from 0; a PAF field holds two channels (x, y) for each, in this order.
        sigmas: OKS standard deviations, one a keypoint (COCO's `sigmas`); empty where they are not known.
    """

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the values; compiled code counts on limbs that join keypoints which are there.

        Raises:
            ValueError: a name is there twice, a limb joins what is no keypoint, or sigmas are of another number or not above
                0; the message begins with the option.
        """
        for option in ("names", "limbs", "sigmas"):
            if not isinstance(getattr(self, option), tuple):
                raise ValueError(f"{option}={_shown(getattr(self, option))}: give a list")  # noqa: TRY004
        _unique("names", self.names)
        K = len(self.names)
        if not K:
            raise ValueError("names=[]: give the name of each keypoint")
        limbs = []
        for place, given in enumerate(self.limbs):
            limb = _listed(given)
            if len(limb) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in limb):
                raise ValueError(f"limbs[{place}]={_shown(given)}: give two indices of keypoints, counted from 0")
            if not all(0 <= end < K for end in limb):
                raise ValueError(
                    f"limbs[{place}]={list(limb)}: there are {K} keypoints, 0 to {K - 1}; count from 0 (COCO counts from 1)"
                )
            if limb[0] == limb[1]:
                raise ValueError(f"limbs[{place}]={list(limb)}: joins '{self.names[limb[0]]}' with itself; give two keypoints")
            limbs.append(limb)
        object.__setattr__(self, "limbs", tuple(limbs))
        for place, sigma in enumerate(self.sigmas):
            number(f"sigmas[{place}]", sigma, 1e-6, 1e3)
        if len(self.sigmas) not in (0, K):
            raise ValueError(f"sigmas: {len(self.sigmas)} numbers for {K} keypoints; give one a keypoint")

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

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a name is there twice, or there is not one colour of three numbers for each; the message begins with
                the option.
        """
        for option in ("names", "colours"):
            if not isinstance(getattr(self, option), tuple):
                raise ValueError(f"{option}={_shown(getattr(self, option))}: give a list")  # noqa: TRY004
        _unique("names", self.names)
        colours = tuple(_listed(colour) for colour in self.colours)
        for place, colour in enumerate(colours):
            if len(colour) != 3:
                raise ValueError(f"colours[{place}]={_shown(self.colours[place])}: give red, green and blue, 0 to 255")
            for value in colour:
                whole(f"colours[{place}]", value, 0, 255)
        if not self.names or len(colours) != len(self.names):
            raise ValueError(f"colours: {len(colours)} for {len(self.names)} classes; give one a class")
        object.__setattr__(self, "colours", colours)


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
    dynamic: frozenset[str] = field(default_factory=lambda: frozenset(_FREE))

    def __post_init__(self) -> None:
        """Check that the names of input and fields differ, and the words of `dynamic`.

        Raises:
            ValueError: they do not; the message begins with the option.
        """
        if not self.fields:
            raise ValueError("fields=[]: give each output of the network, {name, stride, channels, shift}")
        _unique("fields.name", tuple(f.name for f in self.fields))
        if self.input.name in {f.name for f in self.fields}:
            raise ValueError(f"input.name={self.input.name}: a field has this name, too; give each a name of its own")
        for word in self.dynamic:
            _choice("dynamic", word, _FREE)

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
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a network description: {_shown(error)}") from error

    @classmethod
    def from_dict(cls, raw: object) -> "NetworkSpec":
        """The description from plain data, as JSON or a configuration holds it.

        Labels with colours are a palette, others a skeleton; a network whose `dynamic` is not given takes every shape.

        Raises:
            ValueError: a key is unknown or missing, or a value is of another type or out of range; the message begins with the
                path of the value.
        """
        known = ("input", "fields", "labels", "dynamic")
        if not isinstance(raw, Mapping):
            raise ValueError(f"{_shown(raw)}: give {{{', '.join(known)}}}")  # noqa: TRY004 - one kind of error
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                raise ValueError(f"{_shown(key)}: no such key; {f'did you mean {close[0]}?' if close else ', '.join(known)}")
        missing = [key for key in known[:3] if raw.get(key) is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing; add it")
        outputs, labels, dynamic = raw["fields"], raw["labels"], raw.get("dynamic")
        if not isinstance(outputs, (list, tuple)):
            raise ValueError(f"fields={_shown(outputs)}: give a list of {{name, stride, channels, shift}}")  # noqa: TRY004
        if dynamic is not None and not isinstance(dynamic, (list, tuple, set, frozenset)):
            raise ValueError(f"dynamic={_shown(dynamic)}: give a list of {', '.join(_FREE)}")
        for word in dynamic or ():
            _choice("dynamic", word, _FREE)
        palette = isinstance(labels, Mapping) and "colours" in labels
        return cls(
            input=_part(InputSpec, "input", raw["input"], ("mean", "std")),
            fields=tuple(_part(FieldSpec, f"fields[{n}]", one) for n, one in enumerate(outputs)),
            labels=_part(Palette, "labels", labels, ("names", "colours"))
            if palette
            else _part(Skeleton, "labels", labels, ("names", "limbs", "sigmas")),
            dynamic=frozenset(_FREE if dynamic is None else dynamic),
        )


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
        ignored: bool [N], people that need not be found, and whose detections are no false alarms; None is those without
            labelled keypoints.
    """

    keypoints: NDArray[np.float64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    masks: tuple[Any, ...] = ()
    ignored: NDArray[np.bool_] | None = None

    @property
    def never(self) -> NDArray[np.bool_]:
        """Crowds and ignored people, bool [N]."""
        without = ~(self.keypoints[..., 2] > 0).any(axis=1) if self.ignored is None else self.ignored
        return np.asarray(self.crowd | without, bool)


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
