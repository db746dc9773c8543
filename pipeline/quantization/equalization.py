"""Make ranges equal before quantization, by factors that cancel: exact in float, free at run time.

A convolution's output channel can be multiplied by any positive factor if all its readers divide by this factor. The
convolution's weights and bias are multiplied, and the readers' weights are divided (Nagel et al., arXiv:1906.04721). ReLU,
pooling, resizing and concatenation pass a factor on. Channels with small values then use the full range of a shared scale.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.onnx_files.execute import computed_over
from pipeline.quantization.graph import Graph, attribute, channels_of
from pipeline.quantization.place import Placement
from pipeline.quantization.weights import quantized
from pipeline.quantization.writers import Scales
from posepress.compiled import compiled

# Operators that multiply their output by a positive factor if their input is multiplied by it.
_HOMOGENEOUS = (
    "Relu",
    "LeakyRelu",
    "PRelu",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "Resize",
    "Identity",
    "Pad",
    "Slice",
)
_GREATEST = 1e4  # greatest factor of a channel


@dataclass
class _Channels:
    """The channels that must share a factor. Each channel has a number, and the numbers of tied channels share a root."""

    graph: Graph
    parent: list[int] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)  # reasons for which a factor must be 1; empty if it may differ
    of: dict[str, NDArray[np.intp]] = field(default_factory=dict)

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def roots(self, tensor: str) -> NDArray[np.intp]:
        return np.array([self.root(number) for number in self.of[tensor]])

    def new(self, tensor: str, fixed: str = "") -> None:
        count = self.graph.channels.get(tensor, 0)
        if count:
            first = len(self.parent)
            self.parent += range(first, first + count)
            self.fixed += [fixed] * count
            self.of[tensor] = np.arange(first, first + count)

    def tie(self, one: int, other: int) -> None:
        a, b = self.root(one), self.root(other)
        if a != b:
            self.parent[b] = a
            self.fixed[a] = self.fixed[a] or self.fixed[b]

    def hold(self, tensor: str, why: str) -> None:
        """Fix the factors of a tensor at 1, for the reason `why`."""
        for number in self.of.get(tensor, ()):
            root = self.root(number)
            self.fixed[root] = self.fixed[root] or why


def _channels(graph: Graph) -> _Channels:
    """Follow channels through a graph."""
    made = _Channels(graph)
    uses = Counter(name for node in graph.nodes for name in node.input)
    for value in graph.model.graph.input:
        made.new(value.name, "the image")
    for node in graph.nodes:
        given = [name for name in graph.activations(node) if name in made.of]
        out = node.output[0]
        own = graph.weights(node) is not None and all(name in graph.constants and uses[name] == 1 for name in node.input[1:])
        if own and node.op_type == "Conv" and given:
            made.new(out)
        elif _passes(graph, node) and given and graph.channels.get(out) == len(made.of[given[0]]):
            made.of[out] = made.of[given[0]]
        elif node.op_type == "Concat" and attribute(node, "axis") in (1, -3) and len(given) == len(node.input):
            made.of[out] = np.concatenate([made.of[name] for name in given])
        elif node.op_type == "Add" and len(given) == 2 and len(made.of[given[0]]) == len(made.of[given[1]]):
            for one, other in zip(made.of[given[0]], made.of[given[1]], strict=True):
                made.tie(one, other)
            made.of[out] = made.of[given[0]]
        else:
            for name in given:
                made.hold(name, f"read by {node.op_type} '{node.name}'")
            for name in node.output:
                made.new(name, f"made by {node.op_type} '{node.name}'")
    for name in graph.outputs:
        made.hold(name, f"the output '{name}'")
    return made


def _passes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node multiplies an output channel by a positive factor if the input channel is multiplied by it."""
    if node.op_type not in _HOMOGENEOUS:
        return False
    if node.op_type == "PRelu":
        return node.input[1] in graph.constants
    if node.op_type == "Pad":
        mode = attribute(node, "mode", b"constant")
        filled = len(node.input) > 2 and node.input[2] != ""
        return mode != b"constant" or not filled or (node.input[2] in graph.constants and not graph.value(node.input[2]).any())
    return True


