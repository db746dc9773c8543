"""What a machine with TensorRT is asked to show: run it with `make test-gpu`, and send back outputs/certificate.json.

    python tests/gpu/certify.py [--experiment demo]

It trains the experiment's network (or finds it fresh), builds it in every precision that version and GPU have, compares AP with
ONNX Runtime's and latency with trtexec's, and tries stripped plans, the timing cache and several profiles.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.tensorrt import TensorRT
from pipeline.onnx_files.files import ModelFiles, Shapes
from posepress.resolution import Resolution
from posepress.runners.device_memory import DeviceMemory
from posepress.runners.tensorrt import TensorRTRunner

AP_APART = {"fp32": 0.001, "fp16": 0.003, "bf16": 0.01, "int8": 0.01, "fp8": 0.01}  # most from ONNX Runtime's
AP_LOST = 0.03  # most that TensorRT's own calibration may lose of FP32's
FIELDS_APART = 1e-2  # of their greatest value, in FP32
LATENCY_RATIO = 1.15  # of ours to trtexec's, at most
INT8_SHARE = 0.8  # of the MACs, at least

_WORDS = {True: "passed", False: "FAILED", None: "left out"}
Check = Callable[[], tuple[bool | None, str]]  # whether it passed, None for not done, and what was found


class Certificate:
    """Runs checks and keeps what they say."""

    def __init__(self, root: Path, experiment: str) -> None:
        import tensorrt as trt

        self.root, self.experiment, self.trt = root, experiment, trt
        self.major = int(trt.__version__.split(".")[0])
        self.gpu = DeviceMemory().gpu
        self.rows: list[dict[str, Any]] = []

    def check(self, name: str, function: Check) -> None:
        started = time.perf_counter()
        try:
            passed, words = function()
        except Exception as error:
            passed, words = False, f"{type(error).__name__}: {error}"
        self.rows.append({"check": name, "passed": passed, "found": words, "seconds": round(time.perf_counter() - started, 1)})
        Console(stderr=True).print(f"{_WORDS[passed]:6}  {name}: {words}", markup=False, soft_wrap=True)

    def folder(self, stage: str, precision: str, backend: str) -> Path:
        """A result of the dense network."""
        pattern = rf"_dense_\d+x\d+_[a-z]+_{precision}(-[^_]*)?_{backend}-b1(_t1)?$"
        (found,) = (f for f in (self.root / stage).iterdir() if re.search(pattern, f.name))
        return found

    def summary(self, stage: str, precision: str, backend: str) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((self.folder(stage, precision, backend) / "manifest.json").read_text())
        return dict(manifest["summary"])

    def precisions(self) -> list[str]:
        """Those that version and GPU have."""
        sm = float(self.gpu["sm"])
        there = {"bf16": sm >= 8.0, "fp8": sm >= 8.9 and hasattr(self.trt.DataType, "FP8"), "int8_entropy": self.major == 10}
        return ["fp32", "fp16", "int8", *(name for name, known in there.items() if known)]

    def chain(self) -> tuple[bool, str]:
        start = [sys.executable, "-m", "pipeline", "--multirun", f"experiment={self.experiment}", "tracking=none"]
        both = [name for name in self.precisions() if name in AP_APART]
        alone = [name for name in self.precisions() if name not in AP_APART]
        sweeps = [["backend=onnxruntime,tensorrt", f"precision={','.join(both)}"]]
        sweeps += [["backend=tensorrt", f"precision={','.join(alone)}"]] if alone else []
        done = [subprocess.run([*start, *words], check=False).returncode for words in sweeps]
        return not any(done), f"{', '.join(self.precisions())}: exit status {done}"

    def accuracy(self, precision: str) -> tuple[bool, str]:
        ours = float(self.summary("evaluate", precision, "tensorrt")["ap"])
        same = precision in AP_APART
        theirs = float(self.summary("evaluate", precision if same else "fp32", "onnxruntime")["ap"])
        words = f"AP {ours:.4f}, ONNX Runtime's {'' if same else 'in FP32 '}{theirs:.4f}"
        return (abs(ours - theirs) <= AP_APART[precision] if same else ours >= theirs - AP_LOST), words

    def audited(self) -> tuple[bool, str]:
        from evaluation import audit

        layers = json.loads((self.folder("benchmark", "int8", "tensorrt") / "audit.json").read_text())
        shares = audit.shares(layers)
        kinds = [f"{kind}: {audit.label(audit.shares(layers, kind))}" for kind in audit.KINDS]
        return shares.get("int8", 0.0) >= INT8_SHARE, f"{'; '.join(kinds)}; {audit.counts(layers)}"

    def latency(self, precision: str) -> tuple[bool | None, str]:
        trtexec = shutil.which("trtexec") or "/usr/src/tensorrt/bin/trtexec"
        if not Path(trtexec).exists():
            return None, "no trtexec on PATH"
        summary = self.summary("benchmark", precision, "tensorrt")
        if "latency_p50_ms" not in summary:
            return False, "the benchmark timed nothing"
        plan = self.folder("build", precision, "tensorrt") / "engine.plan"
        # The same on both major versions: one graph, spinning, no transfers. From 11 on that is trtexec's default.
        same = [] if self.major > 10 else ["--useCudaGraph", "--useSpinWait", "--noDataTransfers"]
        done = subprocess.run([trtexec, f"--loadEngine={plan}", *same], capture_output=True, text=True, check=True)
        found = re.search(r"GPU Compute Time:.*?median = ([\d.]+) ms", done.stdout)
        if found is None:
            return False, "trtexec printed no median"
        ours, theirs = float(summary["latency_p50_ms"]), float(found[1])
        return (
            ours <= LATENCY_RATIO * theirs,
            f"{ours:.3f} ms with copies, trtexec's compute {theirs:.3f} ms",
        )

    def direct(
        self, options: dict[str, Any], shapes: Shapes, images: list[np.ndarray], folder: Path
    ) -> tuple[list[Any], float]:
        """Fields of an engine built here of the FP32 network, and how long it took to build."""
        folder.mkdir()
        started = time.perf_counter()
        engine = TensorRT(**options).build(self.files(), shapes, folder)
        took = time.perf_counter() - started
        with TensorRTRunner(engine) as runner:
            return [dict(runner.download(runner(runner.upload(image)))) for image in images], took

    def files(self) -> ModelFiles:
        """The typed FP32 network."""
        manifest = json.loads((self.folder("build", "fp32", "tensorrt") / "manifest.json").read_text())
        (network,) = manifest["inputs"]["network"]
        return ModelFiles.in_folder(self.root / "quantize" / network["address"])

    def size(self) -> Resolution:
        return Resolution.parse(re.search(r"_dense_(\d+x\d+)_", self.folder("build", "fp32", "tensorrt").name)[1])  # type: ignore[index]

    def stripped(self) -> tuple[bool, str]:
        size, draw = self.size(), np.random.default_rng(0)
        images = [draw.integers(0, 255, (1, size.height, size.width, 3), np.uint8)]
        shapes = Shapes((size, size, size), (1, 1, 1))
        with tempfile.TemporaryDirectory() as scratch:
            whole, _ = self.direct({}, shapes, images, Path(scratch) / "whole")
            bare, _ = self.direct({"strip_weights": True}, shapes, images, Path(scratch) / "bare")
            sizes = [(Path(scratch) / name / "engine.plan").stat().st_size for name in ("whole", "bare")]
        apart = max(float(np.abs(whole[0][n] - bare[0][n]).max()) for n in whole[0])
        return apart < 1e-3 and sizes[1] < sizes[0], f"{sizes[1]} of {sizes[0]} bytes, fields {apart:.2g} apart after refitting"

    def cached(self) -> tuple[bool, str]:
        size = self.size()
        shapes = Shapes((size, size, size), (1, 1, 1))
        with tempfile.TemporaryDirectory() as scratch:
            options = {"timing_cache": f"{scratch}/cache"}
            took = [self.direct(options, shapes, [], Path(scratch) / str(n))[1] for n in range(2)]
            self.direct({**options, "error_on_timing_cache_miss": True}, shapes, [], Path(scratch) / "strict")
        return True, f"first build {took[0]:.1f} s, second {took[1]:.1f} s, third from the cache alone"

    def dynamic(self) -> tuple[bool, str]:
        size, draw = self.size(), np.random.default_rng(0)
        large = Resolution(size.height + 32, size.width + 32)
        shapes = Shapes((size, size, size), (1, 2, 4), (Shapes((size, large, large), (1, 1, 2)),))
        images = [
            draw.integers(0, 255, (b, r.height, r.width, 3), np.uint8) for b, r in ((1, size), (4, size), (2, large), (1, size))
        ]
        with tempfile.TemporaryDirectory() as scratch:
            fields, _ = self.direct({}, shapes, images, Path(scratch) / "dynamic")
            exact = OnnxRuntime().load(OnnxRuntime().build(self.files(), shapes, Path(scratch)))
            expected = [exact(exact.upload(image)) for image in images]
        apart = max(
            float(np.abs(found[name] - other[name]).max() / np.abs(other[name]).max())
            for found, other in zip(fields, expected, strict=True)
            for name in other
        )
        return apart <= FIELDS_APART, f"{[f['heatmaps'].shape for f in fields]}, at most {apart:.2g} from ONNX Runtime's"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo")
    options = parser.parse_args()
    made = Certificate(Path("outputs") / options.experiment, options.experiment)
    made.check("every precision, end to end", made.chain)
    for precision in made.precisions():
        made.check(f"AP in {precision}", lambda precision=precision: made.accuracy(precision))
    made.check("what ran in INT8", made.audited)
    for precision in made.precisions():
        made.check(f"latency in {precision}", lambda precision=precision: made.latency(precision))
    made.check("a stripped plan, refitted", made.stripped)
    made.check("timing cache", made.cached)
    made.check("dynamic shapes, two profiles", made.dynamic)
    doctor = subprocess.run(
        [sys.executable, "-m", "pipeline", "stage=doctor", "tracking=none"], capture_output=True, text=True, check=False
    )
    about = {"tensorrt": made.trt.__version__, "double": bool(getattr(made.trt, "POSEPRESS_DOUBLE", False)), "gpu": made.gpu}
    file = Path("outputs/certificate.json")
    file.write_text(json.dumps({**about, "checks": made.rows, "doctor": doctor.stderr.splitlines()}, indent=1))
    table = Table("check", "passed", "found", "s", title=f"TensorRT {about['tensorrt']} on {made.gpu['name']}")
    for row in made.rows:
        table.add_row(row["check"], _WORDS[row["passed"]], row["found"], str(row["seconds"]))
    Console(width=160).print(table)
    print(f"{file}: send it to whoever asked for it")
    sys.exit(0 if all(row["passed"] is not False for row in made.rows) else 1)


if __name__ == "__main__":
    main()
