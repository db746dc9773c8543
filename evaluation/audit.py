"""Audit of the precision that really ran: shares of layers, multiply-accumulates and time, and layers that fell back."""

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = ("layers", "macs", "time")


def shares(layers: Sequence[Mapping[str, Any]], of: str = "macs") -> dict[str, float]:
    """The share of an engine that ran in each precision, the greatest first.

    Args:
        layers: records with "precision", "macs" and, if it was measured, "us", as a backend's `audit` returns them.
        of: measure of the shares: "layers" (layers with MACs), "macs", or "time" (all layers, including reformatting).

    Raises:
        ValueError: no layer has MACs.
    """
    totals: dict[str, float] = {}
    for layer in layers:
        weight = {"layers": float(layer["macs"] > 0), "macs": float(layer["macs"]), "time": float(layer.get("us", 0.0))}[of]
        if weight:
            totals[layer["precision"]] = totals.get(layer["precision"], 0) + weight
    every = sum(totals.values())
    if every == 0 and of != "time":
        raise ValueError("no layer of the engine has multiply-accumulates: nothing to audit")
    return {name: total / every for name, total in sorted(totals.items(), key=lambda item: -item[1])}


def label(found: Mapping[str, float]) -> str:
    """The shares as text: "int8 99.1%, fp32 0.9%"."""
    return ", ".join(f"{name} {100 * share:.3g}%" for name, share in found.items())


def counts(layers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The number of layers, and how many of them fuse several nodes, only move data, or are unfused Q/DQ nodes."""
    found = {"layers": len(layers)}
    if any("nodes" in layer for layer in layers):
        found["fused_groups"] = sum(layer.get("nodes", 0) > 1 for layer in layers)
        found["reformat_layers"] = sum(bool(layer.get("reformat")) for layer in layers)
        found["unfused_qdq"] = sum(bool(layer.get("unfused_qdq")) for layer in layers)
    return found


def fallen(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The layers with MACs that did not run in INT8, those with most MACs first; empty if no layer ran in INT8."""
    if not any(layer["precision"] == "int8" for layer in layers):
        return []
    return sorted((x for x in layers if x["macs"] and x["precision"] != "int8"), key=lambda layer: -layer["macs"])


def unmet(layers: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """The layers that the file quantizes but the backend ran in another precision, those with most MACs first.

    The result is None if no record tells what the file quantizes.
    """
    if not any("quantized" in layer for layer in layers):
        return None
    lost = (layer for layer in layers if layer.get("quantized") and layer["precision"] not in ("int8", "fp8"))
    return sorted(lost, key=lambda layer: -layer["macs"])
