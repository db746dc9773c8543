"""bfloat16 by casts: float32's range with 8 bits of mantissa, so nothing overflows and nothing is calibrated."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.quantization.graph import Graph, load
from pipeline.quantization.probe import Candidate, Probe
from pipeline.specs import CalibrationFeed

_SIZES = {"Resize": (1, 2, 3)}  # inputs that say how large something becomes; they stay float32


@dataclass(frozen=True)
class Bf16:
    """bfloat16 weights and activations for TensorRT; inputs and outputs stay float32.

    ONNX Runtime's processor kernels have no bfloat16: its flavour computes in float32 and rounds weights and every
    activation, which shows the accuracy and not the speed.
    """

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both flavours."""
        model = load(onnx_file)
        candidate = Candidate({"tensorrt": convert(model), "onnxruntime": simulated(model)})
        candidate.write(out)
        return {"precision": "bf16", **Probe.summary(probe, candidate)}


def _weights(graph: Graph) -> set[str]:
    """Constants that are numbers of the network."""
    sizes = {name for node in graph.nodes for n, name in enumerate(node.input) if n in _SIZES.get(node.op_type, ())}
    return {name for name, value in graph.constants.items() if value.data_type == TensorProto.FLOAT and name not in sizes}


def convert(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network that computes in bfloat16, with casts at its input and outputs.

    Args:
        model: a float network with inferred shapes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    weights = _weights(Graph(model))
    for tensor in graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16), tensor.name))
    floats = {value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    outputs = {value.name for value in graph.output if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    inside = {name: f"{name}_bf16" for name in (*floats, *outputs)}
    nodes = [
        helper.make_node("Cast", [name], [inside[name]], name=f"{name}_to_bf16", to=TensorProto.BFLOAT16) for name in floats
    ]
    for node in graph.node:
        for names in (node.input, node.output):
            for n, name in enumerate(names):
                names[n] = inside.get(name, name)
        nodes.append(node)
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
    """The same in float32: weights and every activation are rounded to bfloat16.

    Args:
        model: a float network with inferred shapes.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    known = Graph(model)
    weights = _weights(known)
    for tensor in made.graph.initializer:
        if tensor.name in weights:
            rounded = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    given = [value.name for value in made.graph.input if value.name in known.floats]
    rounded_as = {name: f"{name}_rounded" for name in given}
    nodes = [one for name in given for one in _rounding(name, f"{name}_rounded")]
    for node in made.graph.node:
        for n, name in enumerate(node.input):
            node.input[n] = rounded_as.get(name, name)
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
