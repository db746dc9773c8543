"""A given ONNX file: compared with its description by a forward pass, and brought into the form of our own exports."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, inliner

from pipeline.onnx_files.files import described, named
from posepress.errors import UserError, first_line, nearest
from posepress.pixels import normalise
from posepress.spec import SPEC_KEY, FieldSpec, InputSpec, NetworkSpec, Resolution

F32 = NDArray[np.float32]
Outputs = Mapping[str, NDArray[Any]]

_AXES = {"batch": 0, "height": 2, "width": 3}
_LEAST_OPSET = 13  # scales for each channel begin there
_OPSETS = (20, _LEAST_OPSET)  # older files are raised to one of them
_SAME = 1e-3  # two passes that should agree differ by less, as a part of the greatest value
_LIMITS = ("Clip", "Max", "Min")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INTEGER = re.compile(  # of ONNX and of ONNX Runtime
    r"(Dynamic)?QuantizeLinear|DequantizeLinear|QLinear\w+|\w+Integer|QGemm|MatMulIntegerToFloat|MatMul(NBits|Bnb4)|"
    r"DynamicQuantize\w+|Q(Attention|Concat|MoE|Embed\w+|Ordered\w+)|GatherBlockQuantized"
)


@dataclass(frozen=True)
class Adopted:
    """A given file in the form of our own exports.

    Attributes:
        model: its outputs are the fields, by name and in order.
        spec: the description, with what was read off the file.
        sources: the output of the given file that each field is; empty where one output holds all fields.
        size: the input size that it was tried at.
        notes: what was read off the file and is not in `model.spec`, in sentences.
    """

    model: onnx.ModelProto
    spec: NetworkSpec
    sources: Mapping[str, str]
    size: Resolution
    notes: Sequence[str]


def adopt(file: Path, raw: object, outputs: Mapping[str, Any] | None, resolution: Resolution) -> Adopted:
    """Read a given ONNX file, run it once, and compare what it takes and returns with its description.

    Args:
        file: an ONNX file; its weights may lie in further files beside it.
        raw: `model.spec`.
        outputs: `model.outputs`, the file's output of a field whose name is another.
        resolution: of the image it is tried with; a file of one size is tried at its own.

    Raises:
        UserError: the file cannot be read or run, or is not as described; the message says what was expected and what is there.
    """
    where = f"model.onnx={file}"
    model = read(file)
    wanted, own = named(described(raw))
    notes = [f"'{old}' is taken as {new}, in the order of model.spec.fields" for new, old in own.items()]
    spec, size = _input(model, where, wanted, raw, resolution, notes)
    images = _images(spec, size)
    model, returned = _run_as_it_is(model, where, spec, images[:1], notes)
    sources = _sources(spec, {**own, **_option(spec, outputs, returned, where)}, returned, where, notes)
    for name, values in _fields(spec, sources, returned).items():
        _check_field(spec.field(name), values, _declared(model, sources.get(name, name), values), size, where)
    _check_freedom(model, where, spec, sources, images, returned)
    _name_outputs(model, spec, sources)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise UserError(
            f"{where}: its outputs cannot be named as the fields ({first_line(error)}); name them so at export"
        ) from error
    return Adopted(model, spec, sources, size, notes)


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
    file: Path, raw: object, precision: str, sizes: Mapping[str, Resolution], batches: Mapping[str, int], one_size: bool
) -> list[str]:
    """Make sure that a given file takes what a configuration asks of its engine; nothing is run.

    Args:
        file: an ONNX file.
        raw: `model.spec`.
        precision: the name of the engine's.
        sizes: of the engine's input, by option.
        batches: images at once, by option.
        one_size: every input has the resolution's size.

    Returns:
        What figures must be read with, in sentences.

    Raises:
        UserError: it is no ONNX file, is quantized, or takes other sizes or batches.
    """
    where = f"model.onnx={file}"
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception as error:
        raise UserError(f"{where}: not a valid ONNX file ({first_line(error)}); give an ONNX file") from error
    integers = quantized(model)
    if integers and precision != "external":
        raise UserError(
            f"{where}: already quantized ({len(integers)} nodes, the first is '{integers[0]}'), so precision={precision} would "
            f"call it float; give the float network as model.onnx, and this file as precision=external precision.file={file}"
        )
    axes, asked = free_axes(model), raw.get("dynamic") if isinstance(raw, Mapping) else None
    alone = axes["batch"] or (1 if asked is not None and "batch" not in asked else 0)
    for option, batch in batches.items():
        if alone and batch != alone:
            raise UserError(
                f"{option}={batch}: {where} takes a batch of {alone} alone; set batch={alone}, or export a free batch"
            )
    for option, size in sizes.items():
        fixed = Resolution(axes["height"] or size.height, axes["width"] or size.width)
        if size != fixed:
            raise UserError(
                f"{option}={size}: {where} takes {fixed} alone; set training_resolution={fixed} and no other resolution, or "
                "export it with free sizes"
            )
    if not one_size and (axes["width"] or axes["height"] or (asked is not None and not {"height", "width"} <= set(asked))):
        raise UserError(
            f"keep_aspect_ratio_mode or scales ask for inputs of several sizes, and {where} takes one; choose "
            "keep_aspect_ratio_mode=pad_image_input 'scales=[1.0]'"
        )
    said = [f"{where} is quantized itself, so that figures beside FP32 compare it with itself"] if integers else []
    if precision != "external" and (rounding := simulated(model)):
        said.append(
            f"{where} looks like simulated quantization ({len(rounding)} nodes, the first is '{rounding[0]}'), so that what is "
            f"called precision={precision} includes it; give the network as it was before, where that is not wanted"
        )
    half = half_weights(model)
    if half and precision != "external":
        said.append(f"{where} has weights of 16 bits ('{half[0]}'), so that what is called precision=fp32 is theirs")
    return said


def read(file: Path) -> onnx.ModelProto:
    """An ONNX file with its weights, checked.

    Raises:
        UserError: it is none, is damaged, or lacks its file of weights.
    """
    where = f"model.onnx={file}"
    try:
        model = onnx.load(file)
    except Exception as error:
        raise UserError(
            f"{where}: not a valid ONNX file ({first_line(error)}); export it again, with its weights beside it"
        ) from error
    if not model.graph.node:
        raise UserError(f"{where}: not a valid ONNX file (there is no node in it); export it again")
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
    """The names of the nodes that look like simulated quantization: rounding beside a limit, integer weights made float.

    Rounding is looked for at most five nodes before a limit, and a limit at most five before rounding, through additions and
    casts. So a zero point and the straight-through form `x + (round(x) - x)` are found.
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
    """The nodes that make the inputs of a node, and those before them as far as only additions and casts lie between."""
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
    """The nodes of a file, of each of its inner graphs and of each of its functions."""
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


