"""Assign the outputs of a given ONNX file to the fields of its description."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from posepress.errors import UserError, first_line, nearest
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec, OutputSpec

Outputs = Mapping[str, NDArray[Any]]

_AXES_FIX, _FIELDS_FIX = "; set axes in model.spec.fields to the order of its axes", "correct model.spec.fields"


def shape_of(tensor: onnx.ValueInfoProto) -> list[str | int]:
    """A tensor's declared shape: a number, the name of a free axis, or "?"."""
    return [d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in tensor.type.tensor_type.shape.dim]


def shape_words(shape: Sequence[str | int]) -> str:
    """A shape as a text for messages."""
    return f"[{', '.join(map(str, shape))}]"


def ending_at(model: onnx.ModelProto, asked: Mapping[str, str], where: str) -> onnx.ModelProto:
    """The network, cut behind the tensors of the fields if some of these are inside; the same one if none is.

    Args:
        model: a network.
        asked: for each field, the name of an output or of an inner tensor; empty for an output of the field's name.
        where: the option that names the file, for messages.

    Raises:
        UserError: the network cannot be cut there, or has no tensor of a name beside inner ones.
    """
    outputs = [output.name for output in model.graph.output]
    made = {name for node in model.graph.node for name in node.output if name}
    inner = [name for name in asked.values() if name in made and name not in outputs]
    if not inner:
        return model
    names = {field: name or field for field, name in asked.items()}
    for field, name in names.items():
        if name not in made:
            raise UserError(
                f"{where}: no tensor '{name}' for {field}{nearest(name, sorted(made))}; a network that is cut at inner "
                f"tensors, like '{inner[0]}', needs the tensor of each field: 'model.outputs={{{field}: NAME}}'"
            )
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [given.name for given in model.graph.input if given.name not in constants]
    try:
        whole = onnx.shape_inference.infer_shapes(model)
        cut: onnx.ModelProto = onnx.utils.Extractor(whole).extract_model(inputs, list(dict.fromkeys(names.values())))
        onnx.checker.check_model(cut)
    except Exception as error:
        why = first_line(error)
        raise UserError(f"{where}: cannot be cut at '{inner[0]}' ({why}); name another tensor, or an output") from error
    return cut


def suppression(model: onnx.ModelProto, fields: Container[str] = ("boxes", "scores")) -> list[str]:
    """What to know of a network that suppresses boxes itself, naming the node and, for these fields, the tensors before it."""
    for node in model.graph.node:
        if node.op_type == "NonMaxSuppression":
            called = node.name or node.output[0]
            words = f"its node '{called}' suppresses boxes before the decoder does: set decoder.nms_iou=1.0"
            if "boxes" in fields and "scores" in fields:
                at = f"{{boxes: {node.input[0]}, scores: {node.input[1]}}}"
                words += f", or cut the network before it with 'model.outputs={at}'"
            return [words]
    return []


def chosen_outputs(spec: NetworkSpec, outputs: Mapping[str, Any] | None, returned: Outputs, where: str) -> dict[str, str]:
    """Check `model.outputs` and return it.

    Raises:
        UserError: the option names an unknown field or output, or one output twice.
    """
    known = [field.name for field in spec.fields]
    if outputs is not None and not isinstance(outputs, Mapping):  # the command line can give a plain string
        raise UserError(f"model.outputs={outputs}: give it as {{{known[0]}: NAME}}")
    chosen = {str(field): str(output) for field, output in (outputs or {}).items()}
    for field, output in chosen.items():
        if field not in known:
            raise UserError(f"model.outputs.{field}: no such field{nearest(field, known)}; the fields are {', '.join(known)}")
        if output not in returned:
            raise UserError(f"model.outputs.{field}={output}: {where} has no such output; it has {_listed(returned)}")
    if len(set(chosen.values())) < len(chosen):
        raise UserError(f"model.outputs={chosen}: one output is given to two fields; give each field its own output")
    return chosen


