"""What TensorRT's engine inspector says of a plan's layers, as records."""

import json
import re
from collections.abc import Mapping
from math import prod
from typing import Any

from posepress.errors import UserError

_WORDS = (  # in this order: "BFloat16" holds "Float", "UInt8" holds "Int8"
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
    """The layers of a plan.

    Args:
        text: JSON of `get_engine_information`: {"Layers": [...]} with "Bindings" (10) or "I/O Tensors" (11), or the list alone.
        nodes: "macs" and "quantized" (whether the file dequantizes its weights) of the ONNX nodes that have weights; None
            where nobody knows them: MACs are then those of the layers that show their weights.
        times: microseconds of the layers that were timed.

    Returns:
        A record a layer: "name", "op", "precision" ("int8", "fp16", ...; of the weights, or of the first input), "macs" (0
        where none are counted), "us", "nodes" (how many of the ONNX file it fuses), "reformat" (whether it only moves data),
        "unfused_qdq" (whether it is a Q or DQ that was not fused into a layer), "reason" (why not in INT8, where the file
        asks for it) and, where `nodes` are known, "quantized".

    Raises:
        UserError: the plan was built without details.
    """
    content = json.loads(text)
    listed = content["Layers"] if isinstance(content, dict) else content
    if any(isinstance(layer, str) for layer in listed):
        raise UserError("the plan holds names of layers alone; build it here, with profiling verbosity DETAILED: stage=build")
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
    """The precision that a format or type stands for; "other" for none that is known."""
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