def free_axes(model: onnx.ModelProto) -> dict[str, int]:
    """The sizes of the axes "batch", "height" and "width" of the first input; 0 where one is free."""
    constants = {i.name for i in model.graph.initializer}
    tensor = next((i for i in model.graph.input if i.name not in constants), None)
    dims = [] if tensor is None else tensor.type.tensor_type.shape.dim
    return {name: max(dims[at].dim_value, 0) if len(dims) == 4 else 0 for name, at in _AXES.items()}


def _shape(tensor: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.type.tensor_type.shape.dim]


def _words(shape: Sequence[str | int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _input(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, raw: object, resolution: Resolution, notes: list[str]
) -> tuple[NetworkSpec, Resolution]:
    """The description with the input's name and free axes as the file has them, and the size to try it at.

    Raises:
        UserError: the file does not take float32 images [n, 3, h, w], or is not as described.
    """
    graph = model.graph
    constants = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1:
        raise UserError(
            f"{where}: its inputs are {', '.join(i.name for i in inputs) or 'none'}; give a network whose one input is images"
        )
    tensor, shape = inputs[0], _shape(inputs[0])
    kinds = {number: name.lower() for name, number in TensorProto.DataType.items()}
    kind = kinds.get(tensor.type.tensor_type.elem_type, "of an unknown type")
    if kind != "float":
        raise UserError(f"{where}: its input '{tensor.name}' is {kind}; export it with float32 images, [n, 3, h, w]")
    if shape and len(shape) == 4 and shape[3] == 3 and shape[1] != 3:
        raise UserError(
            f"{where}: its input '{tensor.name}' is {_words(shape)}, channels last; export it with channels first, [n, 3, h, w]"
        )
    if shape and (len(shape) != 4 or (isinstance(shape[1], int) and shape[1] != 3)):
        raise UserError(f"{where}: its input '{tensor.name}' is {_words(shape)}; expected are images [n, 3, h, w]")
    axes = free_axes(model)
    if axes["batch"] > 1:
        raise UserError(f"{where}: its batch is fixed at {axes['batch']}; export it with a free batch, or with batch 1")
    free = {name for name, fixed in axes.items() if not fixed}
    given = raw.get("dynamic") if isinstance(raw, Mapping) else None
    missing = sorted(spec.dynamic - free) if given is not None else []
    if missing:
        raise UserError(
            f"{where}: model.spec.dynamic holds '{missing[0]}', but its input is {_words(shape)}; leave dynamic out, or export "
            "the network with free axes"
        )
    if tensor.name != spec.input.name:
        notes.append(f"its input is called '{tensor.name}', not '{spec.input.name}' (model.spec.input.name)")
    try:
        spec = replace(spec, input=replace(spec.input, name=tensor.name), dynamic=spec.dynamic & free)
    except ValueError as error:
        raise UserError(f"{where}: its input and model.spec do not fit: {error}") from error
    size = Resolution(axes["height"] or resolution.height, axes["width"] or resolution.width)
    if not spec.input.fits(size):
        raise UserError(
            f"{where}: takes {size}, which are no multiples of {spec.input.multiple} plus {spec.input.offset}; set "
            "model.spec.input.multiple and offset to what the network takes"
        )
    _pin(tensor, spec, size)
    kept = [i for i in graph.input if i.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)  # before that, constants had to be inputs
    return spec, size


def _pin(tensor: onnx.ValueInfoProto, spec: NetworkSpec, size: Resolution) -> None:
    """Write into a file's input which axes are free, as the description has it."""
    dims = tensor.type.tensor_type.shape.dim
    while len(dims) < 4:
        dims.add()
    dims[1].dim_value = 3
    twice = len({dims[at].dim_param for name, at in _AXES.items() if name in spec.dynamic}) < len(spec.dynamic)
    for name, fixed in (("batch", 1), ("height", size.height), ("width", size.width)):
        dim = dims[_AXES[name]]
        if name not in spec.dynamic:
            dim.dim_value = fixed
        elif twice or not dim.dim_param:
            dim.dim_param = name


def _images(spec: NetworkSpec, size: Resolution) -> F32:
    """Two images of noise in the network's input form, [2, 3, H, W]."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, size.height, size.width, 3), dtype=np.uint8)
    return normalise(pixels, spec.input)


def _run(model: onnx.ModelProto, images: F32) -> Outputs:
    """All outputs of a network, as ONNX Runtime computes them without changing the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    returned = zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True)
    return {name: values for name, values in returned if isinstance(values, np.ndarray)}  # not sequences and maps


def _complaint(error: Exception, model: onnx.ModelProto, images: F32) -> str:
    """What ONNX Runtime says of a network that does not run, with the node's name."""
    unknown = re.search(r"(\S+?):(\w+)\(-?\d+\) is not a registered function/op", str(error))
    if unknown or (unknown := re.search(r"()No Op registered for (\w+)", str(error))):
        domain = f"{unknown[1]}:" if unknown[1] else ""
        return f"{domain}{unknown[2]} is not known to ONNX Runtime; export the network with operators of ONNX alone"
    failed = re.search(r"while running (\w+) node\. Name:'(.*?)' Status Message: ", str(error))
    if failed and not failed[2]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for node in copy.graph.node:
            node.name = node.name or node.output[0]
        try:
            _run(copy, images)
        except Exception as again:  # noqa: BLE001 - the same error with a name
            failed = re.search(r"while running (\w+) node\. Name:'(.*?)' Status Message: ", str(again)) or failed
    return (
        f"its node '{failed[2]}' ({failed[1]}): {first_line(error)}"
        if failed
        else f"ONNX Runtime cannot run it ({first_line(error)})"
    )


def _run_as_it_is(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, image: F32, notes: list[str]
) -> tuple[onnx.ModelProto, Outputs]:
    """The outputs of one image, and the model, raised to an opset that can hold INT8 if it is older.

    Raises:
        UserError: it does not run.
    """
    try:
        returned = _run(model, image)
    except Exception as error:
        if _takes_channels_last(model, image):
            raise UserError(
                f"{where}: its input '{spec.input.name}' has its channels last, [n, h, w, 3]; export it with channels first, "
                "[n, 3, h, w]"
            ) from error
        shape = f"{spec.input.name} {list(image.shape)}"
        raise UserError(f"{where}: does not run at {shape}: {_complaint(error, model, image)}") from error
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=_LEAST_OPSET)
    if opset >= _LEAST_OPSET:
        return model, returned
    reason = "it would return other values"
    for target in _OPSETS:
        try:
            source = inliner.inline_local_functions(model) if model.functions else model
            raised = onnx.version_converter.convert_version(source, target)
            raised.ir_version = max(raised.ir_version, helper.find_min_ir_version_for(list(raised.opset_import)))
            onnx.checker.check_model(raised)
            same = _run(raised, image)
        except Exception as error:  # noqa: BLE001 - a converter knows some operators only
            reason = first_line(error)
            continue
        if all(name in same and _close(same[name], values) for name, values in returned.items()):
            notes.append(f"raised from opset {opset} to {target}")
            return raised, same
    notes.append(f"stays at opset {opset} ({reason}): INT8 begins at opset {_LEAST_OPSET}, so export it with that for INT8")
    return model, returned


