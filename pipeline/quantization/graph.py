"""Analyse an ONNX graph for quantization: producers and readers of tensors, quantized tensors, shared scales."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from posepress.errors import UserError, first_line, nearest

CONVOLUTIONS = ("Conv", "ConvTranspose")
LINEAR = ("Gemm", "MatMul")
WEIGHTED = (*CONVOLUTIONS, *LINEAR)

# Operators that return values of their first input. Their inputs and outputs share a scale.
CARRIERS = ("MaxPool", "DepthToSpace", "Slice")


LEAST_OPSET = 13  # the first opset with one scale for each channel


class Graph:
    """The producer and the readers of each tensor of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {i.name: i for i in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        infos = (*model.graph.value_info, *model.graph.output, *model.graph.input)
        self.floats = {i.name for i in infos if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
        self.channels = {i.name: d[1].dim_value for i in infos if len(d := i.type.tensor_type.shape.dim) == 4}
        for node in self.nodes:  # shape inference fails on computed shapes, but the weights give the number of channels
            if node.op_type in CONVOLUTIONS and node.input[1] in self.constants:
                sides = (*node.input[:1], *node.output[:1])
                known = zip(sides, channels_of(node, self.constants[node.input[1]].dims), strict=True)
                self.channels |= {name: count for name, count in known if not self.channels.get(name)}
        self.producer = {o: n for n in self.nodes for o in n.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def value(self, name: str) -> NDArray[Any]:
        """A constant."""
        return numpy_helper.to_array(self.constants[name])

    def weights(self, node: onnx.NodeProto) -> NDArray[np.float32] | None:
        """The constant weights of a convolution, or of a linear layer that computes activations x weights + bias; else None."""
        if node.op_type not in WEIGHTED or node.input[1] not in self.constants or node.input[0] in self.constants:
            return None
        if node.op_type in LINEAR:
            scaled = any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
            if len(self.constants[node.input[1]].dims) != 2 or scaled or attribute(node, "transA", 0):
                return None
        return np.asarray(self.value(node.input[1]), np.float32)

    def activated(self, tensor: str) -> str:
        """The tensor behind the activations that fuse with the operator that computes `tensor`."""
        while tensor not in self.outputs:
            readers = self.consumers.get(tensor, [])
            if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
                break
            tensor = readers[0].output[0]
        return tensor

    def bounds(self, tensor: str) -> tuple[float, float] | None:
        """The bounds of a tensor if its producer is a ReLU or a Clip with constant bounds; else None."""
        node = self.producer.get(tensor)
        if node is not None and node.op_type == "Relu":
            return 0.0, math.inf
        if node is None or node.op_type != "Clip" or len(node.input) < 3:
            return None
        if any(name not in self.constants for name in node.input[1:3]):
            return None
        low, high = (float(self.value(name).item()) for name in node.input[1:3])
        return low, high

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """The inputs of a node that are not constant."""
        names = node.input[:1] if node.op_type in WEIGHTED else node.input
        return [name for name in names if name and name not in self.constants]


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """An attribute of a node."""
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of the output channels in the weights of a node of `WEIGHTED`."""
    return int(node.op_type != "Conv" and not attribute(node, "transB", 0))


def channels_of(node: onnx.NodeProto, dims: Sequence[int]) -> tuple[int, int]:
    """The numbers of input and output channels of a convolution with weights of these dimensions."""
    groups = int(attribute(node, "group", 1))
    return (dims[1] * groups, dims[0]) if node.op_type == "Conv" else (dims[0], dims[1] * groups)


def unshared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every layer has its own weights and bias, so that each can be rescaled separately.

    This is needed because simplifiers merge equal constants, including biases of zeros.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {i.name: i for i in made.graph.initializer}
    readers = Counter(name for node in made.graph.node for name in node.input)
    taken: set[str] = set()
    for node in made.graph.node:
        for n, name in enumerate(node.input):
            if n == 0 or node.op_type not in WEIGHTED or name not in constants or readers[name] == 1:
                continue
            if name in taken:
                copy = made.graph.initializer.add()
                copy.CopyFrom(constants[name])
                copy.name = node.input[n] = f"{name}_of_{node.output[0]}"
            taken.add(name)
    return made


def with_opset(model: onnx.ModelProto, least: int, what: str) -> onnx.ModelProto:
    """A network with an opset that supports a precision: the given one, or a copy that was raised from opset 13 or later.

    Args:
        model: a float network.
        least: the lowest sufficient opset.
        what: name of the precision that needs it, for the message.

    Raises:
        UserError: the opset is below 13, or cannot be raised.
    """
    given = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if given >= least:
        return model
    try:
        if given < LEAST_OPSET:
            raise UserError(f"from {LEAST_OPSET} it could")  # noqa: TRY301
        made = onnx.version_converter.convert_version(model, least)
        onnx.checker.check_model(made)
        return onnx.shape_inference.infer_shapes(made)
    except Exception as error:
        why = first_line(error)
        raise UserError(
            f"the network is of opset {given}, and {what} needs opset {least}, but it cannot be raised to that ({why}); "
            f"export it with opset {least} or later, or choose precision=fp32"
        ) from error


def load(file: Path) -> onnx.ModelProto:
    """Read an ONNX file with the shapes of its tensors inferred.

    Raises:
        UserError: a batch norm is not folded into the convolution before it, although it could be.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(file))
    names: set[str] = set()
    for n, node in enumerate(model.graph.node):  # the code below identifies nodes by name
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{n}"
        names.add(node.name)
    _hold_constants(model)
    if half := _halves(model):
        raise UserError(
            f"{file}: the network computes in 16 bits ('{half[0]}'), and precisions are written into float32 networks alone; "
            "export it in float32, or choose precision=fp32, which takes it as it is"
        )
    graph = Graph(model)
    left = [
        node.name
        for node in graph.nodes
        if node.op_type == "BatchNormalization"
        and (maker := graph.producer.get(node.input[0])) is not None
        and maker.op_type in CONVOLUTIONS
        and len(graph.consumers[node.input[0]]) == 1
    ]
    if left:
        raise UserError(
            f"{file}: the batch norm '{left[0]}' is not folded into a convolution, so its neighbours could not be INT8; "
            "export or simplify the network again (onnxsim folds them)"
        )
    return model


def _halves(model: onnx.ModelProto) -> list[str]:
    """Names of tensors of 16 bits that are no input of the network."""
    narrow = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    values = [v.name for v in (*model.graph.value_info, *model.graph.output) if v.type.tensor_type.elem_type in narrow]
    return [*values, *(tensor.name for tensor in model.graph.initializer if tensor.data_type in narrow)]


def _hold_constants(model: onnx.ModelProto) -> None:
    """Turn Constant nodes into initializers, because weights are read from there."""
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    if len(kept) < len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)


def matching(model: onnx.ModelProto, patterns: Iterable[str], option: str) -> set[str]:
    """Names of the nodes that shell patterns match.

    Raises:
        UserError: a pattern matches no node.
    """
    names = [node.name for node in model.graph.node]
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        some = {name for name in names if fnmatchcase(name, pattern)}
        if not some:
            some_names = f"; its nodes are named like {', '.join(names[:3])}"
            raise UserError(f"{option}: no node matches '{pattern}'{nearest(pattern, names) or some_names}")
        found |= some
    return found


def of_types(model: onnx.ModelProto, types: Iterable[str], option: str) -> set[str]:
    """Names of the nodes of some types of operators.

    Raises:
        UserError: a type is no ONNX operator. An operator that the network lacks is fine: a sweep has many networks.
    """
    chosen = {types} if isinstance(types, str) else set(types)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    for name in sorted(chosen - known - {node.op_type for node in model.graph.node}):
        raise UserError(f"{option}: '{name}' is no ONNX operator{nearest(name, sorted(known)) or '; give names like MatMul'}")
    return {node.name for node in model.graph.node if node.op_type in chosen}
