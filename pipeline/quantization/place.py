"""Where Q/DQ nodes are placed, and what stays in float."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.quantization.graph import CARRIERS, CONVOLUTIONS, LEAST_OPSET, WEIGHTED, Graph, attribute, channels_of
from pipeline.quantization.transposed import convertible
from posepress.errors import UserError

_JOINING = ("Add", "Concat")
_FEW_CHANNELS = 4  # ONNX Runtime's integer convolution over an image is slower than its float one (benchmarks/README.md)
_POSITIONS = 8  # least number of bins that tell an expectation over them from trained weights


@dataclass(frozen=True)
class Placement:
    """The tensors that are quantized.

    Attributes:
        inputs: tensors with Q/DQ before an operator (int8 for TensorRT).
        ends: inputs and outputs of operators with Q/DQ (uint8 for ONNX Runtime).
        skips: for each residual add, the tensor that TensorRT's runtime variant quantizes.
        shared: sets of tensors with one scale, like the inputs and output of a concatenation or of a pooling.
        excluded: nodes that stay in float in both runtime variants, including the heads.
        slow: nodes that stay in float in ONNX Runtime's variant, since its INT8 kernel is missing or slower.
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
        """The convolutions and linear layers that are quantized. Some runtimes may still compute them in float."""
        graph = Graph(model)
        return [
            node
            for node in model.graph.node
            if node.name not in self.excluded and graph.weights(node) is not None and node.input[0] in self.inputs
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
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=LEAST_OPSET)
    if opset < LEAST_OPSET:
        raise UserError(
            f"the network is of opset {opset}, and INT8 begins at opset {LEAST_OPSET}; export it with "
            f"opset_version={LEAST_OPSET} or above"
        )
    graph = Graph(model)
    marks = _Marks(graph, frozenset(exclude) | tail(graph))
    marks.weighted()
    for node in graph.nodes:
        marks.join(node)
    marks.tie()
    return Placement(
        tuple(marks.inputs), tuple(marks.ends), marks.skips, tuple(joined(marks.groups)), marks.skip, frozenset(marks.slow)
    )


