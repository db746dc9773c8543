"""Half precision by casts. Nodes that would overflow stay in float."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.quantization import calibration
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import Graph
from posepress.errors import UserError

GREATEST = 65504.0  # greatest finite number of half precision
LEAST_NORMAL = 2.0**-14
_ROOM = 4.0  # safety factor, since other images may have larger values than the calibration images
_HALF_IMAGES = 4  # number of calibration images for the pass in half precision, which takes about one second each on a CPU
_SQUARING = (  # operators that square their input internally
    "GroupNormalization",
    "InstanceNormalization",
    "LayerNormalization",
    "LpNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
)


def convert(model: onnx.ModelProto, keep: Iterable[str] = ()) -> onnx.ModelProto:
    """Convert a network's weights and activations to half precision. Inputs and outputs stay float32.

    Args:
        model: a float network, possibly with Q/DQ.
        keep: names of nodes that stay in float32.

    Returns:
        A checked model with sorted nodes.
    """
    from onnxconverter_common import float16

    given = onnx.ModelProto()
    given.CopyFrom(model)
    del given.graph.value_info[:]
    # The converter leaves the type of a Cast as it is, so that a cast to float32 must stay outside.
    casts = [node.name for node in given.graph.node if node.op_type == "Cast" and _to_float(node)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about weights below 1e-7, which half precision rounds to 0
        made = float16.convert_float_to_float16(
            given, keep_io_types=True, node_block_list=[*keep, *casts], op_block_list=["Resize", "Range", "Celu"]
        )
    _sort(made)
    onnx.checker.check_model(made)
    return onnx.load_from_string(made.SerializeToString())


def _to_float(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "to" and attribute.i == onnx.TensorProto.FLOAT for attribute in node.attribute)


def _sort(model: onnx.ModelProto) -> None:
    """Put every node behind those whose outputs it reads."""
    known = {i.name for i in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        if not ready:
            raise ValueError(f"the graph has a cycle at the node '{waiting[0].name}'")
        ordered += ready
        for node in ready:
            known |= set(node.output)
        done = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in done]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def out_of_range(model: onnx.ModelProto, found: Mapping[str, Histogram]) -> dict[str, float]:
    """Nodes that came within a factor of 4 of half precision's greatest number, with the greatest magnitude of each.

    A node's inputs and outputs count. For a normalisation, the squares of its inputs also count.

    Args:
        model: a float network.
        found: extremes of its activations over the calibration images.
    """
    graph = Graph(model)
    far: dict[str, float] = {}
    for node in graph.nodes:
        near = [name for name in (*node.input, *node.output) if name in found]
        reached = max((found[name].peak for name in near), default=0.0)
        if node.op_type in _SQUARING and node.input[0] in found:
            reached = max(reached, found[node.input[0]].peak ** 2)
        constants = [np.abs(graph.value(name)).max(initial=0) for name in node.input if name in graph.constants]
        reached = max([reached, *(float(value) for value in constants if np.isfinite(value))])
        if reached > GREATEST / _ROOM and near:
            far[node.name] = reached
    return far


@dataclass(frozen=True)
class Kept:
    """The nodes with values that are too large for half precision.

    Attributes:
        near: nodes that came near half precision's greatest number in float32, with the greatest magnitude of each.
        broken: nodes that overflowed or returned NaN when the other nodes were computed in half precision.
        images: number of images that were computed in half precision.
        left_out: reason why no image was computed in half precision; empty if some were.
    """

    near: Mapping[str, float]
    broken: Sequence[str] = ()
    images: int = 0
    left_out: str = ""

    @property
    def nodes(self) -> frozenset[str]:
        """The names of all nodes that stay in float32."""
        return frozenset({*self.near, *self.broken})

    def report(self) -> dict[str, Any]:
        """The manifest's entry on the nodes that stayed in float32, with the reasons."""
        return {
            "kept_fp32": sorted(self.nodes),
            "near_overflow": {name: round(value, 1) for name, value in sorted(self.near.items())},
            "overflowed": sorted(self.broken),
            "half_pass_images": self.images,
            **({"half_pass_left_out": self.left_out} if self.left_out else {}),
        }


def kept_in_fp32(model: onnx.ModelProto, asked: Iterable[str], feed: Callable[[], Iterable[NDArray[np.float32]]]) -> Kept:
    """Find the nodes that would overflow: by the ranges on all images, and by a pass in half precision on some images.

    The pass is skipped if torch cannot run the network. The ranges alone then decide.

    Args:
        model: a float network.
        asked: names of nodes that stay in float32 anyway.
        feed: function that returns batches of images [B, 3, H, W] at each call.

    Raises:
        UserError: a node overflows although it is kept, or the float network returns NaN or infinity.
    """
    from pipeline.models.onnx_graph import unknown_operators
    from pipeline.quantization.half_pass import NotRunError, overflowing

    names = [model.graph.input[0].name, *activations(model)]
    count = 0

    def counted() -> Iterator[NDArray[np.float32]]:
        nonlocal count
        for given in feed():
            count += 1
            yield given

    near = out_of_range(model, calibration.observe(model, names, counted(), histograms=False))
    if unknown := unknown_operators(model):
        return Kept(near, left_out=f"torch cannot run {', '.join(unknown)}")
    some = {round(k) for k in np.linspace(0, count - 1, _HALF_IMAGES)}
    images = [given for n, given in enumerate(feed()) if n in some]
    broken: list[str] = []
    try:
        while found := overflowing(model, convert(model, {*asked, *near, *broken}), images):
            if set(found) <= set(broken):
                raise UserError(
                    f"'{found[0]}' overflows in half precision although it is kept in FP32; name its neighbours in "
                    "precision.nodes_to_exclude"
                )
            broken += [name for name in found if name not in broken]
    except NotRunError as error:
        return Kept(near, broken, left_out=f"torch does not run this network here ({error})")
    return Kept(near, broken, len(images))


def activations(model: onnx.ModelProto) -> list[str]:
    """Names of the floating-point tensors that a network computes."""
    graph = Graph(model)
    return [name for node in graph.nodes for name in node.output if name in graph.floats]
