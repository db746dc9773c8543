"""Check a given ONNX file: whether it is complete, already quantized, and accepts the requested inputs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto

from pipeline.onnx_files.outputs import (
    shape_of,
    shape_words,
)
from posepress.errors import UserError, first_line
from posepress.resolution import Resolution
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec

ONE_IMAGE = "which has no batch axis; export a module that takes images [1, 3, h, w] and passes images[0] to the network"

_LIMITS = ("Clip", "Max", "Min")

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)

_INTEGER = re.compile(  # integer operators of ONNX and of ONNX Runtime
    r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear\w+|\w+Integer|QGemm|MatMulIntegerToFloat|MatMul(NBits|Bnb4)|"
    r"DynamicQuantize\w+|Q(Attention|Concat|MoE|Embed\w+|Ordered\w+)|GatherBlockQuantized"
)


def unlike_metadata(file: Path, spec: NetworkSpec) -> list[str]:
    """Compare a description of the input with the one in the file's metadata, where the stage `export` wrote the file.

    Returns:
        A sentence for each difference.
    """
    entries = {entry.key: entry.value for entry in onnx.load(file, load_external_data=False).metadata_props}
    if SPEC_KEY not in entries:
        return []
    try:
        own = NetworkSpec.from_json(entries[SPEC_KEY]).input
    except ValueError:
        return []

    def option(key: str, source: InputSpec) -> str:
        value = getattr(source, key)
        text = f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else value
        return f"model.spec.input.{key}={text}"

    return [
        f"{option(key, spec.input)}: the metadata of {file} says otherwise; give '{option(key, own)}'"
        for key in ("order", "range", "mean", "std")
        if getattr(spec.input, key) != getattr(own, key)
    ]


def check_request(
    file: Path, spec: NetworkSpec, precision: str, sizes: Mapping[str, Resolution], batches: Mapping[str, int], one_size: bool
) -> list[str]:
    """Check that a given file accepts the input sizes and batches of a configuration. Nothing is run.

    Args:
        file: an ONNX file.
        spec: `model.spec`.
        precision: name of the engine's precision.
        sizes: the sizes of the engine's input, by the option that sets them.
        batches: the batch sizes, by the option that sets them.
        one_size: whether every input has the resolution's size.

    Returns:
        Sentences with the reservations under which the figures must be read.

    Raises:
        UserError: the file is no ONNX file, is quantized, or accepts only other sizes or batches.
    """
    where = f"model.onnx={file}"
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        raise UserError(f"{where}: not a valid ONNX file ({first_line(error)}); give an ONNX file") from error
    integers = quantized(model)
    if integers and precision != "external":
        raise UserError(
            f"{where}: already quantized ({len(integers)} nodes, the first is '{integers[0]}'), so that precision={precision} "
            f"would be wrong; give the float network as model.onnx, and this file as precision=external precision.file={file}"
        )
    constants = {tensor.name for tensor in model.graph.initializer}
    for tensor in [tensor for tensor in model.graph.input if tensor.name not in constants][:1]:
        check_form(tensor, shape_of(tensor), spec.input, where)
    _check_sizes(model, spec, sizes, batches, one_size, where)
    said = [f"{where} is quantized itself, so FP32 figures in comparisons are those of a quantized file"] if integers else []
    if precision != "external" and (rounding := simulated(model)):
        said.append(
            f"{where} looks like simulated quantization ({len(rounding)} nodes, the first is '{rounding[0]}'), so that "
            f"precision={precision} includes it; if that is not wanted, give the network without the simulation"
        )
    half = half_weights(model)
    if half and precision != "external":
        said.append(f"{where} has weights of 16 bits ('{half[0]}'), so that precision=fp32 means these 16-bit weights")
    return said


def _check_sizes(
    model: onnx.ModelProto,
    spec: NetworkSpec,
    sizes: Mapping[str, Resolution],
    batches: Mapping[str, int],
    one_size: bool,
    where: str,
) -> None:
    """Check that a model accepts sizes and batches.

    Raises:
        UserError: it accepts only others.
    """
    axes = free_axes(model, spec.input)
    alone = axes["batch"] or (0 if "batch" in spec.dynamic else 1)
    for option, batch in batches.items():
        if alone and batch != alone:
            raise UserError(
                f"{option}={batch}: {where} takes only a batch of {alone}; set batch={alone}, or export a free batch"
            )
    for option, size in sizes.items():
        fixed = spec.input.size or Resolution(axes["height"] or size.height, axes["width"] or size.width)
        if size != fixed:
            raise UserError(
                f"{option}={size}: {where} takes only {fixed}; set training_resolution={fixed} and no other resolution, or "
                "export it with free sizes"
            )
    if not one_size and (axes["width"] or axes["height"] or not {"height", "width"} <= spec.dynamic):
        raise UserError(
            f"keep_aspect_ratio_mode or scales ask for inputs of several sizes, but {where} takes one size; choose "
            "keep_aspect_ratio_mode=pad_image_input 'scales=[1.0]'"
        )


def read(file: Path) -> onnx.ModelProto:
    """Read and check an ONNX file with its weights.

    Raises:
        UserError: the file is no ONNX file, is damaged, or its file of weights is missing.
    """
    where = f"model.onnx={file}"
    try:
        model = onnx.load(file)
    except Exception as error:
        raise UserError(
            f"{where}: not a valid ONNX file ({first_line(error)}); export it again, with its weights beside it"
        ) from error
    if not model.graph.node:
        raise UserError(f"{where}: not a valid ONNX file (it has no node); export it again")
    if model.ByteSize() > onnx.checker.MAXIMUM_PROTOBUF:
        raise UserError(f"{where}: over 2 GiB with its weights, which no ONNX file can hold; give a smaller network")
    newest = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if newest > onnx.defs.onnx_opset_version():
        raise UserError(f"{where}: of opset {newest}, which is too new here; export it with opset_version=20")
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise UserError(f"{where}: not a valid ONNX file ({first_line(error)}); export it again") from error
    return model


def quantized(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that compute or hold integers instead of floats."""
    return [_called(node) for nodes in _scopes(model) for node in nodes if _INTEGER.fullmatch(node.op_type)]


