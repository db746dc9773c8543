"""Half precision by casts, with what would overflow kept in float."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.models.onnx_graph import OnnxNetwork
from pipeline.quantization import calibration
from pipeline.quantization.calibration import Histogram
from pipeline.quantization.graph import Graph

GREATEST = 65504.0  # of half precision
LEAST_NORMAL = 2.0**-14
_ROOM = 4.0  # other images may have larger values than those calibrated on


def convert(model: onnx.ModelProto, keep: Iterable[str] = ()) -> onnx.ModelProto:
    """Write a network's weights and activations in half precision; inputs and outputs stay float32.

    Args:
        model: a float network, perhaps with Q/DQ.
        keep: names of nodes that stay in float32.

    Returns:
        A checked model, its nodes in order.
    """
    from onnxconverter_common import float16

    given = onnx.ModelProto()
    given.CopyFrom(model)
    del given.graph.value_info[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below 1e-7, which half precision does not tell from 0
        made = float16.convert_float_to_float16(
            given, keep_io_types=True, node_block_list=list(keep), op_block_list=["Resize", "Range", "Celu"]
        )
    _sort(made)
    onnx.checker.check_model(made)
    return onnx.load_from_string(made.SerializeToString())


def _sort(model: onnx.ModelProto) -> None:
    """Put every node behind those whose outputs it reads."""
    known = {i.name for i in (*model.graph.input, *model.graph.initializer)} | {""}
    waiting, ordered = list(model.graph.node), []
    while waiting:
        ready = [node for node in waiting if known.issuperset(node.input)]
        if not ready:
            raise ValueError(f"the graph has a circle at the node '{waiting[0].name}'")
        ordered += ready
        for node in ready:
            known |= set(node.output)
        done = {id(node) for node in ready}
        waiting = [node for node in waiting if id(node) not in done]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def out_of_range(model: onnx.ModelProto, found: Mapping[str, Histogram]) -> dict[str, float]:
    """Nodes whose inputs or outputs came within a factor of 4 of half precision's greatest number, with what they reached.

    Args:
        model: a float network.
        found: extremes of its activations over calibration images.
    """
    graph = Graph(model)
    far: dict[str, float] = {}
    for node in graph.nodes:
        near = [name for name in (*node.input, *node.output) if name in found]
        reached = max((found[name].peak for name in near), default=0.0)
        constants = [np.abs(graph.value(name)).max(initial=0) for name in node.input if name in graph.constants]
        reached = max([reached, *(float(value) for value in constants if np.isfinite(value))])
        if reached > GREATEST / _ROOM and near:
            far[node.name] = reached
    return far


def kept_in_fp32(
    model: onnx.ModelProto, asked: Iterable[str], feed: Callable[[], Iterable[NDArray[np.float32]]]
) -> tuple[dict[str, float], list[str]]:
    """Nodes that half precision has no room for.

    Args:
        model: a float network.
        asked: names of nodes that stay in float32 anyway.
        feed: gives images, batches [B, 3, H, W], each time it is asked.

    Returns:
        Those that came near half precision's greatest number in float32, with what they reached; those that passed it when the
        rest was computed in half precision.

    Raises:
        UserError: a node overflows though it is kept, or the network is broken before.
    """
    names = [model.graph.input[0].name, *activations(model)]
    near = out_of_range(model, calibration.observe(model, names, feed(), histograms=False))
    broken: list[str] = []
    while found := overflowing(model, convert(model, {*asked, *near, *broken}), feed()):
        if set(found) <= set(broken):
            raise UserError(
                f"'{found[0]}' overflows in half precision though it is kept in FP32; name its neighbours in "
                "precision.nodes_to_exclude"
            )
        broken += [name for name in found if name not in broken]
    return near, broken


def overflowing(model: onnx.ModelProto, made: onnx.ModelProto, feed: Iterable[NDArray[np.float32]]) -> list[str]:
    """Nodes that return infinity or NaN when a half-precision network is computed in half precision, in torch.

    ONNX Runtime on a processor computes such files in float32 and shows nothing.

    Args:
        model: the float network.
        made: what `convert` made of it.
        feed: images, batches [B, 3, H, W].

    Returns:
        Names of nodes of `model`, the first of each image's only: what follows it is not finite because of it. For a cast that
        was put in, those that read what it reads and returns.
    """
    own = {node.name for node in model.graph.node}
    graph = Graph(made)
    broken: dict[str, None] = {}
    network = _FirstBroken(made).eval()
    with torch.inference_mode():
        for images in feed:
            network(torch.from_numpy(images))
            if network.first is not None:
                node = graph.producer[network.first]
                around = [graph.producer.get(node.input[0]), *graph.consumers.get(node.output[0], [])]
                some = [node.name] if node.name in own else [one.name for one in around if one is not None and one.name in own]
                broken |= dict.fromkeys(some)
            network.first = None
    return list(broken)


class _FirstBroken(OnnxNetwork):
    """Remembers the first tensor that is not finite."""

    first: str | None = None

    def seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if self.first is None and value.is_floating_point() and not torch.isfinite(value).all():
            self.first = name
        return value


def activations(model: onnx.ModelProto) -> list[str]:
    """Names of the floating-point tensors that a network computes."""
    graph = Graph(model)
    return [name for node in graph.nodes for name in node.output if name in graph.floats]


def report(kept: Mapping[str, float], broken: Iterable[str], model: onnx.ModelProto) -> dict[str, Any]:
    """What stayed in float32 and why, for a manifest."""
    return {
        "kept_fp32": sorted({*kept, *broken}),
        "near_overflow": {name: round(value, 1) for name, value in sorted(kept.items())},
        "overflowed": sorted(broken),
        "nodes": len(model.graph.node),
    }
