"""Records of a plan's layers, read from the output of TensorRT's engine inspector."""

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any

from posepress.errors import UserError

_WORDS = (  # the order matters, because "BFloat16" contains "Float" and "UInt8" contains "Int8"
    ("bfloat16", "bf16"),
    ("bf16", "bf16"),
    ("fp8", "fp8"),
    ("uint8", "uint8"),
    ("int8", "int8"),
    ("half", "fp16"),
    ("fp16", "fp16"),
    ("fp32", "fp32"),
    ("float", "fp32"),
)
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MOVING = {"Reformat", "NoOp", "Constant", "ShapeHostToDevice"}


def layers(
    text: str, nodes: Mapping[str, Mapping[str, Any]] | None = None, times: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Return the layers of a plan.

    Args:
        text: JSON of `get_engine_information`. It is {"Layers": [...]} with "Bindings" (TensorRT 10) or "I/O Tensors"
            (TensorRT 11), or the list alone.
        nodes: "macs" and "quantized" (whether the file dequantizes the weights) of each ONNX node with weights. None if
            unknown: only layers that show their weights then have MACs.
        times: times of the measured layers, in microseconds.

    Returns:
        A record for each layer. "name" and "op" identify it. "precision" is that of its weights or else of its first input
        ("int8", "fp16", ...). "macs" is 0 if unknown. "us" is its time in microseconds. "nodes" is the number of ONNX nodes
        that it fuses. "reformat" says whether it only moves data. "unfused_qdq" says whether it is a Q or DQ node that
        TensorRT did not fuse. "reason" says why a layer that the file quantizes does not run in INT8. If `nodes` is given,
        "quantized" says whether the file quantizes the layer.

    Raises:
        UserError: the plan was built without detailed profiling information.
    """
    content = json.loads(text)
    listed = content["Layers"] if isinstance(content, dict) else content
    if any(isinstance(layer, str) for layer in listed):
        raise UserError("the plan holds only the names of its layers; build it here with stage=build, which adds details")
    return [_record(layer, nodes or {}, times or {}) for layer in listed]


def _record(layer: Mapping[str, Any], nodes: Mapping[str, Mapping[str, Any]], times: Mapping[str, float]) -> dict[str, Any]:
    name, op, precision = layer["Name"], layer.get("LayerType", ""), _precision(layer)
    of = _NODES.findall(layer.get("Metadata") or "")
    known = [nodes[node] for node in of if node in nodes]
    quantized = any(node["quantized"] for node in known)
    record = {
        "name": name,
        "op": op,
        "precision": precision,
        "macs": sum(int(node["macs"]) for node in known) if nodes else _macs(layer),
        "us": times.get(name, 0.0),
        "nodes": len(of),
        "reformat": op in _MOVING,
        "unfused_qdq": op == "Reformat" and layer.get("Origin") == "QDQ",
        "reason": "TensorRT did not choose an 8-bit kernel for it" if quantized and precision not in ("int8", "fp8") else "",
    }
    return {**record, "quantized": quantized} if nodes else record


def precision_of(text: str) -> str:
    """Return the precision of a format or type, or "other" if it is unknown."""
    words = text.lower()
    return next((name for word, name in _WORDS if word in words), "other")


def _precision(layer: Mapping[str, Any]) -> str:
    weights = layer.get("Weights")
    if isinstance(weights, dict) and "Type" in weights:
        return precision_of(str(weights["Type"]))
    first = (layer.get("Inputs") or [{}])[0]
    return precision_of(str(first.get("Format/Datatype") or first.get("Datatype") or first.get("Format") or ""))


def _macs(layer: Mapping[str, Any]) -> int:
    weights = layer.get("Weights")
    if not isinstance(weights, dict) or not layer.get("Outputs"):
        return 0
    made = layer["Outputs"][0].get("Dimensions") or [0]
    return int(weights.get("Count", 0)) * int(made[0]) * prod(int(size) for size in made[2:])
