"""Description of the machine, on which latencies and engines depend."""

import json
import os
import platform
from pathlib import Path
from typing import Any

_INTERESTING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def describe() -> dict[str, Any]:
    """The processor, its instruction sets that matter to networks, its cores, and the GPUs' names."""
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        flags = set()
    gpus = []
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        gpus += [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("Model:")]
    return {
        "cpu": model,
        "isa": [flag for flag in _INTERESTING if flag in flags],
        "cores": os.cpu_count() or 1,
        "gpus": gpus,
    }


def write(file: Path) -> dict[str, Any]:
    """Describe this machine in a file. DVC watches the file, so it is written only if the description changed."""
    device = describe()
    text = json.dumps(device, indent=1)
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return device


def name(device: dict[str, Any], on_gpu: bool) -> str:
    """The processor or the GPU in one line, for a table."""
    return f"{device['gpus'][0]}" if on_gpu and device["gpus"] else f"{device['cpu']} ({device['cores']} cores)"