def _listed(returned: Outputs) -> str:
    return ", ".join(f"'{name}' {shape_words(['n', *values.shape[1:]])}" for name, values in returned.items())


def sources_of(spec: NetworkSpec, chosen: Mapping[str, str], returned: Outputs, where: str, notes: list[str]) -> dict[str, str]:
    """For each field, its output in the file: the chosen one, the one of that name, or the only one of that shape.

    Fields whose output is the same one share its channels, in the order of the description.

    Raises:
        UserError: no output, or more than one, fits a field.
    """
    sources = {field.name: chosen.get(field.name, field.tensor or field.name) for field in spec.fields}
    sources = {field: output for field, output in sources.items() if output in returned}
    for output in dict.fromkeys(sources.values()):
        _check_shared([field for field in spec.fields if sources.get(field.name) == output], output, returned, where)
    left = [field for field in spec.fields if field.name not in sources]
    others = [name for name in returned if name not in sources.values()]
    if not left:
        return sources
    if len(spec.fields) > 1 and len(returned) == 1:
        (output,) = returned
        if not sources and _holds_all(spec.fields, returned[output]):
            return {field.name: output for field in spec.fields}
        asked = " + ".join(f"{field.channels} {field.name}" for field in spec.fields)
        raise UserError(
            f"{where}: its one output {_listed(returned)} does not hold the fields of model.spec ({asked} have "
            f"{sum(field.channels for field in spec.fields)} channels, {_joined(spec.fields).form}); correct model.spec.fields"
        )
    fitting = {field.name: [name for name in others if field.holds(returned[name].shape)] for field in left}
    if len(left) == len(others) == 1:
        fitting = {left[0].name: others}
    found = [names[0] for names in fitting.values() if len(names) == 1]
    if len(found) < len(left) or len(set(found)) < len(found):
        lost = next((field for field in left if not fitting[field.name]), None)
        if lost is not None:
            raise UserError(
                f"{where}: no output is {lost.name}, {lost.form}; its outputs are {_listed(returned)}: correct "
                f"model.spec.fields, or name the output with 'model.outputs={{{lost.name}: NAME}}'"
            )
        example = ", ".join(f"{field.name}: {name}" for field, name in zip(left, [*others, "NAME", "NAME"], strict=False))
        raise UserError(
            f"{where}: no output is called {' or '.join(field.name for field in left)}; its outputs are {_listed(returned)}: "
            f"assign them, for example 'model.outputs={{{example}}}'"
        )
    for field, output in zip(left, found, strict=True):
        sources[field.name] = output
        notes.append(f"its output '{output}' is taken as {field.name}")
    return sources


def _joined(fields: Sequence[OutputSpec]) -> OutputSpec:
    """The description of one output with the channels of several fields."""
    return replace(fields[0], channels=sum(field.channels for field in fields))


def _holds_all(fields: Sequence[OutputSpec], values: NDArray[Any]) -> bool:
    """Whether an output has the channels of several fields, one after the other."""
    alike = len({field.axes for field in fields}) == 1 and fields[0].axes != "HW"
    return alike and _joined(fields).holds(values.shape)


def _check_shared(fields: Sequence[OutputSpec], output: str, returned: Outputs, where: str) -> None:
    """Check an output that several fields share.

    Raises:
        UserError: their axes differ, or it has another number of channels than they have together.
    """
    if len(fields) > 1 and not _holds_all(fields, returned[output]):
        listed = " + ".join(f"{field.channels} {field.name}" for field in fields)
        raise UserError(
            f"{where}: its output '{output}' is {shape_words(['n', *returned[output].shape[1:]])}, and model.spec.fields "
            f"shares it among {listed}, {_joined(fields).form}; correct their channels and axes"
        )


def _unlike(field: OutputSpec, values: NDArray[Any]) -> bool:
    """Whether an output is a set of another rank, whose values only need another shape."""
    entries = values.size if values.ndim == 1 else values[:1].size
    return field.axes == "NC" and values.ndim not in (0, 3) and entries % field.channels == 0


