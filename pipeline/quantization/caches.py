"""Files with calibration results: tensor data, scales, and TensorRT 10's calibration cache."""

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

# The inputs of calibration, with their names in error messages.
PARTS = {
    "network": "the network",
    "images": "the list of calibration images",
    "preprocessing": "the preprocessing (framing, resolution or the network's input form)",
    "algorithm": "the algorithm (its options, or the nodes that are quantized)",
    "program": "this program, or ONNX Runtime,",
}


def network_digest(model: onnx.ModelProto) -> str:
    """SHA-256 of a network's graph and weights. The file's other entries, like the producer and descriptions, do not count."""
    return hashlib.sha256(model.graph.SerializeToString(deterministic=True)).hexdigest()


def program_digest() -> str:
    """SHA-256 of the quantizing code and the version of the runtime."""
    import onnxruntime

    code = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(code + onnxruntime.__version__.encode()).hexdigest()


def check(file: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a cache was made from equal inputs.

    Raises:
        UserError: an input changed; the message names it.
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
    """Read histograms from a file, or else make them and write the file.

    Args:
        file: an .npz file. None: the histograms are not kept.
        key: digests of everything that the histograms depend on.
        tensors: names of the tensors.
        make: function that makes the histograms.
        option: name of the option that sets the file, for messages.

    Raises:
        UserError: the file is no such cache, or was made from other inputs.
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
    """Refuse pipes and devices, because reading them may never end.

    Raises:
        UserError: the path exists and is no regular file.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: no regular file; name another file")


def writable(file: Path, option: str) -> None:
    """Make a file's folder early, so that an unusable path is found before the work is done.

    Raises:
        UserError: the folder cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}={file}: cannot make its folder ({error.strerror}); name a file elsewhere") from error


def read_scales(file: Path, key: Mapping[str, Any], tensors: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the rows of given tensors from a scales.json, and check that it was made from equal inputs.

    A row is {"threshold": {runtime variant: number}, "least": number, "most": number, ...}.

    Raises:
        UserError: the file is no such cache, or was made from other inputs.
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
    """The thresholds in the rows of a scales.json, by runtime variant."""
    return {flavour: {name: float(row["threshold"][flavour]) for name, row in rows.items()} for flavour in FLAVOURS}


def write_scales(
    file: Path, key: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], excluded: Sequence[str], most_weight: int
) -> None:
    """Write scales.json. Equal calibrations give equal bytes.

    Args:
        file: path of the file.
        key: digests of everything that the scales depend on.
        rows: the rows, by tensor.
        excluded: names of nodes that stay in float.
        most_weight: the greatest integer of a weight.
    """
    content = {"key": dict(key), "excluded": list(excluded), "most_weight": most_weight, "tensors": dict(rows)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(content, indent=1, sort_keys=True))
    unfinished.replace(file)


def write_tensorrt(file: Path, scales: Mapping[str, float]) -> None:
    """Write scales in the form of TensorRT 10's calibrators: a header, then lines "tensor: float32 bits in hexadecimal"."""
    lines = ["TRT-100300-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', scale).hex()}" for name, scale in sorted(scales.items())]
    file.write_text("\n".join(lines) + "\n")


def read_tensorrt(file: Path) -> dict[str, float]:
    """Scales of a TensorRT calibration cache, by tensor.

    Raises:
        UserError: the file is no calibration cache, or a scale in it is not positive.
    """
    try:
        header, *lines = file.read_text().splitlines() or [""]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot read the calibration cache ({error}); give the file that a calibrator wrote"
        ) from error
    if not header.startswith("TRT-"):
        raise UserError(f"{file}: not a TensorRT calibration cache: it begins with '{header[:20]}', not 'TRT-'; give another")
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
