"""INT8 with the calibrators of TensorRT 10, which read the inputs that the stage `quantize` wrote.

TensorRT 11 has no calibrators.
"""

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.onnx_files.files import CALIBRATION, CALIBRATION_INPUTS
from pipeline.progress import Progress
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.resolution import Resolution
from posepress.runners.device_memory import DeviceMemory
from posepress.spec import InputSpec

_BASES = {"entropy": "IInt8EntropyCalibrator2", "minmax": "IInt8MinMaxCalibrator"}


def calibrate(
    trt: Any, config: Any, profile: Any, folder: Path, spec: InputSpec, memory: DeviceMemory, kept: Path | None
) -> Callable[[], None]:
    """Set up a builder for calibration. Call the returned function after the build: it raises an error of the calibration.

    Args:
        trt: the module `tensorrt`.
        config: the builder's configuration; the network must not be strongly typed.
        profile: an empty optimization profile of the builder.
        folder: folder with calibrator.json and calibration_inputs.npy.
        spec: description of the network's input.
        memory: memory of the GPU.
        kept: folder of calibration caches. A cache is used again if network, images, preprocessing, calibrator and version
            of TensorRT are equal. None calibrates in each build.

    Raises:
        UserError: this version of TensorRT has no calibrators.
    """
    about = json.loads((folder / CALIBRATION).read_text())
    base: Any = getattr(trt, _BASES[about["calibrator"]], None)
    if base is None:
        raise UserError(
            f"precision=int8_entropy: TensorRT {trt.__version__} has no calibrators, which only version 10 has; "
            "choose precision=int8, which writes the scales into the ONNX file"
        )
    images = np.load(folder / CALIBRATION_INPUTS, mmap_mode="r")
    digest = sha256(json.dumps([about, trt.__version__], sort_keys=True).encode()).hexdigest()
    cache = None if kept is None else kept / f"calibration-{digest[:16]}.cache"
    shape = spec.shape(1, Resolution(*images.shape[1:3]))
    profile.set_shape(spec.name, shape, shape, shape)
    config.set_calibration_profile(profile)
    for flag in ("INT8", *(["FP16"] if about["high_precision_dtype"] == "fp16" else [])):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    feed = _Feed(images, spec, memory, memory.empty(shape, np.dtype(spec.dtype)), cache)
    config.int8_calibrator = _calibrator(base)(feed)

    def finish() -> None:
        feed.progress.close()
        if feed.failure is not None:
            raise feed.failure

    return finish


class _Feed:
    """The images that a calibrator gets one by one, and its cache.

    TensorRT ignores exceptions raised while it calibrates, and continues with fewer images. Therefore the first exception is
    kept, and raised again after the build.
    """

    def __init__(self, images: NDArray[Any], spec: InputSpec, memory: DeviceMemory, place: Any, cache: Path | None) -> None:
        self.images, self.spec, self.memory, self.place, self.cache = images, spec, memory, place, cache
        self.known = _kept(cache)
        self.failure: Exception | None = None
        self.at = 0
        self.progress = ExitStack()
        self.bar = Progress("calibrating in TensorRT", len(images), "images")

    def following(self) -> int | None:
        """The address of the next image; None at the end."""
        if self.at >= len(self.images) or self.failure is not None:
            self.progress.close()
            return None
        if not self.at:
            self.progress.enter_context(self.bar)
        try:
            self.memory.copy(self.place, normalise(self.images[self.at : self.at + 1], self.spec))
        except Exception as error:  # noqa: BLE001 - every error is raised again after the build
            self.failure = error
            return None
        self.at += 1
        self.bar.update(self.at)
        address: int = self.place.address
        return address

    def keep(self, content: Any) -> None:
        """Write the calibrator's cache."""
        if self.cache is None or self.failure is not None:
            return
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.cache.with_name(f".{self.cache.name}.{os.getpid()}.tmp")
            blob = bytes(memoryview(content))
            unfinished.write_bytes(sha256(blob).hexdigest().encode() + b"\n" + blob)
            unfinished.replace(self.cache)
        except Exception as error:  # noqa: BLE001 - every error is raised again after the build
            self.failure = error


def _calibrator(base: Any) -> Any:
    """A subclass of one of TensorRT's calibrators, which takes a feed."""

    class Calibrator(base):  # type: ignore[misc] # the base exists only where TensorRT 10 does
        def __init__(self, feed: _Feed) -> None:
            base.__init__(self)
            self.feed = feed

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: list[str]) -> list[int] | None:
            address = self.feed.following()
            return None if address is None else [address for _ in names]

        def read_calibration_cache(self) -> bytes | None:
            return self.feed.known

        def write_calibration_cache(self, content: Any) -> None:
            self.feed.keep(content)

    return Calibrator


def _kept(cache: Path | None) -> bytes | None:
    """Return TensorRT's calibration cache after a check of its digest, or None if there is no cache.

    Raises:
        UserError: the cache is damaged or incomplete.
    """
    if cache is None or not cache.exists():
        return None
    digest, _, content = cache.read_bytes().partition(b"\n")
    if digest != sha256(content).hexdigest().encode():
        raise UserError(f"{cache}: damaged or cut short; delete it, so that TensorRT calibrates again")
    return content