def _batched(values: NDArray[Any], images: int) -> bool:
    """Whether the first axis of a set of another rank is the batch: detectors of single images return none."""
    return values.ndim > 1 and len(values) == images


def fields_of(spec: NetworkSpec, sources: Mapping[str, str], returned: Outputs, images: int = 1) -> Outputs:
    """The outputs of a file for some images, by field: parts of shared outputs, sets in their shape, activations applied."""
    made, begun = {}, Counter[str]()
    shared = Counter(sources.values())
    for field in spec.fields:
        output = sources[field.name]
        values = returned[output]
        if shared[output] > 1:
            start = begun[output]
            begun[output] += field.channels
            values = np.take(values, range(start, start + field.channels), axis=field.axes.index("C") + 1)
        if _unlike(field, values):
            values = values.reshape(images if _batched(values, images) else 1, -1, field.channels)
        if field.activation == "sigmoid":
            values = (1 / (1 + np.exp(-values.astype(np.float64)))).astype(values.dtype)
        made[field.name] = values
    return made


def declared(model: onnx.ModelProto, output: str, values: NDArray[Any]) -> str:
    """A text with the name and shape of an output. The shape is the declared one, or else that of the computed values."""
    shape = next((shape_of(o) for o in model.graph.output if o.name == output), [])
    return f"'{output}' is {shape_words(shape if len(shape) == values.ndim and '?' not in shape else ['n', *values.shape[1:]])}"


def check_field(field: OutputSpec, values: NDArray[Any], declared: str, size: Resolution, where: str) -> None:
    """Compare a field of one image with its description.

    Raises:
        UserError: the field has another rank, type, number of channels or size.
    """
    if values.ndim != len(field.axes) + 1:
        parts = "; a field is made of maps: give the network without its post-processing" if field.is_map else ""
        raise UserError(
            f"{where}: its output {declared}, no {field.form.replace(str(field.channels), 'C')}{parts or _AXES_FIX}"
        )
    what = f"{where}: {declared.partition(' is ')[0]}"
    if not field.holds(values.shape):
        channels, last = values.shape[field.axes.find("C") + 1], ""
        if field.is_map and values.shape[3] == field.channels:
            last = "; it seems to have its channels last: transpose it"
        elif not field.is_map and field.channels in values.shape[1:]:
            last = f"; another order of axes than {field.axes} fits: set axes"
        raise UserError(
            f"{what} is {list(values.shape)} for an image of {size}: {channels} channels, and model.spec says {field.channels}"
            f"{last or '; correct model.spec.fields'}"
        )
    if values.dtype != np.dtype(field.dtype):
        fix = f"set its dtype: {values.dtype}" if field.axes == "HW" or values.dtype == np.float16 else "export it so"
        raise UserError(f"{what} is {values.dtype}; expected is {field.dtype}: {fix}")
    if field.axes in ("CX", "CY"):
        _check_line(field, values.shape[2], size, what)
    elif "H" in field.axes:
        _check_cells(field, values.shape[-2:], size, what)


def _check_line(field: OutputSpec, cells: int, size: Resolution, what: str) -> None:
    """Compare the length of a line with the description's stride.

    Raises:
        UserError: the length differs.
    """
    pixels = size.width if field.axes == "CX" else size.height
    if cells != round(pixels / field.stride):
        raise UserError(
            f"{what}: {pixels} pixels at stride {field.stride:g} are {pixels / field.stride:g} cells, the file gives {cells}; "
            f"set its stride: {pixels / max(cells, 1):g}"
        )


def _check_cells(field: OutputSpec, sides: Sequence[int], size: Resolution, what: str) -> None:
    """Compare the size of maps with the description's stride.

    Raises:
        UserError: the size differs by a cell or more.
    """
    height, width = sides
    asked = [side / field.stride for side in (size.height, size.width)]
    if any(abs(found - side) >= (1 if side % 1 else 0.5) for found, side in zip((height, width), asked, strict=True)):
        stride = round(size.height / max(height, 1))
        hint = f"set its stride: {stride}" if stride and round(size.width / max(width, 1)) == stride else _FIELDS_FIX
        raise UserError(
            f"{what}: {size} at stride {field.stride:g} are maps of {'x'.join(f'{side:g}' for side in asked)}, the file gives "
            f"{height}x{width}; {hint}"
        )


