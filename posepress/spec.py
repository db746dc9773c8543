"""The description of a network without its weights: its input, its outputs and their labels.

Sizes are (height, width).
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posepress.checks import (
    MOST_CHANNELS,
    MOST_PIXELS,
    MOST_VALUE,
    choice,
    number,
    part,
    shown,
    text,
    unique,
    whole,
)
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution

Array = Any  # a numpy array, or a torch tensor on the device that ran the network

Fields = Mapping[str, Array]  # field name -> [B, C, H / stride, W / stride]

FIELDS = ("heatmaps", "pafs")  # names that the decoders use for a pose network's fields

SPEC_KEY = "posepress.spec"  # metadata key of every ONNX file we write; its value is the NetworkSpec as JSON

_FREE = ("batch", "height", "width")


@dataclass(frozen=True)
class InputSpec:
    """How an RGB image of 0..255 becomes the network's input: (value / 255 * range - mean) / std, in `order`.

    Attributes:
        name: the input's name in the ONNX file.
        order: "RGB" or "BGR"; mean and std follow it.
        range: the value a full-scale pixel (255) is scaled to, before mean and std: 1 or 255.
        mean: mean in units of `range`: one number for each channel, or one for all.
        std: standard deviation in units of `range`, above 0: one number for each channel, or one for all.
        pad: the grey level (0..255) outside the image.
        multiple: height and width must be k * multiple + offset.
        offset: 0, or 1 for networks whose height and width must be 16 k + 1.
        layout: order of the axes: "NCHW" (batch, channels, height, width) or "NHWC".
        dtype: "float32", "float16" or "uint8"; a network with uint8 input normalises the pixels itself.
        channels: 3 for colour images, or 1 for grey images.
        size: the only input size of a network with a fixed size; None if height or width is free.
    """

    name: str
    order: Literal["RGB", "BGR"] = "RGB"
    range: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    pad: int = 128
    multiple: int = 8
    offset: int = 0
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    channels: Literal[1, 3] = 3
    size: Resolution | None = None

    def __post_init__(self) -> None:
        """Check the values. Upper and lower case are both accepted, and one mean or std applies to all channels.

        Raises:
            ValueError: a value is of another type or out of range; the message begins with its name.
        """
        text("name", self.name)
        channels: object = self.channels
        if isinstance(channels, bool) or not isinstance(channels, int) or channels not in (1, 3):
            raise ValueError(f"channels={shown(self.channels)}: choose 3 (colour) or 1 (grey)")
        for option, known in (
            ("order", ("RGB", "BGR")),
            ("layout", ("NCHW", "NHWC")),
            ("dtype", ("float32", "float16", "uint8")),
        ):
            value = getattr(self, option)
            word = next((k for k in known if str(value).lower() == k.lower()), value)
            choice(option, word, known)
            object.__setattr__(self, option, word)
        number("range", self.range, 1e-6, 65536)
        for option, least in (("mean", -MOST_VALUE), ("std", 1e-6)):
            object.__setattr__(self, option, self._of_each_channel(option, getattr(self, option), least))
        if self.dtype == "uint8" and (self.range != 255 or any(self.mean) or set(self.std) != {1}):
            raise ValueError("dtype=uint8: the network takes pixels without normalisation; give range=255, mean=0 and std=1")
        whole("pad", self.pad, 0, 255)
        whole("multiple", self.multiple, 1, MOST_PIXELS)
        whole("offset", self.offset, 0, MOST_PIXELS)
        if self.size is not None:
            size = _size(self.size)
            if any((side - self.offset) % self.multiple for side in (size.height, size.width)):
                raise ValueError(
                    f"size={size}: both sides must be multiples of multiple={self.multiple} plus offset={self.offset}"
                )
            object.__setattr__(self, "size", size)

    def _of_each_channel(self, option: str, given: Any, least: float) -> tuple[float, ...]:
        """The numbers of an option, one for each channel.

        Raises:
            ValueError: a value is no number or is too small, or the count of numbers differs from that of channels.
        """
        values = tuple(given) if isinstance(given, (list, tuple)) else (given,)
        for place, value in enumerate(values):
            number(option if len(values) == 1 else f"{option}[{place}]", value, least)
        if self.channels == 1 and len(set(values)) == 1:
            values = values[:1]
        if len(values) not in (1, self.channels):
            more = ", or three, one for each channel" if self.channels == 3 else " for the grey channel"
            raise ValueError(f"{option}={shown(list(values))}: {len(values)} numbers; give one{more}")
        return values * (self.channels // len(values))

    @property
    def doubts(self) -> list[str]:
        """Warnings about values that are allowed but unusual; each begins with the option's name."""
        low, high = min(self.mean), max(self.mean)
        said = []
        if low < -self.range or high > 2 * self.range or (self.range > 2 and 0 < max(abs(low), abs(high)) <= 1):
            said.append(
                f"mean={list(self.mean)} lies far from the middle of 0 to range={self.range:g}; mean and std are in units of "
                "range (1 or 255)"
            )
        least, most = min(self.std) / self.range, max(self.std) / self.range
        if most > 2 or (least < 0.02 and set(self.std) != {1} and self.range > 2):
            said.append(f"std={list(self.std)} is implausible for range={self.range:g}; mean and std are in units of range")
        return said

    def fits(self, resolution: Resolution) -> bool:
        """Whether the network accepts this resolution."""
        if self.size is not None:
            return resolution == self.size
        return all((n - self.offset) % self.multiple == 0 for n in (resolution.height, resolution.width))

    def fit(self, pixels: float) -> int:
        """The smallest side in pixels that the network accepts and that is at least `pixels`."""
        steps = int(np.ceil((pixels - self.offset) / self.multiple - 1e-9))
        return max(steps, 1) * self.multiple + self.offset

    @property
    def axes(self) -> dict[str, int]:
        """The positions of "batch", "height", "width" and "channels" in the input's shape."""
        at = {"N": "batch", "C": "channels", "H": "height", "W": "width"}
        return {at[letter]: place for place, letter in enumerate(self.layout)}

    def shape(self, batch: int, size: Resolution) -> tuple[int, int, int, int]:
        """The shape of an input of `batch` images of `size`."""
        colours, sides = (self.channels,), (size.height, size.width)
        return (batch, *colours, *sides) if self.layout == "NCHW" else (batch, *sides, *colours)

    def size_of(self, shape: Sequence[int]) -> Resolution:
        """The image size of an input's shape."""
        return Resolution(int(shape[self.axes["height"]]), int(shape[self.axes["width"]]))

    def form(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """The conversion of pixels: the channels' order, and factor and offset [channels] of value * factor - offset."""
        order = np.arange(self.channels) if self.order == "RGB" else np.arange(self.channels)[::-1].copy()
        factor = (np.float32(self.range / 255) / np.asarray(self.std, np.float32)).astype(np.float32)
        offset = (np.asarray(self.mean, np.float32) / np.asarray(self.std, np.float32)).astype(np.float32)
        return order, factor, offset


def _size(given: object) -> Resolution:
    """A fixed input size, given as "288x384" or as {height, width}.

    Raises:
        ValueError: the size has neither form; the message begins with the option.
    """
    try:
        size = given if isinstance(given, Resolution) else None
        size = size or (Resolution(**given) if isinstance(given, Mapping) else Resolution.parse(str(given)))
        whole("height", size.height, 1, MOST_PIXELS)
        whole("width", size.width, 1, MOST_PIXELS)
    except (TypeError, ValueError) as error:
        raise ValueError(f"size={shown(given)}: give HEIGHTxWIDTH in pixels, like 288x384") from error
    return size


_AXES = ("CHW", "CX", "CY", "CN", "NC", "HW")

_TYPES = ("float32", "float16", "uint8", "int32", "int64")


@dataclass(frozen=True)
class OutputSpec:
    """One output of a network.

    Attributes:
        name: the output's name in our ONNX files: "heatmaps", "pafs", ...
        stride: size of a cell in input pixels; below 1 for lines that are finer than the input. Sets ignore it.
        channels: number of maps, of lines, or of values of each entry of a set; 1 for a class map.
        shift: offset of a cell's sampling point from the cell's centre, in cells; heatmaps and PAFs can differ. For points and
            boxes of a set: what to add for pixel coordinates in which the centre of the first pixel is 0.
        activation: "sigmoid" for a given file whose output is a logit; the stage `export` appends it.
        udp: whether the first and the last cell lie on the first and the last pixel, as in networks trained with unbiased data
            processing (UDP, arXiv:1911.07524): cell c of n is pixel c (side - 1) / (n - 1).
        axes: the axes after the batch: "CHW" a map for each channel, "CX" or "CY" a line along the width or the height for each
            channel, "CN" or "NC" a set of N entries, "HW" a map of class indices; empty where a network was cut at a tensor.
        dtype: "float32" or "float16"; for a class map or indices "uint8", "int32" or "int64".
        tensor: the output's name in a given file; empty if it equals `name`.
    """

    name: str
    stride: float
    channels: int
    shift: float = 0.0
    axes: Literal["CHW", "CX", "CY", "CN", "NC", "HW", ""] = "CHW"
    dtype: Literal["float32", "float16", "uint8", "int32", "int64"] = "float32"
    tensor: str = ""
    udp: bool = False
    activation: Literal["", "sigmoid"] = ""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a value is of another type or out of range; the message begins with its name.
        """
        text("name", self.name)
        if not isinstance(self.udp, bool):
            raise ValueError(f"udp={shown(self.udp)}: choose true or false")  # noqa: TRY004
        if self.activation:
            choice("activation", self.activation, ("sigmoid",))
        if self.axes:
            choice("axes", self.axes, _AXES)
        choice("dtype", self.dtype, _TYPES)
        if self.axes in ("CX", "CY"):
            number("stride", self.stride, 1 / 64, MOST_PIXELS)
        else:
            whole("stride", self.stride, 1, MOST_PIXELS)
        whole("channels", self.channels, 1, MOST_CHANNELS)
        if self.axes == "HW" and self.channels != 1:
            raise ValueError(f"channels={self.channels}: a map of class indices (axes=HW) has one channel; give channels=1")
        number("shift", self.shift, -MOST_PIXELS, MOST_PIXELS)
        if not isinstance(self.tensor, str):
            raise ValueError(f"tensor={shown(self.tensor)}: give the output's name in the file")  # noqa: TRY004

    @property
    def is_map(self) -> bool:
        """Whether the output has a map for each channel."""
        return self.axes == "CHW"

    @property
    def is_set(self) -> bool:
        """Whether the output is a set of entries."""
        return self.axes in ("CN", "NC")

    def cells(self, size: Resolution) -> Resolution:
        """Height and width of the output's maps for an input of `size`; lines and sets have none."""
        return Resolution(int(size.height // self.stride), int(size.width // self.stride))

    def shape(self, size: Resolution) -> tuple[int | None, ...]:
        """The output's shape for an input of `size`, without the batch; None for an unknown side."""
        sides: dict[str, int | None] = {
            "C": self.channels,
            "H": int(size.height // self.stride),
            "W": int(size.width // self.stride),
            "X": round(size.width / self.stride),
            "Y": round(size.height / self.stride),
            "N": None,
        }
        return tuple(sides[letter] for letter in self.axes)

    def holds(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape, its batch first, has the output's axes and channels; -1 stands for any size."""
        channels = self.axes.find("C") + 1
        if not self.axes:
            return True
        return len(shape) == len(self.axes) + 1 and (not channels or shape[channels] in (-1, self.channels))

    @property
    def form(self) -> str:
        """The output's shape in words: "[n, 19, h, w]"."""
        names = {"C": str(self.channels), "H": "h", "W": "w", "X": "x", "Y": "y", "N": "entries"}
        return f"[n, {', '.join(names[letter] for letter in self.axes)}]"


@dataclass(frozen=True)
class NetworkSpec:
    """The description of a network without its weights; architecture.json and the ONNX file contain it.

    Attributes:
        input: form of the input.
        fields: the outputs, in order.
        labels: the skeleton of a pose network, or the palette of a segmentation network.
        dynamic: which input dimensions are free: "batch", "height", "width".
    """

    input: InputSpec
    fields: tuple[OutputSpec, ...]
    labels: Skeleton | Palette
    dynamic: frozenset[str] = field(default_factory=lambda: frozenset(_FREE))

    def __post_init__(self) -> None:
        """Check the names of input and fields, and the entries of `dynamic`.

        Raises:
            ValueError: two names are equal, or an entry of `dynamic` is unknown; the message begins with the option.
        """
        if not self.fields:
            raise ValueError("fields=[]: give each output of the network, {name, stride, channels}")
        unique("fields.name", tuple(f.name for f in self.fields))
        if self.input.name in {f.name for f in self.fields}:
            raise ValueError(f"input.name={self.input.name}: a field has this name, too; give each a name of its own")
        for word in self.dynamic:
            choice("dynamic", word, _FREE)
        if self.input.size is not None:
            object.__setattr__(self, "dynamic", self.dynamic & {"batch"})

    def field(self, name: str) -> OutputSpec:
        """The output of this name.

        Raises:
            ValueError: no output has this name.
        """
        for spec in self.fields:
            if spec.name == name:
                return spec
        raise ValueError(f"the network has no output '{name}'; it has {', '.join(f.name for f in self.fields)}")

    def offers(self, needs: Mapping[str, str]) -> None:
        """Make sure that the network has the outputs that a decoder or an objective needs.

        Args:
            needs: axes of each output by name, as `OutputSpec.axes`. A set may have its axes in either order.

        Raises:
            ValueError: an output is missing, or has other axes.
        """
        for name, axes in needs.items():
            own = self.field(name)
            if own.axes != axes and not (own.is_set and axes in ("CN", "NC")):
                raise ValueError(f"the network's output '{name}' has the axes {own.axes}, and {axes} is needed")

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
        written = {**asdict(self), "dynamic": sorted(self.dynamic)}
        if not written["labels"].get("mirror", True):
            del written["labels"]["mirror"]
        parts: list[tuple[dict[str, Any], Any, Sequence[str]]] = [(written["input"], InputSpec, ("channels", "size"))]
        parts += [(one, OutputSpec, ("axes", "dtype", "tensor", "udp", "activation")) for one in written["fields"]]
        for values, kind, since_0_2 in parts:  # version 0.1 reads descriptions that need nothing newer
            usual = {option.name: option.default for option in fields(kind)}
            for name in since_0_2:
                if values[name] == usual[name]:
                    del values[name]
        return json.dumps(written, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "NetworkSpec":
        """Read what `to_json` wrote.

        Raises:
            ValueError: the text is not a network description.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a network description: {shown(error)}") from error

    @classmethod
    def from_dict(cls, raw: object) -> "NetworkSpec":
        """The description from plain data, as JSON or a configuration holds it.

        Labels with colours are a palette, others are a skeleton. Without `dynamic`, batch, height and width are all free.

        Raises:
            ValueError: a key is unknown or missing, or a value is of another type or out of range. The message begins with the
                path of the value.
        """
        known = ("input", "fields", "labels", "dynamic")
        if not isinstance(raw, Mapping):
            raise ValueError(f"{shown(raw)}: give {{{', '.join(known)}}}")  # noqa: TRY004 - callers catch ValueError
        for key in raw:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                raise ValueError(f"{shown(key)}: no such key; {f'did you mean {close[0]}?' if close else ', '.join(known)}")
        missing = [key for key in known[:3] if raw.get(key) is None]
        if missing:
            raise ValueError(f"{missing[0]} is missing; add it")
        outputs, labels, dynamic = raw["fields"], raw["labels"], raw.get("dynamic")
        if not isinstance(outputs, (list, tuple)):
            raise ValueError(f"fields={shown(outputs)}: give a list of {{name, stride, channels, shift}}")  # noqa: TRY004
        if dynamic is not None and not isinstance(dynamic, (list, tuple, set, frozenset)):
            raise ValueError(f"dynamic={shown(dynamic)}: give a list of {', '.join(_FREE)}")
        for word in dynamic or ():
            choice("dynamic", word, _FREE)
        palette = isinstance(labels, Mapping) and "colours" in labels
        return cls(
            input=part(InputSpec, "input", raw["input"], ("mean", "std")),
            fields=tuple(part(OutputSpec, f"fields[{n}]", one) for n, one in enumerate(outputs)),
            labels=part(Palette, "labels", labels, ("names", "colours"))
            if palette
            else part(Skeleton, "labels", labels, ("names", "limbs", "sigmas", "mirror")),
            dynamic=frozenset(_FREE if dynamic is None else dynamic),
        )
