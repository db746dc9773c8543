"""Analyse an ONNX graph for quantization: producers and readers of tensors, quantized tensors, shared scales."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from posepress.errors import UserError, first_line, nearest

Flavour = Literal["tensorrt", "onnxruntime"]

WEIGHTED = ("Conv", "ConvTranspose")
# Operators that return their input's values, or means of them. Their inputs and outputs share a scale.
CARRIERS = ("MaxPool",)
_JOINING = ("Add", "Concat")
_LEAST_OPSET = 13  # the first opset with one scale for each channel
_FEW_CHANNELS = 4  # ONNX Runtime's integer convolution over an image is slower than its float one (benchmarks/README.md)


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
            if node.op_type in WEIGHTED and node.input[1] in self.constants:
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
        """The constant weights of a convolution."""
        if node.op_type not in WEIGHTED or node.input[1] not in self.constants:
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


def channels_of(node: onnx.NodeProto, dims: Sequence[int]) -> tuple[int, int]:
    """The numbers of input and output channels of a convolution with weights of these dimensions."""
    groups = int(attribute(node, "group", 1))
    return (dims[1] * groups, dims[0]) if node.op_type == "Conv" else (dims[0], dims[1] * groups)


def unshared(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every convolution has its own weights and bias, so that each can be rescaled separately.

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
        if given < _LEAST_OPSET:
            raise UserError(f"from {_LEAST_OPSET} it could")  # noqa: TRY301
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
    graph = Graph(model)
    left = [
        node.name
        for node in graph.nodes
        if node.op_type == "BatchNormalization"
        and (maker := graph.producer.get(node.input[0])) is not None
        and maker.op_type in WEIGHTED
        and len(graph.consumers[node.input[0]]) == 1
    ]
    if left:
        raise UserError(
            f"{file}: the batch norm '{left[0]}' is not folded into a convolution, so its neighbours could not be INT8; "
            "export or simplify the network again (onnxsim folds them)"
        )
    return model


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


@dataclass(frozen=True)
class Placement:
    """The tensors that are quantized.

    Attributes:
        inputs: tensors with Q/DQ before an operator (int8 for TensorRT).
        ends: inputs and outputs of operators with Q/DQ (uint8 for ONNX Runtime).
        skips: for each residual add, the tensor that TensorRT's runtime variant quantizes.
        shared: sets of tensors with one scale, like the inputs and output of a concatenation or of a pooling.
        excluded: nodes that stay in float in both runtime variants, including the heads.
        slow: convolutions that stay in float in ONNX Runtime's variant, since its INT8 kernel is missing or slower.
    """

    inputs: tuple[str, ...]
    ends: tuple[str, ...]
    skips: Mapping[str, str]
    shared: tuple[frozenset[str], ...]
    excluded: frozenset[str] = frozenset()
    slow: frozenset[str] = frozenset()

    @property
    def tensors(self) -> list[str]:
        """Every tensor that is quantized in at least one runtime variant."""
        return sorted({*self.inputs, *self.ends, *self.skips.values()})

    @property
    def groups(self) -> list[frozenset[str]]:
        """The sets of quantized tensors that share a scale. Every quantized tensor is in exactly one set."""
        alone = set(self.tensors).difference(*self.shared)
        return [*self.shared, *(frozenset((name,)) for name in sorted(alone))]

    def quantized(self, model: onnx.ModelProto) -> list[onnx.NodeProto]:
        """The convolutions that are quantized. Some runtimes may still compute them in float."""
        return [
            n for n in model.graph.node if n.op_type in WEIGHTED and n.name not in self.excluded and n.input[0] in self.inputs
        ]


def place(model: onnx.ModelProto, exclude: Iterable[str] = ()) -> Placement:
    """Decide which tensors are quantized.

    The tail (see `tail`) stays in float. It is a small part of the work, and no later layer averages its rounding errors. In a
    MobileNetV2 PAF network these are a tenth of the whole error.

    Args:
        model: a float network with inferred shapes.
        exclude: names of nodes that stay in float.

    Raises:
        UserError: the network's opset does not support one scale for each channel.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=_LEAST_OPSET)
    if opset < _LEAST_OPSET:
        raise UserError(
            f"the network is of opset {opset}, and INT8 begins at opset {_LEAST_OPSET}; export it with "
            f"opset_version={_LEAST_OPSET} or above"
        )
    graph = Graph(model)
    heads = tail(graph)
    skip = frozenset(exclude) | heads
    inputs: dict[str, None] = {}
    ends: dict[str, None] = {}
    skips: dict[str, str] = {}
    slow: set[str] = set()
    groups: list[set[str]] = []
    integer: set[str] = set()  # outputs of convolutions that compute in integers
    for node in graph.nodes:
        computed = graph.activations(node)
        if node.op_type not in WEIGHTED or node.name in skip:
            continue
        weights, made = graph.weights(node), graph.activated(node.output[0])
        if weights is None:
            continue
        inputs[computed[0]] = None
        integer.add(made)
        few = weights.shape[1] < _FEW_CHANNELS and attribute(node, "group", 1) == 1
        if node.op_type == "ConvTranspose" or few:
            slow.add(node.name)
        else:
            ends[computed[0]] = ends[made] = None
    read = set(inputs)
    for node in graph.nodes:
        computed = graph.activations(node)
        if node.name in skip or not graph.floats.issuperset(computed):  # the second condition excludes arithmetic on shapes
            continue
        made = graph.activated(node.output[0])
        if not integer.intersection(computed) and not read.intersection((node.output[0], made)):
            continue  # all neighbouring layers are in float
        if node.op_type == "Concat" and len(computed) == len(node.input) and node.output[0] not in graph.outputs:
            for name in (*computed, node.output[0]):
                inputs[name] = ends[name] = None
            groups.append({*computed, node.output[0]})
        elif node.op_type == "Add" and len(computed) == 2:
            for name in (*computed, made):
                if name not in graph.outputs:
                    ends[name] = None
            direct = [
                n
                for n in computed
                if n in graph.producer and graph.producer[n].op_type == "Conv" and len(graph.consumers[n]) == 1
            ]
            skips[node.name] = next((n for n in computed if n not in direct[:1]), computed[1])
        elif node.op_type in CARRIERS and node.output[0] not in graph.outputs:
            for name in (computed[0], node.output[0]):
                inputs[name] = ends[name] = None
            groups.append({computed[0], node.output[0]})
    return Placement(tuple(inputs), tuple(ends), skips, tuple(joined(groups)), skip, frozenset(slow))


