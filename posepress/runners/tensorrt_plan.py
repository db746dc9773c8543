"""The description beside a TensorRT plan, and the check that the plan runs on this machine."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posepress.errors import UserError

ENGINE, SIDE, WEIGHTS = "engine.plan", "engine.json", "weights.onnx"

_KEYS = (
    "tensors",
    "nodes",
    "weights",
    "plugins",
    "version_compatible",
    "hardware_compatibility_level",
    "tensorrt",
    "spec",
)  # required keys of a plan's description


def check(engine: Path, version: str | None, gpu: Mapping[str, Any], kind: str = "tensorrt") -> tuple[dict[str, Any], bytes]:
    """Read a plan's description and the plan; both must be intact and made for this machine.

    Args:
        engine: file of the plan.
        version: version of TensorRT on this machine; None skips the comparison.
        gpu: "name" and "sm" of the GPU.
        kind: kind of the TensorRT that would run it.

    Raises:
        UserError: the plan is damaged or was built for another machine; TensorRT has loaded nothing of it.
    """
    again = "build it here: stage=build force=true"
    side = engine.parent / SIDE
    try:
        content: dict[str, Any] = json.loads(side.read_text())
        size, digest, built_for, *_ = (content[key] for key in ("bytes", "sha256", "gpu", *_KEYS))
        _ = built_for["name"], built_for["sm"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{side}: not the description of a plan ({error}); {again}") from error
    if (built_by := content.get("kind", "tensorrt")) != kind:
        raise UserError(f"{engine}: built by {built_by}, here {kind} would run it; {again}")
    if version is not None:
        check_version(engine, content, version)
    if not _fits(content["hardware_compatibility_level"], built_for, gpu):
        raise UserError(
            f"{engine}: built for {built_for['name']} (SM {built_for['sm']}), here is {gpu['name']} (SM {gpu['sm']}); {again}"
        )
    found = engine.stat().st_size if engine.is_file() else 0
    blob = engine.read_bytes() if found == size else b""
    if found != size or hashlib.sha256(blob).hexdigest() != digest:
        raise UserError(f"{engine}: {found} bytes, not the {size} that were built; copy it again, or {again}")
    return content, blob


def check_version(engine: Path, content: Mapping[str, Any], version: str) -> None:
    """Make sure that a plan runs with a version of TensorRT.

    Raises:
        UserError: the plan does not run with it.
    """
    built = content["tensorrt"]
    if built != version and not (content["version_compatible"] and _newer(version, built)):
        raise UserError(f"{engine}: built by TensorRT {built}, here is {version}; build it here: stage=build force=true")


def _newer(version: str, built: str) -> bool:
    """Whether a version-compatible plan runs: `version` has the same major number and is not older than `built`."""
    here, there = ([int(part) for part in text.split(".")[:3]] for text in (version, built))
    return here[0] == there[0] and here >= there


def _fits(level: str, built_for: Mapping[str, Any], gpu: Mapping[str, Any]) -> bool:
    major = int(str(gpu["sm"]).split(".")[0])
    if level == "ampere_plus":
        return major >= 8  # Ampere
    if level == "same_compute_capability":
        return str(gpu["sm"]) == str(built_for["sm"])
    return (gpu["name"], gpu["sm"]) == (built_for["name"], built_for["sm"])
