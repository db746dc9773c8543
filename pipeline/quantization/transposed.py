"""Write transposed convolutions as convolutions, for which ONNX Runtime has INT8 kernels.

ONNX Runtime has no INT8 kernel for ConvTranspose. With a stride of s, each of the s x s phases of its output is a plain
convolution of the input, with every s-th weight (arXiv:1609.07009). One convolution computes all phases, DepthToSpace
interleaves them, and Slice removes what the pads remove. A kernel whose side the stride does not divide is filled with zeros up
to a multiple: 3x3 with a stride of 2 costs as much as 4x4.
"""

from collections.abc import Container

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from pipeline.quantization.graph import Graph, attribute


def as_convolutions(model: onnx.ModelProto, wanted: Container[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Replace transposed convolutions by convolutions of the same name.

    Args:
        model: a float network with inferred shapes.
        wanted: names of the transposed convolutions to replace.

    Returns:
        A network with equal results up to rounding, and for each new tensor the old one with the same values.
    """
    graph = Graph(model)
    chosen = [node for node in graph.nodes if node.name in wanted and convertible(graph, node)]
    if not chosen:
        return model, {}
    made = onnx.ModelProto()
    made.CopyFrom(model)
    new = {node.name: node for node in chosen}
    same: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    behind: dict[str, list[onnx.NodeProto]] = {}  # the last activation of each: what follows it
    names: dict[str, str] = {}
    for node in graph.nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.name in new:
            computed = graph.activated(node.output[0])
            names |= _names(graph, node.output[0], computed)
            copy, tensors, spread = _replaced(graph, node, names[computed], computed)
            made.graph.initializer.extend(tensors)
            behind[computed] = spread
            same |= dict.fromkeys((names[computed], *(after.output[0] for after in spread[:-1])), computed)
        elif node.op_type != "ConvTranspose" and node.output[0] in names:  # an activation between the two
            copy.input[0] = names[node.input[0]]
        kept = node.output[0]
        if kept in names:
            copy.output[0] = names[kept]
        nodes.append(copy)
        nodes += behind.pop(kept, [])
    del made.graph.node[:], made.graph.value_info[:]
    made.graph.node.extend(nodes)
    return onnx.shape_inference.infer_shapes(made), same


def convertible(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is a transposed convolution of one group that `as_convolutions` can write as a convolution."""
    if node.op_type != "ConvTranspose" or graph.weights(node) is None or attribute(node, "group", 1) != 1:
        return False
    bias = node.input[2] if len(node.input) > 2 else ""
    strides, kernel, pads, more = _shape(graph, node)
    if len(kernel) != 2 or (bias and bias not in graph.constants):
        return False
    plain = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and attribute(node, "output_shape") is None
    dilated = any(step != 1 for step in attribute(node, "dilations", [1]))
    cut = [
        step * -(-k // step) + pads[axis + 2] - k - more[axis]
        for axis, (step, k) in enumerate(zip(strides, kernel, strict=True))
    ]
    return plain and not dilated and strides[0] == strides[1] > 1 and min(cut) >= 0


def _shape(graph: Graph, node: onnx.NodeProto) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, kernel, pads and output padding of a transposed convolution over two axes."""
    kernel = list(graph.constants[node.input[1]].dims[2:])
    axes = len(kernel)
    strides, pads = attribute(node, "strides", [1] * axes), attribute(node, "pads", [0] * 2 * axes)
    return list(strides), kernel, list(pads), list(attribute(node, "output_padding", [0] * axes))


def _names(graph: Graph, first: str, last: str) -> dict[str, str]:
    """The names of the phases: of a convolution's output, and of what the activations behind it return."""
    made = {first: f"{first}_phases"}
    while first != last:
        first = graph.consumers[first][0].output[0]
        made[first] = f"{first}_phases"
    return made


def _replaced(
    graph: Graph, node: onnx.NodeProto, phases: str, out: str
) -> tuple[onnx.NodeProto, list[onnx.TensorProto], list[onnx.NodeProto]]:
    """The convolution, its constants, and the nodes that make `out` of `phases`."""
    strides, kernel, pads, more = _shape(graph, node)
    step, weights = strides[0], graph.weights(node)
    assert weights is not None
    taps = [-(-k // step) for k in kernel]
    bias = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(weights.shape[1], np.float32)
    name = node.input[1]
    tensors = [
        numpy_helper.from_array(_phases(weights, step, taps), f"{name}_of_phases_{node.output[0]}"),
        numpy_helper.from_array(np.repeat(np.asarray(bias, np.float32), step * step), f"{node.output[0]}_bias_of_phases"),
    ]
    inputs = [node.input[0], *(tensor.name for tensor in tensors)]
    around = [count - 1 for count in taps]
    copy = helper.make_node("Conv", inputs, list(node.output), name=node.name, pads=around + around, kernel_shape=taps)
    # Of the interleaved phases, the pads remove the first ones, and the end is where the output ends.
    ends = [step * count + pads[axis + 2] - kernel[axis] - more[axis] for axis, count in enumerate(taps)]
    if not any((*pads[:2], *ends)):
        return (
            copy,
            tensors,
            [helper.make_node("DepthToSpace", [phases], [out], name=f"{out}_spread", blocksize=step, mode="CRD")],
        )
    last = [np.iinfo(np.int64).max if end == 0 else -end for end in ends]
    limits = [
        numpy_helper.from_array(np.array(v, np.int64), f"{out}_{n}")
        for n, v in (("from", pads[:2]), ("to", last), ("axes", (2, 3)))
    ]
    whole = f"{out}_whole"
    spread = helper.make_node("DepthToSpace", [phases], [whole], name=f"{out}_spread", blocksize=step, mode="CRD")
    cut = helper.make_node("Slice", [whole, *(limit.name for limit in limits)], [out], name=f"{out}_cut")
    return copy, tensors + limits, [spread, cut]


def _phases(weights: NDArray[np.float32], step: int, taps: list[int]) -> NDArray[np.float32]:
    """The weights [O s s, I, U, V] of the convolution, from those of a transposed one [I, O, H, W]."""
    inputs, outputs = weights.shape[:2]
    sides = [step * count for count in taps]
    full = np.zeros((inputs, outputs, *sides), np.float32)
    full[:, :, : weights.shape[2], : weights.shape[3]] = weights
    split = full.reshape(inputs, outputs, taps[0], step, taps[1], step)[:, :, ::-1, :, ::-1]
    return np.ascontiguousarray(split.transpose(1, 3, 5, 0, 2, 4).reshape(outputs * step * step, inputs, *taps))
