"""Parts of an ONNX file: the files that hold its weights, and the network cut at one of its tensors."""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from pipeline.onnx_files.files import FLAVOURS, ModelFiles
from posepress.spec import SPEC_KEY, NetworkSpec, OutputSpec

_NUMERIC = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_BETWEEN = ("QuantizeLinear", "DequantizeLinear", "Cast", "Shape", "Constant")


def external_files(file: Path) -> dict[str, Path]:
    """The files beside an ONNX file that hold its weights, by their name in it; empty if the file is no ONNX file.

    A name that points outside the folder is skipped, since reading the network refuses it.
    """
    try:
        model = onnx.load(file, load_external_data=False)
    except Exception:  # noqa: BLE001 - a file that cannot be parsed names no weights
        return {}
    folder, found = file.resolve().parent, {}
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop()
        tensors = list(graph.initializer)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors]
            waiting += [attribute.g, *attribute.graphs] if attribute.HasField("g") or attribute.graphs else []
        for tensor in tensors:
            name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if name and (path := (folder / name).resolve()).is_relative_to(folder):
                found[name] = path
    return dict(sorted(found.items()))


def tensors_of(model: onnx.ModelProto, end: str) -> list[str]:
    """Outputs of convolutions, sums and similar operators on which the tensor `end` depends, in the order of the file.

    Args:
        model: the network, with inferred shapes.
        end: name of the last tensor.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    needed, waiting = {end}, [end]
    while waiting:
        maker = makers.get(waiting.pop())
        new = set() if maker is None else set(maker.input) - needed
        needed |= new
        waiting += new
    types = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    nodes = (node for node in model.graph.node if node.op_type not in _BETWEEN)
    return [name for node in nodes for name in node.output if name in needed and types.get(name) in _NUMERIC]


def cut(model: onnx.ModelProto, tensor: str, spec: NetworkSpec, folder: Path) -> ModelFiles:
    """Cut the network behind a tensor, which becomes its only field, as float32.

    Args:
        model: the network, with inferred shapes.
        tensor: one of `tensors_of`.
        spec: description of the whole network.
        folder: folder that the file is written to.
    """
    part = onnx.utils.Extractor(model).extract_model([spec.input.name], [tensor])
    value = part.graph.output[0].type.tensor_type
    if value.elem_type != TensorProto.FLOAT:
        for node in part.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"{name}_narrow" if name == tensor else name for name in names]
        part.graph.node.append(helper.make_node("Cast", [f"{tensor}_narrow"], [tensor], to=TensorProto.FLOAT))
        value.elem_type = TensorProto.FLOAT
    described = NetworkSpec(spec.input, (OutputSpec(tensor, 1, 1, axes=""),), spec.labels, spec.dynamic)
    helper.set_model_props(part, {SPEC_KEY: described.to_json()})
    file = folder / "part.onnx"
    onnx.save(part, file)
    return ModelFiles(dict.fromkeys(FLAVOURS, file))
