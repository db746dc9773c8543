"""bfloat16 by casts. It has float32's range and 8 bits of precision, so it cannot overflow and needs no calibration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.contracts import CalibrationFeed
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe
from pipeline.quantization.graph import Graph, load, with_opset

_SIZES = {"Resize": (1, 2, 3)}  # inputs that hold sizes and scales stay float32
# These operators are refused by TensorRT's parser or builder in bfloat16, or return float32 numbers for other types.
_IN_FLOAT = frozenset(
    ("Celu", "ConvTranspose", "HardSwish", "LpNormalization", "LpPool", "Mish", "Cast", "Constant", "ConstantOfShape", "Range")
)


@dataclass(frozen=True)
class Bf16:
    """bfloat16 weights and activations for TensorRT. Inputs, outputs and operators without bfloat16 stay float32.

    ONNX Runtime has no bfloat16 kernels for CPUs. Its runtime variant computes in float32 and rounds the weights and every
    activation. This shows the accuracy, but not the speed.
    """

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both runtime variants."""
        model = with_opset(load(onnx_file), 13, "BF16")
        candidate = Candidate({"tensorrt": convert(model), "onnxruntime": simulated(model)})
        candidate.write(out)
        kept = {"kept_fp32": names} if (names := sorted(node.name for node in _kept(Graph(model)))) else {}
        return {"precision": "bf16", **kept, **Probe.summary(probe, candidate)}


def _kept(graph: Graph) -> list[onnx.NodeProto]:
    """Nodes that stay in float32."""
    return [node for node in graph.nodes if node.op_type in _IN_FLOAT and graph.floats.intersection(node.output)]


def _weights(graph: Graph) -> set[str]:
    """Names of the float constants that operators in bfloat16 read; they become bfloat16."""
    kept = {node.name for node in _kept(graph)}
    read = {
        name
        for node in graph.nodes
        for n, name in enumerate(node.input)
        if node.name not in kept and n not in _SIZES.get(node.op_type, ())
    }
    sizes = {name for node in graph.nodes for n, name in enumerate(node.input) if n in _SIZES.get(node.op_type, ())}
    floats = {name for name, value in graph.constants.items() if value.data_type == TensorProto.FLOAT}
    return (floats & read) - sizes


def _cast(source: str, target: str, to: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=target, to=to)


def convert(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network that computes in bfloat16, with casts at its input, its outputs and around the nodes that stay in float32.

    Args:
        model: a float network with inferred shapes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph, known = made.graph, Graph(model)
    weights, kept = _weights(known), {node.name for node in _kept(known)}
    for tensor in graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), tensor.name))
    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    outputs = {value.name for value in graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    inside = {name: f"{name}_bf16" for name in (*floats, *outputs)}
    nodes = [
        helper.make_node("Cast", [name], [inside[name]], name=f"{name}_to_bf16", to=TensorProto.BFLOAT16) for name in floats
    ]
    exact: dict[str, str] = {}  # for each bfloat16 tensor that was cast, the float32 tensor
    for node in graph.node:
        before, after = [], []
        for n, name in enumerate(node.input):
            node.input[n] = inside.get(name, name)
            if n in _SIZES.get(node.op_type, ()):
                node.input[n] = exact.get(name, name)
            elif node.name in kept and (name in weights or name in known.floats):
                if name not in exact:
                    exact[name] = f"{name}_in_float"
                    before.append(_cast(inside.get(name, name), exact[name], TensorProto.FLOAT))
                node.input[n] = exact[name]
        for n, name in enumerate(node.output):
            node.output[n] = inside.get(name, name)
            if node.name in kept and name in known.floats:
                node.output[n] = exact[name] = f"{name}_exact"
                after.append(_cast(exact[name], inside.get(name, name), TensorProto.BFLOAT16))
        nodes += [*before, node, *after]
    nodes += [
        helper.make_node("Cast", [inside[name]], [name], name=f"{name}_to_float", to=TensorProto.FLOAT)
        for name in (value.name for value in graph.output if value.name in outputs)
    ]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(copies)
    onnx.checker.check_model(made)
    return made


def simulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 network that simulates bfloat16: its weights and every activation are rounded to bfloat16.

    Args:
        model: a float network with inferred shapes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    known = Graph(model)
    weights, kept = _weights(known), {node.name for node in _kept(known)}
    exact = {name for node in _kept(known) for name in node.output if name in known.floats}
    for tensor in made.graph.initializer:
        if tensor.name in weights:
            rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    given = [value.name for value in made.graph.input if value.name in known.floats]
    rounded_as = {name: f"{name}_rounded" for name in given}
    nodes = [one for name in given for one in _rounding(name, f"{name}_rounded")]
    for node in made.graph.node:
        for n, name in enumerate(node.input):
            sized = n in _SIZES.get(node.op_type, ())
            node.input[n] = f"{name}_exact" if name in exact and (sized or node.name in kept) else rounded_as.get(name, name)
        after = []
        for n, name in enumerate(node.output):
            if name in known.floats:
                node.output[n] = f"{name}_exact"
                after += _rounding(f"{name}_exact", name)
        nodes += [node, *after]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:], made.graph.value_info[:]
    made.graph.node.extend(copies)
    onnx.checker.check_model(made)
    return made


def _rounding(source: str, target: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Cast", [source], [f"{target}_bf16"], name=f"{target}_to_bf16", to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [f"{target}_bf16"], [target], name=f"{target}_to_float", to=TensorProto.FLOAT),
    ]
