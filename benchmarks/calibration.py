"""Compare our INT8 calibration with ONNX Runtime's: memory and time by the number of images, scales, and resulting speed.

    python benchmarks/calibration.py [--images 32 512] [--size 256x320] [--onnx FILE]

Each measurement runs in a separate process, so that its memory can be measured. Without a file, the network is the
lightweight OpenPose with random weights, on noise: memory and time do not depend on the content of the images.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from evaluation import latency
from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import ModelFiles
from pipeline.quantization import calibration
from pipeline.quantization.graph import load
from pipeline.quantization.place import place
from pipeline.quantization.precisions.int8 import Int8


def session(file: Path, threads: int = 0) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def images(count: int, size: tuple[int, int]) -> Iterator[NDArray[np.float32]]:
    for n in range(count):
        draw = np.random.default_rng(n)
        coarse = draw.normal(0, 60, (1, 3, size[0] // 8, size[1] // 8)).repeat(8, 2).repeat(8, 3)
        yield (128 + coarse + draw.normal(0, 10, coarse.shape)).clip(0, 255).astype(np.float32)


def network(file: Path) -> None:
    import torch

    from pipeline.models.lightweight_openpose import LightweightOpenPose
    from pipeline.onnx_files import export

    torch.manual_seed(0)
    made = LightweightOpenPose().eval()
    for layer in made.modules():  # keeps activations at a usual magnitude from input to fields
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    export.export(made, np.zeros((1, 3, 64, 80), np.float32), 20, file)
    export.simplify(file, 120)
    export.stamp(file, made.spec)


def plain(file: Path, count: int, size: tuple[int, int]) -> float:
    runner = session(file)
    name, given = runner.get_inputs()[0].name, list(images(min(count, 16), size))
    runner.run(None, {name: given[0]})
    started = time.perf_counter()
    for n in range(count):
        runner.run(None, {name: given[n % len(given)]})
    return time.perf_counter() - started


def ours(file: Path, count: int, size: tuple[int, int], histograms: bool) -> str:
    model = load(file)
    tensors = place(model).tensors
    given = list(images(min(count, 16), size))
    calibration.observe(model, tensors, given[:1], histograms)  # compiles the code before the timing
    ratios, found = [], {}
    for _ in range(3 if count <= 64 else 1):
        before = plain(file, count, size)
        started = time.perf_counter()
        found = calibration.observe(model, tensors, (given[n % len(given)] for n in range(count)), histograms)
        taken = time.perf_counter() - started
        ratios.append(taken / ((before + plain(file, count, size)) / 2))
    text = f"{taken:6.1f} s, {np.median(ratios):.2f}x of plain inference"
    if histograms:
        started = time.perf_counter()
        every = {m: {n: h.threshold(m) for n, h in found.items()} for m in calibration.METHODS}
        text += f"; all {len(every)} methods' thresholds of {len(tensors)} tensors {time.perf_counter() - started:.2f} s"
    return text


def theirs(file: Path, count: int, size: tuple[int, int], method: str) -> str:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc] # the base has no types
        def __init__(self) -> None:
            self.left, self.name = images(count, size), load(file).graph.input[0].name

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            one = next(self.left, None)
            return None if one is None else {self.name: one}

    options = {"ActivationSymmetric": True, "WeightSymmetric": True}
    with tempfile.TemporaryDirectory() as folder:
        scales = []
        before = plain(file, count, size)
        for wanted in (method, "MinMax") if method == "Entropy" else (method,):
            out = Path(folder) / f"{wanted}.onnx"
            started = time.perf_counter()
            quantize_static(
                str(file), str(out), Reader(), per_channel=True, quant_format=QuantFormat.QDQ, activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod[wanted], extra_options=options,
            )  # fmt: skip
            taken = time.perf_counter() - started
            if wanted == method:
                text = f"{taken:6.1f} s, {taken / before:.2f}x of plain inference"
            graph = onnx.load(out).graph
            constants = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
            scales.append({n.input[1]: constants[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"})
        if len(scales) == 2:
            same = sum(bool(np.array_equal(scales[0][name], scales[1][name])) for name in scales[0])
            text += f"; {same} of {len(scales[0])} scales are exactly its min-max's"
    return text


def speed(file: Path, size: tuple[int, int]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        feed = CalibrationFeed(lambda most: images(min(most or 8, 8), size), lambda _: (), "", "")
        Int8().quantize(file, feed, None, Path(folder))
        runners = [session(f, 1) for f in (file, ModelFiles.in_folder(Path(folder)).onnx["onnxruntime"])]
        name, given = runners[0].get_inputs()[0].name, next(images(1, size))
        fp32, int8 = latency.in_turns([[partial(lambda run, _: run(None, {name: given}), r.run)] for r in runners], 25)
    return (
        f"FP32 {fp32.percentile(50).value:.1f} ms, INT8 {int8.percentile(50).value:.1f} ms on one thread: "
        f"{latency.speedup(int8, fp32)} times as fast"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 512], help="numbers of calibration images, ours")
    parser.add_argument("--theirs", type=int, nargs="+", default=[8, 32], help="numbers of calibration images for ONNX Runtime")
    parser.add_argument("--size", default="256x320")
    parser.add_argument("--onnx", type=Path, help="an exported network")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    height, width = (int(part) for part in asked.size.split("x"))
    if asked.one:
        what, count = asked.one.split(":")
        if what in ("minmax", "histograms"):
            text = ours(asked.onnx, int(count), (height, width), what == "histograms")
        else:
            text = (
                speed(asked.onnx, (height, width)) if what == "speed" else theirs(asked.onnx, int(count), (height, width), what)
            )
        print(f"{text}; peak {latency.peak_rss_mb():.0f} MiB")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = asked.onnx or Path(folder) / "network.onnx"
        if asked.onnx is None:
            network(file)
        jobs = [(what, n) for what in ("minmax", "histograms") for n in asked.images]
        jobs += [(what, n) for what in ("Percentile", "Entropy") for n in asked.theirs] + [("speed", 0)]
        for what, count in jobs:
            words = [sys.executable, __file__, "--one", f"{what}:{count}", "--onnx", str(file), "--size", asked.size]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            line = done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr.strip().splitlines()[-1]
            who = "ours" if what in ("minmax", "histograms", "speed") else "ONNX Runtime"
            print(f"{who:13} {what:11} {count or '':>4} {line}", flush=True)


if __name__ == "__main__":
    main()
