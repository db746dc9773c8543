"""The effect of each step of INT8 on AP, agreement and error of the fields, for both runtime variants and channels of zeros.

    python benchmarks/quantization.py [--name NAME] resolution=368x432 WORDS...

WORDS are options of the pipeline that set a trained network and its data (weights=, model=, data=, sampler.num_images=).
Every row is a cell of the sweep outputs/<name>, and its report also shows it. The tests' double of TensorRT computes the
TensorRT file. This double is ONNX Runtime without optimisations.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

from evaluation import latency
from evaluation.statistics import Draws, paired
from pipeline.contracts import CalibrationFeed
from pipeline.probing.probe import of_all_fields
from pipeline.quantization import alignment, writers
from pipeline.quantization.graph import load
from pipeline.quantization.precisions.int8 import Int8
from posepress.resolution import Resolution

SWITCHES = ("equalize_concatenations", "equalize_layers", "bias_correction")
FAKES = Path(__file__).parent.parent / "tests" / "fakes"


def pipeline(*words: str) -> dict[str, Path]:
    """Run the pipeline, and return the folder of each stage's result."""
    path = os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pipeline", *words]
    done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [line.split() for line in done.stderr.splitlines()]
    return {line[0]: Path(line[2]) for line in lines if len(line) > 2 and line[1] in ("done", "fresh")}


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def zeros(file: Path, size: Resolution) -> Table:
    """FP32 and INT8 with and without channels of zeros in the concatenations, timed in turns on noise."""
    shape = (1, 3, size.height, size.width)
    noise = [np.random.default_rng(n).uniform(0, 255, shape).astype(np.float32) for n in range(2)]
    made = Int8("percentile").calibrate(file, CalibrationFeed(lambda most: noise[:most], lambda _: (), "noise", "noise"))
    given = [load(file), made.model]
    floats, bases = ([model, alignment.align(model)[0]] for model in given)
    integers = [writers.insert(base, made.placement, made.scales["onnxruntime"], "onnxruntime") for base in bases]
    runners = [session(network) for network in (*floats, *integers)]
    name = runners[0].get_inputs()[0].name
    times = latency.in_turns([[partial(lambda run, _: run(None, {name: noise[0]}), runner.run)] for runner in runners], 30)
    table = Table("network", "as exported, ms", "channels of zeros, ms", "ratio", "INT8 x FP32")
    for n, label in ((0, "FP32"), (2, "INT8")):
        plain, padded = times[n], times[n + 1]
        against = str(latency.speedup(padded, times[1])) if n else ""
        table.add_row(
            label, f"{plain.percentile(50)}", f"{padded.percentile(50)}", f"{latency.speedup(padded, plain)}", against
        )
    return table


def interval(found: Mapping[str, Any], name: str, digits: int) -> str:
    if found[name] == -1:
        return "–"  # the images show no people
    return f"{found[name]:.{digits}f} [{found[f'{name}_lo']:.{digits}f}, {found[f'{name}_hi']:.{digits}f}]"


def main() -> None:
    """Print both tables."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--name", default="quantization")
    given, chain = words.parse_known_args()
    chain += [f"name={given.name}", "tracking=none"]
    table = Table("step", "error", "AP", "AP - FP32", "agreement", "p50 ms", "x FP32")
    fp32 = pipeline(*chain, "precision=fp32", "stage=[train,export,quantize,build,tune,evaluate]")
    draws = Draws.load(fp32["evaluate"] / "draws.npz")
    table.add_row("fp32", "", f"{draws.value:.4f}")

    def add(label: str, *options: str) -> dict[str, Path]:
        made = pipeline(*chain, *options)
        found = {stage: json.loads((made[stage] / "manifest.json").read_text())["summary"] for stage in made}
        errors = {name: value for name, value in found["quantize"].items() if name.startswith("error_")}
        row = [f"{of_all_fields(errors):.4f}", f"{found['evaluate']['ap']:.4f}"]
        lost = paired(Draws.load(made["evaluate"] / "draws.npz"), draws)
        row += [f"{lost.value:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}]", interval(found["evaluate"], "agreement_ap", 3)]
        if timed := found.get("benchmark"):
            row += [f"{timed['latency_p50_ms']:.1f}", interval(timed, "speedup", 2)]
        table.add_row(label, *row)
        return made

    steps = "train,export,sample,quantize,build,tune,evaluate"
    for on in range(len(SWITCHES) + 1):
        switches = [f"precision.{name}={str(n < on).lower()}" for n, name in enumerate(SWITCHES)]
        label = "calibrated" if on == 0 else f"+ {SWITCHES[on - 1]}"
        made = add(label, "precision=int8", f"stage=[{steps},benchmark]", *switches)
    made = add(
        "TensorRT's file, simulated",
        "precision=int8",
        f"stage=[{steps}]",
        "backend=tensorrt",
        "precision.measured_on=${backend}",
        "tag=-tensorrt",
    )
    console = Console(width=150)
    console.print(table)
    built = json.loads((made["quantize"] / "manifest.json").read_text())
    console.print(zeros(made["export"] / "model.onnx", Resolution.parse(built["config"]["resolution"])))


if __name__ == "__main__":
    main()
