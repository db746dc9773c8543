"""Quantize / dequantize (Q/DQ) nodes, placed as each runtime fuses them, from one set of scales.

TensorRT wants symmetric int8 at the inputs of operators, nothing between a convolution and its activation, and one input of
a residual add. ONNX Runtime's CPU kernels want uint8 and both ends of every operator. The scales are the same: uint8 has
zero point 0 where a tensor is never negative and 128 elsewhere, which is the same grid.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Flavour = Literal["tensorrt", "onnxruntime"]

_WEIGHTED = ("Conv", "ConvTranspose")
_LEAST_SCALE = 2.0**-100  # far from the least normal float32 number


class Graph:
    """Who makes and who reads each tensor of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = {i.name: i for i in model.graph.initializer}
        self.outputs = {o.name for o in model.graph.output}
        infos = (*model.graph.value_info, *model.graph.output, *model.graph.input)
        self.floats = {i.name for i in infos if i.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
        self.producer = {o: n for n in self.nodes for o in n.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def activated(self, tensor: str) -> str:
        """The tensor after the activations that fuse with the operator that makes `tensor`."""
        while tensor not in self.outputs:
            readers = self.consumers.get(tensor, [])
            if len(readers) != 1 or readers[0].op_type not in ("Relu", "Clip"):
                break
            tensor = readers[0].output[0]
        return tensor

    def bounds(self, tensor: str) -> tuple[float, float] | None:
        """The bounds of the activation that makes a tensor, if it is a ReLU or a Clip with constant bounds."""
        node = self.producer.get(tensor)
        if node is not None and node.op_type == "Relu":
            return 0.0, math.inf
        if node is None or node.op_type != "Clip" or len(node.input) < 3:
            return None
        bounds = [self.constants.get(name) for name in node.input[1:3]]
        if any(bound is None for bound in bounds):
            return None
        low, high = (float(numpy_helper.to_array(bound)) for bound in bounds if bound is not None)
        return low, high

    def activations(self, node: onnx.NodeProto) -> list[str]:
        """A node's inputs that are computed."""
        names = node.input[:1] if node.op_type in _WEIGHTED else node.input
        return [name for name in names if name and name not in self.constants]


@dataclass(frozen=True)
class Placement:
    """Which tensors are quantized.

    Attributes:
        inputs: tensors with Q/DQ before an operator (int8 for TensorRT).
        ends: those and the outputs of operators (uint8 for ONNX Runtime).
        skips: for each residual add, the tensor that TensorRT's flavour quantizes.
        shared: sets of tensors with one scale: inputs and output of a concatenation.
    """

    inputs: tuple[str, ...]
    ends: tuple[str, ...]
    skips: Mapping[str, str]
    shared: tuple[frozenset[str], ...]


def place(model: onnx.ModelProto, exclude: Iterable[str] = ()) -> Placement:
    """Decide what is quantized.

    Args:
        model: a float network with inferred shapes.
        exclude: names of nodes that stay in float.
    """
    graph = Graph(model)
    skip = set(exclude)
    inputs: dict[str, None] = {}
    ends: dict[str, None] = {}
    skips: dict[str, str] = {}
    groups: list[set[str]] = []
    for node in graph.nodes:
        if node.name in skip:
            continue
        computed = graph.activations(node)
        if not graph.floats.issuperset(computed):  # arithmetic on shapes
            continue
        if node.op_type == "Conv":
            inputs[computed[0]] = ends[computed[0]] = None
            made = graph.activated(node.output[0])
            if made not in graph.outputs:
                ends[made] = None
        elif node.op_type == "ConvTranspose":
            inputs[computed[0]] = None
        elif node.op_type == "Concat" and len(computed) == len(node.input) and node.output[0] not in graph.outputs:
            for name in (*computed, node.output[0]):
                inputs[name] = ends[name] = None
            groups.append({*computed, node.output[0]})
        elif node.op_type == "Add" and len(computed) == 2:
            made = graph.activated(node.output[0])
            for name in (*computed, made):
                if name not in graph.outputs:
                    ends[name] = None
            direct = [
                n
                for n in computed
                if n in graph.producer and graph.producer[n].op_type == "Conv" and len(graph.consumers[n]) == 1
            ]
            skips[node.name] = next((n for n in computed if n not in direct[:1]), computed[1])
    return Placement(tuple(inputs), tuple(ends), skips, tuple(_joined(groups)))


def _joined(groups: list[set[str]]) -> list[frozenset[str]]:
    """Sets that share a member become one."""
    joined: list[set[str]] = []
    for group in groups:
        touching = [other for other in joined if other & group]
        joined = [other for other in joined if not other & group]
        joined.append(group.union(*touching))
    return [frozenset(group) for group in joined]


def weight_scales(weights: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Symmetric per-channel scales of a weight tensor; 1 for a channel of zeros."""
    peak = np.abs(weights).max(axis=tuple(k for k in range(weights.ndim) if k != axis))
    return np.where(peak > 0, np.maximum(peak / 127, _LEAST_SCALE), 1.0).astype(np.float32)


def activation_scales(thresholds: Mapping[str, float], placement: Placement) -> dict[str, float]:
    """One scale a tensor, the greatest of its set where scales are shared; 1 for a tensor of zeros."""
    greatest = dict(thresholds)
    for group in placement.shared:
        peak = max(thresholds[name] for name in group)
        greatest |= dict.fromkeys(group, peak)
    return {name: float(np.float32(max(peak / 127, _LEAST_SCALE) if peak > 0 else 1.0)) for name, peak in greatest.items()}


class _Writer:
    """Rebuilds a model's node list with Q/DQ."""

    def __init__(
        self, model: onnx.ModelProto, scales: Mapping[str, float], lows: Mapping[str, float], flavour: Flavour
    ) -> None:
        self.graph = Graph(model)
        self.scales, self.lows, self.flavour = scales, lows, flavour
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def weights(self, node: onnx.NodeProto) -> str:
        """The dequantized weights of a convolution, int8 with a scale a channel."""
        name = node.input[1]
        out = f"{name}_dequantized"
        if f"{name}_int8" not in self.constants:
            values = numpy_helper.to_array(self.graph.constants[name])
            axis = 0 if node.op_type == "Conv" else 1
            scales = weight_scales(values, axis)
            shape = [-1 if k == axis else 1 for k in range(values.ndim)]
            integers = np.clip(np.rint(values / scales.reshape(shape)), -127, 127).astype(np.int8)
            parts = [
                self.constant(f"{name}_int8", integers),
                self.constant(f"{name}_scale", scales),
                self.constant(f"{name}_zero", np.zeros(len(scales), np.int8)),
            ]
            self.nodes.append(helper.make_node("DequantizeLinear", parts, [out], name=f"{name}_DQ", axis=axis))
        return out

    def zero_point(self, tensor: str) -> int:
        """128 for an unsigned tensor that is negative somewhere, else 0."""
        return 128 if self.flavour == "onnxruntime" and self.lows[tensor] < 0 else 0

    def quantize(self, source: str, tensor: str, bounds: tuple[float, float] | None) -> None:
        """Q, perhaps a clip of the integers to real bounds, and DQ of `source` with the scale of `tensor`."""
        dtype = np.uint8 if self.flavour == "onnxruntime" else np.int8
        zero = self.zero_point(tensor)
        scale = np.float32(self.scales[tensor])
        parts = [self.constant(f"{tensor}_scale", np.array(scale)), self.constant(f"{tensor}_zero", np.array(zero, dtype))]
        held = f"{tensor}_quantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *parts], [held], name=f"{tensor}_Q"))
        if bounds is not None:
            least, most = (dtype(np.clip(np.rint(bound / float(scale)) + zero, 0, 255)) for bound in bounds)
            ends = [self.constant(f"{tensor}_least", np.array(least)), self.constant(f"{tensor}_most", np.array(most))]
            self.nodes.append(helper.make_node("Clip", [held, *ends], [f"{held}_clipped"], name=f"{tensor}_clip"))
            held = f"{held}_clipped"
        self.nodes.append(helper.make_node("DequantizeLinear", [held, *parts], [f"{tensor}_dequantized"], name=f"{tensor}_DQ"))

    def finish(self) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        every = {**self.graph.constants, **self.constants}
        model.graph.initializer.extend(tensor for name, tensor in every.items() if name in used)
        onnx.checker.check_model(model)
        return model


def insert(
    model: onnx.ModelProto,
    placement: Placement,
    scales: Mapping[str, float],
    lows: Mapping[str, float],
    flavour: Flavour,
    exclude: Iterable[str] = (),
) -> onnx.ModelProto:
    """Write one flavour of an INT8 network.

    Args:
        model: the float network.
        placement: what is quantized.
        scales: of every placed tensor; a magnitude of 127 * scale is the greatest.
        lows: the least value of every placed tensor.
        flavour: "tensorrt" or "onnxruntime".
        exclude: names of nodes that stay in float.

    Returns:
        A checked model.
    """
    writer = _Writer(model, scales, lows, flavour)
    graph = writer.graph
    skip = set(exclude)
    for_cpu = flavour == "onnxruntime"
    chosen = set(placement.ends if for_cpu else (*placement.inputs, *placement.skips.values()))
    operators = {"Conv", "Add", "Concat"} if for_cpu else {"Conv", "ConvTranspose", "Concat"}

    def quantize(tensor: str) -> None:
        """Emit the pair of a tensor that now exists.

        A float activation between an operator and its Q keeps the operator in float, but for a ReLU that the zero point 0
        already does: the others are done on the integers.
        """
        bounds = graph.bounds(tensor) if for_cpu else None
        before = graph.producer[tensor].input[0] if bounds else tensor
        done = bounds == (0.0, math.inf) and writer.zero_point(tensor) == 0
        if bounds and not done and tensor not in graph.outputs and len(graph.consumers[before]) == 1:
            writer.nodes.pop()  # the float activation
            writer.quantize(before, tensor, bounds)
        else:
            writer.quantize(tensor, tensor, None)

    for value in model.graph.input:
        if value.name in chosen:
            quantize(value.name)
    for node in graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        held = node.name in skip
        for place_, name in enumerate(node.input):
            if name not in chosen or (node.op_type in _WEIGHTED and place_ > 0):
                continue
            residual = not for_cpu and node.op_type == "Add" and placement.skips.get(node.name) == name
            if residual or (node.op_type in operators and not held) or (for_cpu and f"{name}_dequantized" in _made(writer)):
                copy.input[place_] = f"{name}_dequantized"
        if node.op_type in operators & set(_WEIGHTED) and not held:
            copy.input[1] = writer.weights(node)
        writer.nodes.append(copy)
        for name in node.output:
            if name in chosen:
                quantize(name)
    return writer.finish()


def _made(writer: _Writer) -> set[str]:
    return {f"{tensor.removesuffix('_zero')}_dequantized" for tensor in writer.constants if tensor.endswith("_zero")}
