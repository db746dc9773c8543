"""What each step of INT8 gives a network: AP, agreement and error of the fields; both flavours; channels of zeros.

    python benchmarks/quantization.py [--name NAME] resolution=368x432 WORDS...

WORDS are those of a run of the pipeline with a trained network and its data (weights=, model=, data=, sampler.num_images=).
Every row is a cell of the sweep outputs/<name>, which its report shows, too.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

from evaluation import latency
from evaluation.types import Resolution
from pipeline.quantization import alignment, writers
from pipeline.quantization.graph import load
from pipeline.quantization.probe import of_all_fields
from pipeline.quantization.quantizers import Int8
from pipeline.specs import CalibrationFeed

SWITCHES = ("equalize_concatenations", "equalize_layers", "bias_correction")


def pipeline(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *words], check=True)


def row(root: Path, precision: str) -> dict[str, str]:
    """The row of results.csv that was evaluated last."""
    folders = [f for f in (root / "evaluate").glob(f"*_{precision}*") if (f / "manifest.json").exists()]
    newest = max(folders, key=lambda folder: (folder / "manifest.json").stat().st_mtime)
    axes = json.loads((newest / "manifest.json").read_text())["config"]["axes"]
    with (root / "report" / "results.csv").open() as stream:
        return next(r for r in csv.DictReader(stream) if all(r[k] == str(v) for k, v in axes.items() if k in r))


def error(root: Path, precision: str) -> float:
    """The fields' relative error on tune images, of the network that was quantized last."""
    newest = max((root / "quantize").glob(f"*_{precision}*/manifest.json"), key=lambda file: file.stat().st_mtime)
    summary = json.loads(newest.read_text())["summary"]
    return of_all_fields({key: value for key, value in summary.items() if key.startswith("error_")})


def interval(found: dict[str, str], name: str) -> str:
    value, low, high = (float(found[key]) for key in (name, f"{name}_lo", f"{name}_hi"))
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def zeros(file: Path, size: Resolution, table: Table) -> None:
    """FP32 and INT8 with and without channels of zeros in the concatenations, timed in turns on noise."""
    noise = [np.random.default_rng(n).uniform(0, 255, (1, 3, *size)).astype(np.float32) for n in range(2)]
    made = Int8("percentile").calibrate(file, CalibrationFeed(lambda most: iter(noise[:most]), "noise", "noise"))
    networks = [load(file), alignment.align(load(file))[0]]
    networks += [
        writers.insert(m, made.placement, made.scales, "onnxruntime") for m in (made.model, alignment.align(made.model)[0])
    ]
    runners = [session(network) for network in networks]
    name = runners[0].get_inputs()[0].name
    calls = [[lambda _, runner=runner: runner.run(None, {name: noise[0]})] for runner in runners]
    times = latency.in_turns(calls, 30)
    for label, base, padded in (("FP32", times[0], times[1]), ("INT8", times[2], times[3])):
        table.add_row(label, f"{base.percentile(50)}", f"{padded.percentile(50)}", f"{latency.speedup(padded, base)}")


def main() -> None:
    """Print both tables."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--name", default="quantization")
    given, chain = words.parse_known_args()
    chain += [f"name={given.name}", "tracking=none"]
    root = Path("outputs") / given.name
    table = Table("step", "error", "AP", "AP - FP32", "agreement", "p50 ms", "x FP32")

    def add(label: str, precision: str, *more: str) -> None:
        pipeline(*chain, f"precision={precision}", *more)
        found = row(root, precision)
        wrong = f"{error(root, precision):.4f}" if precision != "fp32" else ""
        kept = interval(found, "ap_vs_fp32") if precision != "fp32" else ""
        faster = interval(found, "speedup_vs_fp32") if precision != "fp32" else ""
        figures = (kept, interval(found, "agreement_ap"), f"{float(found['latency_p50_ms']):.1f}", faster)
        table.add_row(label, wrong, f"{float(found['ap']):.4f}", *figures)

    add("fp32", "fp32")
    for on in range(len(SWITCHES) + 1):
        switches = [f"precision.{name}={str(n < on).lower()}" for n, name in enumerate(SWITCHES)]
        add("calibrated" if on == 0 else f"+ {SWITCHES[on - 1]}", "int8", *switches)
    newest = max((root / "quantize").glob("*_int8*/model.tensorrt.onnx"), key=lambda file: file.stat().st_mtime)
    add("TensorRT's flavour", "external", f"precision.file={newest.resolve()}")
    padding = Table("network", "as exported, ms", "channels of zeros, ms", "ratio")
    built = json.loads((newest.parent / "manifest.json").read_text())
    (export,) = (root / "export").glob("*_dense/model.onnx")
    zeros(export, Resolution.parse(built["config"]["resolution"]), padding)
    console = Console()
    console.print(table)
    console.print(padding)


if __name__ == "__main__":
    main()