def name_outputs(model: onnx.ModelProto, spec: NetworkSpec, sources: Mapping[str, str], returned: Outputs) -> None:
    """Make the fields the outputs of a model, in order, as `fields_of` computes them."""
    graph, shared = model.graph, Counter(sources.values())
    made = {name for node in graph.node for name in node.output}
    plain = {
        sources[field.name]: field.name
        for field in spec.fields
        if shared[sources[field.name]] == 1 and not field.activation and not _unlike(field, returned[sources[field.name]])
    }
    new = {source: name for source, name in plain.items() if source != name and source in made}
    inner = {  # other tensors with the name of a field are renamed
        field.name: f"inner_{field.name}" for field in spec.fields if field.name in made and field.name not in plain
    }
    _rename(graph, {**inner, **new})
    for source, name in plain.items():
        if source not in made:  # the source is the input itself, or a constant
            graph.node.append(helper.make_node("Identity", [source], [name], name=f"posepress_{name}"))
    for source in dict.fromkeys(sources.values()):
        fields = [field for field in spec.fields if sources[field.name] == source]
        if source not in plain:
            _append_parts(graph, fields, inner.get(source, source), returned[source])
    kinds = {output.name: output for output in graph.output}
    values = [kinds.get(field.name) or kinds.get(sources[field.name]) for field in spec.fields]
    kept = [None if field.name not in plain.values() else value for field, value in zip(spec.fields, values, strict=True)]
    copies = [None if value is None else onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.output[:]
    for field, value in zip(spec.fields, copies, strict=True):
        if value is None or len(value.type.tensor_type.shape.dim) != len(field.axes) + 1:
            free = {"H": "field_height", "W": "field_width", "X": "line_x", "Y": "line_y", "N": "entries"}
            shape: list[str | int] = ["batch", *(free.get(letter, field.channels) for letter in field.axes)]
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(field.dtype))
            graph.output.append(helper.make_tensor_value_info(field.name, kind, shape))
        else:
            graph.output.append(value)
            graph.output[-1].name = field.name


def _append_parts(graph: onnx.GraphProto, fields: Sequence[OutputSpec], source: str, values: NDArray[Any]) -> None:
    """Append the nodes that compute fields from one output: its split, another shape of a set, and activations.

    Args:
        graph: the graph.
        fields: the fields that share the output.
        source: name of the output in the graph.
        values: the output for one image.
    """

    def constant(name: str, numbers: Sequence[int]) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), name))
        return name

    names = {field.name: source for field in fields}
    if len(fields) > 1:
        names = {field.name: f"posepress_part_{field.name}" for field in fields}
        sizes = constant(f"posepress_split_{fields[0].name}", [field.channels for field in fields])
        axis = fields[0].axes.index("C") + 1
        graph.node.append(helper.make_node("Split", [source, sizes], [*names.values()], axis=axis, name=f"posepress_{source}"))
    for field in fields:
        name = names[field.name]
        if len(fields) == 1 and _unlike(field, values):
            shape = constant(f"posepress_shape_{field.name}", [0 if _batched(values, 1) else 1, -1, field.channels])
            reshaped = f"posepress_reshaped_{field.name}"
            graph.node.append(helper.make_node("Reshape", [name, shape], [reshaped], name=reshaped))
            name = reshaped
        kind = "Sigmoid" if field.activation else "Identity"
        graph.node.append(helper.make_node(kind, [name], [field.name], name=f"posepress_{field.name}"))


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors, in subgraphs, too."""
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner, names)
    for tensor in (*graph.initializer, *graph.value_info, *graph.output):
        tensor.name = names.get(tensor.name, tensor.name)
