"""What this machine has, which parts of Posepress run on it, and what to install for the rest."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluation import device
from posepress.errors import UserError

_LEAST_DISK, _LEAST_MEMORY = 10, 8  # recommended free disk space and memory, in GiB
_TOO_OLD = ("TX2", "Nano Developer Kit", "TX1")  # TensorRT ends with 8.2 on these boards; an Orin Nano is not one of them


@dataclass(frozen=True)
class Finding:
    """The result of one check, and the remedy.

    Attributes:
        what: the part that was checked.
        found: the state that was found.
        remedy: a command or a sentence; empty if nothing is wrong.
    """

    what: str
    found: str
    remedy: str = ""


def findings(outputs: Path, root: Path) -> list[Finding]:
    """What was found on this machine.

    Args:
        outputs: folder of the results. The free space of its disk is checked.
        root: root of the file system.
    """
    return [*_computer(outputs, root), *_packages(), *_gpu(root), *_tensorrt(root)]


def _computer(outputs: Path, root: Path) -> Iterator[Finding]:
    machine = device.describe()
    model = root / "proc/device-tree/model"
    board = model.read_text().rstrip("\0\n") if model.exists() else ""
    yield Finding("machine", board or f"{machine['cpu']}, {machine['cores']} cores, {platform.machine()}")
    isa = machine["isa"]
    fast = any(name in isa for name in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))
    slow = "this processor has no VNNI: INT8 is slower, and weights get 7 bits, which costs accuracy (precision.reduce_range)"
    yield Finding("instructions", ", ".join(isa) or "no relevant ones", "" if fast else slow)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    little = f"less than {_LEAST_MEMORY} GiB: keep batch=1 and stages.train.training.workers low"
    yield Finding("memory", f"{memory:.0f} GiB", "" if memory > _LEAST_MEMORY else little)
    there = next(folder for folder in (outputs.resolve(), *outputs.resolve().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 2**30
    yield Finding("disk", f"{free:.0f} GiB free for {outputs}", "" if free > _LEAST_DISK else "free some, or set outputs=DIR")


def _packages() -> Iterator[Finding]:
    yield Finding("python", platform.python_version())
    for name, command in (("onnxruntime", "pip install onnxruntime"), ("torch", "make install"), ("mlflow", "make install")):
        version = _version(name)
        more = ""
        if name == "onnxruntime" and version:
            import onnxruntime

            more = f" ({', '.join(onnxruntime.get_available_providers())})"
        yield Finding(name, f"{version}{more}" if version else "not installed", "" if version else command)


def _gpu(root: Path) -> Iterator[Finding]:
    driver = root / "proc/driver/nvidia/version"
    if not driver.exists() and not (root / "etc/nv_tegra_release").exists():
        yield Finding("NVIDIA driver", "none", "for TensorRT: a GPU, and its driver from the distribution or nvidia.com")
    elif driver.exists():
        yield Finding("NVIDIA driver", driver.read_text().splitlines()[0].partition("Module")[2].split("Release")[0].strip())
    if importlib.util.find_spec("cuda") is None:
        yield Finding("cuda-python", "not installed", "for backend=tensorrt: pip install cuda-python")
        return
    from posepress.runners.device_memory import DeviceMemory

    try:
        memory = DeviceMemory()
        gpu = memory.gpu
        memory.activate()  # raises an error if the GPU does not answer
        yield Finding("GPU", f"{gpu['name']}, SM {gpu['sm']}")
    except (UserError, RuntimeError) as error:
        yield Finding("GPU", "does not answer", str(error))


def _tensorrt(root: Path) -> Iterator[Finding]:
    model = root / "proc/device-tree/model"
    board = model.read_text() if model.exists() else ""
    if "Orin" not in board and any(name in board for name in _TOO_OLD):
        yield Finding("TensorRT", "8.2 at most on this board", "not supported: 10.3 is the oldest; build for an Orin or a PC")
        return
    if importlib.util.find_spec("tensorrt") is None:
        where = "JetPack 6 or 7 brings it" if "NVIDIA" in board or "Orin" in board else "pip install tensorrt cuda-python"
        yield Finding("TensorRT", "not installed", where)
        return
    from posepress.runners.tensorrt_module import load

    trt, double = load().trt, " (the double of the tests)" if load().is_double else ""
    oldest = tuple(int(part) for part in trt.__version__.split(".")[:2]) < (10, 3)
    yield Finding("TensorRT", f"{trt.__version__}{double}", "not supported: install 10.3 or later" if oldest else "")
    flags = trt.BuilderFlag.__members__
    can = {
        "int8 by Q/DQ": True,
        "int8_entropy": hasattr(trt, "IInt8EntropyCalibrator2"),
        "same_compute_capability": hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"),
        "sparse_weights": "SPARSE_WEIGHTS" in flags,
    }
    yield Finding("TensorRT can", ", ".join(name for name, there in can.items() if there))
    if missing := [name for name, there in can.items() if not there]:
        yield Finding("TensorRT cannot", ", ".join(missing))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
