"""FP16 in torch on a GPU: eager, in backend=torch, and compiled. Graph replays are compared with the roofline's lower bound.

    python benchmarks/torch_gpu.py [--compile] [--resolutions 368x656 ...] [--batches 1 8 32]

The lower bound is the longer of two times: arithmetic (2 operations for each multiply-accumulate, at `--tflops`), and one
transfer of input, weights and fields (at `--bandwidth` TB/s). The weights are random, because times do not depend on them.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backends.torch import TorchRunner
from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.pruning.costs import macs
from posepress.decoders.heatmap_paf.decoder import limb_order
from posepress.decoders.heatmap_paf.on_gpu import OFTEN, candidates, to_candidates, to_scores
from posepress.pixels_torch import normalise
from posepress.resolution import Resolution

REPEATS, WARM_UP = 300, 50
DECODING = (0.0, 0.1, 0.05, 32)  # shift between fields, thresholds of peaks and limbs, peaks in each map


def events(work: Callable[[], Any]) -> list[float]:
    """Milliseconds of each call, by CUDA events."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def shown(times: list[float]) -> str:
    return f"{np.median(times):.3f} / {np.percentile(times, 95):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", nargs="+", default=["224x320", "288x384", "320x448", "368x656"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--tflops", type=float, default=989.0, help="dense FP16 peak of the GPU")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="memory bandwidth of the GPU, in TB/s")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        torch.manual_seed(0)
        make: type[torch.nn.Module] = LightweightOpenPose  # partial is invariant
        network = LightweightOpenPose().eval()
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)  # default weights let rounding errors grow by layer
        store.save(network, Path(folder), partial(make), [])
        given = {"precision": "fp16", "cuda_graph": True, "compile": False}
        ours = TorchRunner(Path(folder), given, 0)
        plain = TorchRunner(Path(folder), {**given, "cuda_graph": False, "fuse": False}, 0)
        compiled = TorchRunner(Path(folder), {**given, "compile": True}, 0) if options.compile else None
        weights = sum(p.numel() for p in network.parameters()) * 2
        rows = []
        for text in options.resolutions:
            size = Resolution.parse(text)
            for batch in options.batches:
                images = np.random.default_rng(0).integers(0, 255, (batch, size.height, size.width, 3), np.uint8)
                row = {"resolution": text, "batch": batch}
                for name, runner in (("ours", ours), ("compiled", compiled)):
                    if runner is not None:
                        started = time.perf_counter()
                        fields = runner(runner.upload(images))
                        row[f"{name} first s"] = round(time.perf_counter() - started, 1)
                        slot = runner.slots.queue[-1]
                        graph = slot.graphs[(batch, 3, size.height, size.width)][0]
                        with torch.cuda.stream(slot.stream):
                            row[f"{name} p50/p95 ms"] = shown(events(graph.replay))
                        row[f"{name} frame to candidates ms"] = shown(in_steps(runner, images)) if batch == 1 else ""
                        row[f"{name} as one graph ms"] = shown(in_one_graph(runner, images)) if batch == 1 else ""
                given_images = plain.upload(images)
                row["eager p50/p95 ms"] = shown(events(partial(plain.forward, given_images)))
                moved = images.size * 2 + weights + sum(field.numel() * 4 for field in fields.values())
                work = 2 * macs(network, size) * batch / options.tflops / 1e9
                row["floor ms"] = f"{max(work, moved / options.bandwidth / 1e9):.3f}"
                exact = network.float().cuda()(normalise(images, network.spec.input, torch.device("cuda")))
                apart = max(float((fields[n] - exact[n]).abs().max() / exact[n].abs().max()) for n in fields)
                row["from fp32"] = f"{apart:.4f}"
                rows.append(row)
                print(json.dumps(row), flush=True)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")


def in_steps(runner: TorchRunner, images: np.ndarray) -> list[float]:
    """Milliseconds from frames to candidates of people, both in the host's memory, in the steps of evaluation."""
    spec = runner.spec
    limbs, _ = limb_order(spec.skeleton)
    joints = len(spec.skeleton.names)

    def call() -> None:
        fields = runner(runner.upload(images))
        list(candidates(fields["heatmaps"][:, :joints], fields["pafs"], limbs, *DECODING))

    return on_the_clock(call)


def in_one_graph(runner: TorchRunner, images: np.ndarray) -> list[float]:
    """Milliseconds from frames to candidates with upload, network, peaks, limb scores and download recorded as one graph."""
    spec = runner.spec
    limbs, _ = limb_order(spec.skeleton)
    joints = len(spec.skeleton.names)
    _, factor, offset = spec.input.form()
    mirrored = spec.input.order == "BGR"
    scale, shift = (torch.from_numpy(values).cuda()[:, None, None] for values in (factor, offset))
    given = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True)
    there = given.cuda()

    @partial(torch.compile, dynamic=False)
    def normalised(pixels: torch.Tensor) -> torch.Tensor:
        values = (pixels.flip(-1) if mirrored else pixels).permute(0, 3, 1, 2).float() * scale - shift
        return values.half().contiguous(memory_format=torch.channels_last)

    def step() -> tuple[torch.Tensor, ...]:
        there.copy_(given, non_blocking=True)
        fields = runner.forward(normalised(there))
        return to_scores(fields["heatmaps"][:, :joints].contiguous(), fields["pafs"], limbs, *DECODING)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(OFTEN + 5):  # peaks and scores are compiled after these calls
            made = step()
        back = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in made]
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for host, tensor in zip(back, step(), strict=True):
                host.copy_(tensor, non_blocking=True)

        def call() -> None:
            np.copyto(given.numpy(), images)
            graph.replay()
            stream.synchronize()
            peaks, counts, strange, scores = (host.numpy() for host in back)
            list(to_candidates(peaks, counts, strange, scores, limbs))

        return on_the_clock(call)


def on_the_clock(call: Callable[[], None]) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(WARM_UP + REPEATS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return times[WARM_UP:]


if __name__ == "__main__":
    main()
