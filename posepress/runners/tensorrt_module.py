"""The Python module of a TensorRT, its logger and its plugins: the one place that imports it."""

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from posepress.errors import UserError

_PACKAGES: Mapping[str, Sequence[str]] = {  # Python packages that bring each module
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx",),
}


@dataclass(frozen=True)
class TensorRTModule:
    """A TensorRT that is loaded, once in a process: the library keeps the first logger that it gets.

    Attributes:
        kind: "tensorrt", or "tensorrt_rtx" for TensorRT for RTX.
        trt: the Python module.
        logger: keeps errors, because a failing call returns None and reports the reason only there.
        libraries: plugin libraries that were loaded.
    """

    kind: str
    trt: Any
    logger: Any
    libraries: set[str] = field(default_factory=set)

    @property
    def is_double(self) -> bool:
        """Whether this is the double of the tests."""
        return bool(getattr(self.trt, "POSEPRESS_DOUBLE", False))

    def failed(self, what: str, fix: str) -> UserError:
        """The error for a failed call, with the reason that TensorRT logged."""
        reason = "; ".join(self.logger.errors[-3:]) or "TensorRT gave no reason"
        self.logger.errors.clear()
        return UserError(f"{what}: {reason}; {fix}")

    def prepare(self, files: Sequence[str]) -> None:
        """Clear the log, and load TensorRT's own plugins and further libraries, each once in a process.

        Raises:
            UserError: a library is missing, or TensorRT cannot load it.
        """
        self.logger.errors.clear()
        self.trt.init_libnvinfer_plugins(self.logger, "")
        for file in files:
            if not Path(file).is_file():
                raise UserError(f"backend.plugins: {file} is not there; give the plugin library that the engine was built with")
            library = str(Path(file).resolve())
            if library in self.libraries:
                continue
            if self.trt.get_plugin_registry().load_library(library) is None:
                raise self.failed(f"backend.plugins: {library} cannot be loaded", "build it for this TensorRT and CUDA")
            self.libraries.add(library)


@cache
def load(kind: str = "tensorrt") -> TensorRTModule:
    """Import a TensorRT.

    Args:
        kind: "tensorrt", or "tensorrt_rtx" for TensorRT for RTX.

    Raises:
        UserError: it is not installed.
    """
    try:
        trt = importlib.import_module(kind)
    except ImportError as error:
        package = _PACKAGES[kind][0]
        raise UserError(
            f"the Python package '{package}' cannot be imported ({error}); install it: pip install {package}"
        ) from error

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined] # the base exists only where TensorRT does
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return TensorRTModule(kind, trt, Logger())


def installed(kind: str = "tensorrt") -> str | None:
    """The version of a TensorRT, read without loading it; None if no package tells it."""
    for name in _PACKAGES[kind]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
