"""Calibration kept in files: tensor data, scales, and TensorRT 10's calibration cache."""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pipeline.onnx_files.files import FLAVOURS
from pipeline.quantization import calibration
from pipeline.quantization.calibration import Histogram
from pipeline.results.content import parse_json
from posepress.errors import UserError
from posepress.results import DAMAGED

# What calibration follows from, as an error names it.
PARTS = {
    "network": "the network",
    "images": "the list of calibration images",
    "preprocessing": "the preprocessing (framing, resolution or the network's input form)",
    "algorithm": "the algorithm (its options, or the nodes that are quantized)",
    "program": "this program, or ONNX Runtime,",
}


def network_digest(model: onnx.ModelProto) -> str:
    """SHA-256 of a network's graph and weights; names of tools and descriptions beside it do not count."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def program_digest() -> str:
    """SHA-256 of the code that quantizes, and of the version of the runtime."""
    import onnxruntime

    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(code + onnxruntime.__version__.encode()).hexdigest()


def check(file: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Make sure that a cache was made of the same things.

    Raises:
        UserError: it was not; what changed is named.
    """
    changed = [what for key, what in PARTS.items() if key in wanted and stored.get(key) != wanted[key]]
    if changed:
        raise UserError(f"{file}: made with another calibration: {', '.join(changed)} changed; delete the file or name another")


def tensor_data(
    file: Path | None,
    key: Mapping[str, Any],
    tensors: Sequence[str],
    make: Callable[[], dict[str, Histogram]],
    option: str = "precision.cal_data_file",
) -> dict[str, Histogram]:
    """Histograms from a file, or made and then written to it.

    Args:
        file: an .npz file; None keeps nothing.
        key: what they follow from.
        tensors: whose histograms they are.
        make: them.
        option: that names the file.

    Raises:
        UserError: the file is no such cache, or was made of other things.
    """
    if file is not None and file.exists():
        _check_regular(file)
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            check(file, json.loads(str(arrays.pop("key"))), key)
            found = calibration.restore(arrays)
            return {name: found[name] for name in tensors}
        except DAMAGED as error:
            raise UserError(f"{file}: not a cache of tensor data; delete it or name another") from error
    if file is not None:
        writable(file, option)
    made = make()
    if file is not None:
        unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with unfinished.open("wb") as stream:
            np.savez_compressed(stream, key=np.array(json.dumps(dict(key))), **calibration.save(made))  # type: ignore[arg-type]
        unfinished.replace(file)
    return made


def _check_regular(file: Path) -> None:
    """Refuse pipes and devices, which have no end.

    Raises:
        UserError: the file is there and is no regular file.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: no regular file; name another")


def writable(file: Path, option: str) -> None:
    """Make a file's folder, before work is done whose result would have no place.

    Raises:
        UserError: it cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}={file}: cannot make its folder ({error.strerror}); name a file elsewhere") from error


def read_scales(file: Path, key: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Rows of a scales.json, of some tensors and made of the same things.

    A row is {"threshold": {flavour: number}, "least": number, "most": number, ...}.

    Raises:
        UserError: the file is no such cache, or was made of other things.
    """
    _check_regular(file)
    try:
        content = parse_json(file.read_bytes())
        rows: dict[str, dict[str, Any]] = dict(content["tensors"])
        stored = dict(content["key"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a cache of scales ({error}); delete it or name another") from error
    check(file, stored, key)
    for name in tensors:
        try:
            row = rows[name]
            least, most, *ends = (float(v) for v in (row["least"], row["most"], *(row["threshold"][f] for f in FLAVOURS)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: no least, most and threshold of '{name}'; delete the file or name another") from error
        reached = max(-least, most)
        if not np.isfinite([least, most, *ends]).all() or min(ends) < 0 or (min(ends) == 0 and reached > 0):
            raise UserError(
                f"{file}: the thresholds of '{name}' are {ends}, of values from {least} to {most}; delete the file or name "
                "another"
            )
    return {name: rows[name] for name in tensors}


def thresholds(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By flavour, the thresholds of the rows of a scales.json."""
    return {flavour: {name: float(row["threshold"][flavour]) for name, row in rows.items()} for flavour in FLAVOURS}


def write_scales(
    file: Path, key: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], excluded: Sequence[str], most_weight: int
) -> None:
    """Write scales.json; the same calibration gives the same bytes.

    Args:
        file: to write.
        key: what the scales follow from.
        rows: by tensor.
        excluded: nodes that stay in float.
        most_weight: the greatest integer of a weight.
    """
    content = {"key": dict(key), "excluded": list(excluded), "most_weight": most_weight, "tensors": dict(rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True))
    unfinished.replace(file)


def write_tensorrt(file: Path, scales: Mapping[str, float]) -> None:
    """Write scales as TensorRT 10's calibrators do: a header, then "tensor: bits of the float32 scale" in hexadecimal."""
    lines = ["TRT-100300-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in sorted(scales.items())]
    file.write_text("\n".join(lines) + "\n")


def read_tensorrt(file: Path) -> dict[str, float]:
    """Scales of a TensorRT calibration cache, by tensor.

    Raises:
        UserError: the file is none, or a scale in it is not positive.
    """
    try:
        header, *lines = file.read_text().splitlines() or [""]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot read the calibration cache ({error}); give the file that a calibrator wrote"
        ) from error
    if not header.startswith("TRT-"):
        raise UserError(f"{file}: not a TensorRT calibration cache, for it begins with '{header[:20]}' instead of 'TRT-'")
    scales = {}
    for number, line in enumerate(lines, 2):
        name, _, bits = line.rpartition(":")
        try:
            (scale,) = struct.unpack(">f", bytes.fromhex(bits.strip()))
        except (ValueError, struct.error) as error:
            raise UserError(f"{file}, line {number}: not 'tensor: eight hexadecimal digits' but '{line[:40]}'") from error
        if name and not (np.isfinite(scale) and scale >= 0):
            raise UserError(f"{file}, line {number}: the scale of '{name}' is {scale}; calibrate again")
        if name:
            scales[name] = float(scale)
    return scales