def _takes_channels_last(model: onnx.ModelProto, image: F32) -> bool:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.input[0].type.tensor_type.ClearField("shape")
    try:
        _run(copy, image.transpose(0, 2, 3, 1))
    except Exception:  # noqa: BLE001 - whatever it is, it is another fault
        return False
    return True


def _close(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if ours.dtype.kind != "f":
        return bool(np.array_equal(ours, theirs))
    least = _SAME * max(float(np.abs(theirs).max(initial=0)), 1e-6)
    return bool(np.allclose(ours, theirs, rtol=0, atol=least, equal_nan=True))


def _option(spec: NetworkSpec, outputs: Mapping[str, Any] | None, returned: Outputs, where: str) -> dict[str, str]:
    """`model.outputs`, checked.

    Raises:
        UserError: it names a field or an output that is not there, or one output twice.
    """
    known = [field.name for field in spec.fields]
    if outputs is not None and not isinstance(outputs, Mapping):  # from the command line
        raise UserError(f"model.outputs={outputs}: give it as {{{known[0]}: NAME}}")
    chosen = {str(field): str(output) for field, output in (outputs or {}).items()}
    for field, output in chosen.items():
        if field not in known:
            raise UserError(f"model.outputs.{field}: no such field{nearest(field, known)}; the fields are {', '.join(known)}")
        if output not in returned:
            raise UserError(f"model.outputs.{field}={output}: {where} has no such output; it has {_listed(returned)}")
    if len(set(chosen.values())) < len(chosen):
        raise UserError(f"model.outputs={chosen}: one output is given to two fields; give each its own")
    return chosen


def _listed(returned: Outputs) -> str:
    return ", ".join(f"'{name}' {_words(['n', *values.shape[1:]])}" for name, values in returned.items())


def _sources(spec: NetworkSpec, chosen: Mapping[str, str], returned: Outputs, where: str, notes: list[str]) -> dict[str, str]:
    """The file's output that each field is: as chosen, by name, or the only one of its shape; empty if one holds all fields.

    Raises:
        UserError: for a field no output, or more than one, fits.
    """
    sources = {field.name: chosen.get(field.name, field.name) for field in spec.fields}
    sources = {field: output for field, output in sources.items() if output in returned}
    left = [field for field in spec.fields if field.name not in sources]
    others = [name for name in returned if name not in sources.values()]
    if not left:
        return sources
    if len(spec.fields) > 1 and len(returned) == 1:
        (values,) = returned.values()
        every = sum(field.channels for field in spec.fields)
        if values.ndim == 4 and values.shape[1] == every and not sources:
            return {}
        asked = " + ".join(f"{field.channels} {field.name}" for field in spec.fields)
        raise UserError(
            f"{where}: its one output {_listed(returned)} does not hold the fields of model.spec ({asked} are {every} "
            "channels, [n, C, h, w]); describe them in model.spec.fields"
        )
    fitting = {
        field.name: [n for n in others if returned[n].ndim == 4 and returned[n].shape[1] == field.channels] for field in left
    }
    if len(left) == len(others) == 1:
        fitting = {left[0].name: others}
    found = [names[0] for names in fitting.values() if len(names) == 1]
    if len(found) < len(left) or len(set(found)) < len(found):
        lost = next((field for field in left if not fitting[field.name]), None)
        if lost is not None:
            raise UserError(
                f"{where}: no output is {lost.name}, [n, {lost.channels}, h, w]; its outputs are {_listed(returned)}: mend "
                f"model.spec.fields, or say which it is with 'model.outputs={{{lost.name}: NAME}}'"
            )
        example = ", ".join(f"{field.name}: {name}" for field, name in zip(left, [*others, "NAME", "NAME"], strict=False))
        raise UserError(
            f"{where}: no output is called {' or '.join(field.name for field in left)}; its outputs are {_listed(returned)}: "
            f"say which is which, like 'model.outputs={{{example}}}'"
        )
    for field, output in zip(left, found, strict=True):
        sources[field.name] = output
        notes.append(f"its output '{output}' is taken as {field.name}")
    return sources


def _fields(spec: NetworkSpec, sources: Mapping[str, str], returned: Outputs) -> Outputs:
    """What a file returned, by field."""
    if sources:
        return {field.name: returned[sources[field.name]] for field in spec.fields}
    (values,) = returned.values()
    ends = np.cumsum([field.channels for field in spec.fields])[:-1]
    return dict(zip((field.name for field in spec.fields), np.split(values, ends, axis=1), strict=True))


def _declared(model: onnx.ModelProto, output: str, values: NDArray[Any]) -> str:
    """An output and its shape in words: as the file declares it, or as it came out."""
    shape = next((_shape(o) for o in model.graph.output if o.name == output), [])
    return f"'{output}' is {_words(shape if len(shape) == values.ndim and '?' not in shape else ['n', *values.shape[1:]])}"


def _check_field(field: FieldSpec, values: NDArray[Any], declared: str, size: Resolution, where: str) -> None:
    """Compare a field of one image with its description.

    Raises:
        UserError: it is of another rank, type, number of channels or size.
    """
    if values.ndim != 4:
        raise UserError(
            f"{where}: its output {declared}, no [n, C, h, w]; a field is made of maps: give the network without its "
            "post-processing"
        )
    what = f"{where}: {declared.partition(' is ')[0]}"
    _, channels, height, width = values.shape
    if channels != field.channels:
        last = "; it seems to have its channels last: transpose it" if width == field.channels else ""
        raise UserError(
            f"{what} is {list(values.shape)} for an image of {size}: {channels} channels, and model.spec says {field.channels}"
            f"{last or '; mend model.spec.fields'}"
        )
    if values.dtype != np.float32:
        raise UserError(f"{what} is {values.dtype}; expected is float32: export it so")
    asked = [side / field.stride for side in (size.height, size.width)]
    if any(abs(found - side) >= (1 if side % 1 else 0.5) for found, side in zip((height, width), asked, strict=True)):
        stride = round(size.height / max(height, 1))
        hint = (
            f"set its stride: {stride}" if stride and round(size.width / max(width, 1)) == stride else "mend model.spec.fields"
        )
        raise UserError(
            f"{what}: {size} at stride {field.stride} are maps of {'x'.join(f'{side:g}' for side in asked)}, the file gives "
            f"{height}x{width}; {hint}"
        )


def _check_freedom(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, sources: Mapping[str, str], images: F32, returned: Outputs
) -> None:
    """Run two images at once, and another size, if the description calls batch, height and width free.

    Raises:
        UserError: the network is for one of them alone.
    """
    kept = sorted(spec.dynamic)
    if "batch" in spec.dynamic:
        words = ",".join(name for name in kept if name != "batch")
        fix = f"set 'model.spec.dynamic=[{words}]' and batch=1, or export it with a free batch"
        try:
            several = _run(model, images)
            differs = any(not _close(several[name][:1], values) for name, values in returned.items() if values.ndim == 4)
            said = "two images at once give other values than one" if differs else ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the network does not take two images
            said = _complaint(error, model, images)
        if said:
            node = _of_one_image(model)
            raise UserError(f"{where}: {f'its node {node!r} is for batch 1' if node else f'takes one image: {said}'}; {fix}")
    if {"height", "width"} <= spec.dynamic:
        step, (height, width) = spec.input.multiple, images.shape[2:]
        size = Resolution(height + step, width + 2 * step)
        words = ",".join(name for name in kept if name == "batch")
        fix = f"set 'model.spec.dynamic=[{words}]' and resolution={Resolution(height, width)}, or export it with free sizes"
        other = _images(spec, size)[:1]
        try:
            fields = _fields(spec, sources, _run(model, other))
            for field in spec.fields:
                _check_field(field, fields[field.name], f"'{field.name}' is {_words(fields[field.name].shape)}", size, where)
        except UserError as error:
            raise UserError(f"{error}, at {size}; {fix}") from error
        except Exception as error:
            raise UserError(f"{where}: does not run at {size}: {_complaint(error, model, other)}; {fix}") from error


def _of_one_image(model: onnx.ModelProto) -> str:
    """The first node that makes a tensor of one image, whatever the batch; empty if none is found."""
    constants = {i.name: i for i in model.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant" and n.attribute}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = onnx.numpy_helper.to_array(constants[node.input[1]])
            if shape.size > 2 and int(shape.flat[0]) == 1:
                return node.name or str(node.output[0])
    return ""


def _name_outputs(model: onnx.ModelProto, spec: NetworkSpec, sources: Mapping[str, str]) -> None:
    """Make the fields the outputs of a model, in order; one output that holds all of them is split."""
    graph, wanted = model.graph, [field.name for field in spec.fields]
    joined = "" if sources else graph.output[0].name
    made = {name for node in graph.node for name in node.output}
    new = {source: name for name, source in sources.items() if source != name and source in made}
    inner = {
        name: f"inner_{name}" for name in wanted if name in made and name not in sources.values()
    }  # tensors make way for fields
    _rename(graph, {**inner, **new})
    for name, source in sources.items():
        if source not in made:  # the input itself, or a constant
            graph.node.append(helper.make_node("Identity", [source], [name], name=f"posepress_{name}"))
    kinds = {output.name: output for output in graph.output}
    values = [kinds.get(name) or kinds.get(source) for name, source in sources.items()]
    del graph.output[:]
    if joined:
        joined = inner.get(joined, joined)
        sizes = onnx.numpy_helper.from_array(np.array([field.channels for field in spec.fields], np.int64), "posepress_split")
        graph.initializer.append(sizes)
        graph.node.append(helper.make_node("Split", [joined, sizes.name], wanted, axis=1, name="posepress_split"))
    for field, value in zip(spec.fields, values or [None] * len(wanted), strict=True):
        shape: list[str | int] = ["batch", field.channels, "field_height", "field_width"]
        if value is None or len(value.type.tensor_type.shape.dim) != 4:
            graph.output.append(helper.make_tensor_value_info(field.name, TensorProto.FLOAT, shape))
        else:
            graph.output.append(value)
            graph.output[-1].name = field.name


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give tensors other names, in inner graphs, too."""
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)
    for tensor in (*graph.initializer, *graph.value_info, *graph.output):
        tensor.name = names.get(tensor.name, tensor.name)
