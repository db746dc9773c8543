"""Place quantize / dequantize (Q/DQ) nodes so that each runtime can fuse them, from one set of scales.

TensorRT needs symmetric int8 at the inputs of operators and at one input of a residual add. It allows no Q/DQ between a
convolution and its activation. ONNX Runtime's CPU kernels need uint8 at both ends of every operator. Both can use equal
scales: uint8 has the zero point 0 if a tensor is never negative and 128 otherwise, which gives an equal grid.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline.quantization.graph import CARRIERS, LINEAR, WEIGHTED, Graph, output_axis
from pipeline.quantization.place import Placement, check_shared, place
from pipeline.quantization.transposed import as_convolutions
from pipeline.quantization.weights import LEAST_SCALE, WeightScale, quantized

FP8_GREATEST = 448.0  # greatest finite number of E4M3


@dataclass(frozen=True)
class Scales:
    """The scales of a quantized network. Both runtime variants are written from them.

    Attributes:
        activations: the step between integers of every placed tensor.
        lows: the least value of every placed tensor.
        weight_scale: method that chooses the scales of weights.
        most_weight: the greatest integer of a weight.
        least: the smallest allowed scale. It is 2^-14 if scales are written as half-precision numbers.
    """

    activations: Mapping[str, float]
    lows: Mapping[str, float]
    weight_scale: WeightScale = "max"
    most_weight: int = 127
    least: float = LEAST_SCALE

    @classmethod
    def of(
        cls,
        thresholds: Mapping[str, float],
        lows: Mapping[str, float],
        placement: Placement,
        weight_scale: WeightScale = "max",
        most_weight: int = 127,
        least: float = LEAST_SCALE,
        greatest: float = 127,
    ) -> "Scales":
        """Scales from the thresholds, which `greatest` represents.

        Tensors that share a scale get the greatest of theirs. A tensor of zeros has the scale 1.
        """
        peaks, lowest = dict(thresholds), dict(lows)
        for group in placement.shared:
            peaks |= dict.fromkeys(group, max(thresholds[name] for name in group))
            lowest |= dict.fromkeys(group, min(lows[name] for name in group))
        steps = {n: float(np.float32(max(peak / greatest, least) if peak > 0 else 1.0)) for n, peak in peaks.items()}
        return cls(steps, lowest, weight_scale, most_weight, least)

    @property
    def clamped(self) -> list[str]:
        """Tensors with a scale that was raised to the smallest allowed one."""
        return sorted(name for name, step in self.activations.items() if step == float(np.float32(self.least)))


class _Writer:
    """Rebuilds a model's node list with Q/DQ.

    Attributes:
        chosen: the tensors that are quantized in this runtime variant.
        operators: the types of operators that compute in integers.
        held: nodes that stay in float.
    """

    def __init__(self, model: onnx.ModelProto, placement: Placement, scales: Scales, flavour: str, fp8: bool) -> None:
        self.graph, self.placement = Graph(model), placement
        self.scales, self.flavour, self.fp8 = scales, flavour, fp8
        self.for_cpu = flavour == "onnxruntime"
        self.chosen = set(placement.ends if self.for_cpu else (*placement.inputs, *placement.skips.values()))
        more = ("Conv", "Add", *LINEAR) if self.for_cpu else WEIGHTED
        self.operators = {*more, "Concat", *CARRIERS}
        self.held = placement.excluded | placement.slow if self.for_cpu else placement.excluded
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.emitted: set[str] = set()

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def weights(self, node: onnx.NodeProto) -> str:
        """The dequantized weights of a layer: int8 with a scale for each channel, or FP8 with a single scale."""
        name = node.input[1]
        out = f"{name}_dequantized"
        if self.fp8 and f"{name}_fp8" not in self.constants:
            values, how = self.graph.value(name), self.scales
            step = np.float32(max(float(np.abs(values).max()) / FP8_GREATEST, how.least))
            parts = [
                self.constant(f"{name}_fp8", (values / step).astype(float8_e4m3fn)),
                self.constant(f"{name}_scale", np.array(step)),
                self.constant(f"{name}_zero", np.zeros((), float8_e4m3fn)),
            ]
            self.nodes.append(helper.make_node("DequantizeLinear", parts, [out], name=f"{name}_DQ"))
        elif not self.fp8 and f"{name}_int8" not in self.constants:
            axis, how = output_axis(node), self.scales
            integers, steps = quantized(self.graph.value(name), axis, how.weight_scale, how.most_weight, how.least)
            parts = [
                self.constant(f"{name}_int8", integers),
                self.constant(f"{name}_scale", steps),
                self.constant(f"{name}_zero", np.zeros(len(steps), np.int8)),
            ]
            self.nodes.append(helper.make_node("DequantizeLinear", parts, [out], name=f"{name}_DQ", axis=axis))
        return out

    def zero_point(self, tensor: str) -> int:
        """The zero point: 128 for an unsigned tensor with negative values, else 0."""
        return 128 if self.flavour == "onnxruntime" and self.scales.lows[tensor] < 0 else 0

    def quantize(self, source: str, tensor: str, bounds: tuple[float, float] | None) -> None:
        """Add Q and DQ of `source` with the scale of `tensor`, and between them, if needed, a clip of the integers."""
        dtype = float8_e4m3fn if self.fp8 else np.uint8 if self.flavour == "onnxruntime" else np.int8
        zero = self.zero_point(tensor)
        scale = np.float32(self.scales.activations[tensor])
        parts = [self.constant(f"{tensor}_scale", np.array(scale)), self.constant(f"{tensor}_zero", np.array(zero, dtype))]
        held = f"{tensor}_quantized"
        self.nodes.append(helper.make_node("QuantizeLinear", [source, *parts], [held], name=f"{tensor}_Q"))
        if bounds is not None:
            least, most = (dtype(np.clip(np.rint(bound / float(scale)) + zero, 0, 255)) for bound in bounds)
            ends = [self.constant(f"{tensor}_least", np.array(least)), self.constant(f"{tensor}_most", np.array(most))]
            self.nodes.append(helper.make_node("Clip", [held, *ends], [f"{held}_clipped"], name=f"{tensor}_clip"))
            held = f"{held}_clipped"
        self.nodes.append(helper.make_node("DequantizeLinear", [held, *parts], [f"{tensor}_dequantized"], name=f"{tensor}_DQ"))
        self.emitted.add(tensor)

    def in_float(self, tensor: str) -> str:
        """A copy of a dequantized tensor, for a layer that stays in float between quantized neighbours.

        Without the copy, ONNX Runtime would quantize the weights of a float layer between a DQ and a Q by itself, with
        a single scale.
        """
        copy = f"{tensor}_in_float"
        if copy not in self.emitted:
            self.nodes.append(helper.make_node("Sum", [f"{tensor}_dequantized"], [copy], name=copy))
            self.emitted.add(copy)
        return copy

    def fuses(self, node: onnx.NodeProto) -> bool:
        """Whether the runtime fuses a node with the Q and DQ around it into an integer operator."""
        return node.op_type in self.operators and node.name not in self.held

    def computed(self, tensor: str) -> None:
        """Emit the Q/DQ pair of a tensor that has just been computed.

        A float activation between an operator and its Q would keep the operator in float. With a zero point of 0, the Q
        already acts as a ReLU; other activations clip the integers.
        """
        graph = self.graph
        bounds = graph.bounds(tensor) if self.for_cpu else None
        before = graph.producer[tensor].input[0] if bounds else tensor
        maker = graph.producer.get(before)
        done = bounds == (0.0, math.inf) and self.zero_point(tensor) == 0
        fused = maker is not None and self.fuses(maker)
        if bounds and not done and fused and tensor not in graph.outputs and len(graph.consumers[before]) == 1:
            self.nodes.pop()  # removes the float activation
            self.quantize(before, tensor, bounds)
        elif self.for_cpu and maker is not None and maker.op_type in CARRIERS and maker.name in self.placement.slow:
            # ONNX Runtime moves a Q before the pooling that it follows; the copy keeps it behind.
            self.nodes.append(helper.make_node("Sum", [tensor], [f"{tensor}_copied"], name=f"{tensor}_copied"))
            self.quantize(f"{tensor}_copied", tensor, None)
        else:
            self.quantize(tensor, tensor, None)

    def rewired(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A copy of a node that reads dequantized tensors and weights."""
        copy, fused = onnx.NodeProto(), self.fuses(node)
        copy.CopyFrom(node)
        if self.for_cpu and node.op_type in CARRIERS and node.name in self.placement.slow:
            return copy
        for place_, name in enumerate(node.input):
            if name not in self.chosen or (node.op_type in WEIGHTED and place_ > 0):
                continue
            residual = not self.for_cpu and node.op_type == "Add" and self.placement.skips.get(node.name) == name
            if not (residual or fused or (self.for_cpu and name in self.emitted)):
                continue
            quantized_after = self.graph.activated(node.output[0]) in self.chosen
            if not (self.for_cpu and node.op_type in WEIGHTED and quantized_after and not fused):
                copy.input[place_] = f"{name}_dequantized"
            elif name in self.graph.producer:  # the network's input is a float tensor without a Q/DQ pair
                copy.input[place_] = self.in_float(name)
        if fused and node.op_type in WEIGHTED and node.input[0] in self.placement.inputs:
            copy.input[1] = self.weights(node)
        return copy

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


