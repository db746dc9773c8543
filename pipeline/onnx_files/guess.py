"""What a given ONNX file is: its inputs, outputs and operators, and the family that its outputs look like."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from pipeline.backends.tensorrt_checks import BY_PLUGIN
from pipeline.onnx_files.given import ONE_IMAGE, dtype_of, one_image, quantized, read
from pipeline.onnx_files.outputs import shape_of, shape_words, suppression
from posepress.errors import UserError, first_line
from posepress.resolution import Resolution

_SIDE = 256  # side in pixels that is tried where a file leaves it free
_MOST_KEYPOINTS = 133  # those of COCO-WholeBody, the greatest of the usual skeletons
_SKELETONS = {17: "coco_17", 18: "openpose_18", 19: "openpose_18"}
_REFUSED = {  # operators that TensorRT's parsers do not take
    "NonZero", "Unique", "SequenceConstruct", "SequenceAt", "StringNormalizer", "Multinomial", "Bernoulli", "Det", "Compress",
}  # fmt: skip


@dataclass(frozen=True)
class Guess:
    """The family that a file's outputs look like.

    Attributes:
        family: the family, or "" if no one fits.
        why: the shapes from which it follows.
        words: options to give, in the form of the command line.
        others: other families whose outputs have the same shapes.
    """

    family: str
    why: str
    words: Sequence[str] = ()
    others: Sequence["Guess"] = ()


@dataclass(frozen=True)
class Anatomy:
    """A file's input and outputs.

    Attributes:
        rows: findings, (what, found), for a table.
        input: name of the input.
        layout: "NCHW" or "NHWC".
        channels: of the input.
        dtype: of the input.
        size: size of the input that was tried.
        outputs: shapes of the outputs for one image of this size, by name.
    """

    rows: Sequence[tuple[str, str]]
    input: str
    layout: str
    channels: int
    dtype: str
    size: Resolution
    outputs: Mapping[str, Sequence[int]]


def anatomy(file: Path) -> Anatomy:
    """Read a file and run it once.

    Raises:
        UserError: the file cannot be read or run, or has another input than one image.
    """
    model = read(file)
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise UserError(f"model.onnx={file}: its inputs are {', '.join(i.name for i in inputs)}; give a network with one input")
    shape = shape_of(inputs[0])
    if one_image(shape):
        raise UserError(f"model.onnx={file}: its input is {shape_words(shape)}, {ONE_IMAGE}; a detector.file may be as it is")
    if len(shape) != 4:
        raise UserError(
            f"model.onnx={file}: its input is {shape_words(shape)}, and images are [n, 3, h, w]; export it with images"
        )
    layout = "NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW"
    at = {letter: place for place, letter in enumerate(layout)}
    numbers = [side if isinstance(side, int) else 0 for side in shape]
    size = Resolution(numbers[at["H"]] or _SIDE, numbers[at["W"]] or _SIDE)
    channels = numbers[at["C"]] or 3
    kind = dtype_of(inputs[0], f"model.onnx={file}")
    returned = _outputs(model, file, inputs[0].name, layout, channels, size, kind)
    counted = Counter(node.op_type for node in model.graph.node)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    rows = [
        ("input", f"{inputs[0].name} {shape_words(shape)} {kind}, {layout}"),
        *(("output", f"{name} {list(sides)}, for an input of {size}") for name, sides in returned.items()),
        ("free axes", ", ".join(str(side) for side in shape if not isinstance(side, int)) or "none"),
        ("opset", str(opset)),
        ("operators", ", ".join(f"{count} {name}" for name, count in counted.most_common())),
    ]
    if integers := quantized(model):
        rows.append(("quantized", f"{len(integers)} nodes, the first is '{integers[0]}': give it as precision=external"))
    rows += [("suppression", words) for words in suppression(model)]
    refused = sorted(set(counted) & _REFUSED)
    foreign = sorted({f"{node.domain}:{node.op_type}" for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    rows.append(("ONNX Runtime refuses", "nothing: it has run the file"))
    plugins = [f"{name} without a plugin (backend.plugins)" for name in BY_PLUGIN if name in counted]
    rows.append(
        ("TensorRT refuses", ", ".join([*refused, *foreign, *plugins]) or "no operator by its name; its parser decides")
    )
    return Anatomy(rows, inputs[0].name, layout, channels, kind, size, returned)


def _outputs(
    model: onnx.ModelProto, file: Path, name: str, layout: str, channels: int, size: Resolution, kind: str
) -> dict[str, list[int]]:
    sides = (1, channels, size.height, size.width) if layout == "NCHW" else (1, size.height, size.width, channels)
    pixels = np.random.default_rng(0).random(sides)
    images = (255 * pixels).astype(np.uint8) if kind == "uint8" else pixels.astype(kind)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return {n: list(np.shape(v)) for n, v in zip(names, session.run(names, {name: images}), strict=True)}
    except Exception as error:
        raise UserError(
            f"model.onnx={file}: ONNX Runtime does not run it at {list(sides)} ({first_line(error)}); export it again"
        ) from error


def guess(file: Path, found: Anatomy) -> Guess:
    """The family that a file's outputs look like, with the options that describe it.

    Args:
        file: the file.
        found: its anatomy.
    """
    shapes = [(name, list(sides)) for name, sides in found.outputs.items()]
    height, width = found.size.height, found.size.width
    sets = [(name, sides) for name, sides in shapes if len(sides) == 3]
    maps = [(name, sides) for name, sides in shapes if len(sides) == 4]
    given = [f"model.onnx={file}", f"training_resolution={found.size}"]
    if len(sets) == 2 and sets[0][1][1] == sets[1][1][1] and sets[0][1][2] % width == 0 and sets[1][1][2] % height == 0:
        return _lines(found, sets, given)
    five = next((sides for _, sides in sets if sides[2] == 5), None)
    points = next((sides for _, sides in shapes if len(sides) == 4 and sides[3] == 3 and sides[2] != width), None)
    if five is not None and points is not None:
        return _preset(found, "rtmo", f"boxes with scores {five} and keypoints {points}", points[2], given)
    if len(sets) == 1:
        ((_, (_, one, other)),) = sets
        if one == 300 and other in range(9, 6 + 3 * _MOST_KEYPOINTS + 1, 3):  # each entry has its values together
            return _preset(found, "yolo26_pose", f"300 entries of {other} values", (other - 6) // 3, given)
        if 4 < one < other:
            return _of_channels(found, one, other, given)
    if any(sides[-1] == 4 or (len(sides) == 3 and sides[1] == 4) for _, sides in sets):
        return Guess("boxes", "a set of boxes with 4 values", [*given, "family=boxes", "model=onnx", *_boxes(found)])
    if maps:
        return _of_maps(found, maps, given)
    return Guess("", "no family has outputs of these shapes; docs/extend.md adds one")


def _lines(found: Anatomy, sets: Sequence[tuple[str, Sequence[int]]], given: Sequence[str]) -> Guess:
    (x, (_, K, columns)), (y, _) = sets
    stride = found.size.width / columns
    fields = (
        f"model.spec.fields=[{{name: simcc_x, stride: {stride:g}, channels: {K}, axes: CX, shift: 0.5, tensor: {x}}}, "
        f"{{name: simcc_y, stride: {stride:g}, channels: {K}, axes: CY, shift: 0.5, tensor: {y}}}]"
    )
    why = f"two lines for each of {K} keypoints, of {1 / stride:g} cells a pixel"
    return Guess("simcc", why, [*given, "model=rtmpose", fields, *_skeleton(K), *_input(found)])


def _preset(found: Anatomy, name: str, why: str, K: int, given: Sequence[str]) -> Guess:
    words = [*given, f"model={name}", *_skeleton(K), *_input(found)]
    if K != 17:
        words.append(f"model.spec.fields.{3 if name == 'yolo26_pose' else 2}.channels={3 * K}")
    return Guess("onestage", f"{why}: {K} keypoints", words)


def _of_channels(found: Anatomy, channels: int, entries: int, given: Sequence[str]) -> Guess:
    """The guess for one output [n, channels, entries]: a detector, and a pose network if the channels fit keypoints."""
    classes, K = channels - 4, (channels - 5) // 3
    words = [*given, "model=yolo_boxes", *_labels(classes), *_input(found)]
    boxes = Guess("boxes", f"{entries} entries of a box and {classes} scores", words)
    if K == 0 or channels != 5 + 3 * K:
        return boxes
    pose = _preset(found, "yolov8_pose", f"{entries} entries of {channels} values", K, given)
    return replace(pose, why=f"{pose.why}; a detector of {classes} classes has the same shape", others=(boxes,))


def _of_maps(found: Anatomy, maps: Sequence[tuple[str, Sequence[int]]], given: Sequence[str]) -> Guess:
    name, sides = maps[0]
    stride = round(found.size.height / max(sides[2], 1))
    listed = "; ".join(f"{sides[1]} maps at stride {round(found.size.height / max(sides[2], 1))}" for _, sides in maps)
    if len(maps) == 1 and stride >= 2 and sides[1] < 200 and sides[1] not in (57, 56):
        field = f"model.spec.fields=[{{name: heatmaps, stride: {stride}, channels: {sides[1]}, tensor: {name}}}]"
        return Guess("topdown", listed, [*given, "family=topdown", "model=onnx", field, *_skeleton(sides[1]), *_input(found)])
    if len(maps) >= 2 or sides[1] in (56, 57):
        return Guess("heatmap_paf", listed, [*given, "family=heatmap_paf", "model=onnx", *_input(found)])
    return Guess("", f"{listed}: classes of a segmentation network, which no family reads yet")


def _skeleton(K: int) -> list[str]:
    return [
        f"model.spec.labels={_SKELETONS[K]}"
        if K in _SKELETONS
        else f"model.spec.labels={{names: [{K} NAMES], limbs: [], sigmas: []}}"
    ]


def _labels(classes: int) -> list[str]:
    names = f"coco_{classes}" if classes in (80, 91) else f"{{names: [{classes} NAMES], colours: []}}"
    return [f"model.spec.labels={names}", *([] if classes == 80 else [f"model.spec.fields.1.channels={classes}"])]


def _input(found: Anatomy) -> list[str]:
    words = [f"model.spec.input.name={found.input}"]
    words += [f"model.spec.input.layout={found.layout}"] if found.layout != "NCHW" else []
    words += [f"model.spec.input.channels={found.channels}"] if found.channels != 3 else []
    return words + ([f"model.spec.input.dtype={found.dtype}"] if found.dtype != "float32" else [])


def _boxes(found: Anatomy) -> list[str]:
    fields: list[str] = []
    for name, sides in found.outputs.items():
        if len(sides) != 3:
            continue
        role = "boxes" if 4 in sides[1:] and "boxes" not in str(fields) else "scores"
        axes = "CN" if sides[1] < sides[2] else "NC"
        fields.append(f"{{name: {role}, stride: 1, channels: {min(sides[1:])}, axes: {axes}, tensor: {name}}}")
    return [f"model.spec.fields=[{', '.join(fields)}]", *_input(found)]


def report(file: Path) -> tuple[list[tuple[str, str, str]], Guess]:
    """Findings on a file as rows (what, found, what to do), and the guess."""
    found = anatomy(file)
    made = guess(file, found)
    rows: list[tuple[str, str, Any]] = [(what, text, "") for what, text in found.rows]
    what = made.why if not made.family else f"{made.family}: {made.why}"
    rows.append(("family", what, "give the options below" if made.words else "see docs/extend.md"))
    rows += [("or", f"{other.family}: {other.why}", "or the options after them") for other in made.others]
    return rows, made
