"""Add channels of zeros, so that depthwise convolutions over a concatenation use whole vectors.

ONNX Runtime's INT8 depthwise kernel is 2.4 times slower if the number of channels is no multiple of 16 (benchmarks/README.md).
The few maps between the stages of a pose network often have such a number. The convolution that computes the maps then adds
channels of zeros, and the layers that read the concatenation get zero weights for them. The results do not change.
"""

from collections import Counter

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.quantization.graph import Graph, attribute

MULTIPLE = 16


def align(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Fill the channels of concatenations up to a multiple of 16 if depthwise convolutions read them.

    Args:
        model: a float network with inferred shapes.

    Returns:
        A network with equal results, and the number of channels that were added.
    """
    graph = Graph(model)
    uses = Counter(name for node in graph.nodes for name in node.input)
    changed: dict[str, NDArray[np.float32]] = {}
    groups: dict[str, int] = {}
    added = 0
    for node in graph.nodes:
        channels = graph.channels.get(node.output[0], 0)
        missing = -channels % MULTIPLE
        if node.op_type != "Concat" or attribute(node, "axis") not in (1, -3) or not channels or not missing:
            continue
        place = _donor(graph, node, uses)
        plan = None if place is None else _readers(graph, node, channels, uses)
        if place is None or plan is None or not plan[0]:
            continue
        at = sum(graph.channels[name] for name in node.input[: place + 1])
        donor = graph.producer[node.input[place]]
        _insert(graph, changed, donor, graph.channels[donor.output[0]], missing, 0)
        for reader in plan[0]:
            _insert(graph, changed, reader, at, missing, 0)
            groups[reader.name] = channels + missing
        for reader in plan[1]:
            _insert(graph, changed, reader, at, missing, 1)
        added += missing
    return _with(model, changed, groups), added


def _with(model: onnx.ModelProto, changed: dict[str, NDArray[np.float32]], groups: dict[str, int]) -> onnx.ModelProto:
    """A copy of a model with other weights, and other groups of its depthwise convolutions."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for constant in made.graph.initializer:
        if constant.name in changed:
            constant.CopyFrom(numpy_helper.from_array(changed[constant.name], constant.name))
    for node in made.graph.node:
        for option in node.attribute:
            if option.name == "group" and node.name in groups:
                option.i = groups[node.name]
    if changed:
        del made.graph.value_info[:]
    return made


def _own(graph: Graph, node: onnx.NodeProto, uses: dict[str, int]) -> bool:
    """Whether a node is a convolution with weights that no other node uses."""
    return graph.weights(node) is not None and node.op_type == "Conv" and all(uses[name] == 1 for name in node.input[1:])


def _donor(graph: Graph, node: onnx.NodeProto, uses: dict[str, int]) -> int | None:
    """The index of the last input of a concatenation that comes from a convolution and has no other reader."""
    for place in reversed(range(len(node.input))):
        name = node.input[place]
        maker = graph.producer.get(name)
        alone = len(graph.consumers.get(name, [])) == 1 and name not in graph.outputs
        if maker is not None and alone and _own(graph, maker, uses) and attribute(maker, "group", 1) == 1:
            return place
    return None


def _readers(
    graph: Graph, node: onnx.NodeProto, channels: int, uses: dict[str, int]
) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]] | None:
    """Depthwise convolutions that read a concatenation, and dense ones behind it or them; None if other nodes read it."""
    deep: list[onnx.NodeProto] = []
    dense: list[onnx.NodeProto] = []
    waiting = [node.output[0]]
    while waiting:
        tensor = waiting.pop()
        if tensor in graph.outputs:
            return None
        for reader in graph.consumers.get(tensor, []):
            weights = graph.weights(reader)
            if weights is None or not _own(graph, reader, uses):
                return None
            if attribute(reader, "group", 1) == 1:
                dense.append(reader)
            elif tensor == node.output[0] and attribute(reader, "group", 1) == channels == len(weights):
                deep.append(reader)
                waiting.append(graph.activated(reader.output[0]))
            else:
                return None
    return deep, dense


def _insert(
    graph: Graph, changed: dict[str, NDArray[np.float32]], node: onnx.NodeProto, at: int, count: int, axis: int
) -> None:
    """Insert zeros into a convolution's weights along an axis, and into its bias if the axis is that of the outputs."""
    for name in node.input[1 : 2 + (axis == 0)]:
        values = changed.get(name, np.asarray(graph.value(name), np.float32))
        changed[name] = np.insert(values, [at] * count, 0, axis=axis)