def equalize(
    model: onnx.ModelProto,
    placement: Placement,
    peaks: Mapping[str, NDArray[np.float32]],
    concatenations: bool = True,
    layers: bool = True,
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Rescale channels so that each fills the range of its tensor.

    Args:
        model: a float network with inferred shapes.
        placement: the tensors that will be quantized.
        peaks: greatest magnitude of each channel [C] of every placed tensor.
        concatenations: whether to rescale the inputs of concatenations.
        layers: whether to rescale tensors that only convolutions read.

    Returns:
        A model with equal results, and the numbers of rescaled "channels" and "tensors".
    """
    graph = Graph(model)
    channels = _channels(graph)
    count = len(channels.parent)
    factor = np.full(count, np.inf)
    joint = np.zeros(count, bool)
    for group in placement.groups:
        tensors = [name for name in group if name in channels.of and len(peaks[name]) == len(channels.of[name])]
        widest = max((float(peaks[name].max()) for name in tensors), default=0.0)
        if widest <= 0:
            continue
        for name in tensors:
            roots, peak = channels.roots(name), peaks[name].astype(np.float64)
            np.minimum.at(factor, roots, np.where(peak > 0, widest / np.maximum(peak, widest / _GREATEST), np.inf))
            joint[roots] |= len(group) > 1
    held = np.array([channels.fixed[channels.root(number)] != "" for number in range(count)], bool)
    chosen = np.where(joint, concatenations, layers) & np.isfinite(factor) & ~held
    scale = np.where(chosen, factor, 1.0)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {i.name: i for i in made.graph.initializer}
    for node in graph.nodes:
        weights = graph.weights(node)
        if node.op_type != "Conv" or weights is None or node.input[0] not in channels.of or node.output[0] not in channels.of:
            continue
        given, out = (scale[channels.roots(name)] for name in (node.input[0], node.output[0]))
        if (given == 1).all() and (out == 1).all():
            continue
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(_rescaled(node, weights, given, out), node.input[1]))
        if len(node.input) > 2:
            bias = (graph.value(node.input[2]) * out).astype(np.float32)
            constants[node.input[2]].CopyFrom(numpy_helper.from_array(bias, node.input[2]))
    rescaled = {name: int((scale[channels.roots(name)] != 1).sum()) for name in placement.tensors if name in channels.of}
    return made, {"channels": sum(rescaled.values()), "tensors": sum(n > 0 for n in rescaled.values())}


def left_out(model: onnx.ModelProto, placement: Placement) -> dict[str, str]:
    """The reasons for which outputs of quantized convolutions cannot be rescaled, by name of the layer.

    A reason names the number of channels and the node that fixes them.

    Args:
        model: a float network with inferred shapes.
        placement: the tensors that will be quantized.
    """
    channels = _channels(Graph(model))
    found: dict[str, str] = {}
    for node in placement.quantized(model):
        roots = channels.roots(node.output[0]) if node.output[0] in channels.of else ()
        reasons = [channels.fixed[root] for root in roots if channels.fixed[root]]
        if reasons:
            found[node.name] = f"{len(reasons)} of {len(roots)} channels, {reasons[0]}"
    return found


def _rescaled(
    node: onnx.NodeProto, weights: NDArray[np.float32], given: NDArray[np.float64], out: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Weights [O, I / groups, kh, kw] that take inputs multiplied by `given` and return outputs multiplied by `out`."""
    groups = int(attribute(node, "group", 1))
    inverse = np.repeat(1 / given.reshape(groups, -1), weights.shape[0] // groups, axis=0)
    scaled: NDArray[np.float64] = weights * inverse[:, :, None, None] * out[:, None, None, None]
    return scaled.astype(np.float32)


def corrected(model: onnx.ModelProto, shifts: Mapping[str, NDArray[np.float64]]) -> onnx.ModelProto:
    """Subtract the bias corrections [O], given by name of the convolution, from the biases of a model's convolutions."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    constants = {i.name: i for i in made.graph.initializer}
    for node in made.graph.node:
        if node.name not in shifts or (len(node.input) > 2 and node.input[2] not in constants):
            continue
        bias = numpy_helper.to_array(constants[node.input[2]]) if len(node.input) > 2 and node.input[2] else 0.0
        name = f"{node.output[0]}_bias"  # each layer gets its own bias, since two layers may share one
        made.graph.initializer.append(numpy_helper.from_array((bias - shifts[node.name]).astype(np.float32), name))
        del node.input[2:]
        node.input.append(name)
    return made


def mean_shifts(
    model: onnx.ModelProto, placement: Placement, scales: Mapping[str, Scales], feed: Iterable[NDArray[np.float32]]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The bias corrections: the mean error of each output that rounding a convolution's input and weights causes.

    Args:
        model: the float network.
        placement: the tensors that are quantized.
        scales: the scales of each runtime variant.
        feed: batches of images [B, 3, H, W].

    Returns:
        For each runtime variant and quantized convolution, the corrections [O]: the sum over inputs of mean rounded input x
        rounded weights - mean input x weights (Nagel et al., arXiv:1906.04721, section 4.2, with measured means). Borders
        are treated like the rest. The variants differ because their integers have different limits.
    """
    graph = Graph(model)
    nodes = [node for node in placement.quantized(model) if node.op_type == "Conv"]
    tensors = sorted({node.input[0] for node in nodes})
    means = {n.input[0]: np.zeros((3, channels_of(n, graph.constants[n.input[1]].dims)[0])) for n in nodes}
    seen = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:

        def add(item: tuple[str, NDArray[np.float32]]) -> None:
            name, values = item
            planes = np.ascontiguousarray(values, np.float32).reshape(*values.shape[:2], -1)
            own, other = scales["onnxruntime"], scales["tensorrt"].activations[name]
            low, high = (-128, 127) if own.lows[name] < 0 else (0, 255)
            means[name] = means[name] + _rounded_means(planes, other, own.activations[name], low, high)

        for made in computed_over(model, tensors, feed):
            seen += 1
            list(pool.map(add, made.items()))
    shifts: dict[str, dict[str, NDArray[np.float64]]] = {"tensorrt": {}, "onnxruntime": {}}
    for node in nodes:
        weights = graph.weights(node)
        assert weights is not None
        how = scales["tensorrt"]  # both runtime variants have these scales of weights
        integers, steps = quantized(weights, 0, how.weight_scale, how.most_weight, how.least)
        area = tuple(range(2, weights.ndim))
        rounded = integers.sum(axis=area) * steps[:, None].astype(np.float64)
        groups = int(attribute(node, "group", 1))
        plain, *after = (
            np.repeat(mean.reshape(groups, -1), len(weights) // groups, axis=0) for mean in means[node.input[0]] / max(seen, 1)
        )
        exact = (weights.sum(axis=area, dtype=np.float64) * plain).sum(axis=1)
        for flavour, mean in zip(shifts, after, strict=True):
            shifts[flavour][node.name] = (rounded * mean).sum(axis=1) - exact
    return shifts


@compiled
def _rounded_means(planes: NDArray[np.float32], other: float, scale: float, low: int, high: int) -> NDArray[np.float64]:
    """Mean values [3, C] of the channels of planes [B, C, n].

    The three rows are: not rounded, rounded to steps `other` in -128..127, and rounded to steps `scale` in low..high.
    """
    B, C, n = planes.shape
    means = np.zeros((3, C))
    inverse, inverse_other = np.float32(1) / np.float32(scale), np.float32(1) / np.float32(other)
    least, most = np.float32(low), np.float32(high)
    for b in range(B):
        for c in range(C):
            plain, signed, own = 0.0, 0.0, 0.0
            for i in range(n):
                plain += planes[b, c, i]
                signed += min(max(np.rint(planes[b, c, i] * inverse_other), np.float32(-128)), np.float32(127))
                own += min(max(np.rint(planes[b, c, i] * inverse), least), most)
            means[0, c] += plain / n / B
            means[1, c] += signed * other / n / B
            means[2, c] += own * scale / n / B
    return means