def tail(graph: Graph) -> set[str]:
    """Names of the nodes that are never quantized, because they are the end of the network.

    On every path to an output these are the last Conv, ConvTranspose, Gemm or MatMul with trained weights, and all that follows
    it. Operators with fixed weights are part of what follows: an expectation over bins, a resize written as a convolution.
    """
    found: set[str] = set()
    waiting, seen = list(graph.outputs), set(graph.outputs)
    while waiting:
        node = graph.producer.get(waiting.pop())
        if node is None:
            continue
        if node.op_type in (*WEIGHTED, *_JOINING, *CARRIERS):
            found.add(node.name)
        weights = next((name for name in node.input[:2] if name in graph.constants), "")
        if node.op_type in (*WEIGHTED, "Gemm", "MatMul") and weights and not _fixed(graph.value(weights)):
            continue
        new = graph.floats.intersection(graph.activations(node)) - seen  # skips arithmetic on shapes
        seen |= new
        waiting += new
    return found


def _fixed(weights: NDArray[Any]) -> bool:
    """Whether weights were written down rather than trained.

    Such weights have one or two values (a mean, a selection), are evenly spaced without a repetition (the positions of an
    expectation over bins), or are the same kernel for every channel (a bilinear resize).
    """
    values = np.asarray(weights, np.float64)
    different = np.unique(values)
    if not different.any():
        return False  # pruned or untrained, which says nothing
    if values.size > 2 and len(different) <= 2:
        return True
    steps = np.diff(different)
    if len(different) == values.size > 2 and np.allclose(steps, steps[0], rtol=1e-3):
        return True
    kernels = values.reshape(len(values), -1)
    return len(kernels) > 1 and kernels.shape[1] > 1 and bool((kernels == kernels[0]).all())


def joined(groups: Iterable[set[str]]) -> list[frozenset[str]]:
    """Merge sets that share a member."""
    made: list[set[str]] = []
    for group in groups:
        touching = [other for other in made if other & group]
        made = [other for other in made if not other & group]
        made.append(group.union(*touching))
    return [frozenset(group) for group in made]


def check_shared(model: onnx.ModelProto) -> None:
    """Check that the inputs and the output of each concatenation and pooling have one scale.

    Args:
        model: a network with Q/DQ.

    Raises:
        ValueError: scales differ; the message names the node and the scales.
    """
    graph = Graph(model)
    for node in graph.nodes:
        if node.op_type not in ("Concat", *CARRIERS):
            continue
        scales = {name: scale for name in node.input if (scale := _scale(graph, graph.producer.get(name))) is not None}
        for name in node.output:
            after = [_scale(graph, reader) for reader in graph.consumers.get(name, []) if reader.op_type == "QuantizeLinear"]
            scales |= dict.fromkeys([name], after[0]) if after and after[0] is not None else {}
        if len(set(scales.values())) > 1:
            listed = ", ".join(f"{name} {scale:.4g}" for name, scale in scales.items())
            raise ValueError(f"the {node.op_type} '{node.name}' has inputs and output of different scales ({listed})")


def _scale(graph: Graph, node: onnx.NodeProto | None) -> float | None:
    """The scale of a Q or DQ node if it is a single number; else None."""
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in graph.constants:
        return None
    value = graph.value(node.input[1])
    return float(value.ravel()[0]) if value.size == 1 else None


def observed(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model that also returns inner tensors, and the names of these tensors without the input."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    given = {i.name for i in probe.graph.input}
    wanted = [name for name in tensors if name not in given]
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in present
    )
    return probe, wanted


def computed_over(
    model: onnx.ModelProto, tensors: Sequence[str], feed: Iterable[NDArray[np.float32]], optimise: bool = True
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Inner tensors of a network, image by image. Their memory is reused for the next image but one.

    Args:
        model: a network with one input.
        tensors: names of the tensors, which may include the input.
        feed: batches [B, 3, H, W].
        optimise: whether the runtime may optimise the graph. False computes Q/DQ as arithmetic in float.
    """
    import onnxruntime

    probe, wanted = observed(model, tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    # Memory is reused, because allocating hundreds of megabytes takes as long as computing the tensors.
    memory: dict[tuple[int, ...], list[dict[str, NDArray[np.float32]]]] = {}
    for images in feed:
        if not wanted:
            yield {name: images}
            continue
        kept = memory.setdefault(images.shape, [])
        if len(kept) < 2:
            kept.append(dict(zip(wanted, session.run(wanted, {name: images}), strict=True)))
            made = kept[-1]
        else:
            kept.reverse()
            made = kept[-1]
            binding = session.io_binding()
            binding.bind_cpu_input(name, np.ascontiguousarray(images))
            for tensor, values in made.items():
                binding.bind_output(tensor, "cpu", 0, np.float32, values.shape, values.ctypes.data)
            session.run_with_iobinding(binding)
        yield {**made, name: images} if name in tensors else dict(made)
        if len(memory) > 4:  # with images of many sizes, save memory rather than time
            memory.clear()
