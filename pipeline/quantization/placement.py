"""Choose the places of Q/DQ nodes by timing whole engines, because their fusion is faster on some GPUs only."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import onnx

from pipeline.probing.probe import Probe
from pipeline.progress import track
from pipeline.quantization.graph import CONVOLUTIONS, LINEAR
from pipeline.quantization.place import place
from posepress.errors import UserError

_LEAST_GAIN = 0.01  # smallest relative gain of time for which a variant is kept
_SECONDS = 6.0  # longest time of timing a pair of engines, in seconds


def _variants(model: onnx.ModelProto) -> Iterator[tuple[str, set[str]]]:
    """The sets of nodes that may stay in float, each with its name."""
    kinds = {
        "sums": ("Add",), "concatenations": ("Concat",), "pooling": ("MaxPool",), "linear layers": LINEAR,
        "transposed convolutions": ("ConvTranspose",),
    }  # fmt: skip
    for name, types in kinds.items():
        if nodes := {node.name for node in model.graph.node if node.op_type in types}:
            yield name, nodes
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type in CONVOLUTIONS]
    if convolutions:
        yield "the first convolution", {convolutions[0].name}
    depthwise = {n.name for n in convolutions if n.op_type == "Conv" and weights.get(n.input[1], [0, 0])[1] == 1}
    if depthwise:
        yield "depthwise convolutions", depthwise


def search(calibrated: Any, probe: Probe | None, progress: Callable[[str], None]) -> tuple[Any, list[dict[str, Any]]]:
    """Try one set of nodes after another in float, and keep each that makes the whole engine faster.

    Args:
        calibrated: a `pipeline.quantization.calibrated.Calibrated`.
        probe: candidate evaluator that times engines.
        progress: function that gets a message for each variant.

    Returns:
        The calibrated network with the fastest placement, and a row for each variant: its name, the milliseconds without and
        with it, and whether it is kept.

    Raises:
        UserError: engines cannot be timed.
    """
    if probe is None or not probe.backend.timeable:
        lacking = "the data has no tune images" if probe is None else "this backend cannot be timed"
        raise UserError(f"precision.placement=search: {lacking}; choose precision.placement=default")
    best, engine = calibrated, calibrated.written()
    rows = []
    for name, nodes in track(list(_variants(calibrated.model)), "timing placements", unit="placements"):
        excluded = best.placement.excluded | nodes
        if nodes <= best.placement.excluded or not (placed := place(best.model, excluded)).quantized(best.model):
            continue
        other = replace(best, placement=placed)
        candidate = other.written()
        before, after = probe.latencies([engine, candidate], _SECONDS)
        faster = after < before * (1 - _LEAST_GAIN)
        rows.append({"in_float": name, "before_ms": before, "ms": after, "kept": faster})
        progress(f"{name} in float: {before:.3f} -> {after:.3f} ms{', kept' if faster else ''}")
        if faster:
            best, engine = other, candidate
    return best, rows
