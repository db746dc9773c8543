"""INT8 that TensorRT 10 calibrates while it builds. The network stays float; its calibration inputs are stored beside it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import CALIBRATION, CALIBRATION_INPUTS
from pipeline.quantization.caches import network_digest
from posepress.errors import UserError

CALIBRATORS = ("entropy", "minmax")


@dataclass(frozen=True)
class ImplicitInt8:
    """Writes the inputs of TensorRT's own calibrators (`IInt8EntropyCalibrator2`, `IInt8MinMaxCalibrator`).

    TensorRT 11 no longer has them.

    Attributes:
        calibrator: "entropy" or "minmax".
        high_precision_dtype: "fp16" or "fp32": type of the layers that have no INT8 kernel or a slower one.
    """

    calibrator: Literal["entropy", "minmax"] = "entropy"
    high_precision_dtype: Literal["fp32", "fp16"] = "fp32"

    @staticmethod
    def label_of(options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the calibrator, the type of the other layers, and the calibration images."""
        return f"{options['calibrator']}-{options['high_precision_dtype']}-{setting['sampler']}"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: the calibrator or the type is unknown.
        """
        for option, known in (("calibrator", CALIBRATORS), ("high_precision_dtype", ("fp16", "fp32"))):
            if getattr(self, option) not in known:
                raise ValueError(f"precision.{option}={getattr(self, option)}: choose {', '.join(known)}")

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Any, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Copy the network for TensorRT, and write the framed calibration inputs, uint8 [N, H, W, 3].

        Raises:
            UserError: the inputs have different sizes.
        """
        assert feed is not None
        model = onnx.load(onnx_file)
        onnx.save(model, out / "model.tensorrt.onnx")
        size = _write(out / CALIBRATION_INPUTS, feed.frames(None))
        about = {
            "calibrator": self.calibrator,
            "high_precision_dtype": self.high_precision_dtype,
            "network": network_digest(model),
            "images": feed.images,
            "preprocessing": feed.preprocessing,
        }
        (out / CALIBRATION).write_text(json.dumps(about, indent=1, sort_keys=True))
        return {"precision": "int8_entropy", "calibrator": self.calibrator, "calibration_inputs": size}


def _write(file: Path, frames: Iterable[NDArray[np.uint8]]) -> int:
    """Write frames one by one as an .npy array, and return their number."""
    with file.open("wb") as stream:
        shape: tuple[int, ...] | None = None
        count = 0
        for batch in frames:
            if shape is None:
                shape = batch.shape[1:]
                _header(stream, (0, *shape))
            if batch.shape[1:] != shape:
                raise UserError(
                    f"TensorRT calibrates at one input size, and images here become {shape[0]}x{shape[1]} and "
                    f"{batch.shape[1]}x{batch.shape[2]}; choose keep_aspect_ratio_mode=null or pad_image_input, or another "
                    "precision"
                )
            stream.write(np.ascontiguousarray(batch).tobytes())
            count += len(batch)
        assert shape is not None
        _header(stream, (count, *shape))
    return count


def _header(stream: Any, shape: tuple[int, ...]) -> None:
    """Write the header of an .npy file. Numpy leaves room for a greater number of images."""
    stream.seek(0)
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