class _Marks:
    """The decisions for a placement, in the order of the nodes. Dictionaries without values keep the order of tensors."""

    def __init__(self, graph: Graph, skip: frozenset[str]) -> None:
        self.graph, self.skip = graph, skip
        self.inputs: dict[str, None] = {}
        self.ends: dict[str, None] = {}
        self.skips: dict[str, str] = {}
        self.slow: set[str] = set()
        self.groups: list[set[str]] = []
        self._integer: set[str] = set()  # outputs of convolutions that compute in integers
        self._on_cpu: set[str] = set()  # outputs of nodes that compute in integers in ONNX Runtime
        self._read: set[str] = set()  # their inputs

    def weighted(self) -> None:
        """Mark the inputs and outputs of the convolutions and linear layers."""
        for node in self.graph.nodes:
            if node.op_type not in WEIGHTED or node.name in self.skip or (weights := self.graph.weights(node)) is None:
                continue
            read, computed = self.graph.activations(node)[0], self.graph.activated(node.output[0])
            self.inputs[read] = None
            self._integer.add(computed)
            image = node.op_type in CONVOLUTIONS and attribute(node, "group", 1) == 1
            if (image and channels_of(node, weights.shape)[0] < _FEW_CHANNELS) or (
                node.op_type == "ConvTranspose" and not convertible(self.graph, node)
            ):
                self.slow.add(node.name)
            else:
                self.ends[read] = self.ends[computed] = None
                self._on_cpu.add(computed)
        self._read = set(self.inputs)

    def join(self, node: onnx.NodeProto) -> None:
        """Mark the tensors of a concatenation, an addition or a pooling beside layers that compute in integers."""
        graph, read, out = self.graph, self.graph.activations(node), node.output[0]
        if node.name in self.skip or not graph.floats.issuperset(read):  # the second condition excludes arithmetic on shapes
            return
        activated = graph.activated(out)
        if not self._integer.intersection(read) and not self._read.intersection((out, activated)):
            return  # all neighbouring layers are in float
        if node.op_type == "Add" and len(read) == 2:
            self.ends |= dict.fromkeys(name for name in (*read, activated) if name not in graph.outputs)
            self._on_cpu.add(activated)
            self.skips[node.name] = self._skip(read)
        elif (node.op_type == "Concat" and len(read) == len(node.input)) or node.op_type in CARRIERS:
            tied = dict.fromkeys((*(read if node.op_type == "Concat" else read[:1]), out))
            if out not in graph.outputs:
                self.inputs |= tied
                self.groups.append(set(tied))
                if node.op_type in CARRIERS and read[0] not in self._on_cpu:
                    self.slow.add(node.name)  # pooling of float values is faster before their conversion (benchmarks/README.md)
                else:
                    self.ends |= tied
                    self._on_cpu |= {out, activated}
                if node.op_type in CARRIERS and read[0] in self._integer:
                    self._integer.add(out)

    def tie(self) -> None:
        """Give one scale to both sides of every carrier between quantized tensors, also where no layer beside it needs it."""
        every = {*self.inputs, *self.ends, *self.skips.values()}
        for node in self.graph.nodes:
            sides = {*node.input[:1], *node.output[:1]}
            if node.op_type in CARRIERS and node.name not in self.skip and sides <= every:
                self.groups.append(sides)

    def _skip(self, read: Sequence[str]) -> str:
        """The input of an addition that TensorRT's variant quantizes: the one that no convolution alone computes."""
        makers, readers = self.graph.producer, self.graph.consumers
        direct = [n for n in read if n in makers and makers[n].op_type == "Conv" and len(readers[n]) == 1]
        return next((n for n in read if n not in direct[:1]), read[1])


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
        if node.op_type in WEIGHTED and weights and not _fixed(node.op_type, graph.value(weights)):
            continue
        new = graph.floats.intersection(graph.activations(node)) - seen  # skips arithmetic on shapes
        seen |= new
        waiting += new
    return found


def _fixed(kind: str, weights: NDArray[Any]) -> bool:
    """Whether weights were written down rather than trained.

    Args:
        kind: "Conv", "ConvTranspose", "Gemm" or "MatMul".
        weights: of the operator.

    Returns:
        Whether the weights are one of these: a mean or a selection (0 and one value); the positions of an expectation over
        bins or a grid; a resize (the same symmetrical kernel from each channel to itself). Zeros alone tell nothing.
    """
    values = np.asarray(weights, np.float64)
    if not values.any():
        return False
    rows = values.reshape(len(values), -1) if kind in CONVOLUTIONS else np.atleast_2d(values).T
    kept = values[values != 0]
    if len(np.unique(kept)) == 1 and (kept[0] == 1 or ((rows != 0).sum(axis=1) != 1).all()) and values.size > 2:
        return True
    if all(_evenly_spaced(row) for row in rows):
        return True
    if values.ndim != 4 or values.shape[2:] == (1, 1):
        return False
    kernels = values.reshape(-1, *values.shape[2:])
    there = kernels[kernels.any(axis=(1, 2))]
    alike = (
        (there == there[0]).all() and np.array_equal(there[0], there[0][::-1]) and np.array_equal(there[0], there[0][:, ::-1])
    )
    return bool(alike) and len(there) == max(values.shape[:2])


def _evenly_spaced(row: NDArray[np.float64]) -> bool:
    """Whether values are positions: evenly spaced, each as often as the others, and too many to be so by chance."""
    different, counts = np.unique(row, return_counts=True)
    if len(row) < _POSITIONS or len(different) < 2 or len(set(counts)) > 1:
        return False
    steps = np.diff(different)
    return bool(np.allclose(steps, steps.mean(), rtol=0.02))
