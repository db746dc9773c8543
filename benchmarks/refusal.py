"""The time of refusing an unsuitable engine, by the fault that the file beside it reveals. TensorRT is not loaded.

python benchmarks/refusal.py [--megabytes 64]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path

from posepress.errors import UserError
from posepress.runners.tensorrt_plan import ENGINE, SIDE, check

REPEATS = 50
GPU = {"name": "NVIDIA H200", "sm": "9.0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = bytes(options.megabytes << 20)
        (Path(folder) / ENGINE).write_bytes(plan)
        whole = {
            "tensorrt": "10.3.0",
            "gpu": GPU,
            "bytes": len(plan),
            "sha256": sha256(plan).hexdigest(),
            "hardware_compatibility_level": "none",
            **dict.fromkeys(("tensors", "nodes", "weights", "plugins", "version_compatible", "spec")),
        }
        wrong: dict[str, dict[str, object]] = {
            "another version": {"tensorrt": "10.16.0"},
            "another GPU": {"gpu": {"name": "Orin", "sm": "8.7"}},
            "cut short": {"bytes": len(plan) + 1},
            "damaged": {"sha256": "0" * 64},
        }
        for name, change in wrong.items():
            (Path(folder) / SIDE).write_text(json.dumps({**whole, **change}))
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                try:
                    check(Path(folder) / ENGINE, "10.3.0", GPU)
                except UserError:
                    times.append(1e3 * (time.perf_counter() - started))
            assert len(times) == REPEATS
            print(f"{name}: {statistics.median(times):.2f} ms, a plan of {options.megabytes} MiB")
    assert "tensorrt" not in sys.modules


if __name__ == "__main__":
    main()
