"""Which precision really ran: shares of the multiply-accumulates of an engine."""

from collections.abc import Mapping, Sequence
from typing import Any


def shares(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The part of all MACs that ran in each precision, the greatest first.

    Args:
        layers: records with "precision" and "macs", as a backend's `audit` returns them.

    Raises:
        ValueError: no layer has MACs.
    """
    totals: dict[str, int] = {}
    for layer in layers:
        if layer["macs"]:
            totals[layer["precision"]] = totals.get(layer["precision"], 0) + int(layer["macs"])
    every = sum(totals.values())
    if every == 0:
        raise ValueError("no layer of the engine has multiply-accumulates: nothing to audit")
    return {name: macs / every for name, macs in sorted(totals.items(), key=lambda item: -item[1])}


def label(found: Mapping[str, float]) -> str:
    """The shares in a few words: "int8 99.1%, fp32 0.9%"."""
    return ", ".join(f"{name} {100 * share:.3g}%" for name, share in found.items())