def simulated(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that look like simulated quantization.

    Such nodes are a rounding near a clipping operator, and integer weights that are cast to float. Rounding and clipping may
    be up to five nodes apart, with only additions and casts between them. This covers a zero point and the straight-through
    form `x + (round(x) - x)`.
    """
    narrow = (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4)
    weights = {tensor.name for tensor in model.graph.initializer if tensor.data_type in narrow and len(tensor.dims) > 1}
    names: dict[str, None] = {}
    for nodes in _scopes(model):
        makers = {name: node for node in nodes for name in node.output}
        for node in nodes:
            near = _before(node, makers) if node.op_type in ("Round", *_LIMITS) else []
            if node.op_type == "Round" and any(other.op_type in _LIMITS for other in near):
                names[_called(node)] = None
            elif node.op_type in _LIMITS:
                names |= {_called(other): None for other in near if other.op_type == "Round"}
            to = next((attribute.i for attribute in node.attribute if attribute.name == "to"), 0)
            if node.op_type == "Cast" and to in _FLOATS and weights.intersection(node.input):
                names[_called(node)] = None
    return list(names)


def _before(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that compute the inputs of a node, and earlier ones from which only additions and casts lead to it."""
    reached: list[onnx.NodeProto] = []
    step = [node]
    for _ in range(5):
        step = [makers[name] for one in step for name in one.input if name in makers]
        reached += step
        step = [one for one in step if one.op_type in ("Add", "Sub", "Cast", "Identity", *_LIMITS)]
    return reached


def _called(node: onnx.NodeProto) -> str:
    return node.name or "".join(node.output[:1])


def _scopes(model: onnx.ModelProto) -> Iterator[Sequence[onnx.NodeProto]]:
    """The nodes of a file's main graph, then those of each subgraph and of each function."""
    waiting = [model.graph.node, *(function.node for function in model.functions)]
    while waiting:
        nodes = waiting.pop(0)
        yield nodes
        attributes = [attribute for node in nodes for attribute in node.attribute]
        waiting += [graph.node for attribute in attributes for graph in (attribute.g, *attribute.graphs) if graph.node]


def half_weights(model: onnx.ModelProto) -> list[str]:
    """The names of weights of 16 bits."""
    narrow = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return [tensor.name for tensor in model.graph.initializer if tensor.data_type in narrow and len(tensor.dims) > 1]


def free_axes(model: onnx.ModelProto, spec: InputSpec) -> dict[str, int]:
    """The sizes of the axes "batch", "height" and "width" of the first input; 0 means that an axis is free."""
    constants = {i.name for i in model.graph.initializer}
    tensor = next((i for i in model.graph.input if i.name not in constants), None)
    dims = [] if tensor is None else tensor.type.tensor_type.shape.dim
    at = {name: place for name, place in spec.axes.items() if name != "channels"}
    return {name: max(dims[place].dim_value, 0) if len(dims) == 4 else 0 for name, place in at.items()}


_TYPES = {"float": "float32"}  # numpy's names of ONNX types that have another name


def dtype_of(tensor: onnx.ValueInfoProto, where: str) -> str:
    """The type of a file's input, by numpy's name.

    Raises:
        UserError: it is no type of images.
    """
    kinds = {number: name.lower() for name, number in TensorProto.DataType.items()}
    kind: str = _TYPES.get(raw := kinds.get(tensor.type.tensor_type.elem_type, "of an unknown type"), raw)
    if kind not in ("float32", "float16", "uint8"):
        raise UserError(f"{where}: its input '{tensor.name}' is {raw}; export it with float32 images, [n, 3, h, w]")
    return kind


def one_image(shape: Sequence[str | int]) -> bool:
    """Whether an input's shape is that of one image without a batch axis: [C, h, w] or [h, w, C]."""
    return len(shape) == 3 and not {1, 3}.isdisjoint((shape[0], shape[2]))


def check_form(tensor: onnx.ValueInfoProto, shape: Sequence[str | int], spec: InputSpec, where: str) -> None:
    """Compare the type, the layout and the channels of a file's input with the description.

    Raises:
        UserError: a property differs. The message names the option to set.
    """
    kind, what = dtype_of(tensor, where), f"{where}: its input '{tensor.name}' is"
    if kind != spec.dtype:
        more = " with range=255 mean=0 std=1, since such a network normalises pixels itself" if kind == "uint8" else ""
        raise UserError(f"{what} {kind}, and model.spec says {spec.dtype}; set model.spec.input.dtype={kind}{more}")
    if not shape:
        return
    at, other = spec.axes["channels"], {"NCHW": "NHWC", "NHWC": "NCHW"}[spec.layout]
    if one_image(shape):
        raise UserError(f"{what} {shape_words(shape)}, {ONE_IMAGE}")
    if len(shape) != 4:
        raise UserError(f"{what} {shape_words(shape)}; expected are images [n, {spec.channels}, h, w]")
    if shape[at] == spec.channels:
        return
    if shape[at] not in (1, 3) and shape[4 - at] in (1, 3):
        channels = "" if shape[4 - at] == spec.channels else f" and model.spec.input.channels={shape[4 - at]}"
        words = "channels last" if other == "NHWC" else "channels first"
        raise UserError(f"{what} {shape_words(shape)}, {words}; set model.spec.input.layout={other}{channels}")
    if not isinstance(shape[at], int):
        return
    fix = f"; set model.spec.input.channels={shape[at]}" if shape[at] in (1, 3) else ""
    expected = "n, C, h, w" if spec.layout == "NCHW" else "n, h, w, C"
    raise UserError(f"{what} {shape_words(shape)}; expected are images [{expected.replace('C', str(spec.channels))}]{fix}")
