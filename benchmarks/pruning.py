"""Pruning: its duration, and ONNX Runtime's latency against multiply-accumulates, compared with Torch-Pruning's defaults.

The weights are random, because only shapes influence these figures. All engines of a row and the dense one are timed in turns,
in one run, on the same threads. Run it while the machine is idle:

    python benchmarks/pruning.py [--resolution 256x456] [--threads 1] [--seconds 20]
    python benchmarks/pruning.py --gpu --resolution 368x656     # FP16 in torch, replays of CUDA graphs, batch 1 and 32
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from evaluation import latency
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.torch_fusion import fused
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.onnx_files.files import Shapes
from pipeline.probing.exported import exported
from pipeline.pruning.costs import Costs
from pipeline.pruning.cycle import DIVISORS
from pipeline.pruning.groups import remove, replay
from pipeline.pruning.plan import Step, UnreachableError, choose
from pipeline.pruning.pruner import Pruner
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from posepress.resolution import Resolution

NETWORKS = {"lightweight_openpose": LightweightOpenPose, "mobilenetv2_paf": MobileNetV2Paf}
RATIOS = (0.7, 0.5, 0.3, 0.1)
REPLAYS = 100


def lively(make: type[nn.Module]) -> nn.Module:
    """A network whose batch norms differ, so that channels differ."""
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
    return network


def seconds_of(make: type[nn.Module], size: Resolution) -> list[str]:
    """The seconds for pruning and replaying, and whether the outputs of the replayed network are bit-identical."""
    network = lively(make)
    dense = Costs(network, [], size)([])["macs"]
    began = time.perf_counter()
    pruner = Pruner(target="macs", value="0.5x")
    history = remove(network, choose(pruner, network, size, step=Step({"macs": 0.5 * dense})).dropped)
    pruned = time.perf_counter() - began
    again = make().eval()
    began = time.perf_counter()
    replay(again, history)
    replayed = time.perf_counter() - began
    again.load_state_dict(network.state_dict())
    images = torch.rand(1, 3, size.height, size.width)
    with torch.no_grad():
        same = all(torch.equal(a, b) for a, b in zip(network(images).values(), again(images).values(), strict=True))
    return [f"{pruned:.2f}", f"{replayed:.2f}", "yes" if same else "NO"]


def default_at(network: nn.Module, size: Resolution, macs: float) -> nn.Module:
    """A network that Torch-Pruning's default pruned to `macs`. The ratio is found by bisection."""
    low, high, best = 0.0, 1.0, network
    for _ in range(10):
        ratio = (low + high) / 2
        tried = deepcopy(network)
        TorchPruningDefault(ratio).prune(tried)
        fits = Costs(tried, [], size)([])["macs"] <= macs
        low, high = (low, ratio) if fits else (ratio, high)
        best = tried if fits else best
    return best


def on_processor(networks: Sequence[nn.Module], size: Resolution, threads: int, seconds: float) -> list[float]:
    """The median latency of each network in ONNX Runtime, in ms, timed in turns."""
    backend = OnnxRuntime("CPUExecutionProvider")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        calls = []
        for n, network in enumerate(networks):
            out = Path(folder) / str(n)
            (out / "engine").mkdir(parents=True)
            shapes = Shapes((size, size, size), (1, 1, 1))
            engine = backend.build(exported(network, size).write(out), shapes, out / "engine")
            runner = stack.enter_context(backend.load(engine, threads))
            inputs = runner.upload(np.zeros((1, size.height, size.width, 3), np.uint8))
            calls.append([partial(lambda run, x, _: run(x), runner, inputs)])
        return [timing.percentile(50).value for timing in latency.in_turns(calls, seconds)]


def on_gpu(networks: Sequence[nn.Module], size: Resolution, batch: int) -> list[float]:
    """The median latency of each network's CUDA graph in ms, timed in turns, in FP16 with folded batch norms."""
    graphs = []
    with torch.inference_mode():
        for network in networks:
            half = deepcopy(network).eval()
            fused(half)
            half = half.to("cuda", torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = torch.rand(batch, 3, size.height, size.width, device="cuda", dtype=torch.float16)
            images = images.contiguous(memory_format=torch.channels_last)
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(3):
                    half(images)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                half(images)
            graphs.append((graph, half, images))
        times: list[list[float]] = [[] for _ in graphs]
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for turn in range(REPLAYS + 5):
            for taken, (graph, _, _) in zip(times, graphs, strict=True):
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if turn >= 5:
                    taken.append(begin.elapsed_time(end))
    return [float(np.median(taken)) for taken in times]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="lightweight_openpose")
    parser.add_argument("--resolution", type=Resolution.parse, default=Resolution(256, 456))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="longest time of timing a row, in seconds")
    parser.add_argument("--gpu", action="store_true", help="FP16 in torch on a GPU instead of ONNX Runtime on CPUs")
    given = parser.parse_args()
    console = Console(width=140)
    table = Table("network", "prune to 0.5x, s", "replay, s", "bit-identical", title="seconds on this processor")
    for name, make in NETWORKS.items():
        fit = make.spec.input.fit  # type: ignore[attr-defined]
        table.add_row(name, *seconds_of(make, Resolution(fit(given.resolution.height), fit(given.resolution.width))))
    console.print(table)

    make, size = NETWORKS[given.network], given.resolution
    network = lively(make)
    dense = Costs(network, [], size)([])["macs"]
    names = [*(f"round_to {d}" for d in DIVISORS), "Torch-Pruning"]
    clocks: dict[str, Callable[[Sequence[nn.Module]], list[float]]]
    if given.gpu:
        clocks = {f"{torch.cuda.get_device_name()}, FP16, batch {n}": partial(on_gpu, size=size, batch=n) for n in (1, 32)}
    else:
        name = f"ONNX Runtime, {given.threads} thread(s)"
        clocks = {name: partial(on_processor, size=size, threads=given.threads, seconds=given.seconds)}
    tables = {
        name: Table("MACs asked", *names, title=f"{given.network} {size}, {name}: latency (MACs): their ratio, of dense")
        for name in clocks
    }
    for ratio in RATIOS:
        engines: list[tuple[str, nn.Module]] = []
        for divisor in DIVISORS:
            pruner = Pruner(target="macs", value="0.5x", min_num_filters=min(8, divisor), max_pruning_ratio=0.95)
            try:
                plan = choose(pruner, network, size, step=Step({"macs": ratio * dense}, divisor))
            except UnreachableError:
                continue
            pruned = deepcopy(network)
            remove(pruned, plan.dropped)
            engines.append((f"round_to {divisor}", pruned))
        engines.append((names[-1], default_at(network, size, ratio * dense)))
        for clock, table in tables.items():
            times = clocks[clock]([network, *(net for _, net in engines)])
            cells = dict.fromkeys(names, "cannot be reached")
            for (name, net), ms in zip(engines, times[1:], strict=True):
                macs = Costs(net, [], size)([])["macs"] / dense
                cells[name] = f"{ms / times[0]:.3f} ({macs:.3f}): {ms / times[0] / macs:.2f}"
            table.add_row(f"{ratio}x", *cells.values())
            print(f"{clock}: dense takes {times[0]:.3f} ms beside the engines of {ratio}x", flush=True)
    for table in tables.values():
        console.print(table)


if __name__ == "__main__":
    main()