def _without_transposed(
    model: onnx.ModelProto, placement: Placement, scales: Scales
) -> tuple[onnx.ModelProto, Placement, Scales]:
    """The network with its quantized transposed convolutions as convolutions, with their placement and scales."""
    wanted = {node.name for node in placement.quantized(model)} - placement.slow
    made, same = as_convolutions(model, wanted)
    if not same:
        return model, placement, scales
    more = [{new: values[old] for new, old in same.items()} for values in (scales.activations, scales.lows)]
    known = replace(scales, activations={**scales.activations, **more[0]}, lows={**scales.lows, **more[1]})
    return made, place(made, placement.excluded), known


def insert(model: onnx.ModelProto, placement: Placement, scales: Scales, flavour: str, fp8: bool = False) -> onnx.ModelProto:
    """Write one runtime variant of an INT8 or FP8 network.

    Args:
        model: the float network.
        placement: the tensors that are quantized.
        scales: the scales of every placed tensor. The greatest magnitude is 127 times the scale.
        flavour: the runtime variant, "tensorrt" or "onnxruntime".
        fp8: whether to write E4M3 numbers instead of integers, for TensorRT only.

    Returns:
        A checked model.

    Raises:
        ValueError: a concatenation would get inputs of different scales.
    """
    if flavour == "onnxruntime":
        model, placement, scales = _without_transposed(model, placement, scales)
    writer = _Writer(model, placement, scales, flavour, fp8)
    for value in model.graph.input:
        if value.name in writer.chosen:
            writer.computed(value.name)
    for node in writer.graph.nodes:
        writer.nodes.append(writer.rewired(node))
        for name in node.output:
            if name in writer.chosen:
                writer.computed(name)
    made = writer.finish()
    check_shared(made)
    return made
