"""Checks of a network and of options against the installed TensorRT."""

from collections.abc import Iterable, Mapping
from typing import Any

from posepress.errors import UserError, nearest
from posepress.spec import NetworkSpec

_BF16_FROM, _FP8_FROM = 8.0, 8.9  # lowest compute capability that supports the type


def member(trt: Any, kind: str, name: str, option: str) -> Any:
    """Return a member of an enum by its name, in upper or lower case.

    Raises:
        UserError: this version of TensorRT has no such member.
    """
    owner = getattr(trt, kind)
    found = getattr(owner, str(name).upper(), None)
    if found is None:
        known = _names(owner)
        raise UserError(
            f"backend.{option}={name}: TensorRT {trt.__version__} has no {kind} of this name"
            f"{nearest(str(name).upper(), known)}; it has {', '.join(n.lower() for n in known)}"
        )
    return found


def _names(owner: Any) -> list[str]:
    members: Iterable[str] = getattr(owner, "__members__", ())
    return sorted(members)


# Operators of ONNX that TensorRT's parser looks for among the plugins.
BY_PLUGIN = ("DeformConv",)


def check_plugins(trt: Any, model: Any, file: str) -> None:
    """Check that a plugin is loaded for every operator that TensorRT's parser does not implement.

    Raises:
        UserError: no plugin has an operator of the network.
    """
    known = {str(creator.name) for creator in trt.get_plugin_registry().all_creators}
    for node in model.graph.node:
        own = node.domain in ("", "ai.onnx") and node.op_type not in BY_PLUGIN
        native = own or node.op_type.startswith("TRT_")  # the parser itself implements these
        if not native and node.op_type not in known:
            raise UserError(
                f"{file}: no plugin has the operator {node.op_type} (of the node '{node.name}'){nearest(node.op_type, known)}; "
                "name its library in backend.plugins"
            )


def check_types(trt: Any, model: Any, gpu: Mapping[str, str]) -> None:
    """Check that TensorRT and the GPU support FP8 and bfloat16, if the network uses them.

    Raises:
        UserError: TensorRT or the GPU does not support a type of the network.
    """
    from onnx import TensorProto

    kinds = {tensor.data_type for tensor in model.graph.initializer}
    if TensorProto.BFLOAT16 in kinds and float(gpu["sm"]) < _BF16_FROM:
        raise UserError(
            f"precision=bf16: {gpu['name']} has SM {gpu['sm']}, and bfloat16 begins at SM {_BF16_FROM}; choose precision=fp16"
        )
    if TensorProto.FLOAT8E4M3FN in kinds:
        if not hasattr(trt.DataType, "FP8"):
            raise UserError(f"precision=fp8: TensorRT {trt.__version__} has no FP8; choose precision=int8")
        if float(gpu["sm"]) < _FP8_FROM:
            raise UserError(
                f"precision=fp8: {gpu['name']} has SM {gpu['sm']}, and FP8 begins at SM {_FP8_FROM}; choose precision=int8"
            )


def reason_of(error: Any, model: Any) -> str:
    """Return the parser's message, with the node, its operator and the torch module from which it was exported."""
    name, words = error.node_name(), f"{error.desc()}"
    if not name:
        return words
    module = _module(model, name)
    return f"{words} (at '{name}', {error.node_operator()}" + (f", of the torch module {module})" if module else ")")


def _module(model: Any, name: str) -> str:
    """Return the torch module of a node's weights, or of the nearest weights before it.

    The exporter names weights after their modules.
    """
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer if ".weight" in tensor.name}
    makers = {output: node for node in graph.node for output in node.output}
    waiting, seen = [node for node in graph.node if node.name == name], set()
    while waiting:
        node = waiting.pop(0)
        for tensor in node.input:
            if tensor in weights:
                return str(tensor).removeprefix("network.").partition(".weight")[0]
            if tensor in makers and tensor not in seen:
                seen.add(tensor)
                waiting.append(makers[tensor])
    return ""


def check_tensors(trt: Any, engine: Any, where: str, spec: NetworkSpec, tensors: Mapping[str, str]) -> dict[str, str]:
    """Compare the tensors of an engine that another program built with a description.

    Args:
        trt: the module of TensorRT.
        engine: the loaded engine.
        where: beginning of the messages.
        spec: the description.
        tensors: names of the engine's tensors by the name of input or field, where they differ.

    Returns:
        The engine's tensor of the input and of each field.

    Raises:
        UserError: a tensor is missing or left over, or has another type, format or shape.
    """
    names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
    wanted = {name: tensors.get(name, name) for name in (spec.input.name, *(field.name for field in spec.fields))}
    missing = [tensor for tensor in wanted.values() if tensor not in names]
    if missing:
        raise UserError(
            f"{where}: has no tensor {', '.join(missing)}; its tensors are {', '.join(names)}: name them with "
            f"model.tensors={{{missing[0]}: ...}}"
        )
    further = [name for name in names if name not in wanted.values()]
    if further:
        raise UserError(f"{where}: has further tensors, {', '.join(further)}; build it with the input and the fields alone")
    described = {spec.input.name: spec.input.dtype, **{field.name: field.dtype for field in spec.fields}}
    for name, tensor in wanted.items():
        kind, form = engine.get_tensor_dtype(tensor), engine.get_tensor_format(tensor)
        floats = described[name].startswith("float")
        taken = (trt.DataType.FLOAT, trt.DataType.HALF) if floats else (getattr(trt.DataType, described[name].upper(), None),)
        if kind not in taken or form != trt.TensorFormat.LINEAR:
            says = "float or half tensors" if floats else f"{described[name]} tensors, as model.spec says,"
            raise UserError(
                f"{where}: its tensor {tensor} is {kind.name} in the format {form.name}; build it with {says} "
                "in linear format (trtexec --inputIOFormats=fp32:chw --outputIOFormats=fp32:chw)"
            )
    for field in spec.fields:
        made = tuple(engine.get_tensor_shape(wanted[field.name]))
        if not field.holds(made):
            raise UserError(
                f"{where}: its tensor {wanted[field.name]} is {list(made)}, and model.spec says {field.channels} "
                f"channels, {field.form}; correct model.spec.fields"
            )
    shape, colours = tuple(engine.get_tensor_shape(wanted[spec.input.name])), spec.input.channels
    if len(shape) != 4 or shape[spec.input.axes["channels"]] != colours:
        layout = f"[B, {colours}, H, W]" if spec.input.layout == "NCHW" else f"[B, H, W, {colours}]"
        raise UserError(f"{where}: takes {shape}; only images {layout} can be evaluated, as model.spec.input says")
    return wanted
