"""The overhead of the evaluation loop over the network: `python benchmarks/overlap.py ENGINE IMAGES --resolution 368x432`.

Three passes over the same images are timed in turns: the loader alone (reading, JPEG decoding, framing), the network alone
(inputs framed beforehand, with the loop's batch size), and the whole loop with decoding. ENGINE is a built engine.onnx or
engine.json, and IMAGES a folder. A slow loop would raise the ratio of its wall time to the network's time.
"""

import argparse
import resource
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.datasets.coco_split import Coco
from posepress.contracts import Runner
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder
from posepress.framing.whole_image import WholeImage
from posepress.predict import Selection, Watch, batches, predict
from posepress.resolution import Resolution


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("engine", type=Path)
    words.add_argument("images", type=Path)
    words.add_argument("--resolution", type=Resolution.parse, required=True)
    words.add_argument("--mode", default=None, help="keep_aspect_ratio_mode; the default stretches")
    words.add_argument("--batch", type=int, default=1)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--limit", type=int, default=None, help="largest number of images")
    given = words.parse_args()
    runner: Runner
    if given.engine.suffix == ".onnx":
        from pipeline.backends.onnxruntime import OnnxRuntime

        runner = OnnxRuntime().load(given.engine)
    else:
        from pipeline.backends.torch import Torch

        runner = Torch().load(given.engine)
    every = Coco(given.images)
    images = Selection(every, range(min(len(every), given.limit or len(every))))
    loop = Loop(runner, images, WholeImage(given.mode), given.resolution, given.batch)
    times, memory = loop.timed(given.repeats)
    report(loop, times, memory)


class Loop:
    """The evaluation loop over images, and its parts alone."""

    def __init__(self, runner: Runner, images: Selection, framing: WholeImage, size: Resolution, batch: int) -> None:
        self.runner, self.images, self.framing, self.size, self.batch = runner, images, framing, size, batch
        self.watch, self.calls = Watch(), -(-len(images) // batch)
        some = Selection(images, range(min(len(images), 64)))
        few = [b.images for b in batches(some, framing, runner.spec.input, size, batch)]
        self._full = [b for b in few if len(b) == len(few[0])]

    def loader(self) -> None:
        """Read and frame the images."""
        deque(batches(self.images, self.framing, self.runner.spec.input, self.size, self.batch), maxlen=0)

    def network(self) -> None:
        """Run the network as often as the images need."""
        full, run = self._full, self.runner
        with ThreadPoolExecutor(run.workers) as pool:
            deque(pool.map(lambda n: run(run.upload(full[n % len(full)])), range(self.calls)), maxlen=0)

    def whole(self) -> None:
        """Predict the images."""
        decoder = HeatmapPafDecoder(self.runner.spec)
        deque(predict(self.images, self.runner, self.framing, decoder, self.size, self.batch, self.watch), maxlen=0)

    def timed(self, repeats: int) -> tuple[dict[str, list[float]], list[float]]:
        """The seconds of each pass, in turns, and the peak memory in MiB after each turn."""
        passes = {"loader alone": self.loader, "network alone": self.network, "whole loop": self.whole}
        times: dict[str, list[float]] = {name: [] for name in passes}
        memory = []
        self.network()
        self.whole()
        self.watch.busy.clear()
        for _ in range(repeats):
            for name, run in passes.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return times, memory


def report(loop: Loop, times: dict[str, list[float]], memory: list[float]) -> None:
    """Print the rates, the ratios and the steps' parts of the time."""
    count, computed = len(loop.images), loop.calls * loop.batch
    table = Table("pass", "images/s", "wall over network's", title=f"{count} images, batch {loop.batch}, {loop.size}")
    best = {name: min(found) for name, found in times.items()}
    for name, seconds in best.items():
        shown = computed if name == "network alone" else count
        table.add_row(name, f"{shown / seconds:.1f}", f"{seconds / best['network alone']:.3f}")
    Console().print(table)
    least = min(count / best["loader alone"], computed / best["network alone"])
    reached = count / best["whole loop"] / least
    print(f"the loop reaches {reached:.3f} of the slower of the two; held up by {loop.watch.bottleneck}")
    busy, wall = loop.watch.busy, sum(times["whole loop"])
    shares = {name: seconds / loop.watch.workers.get(name, 1) / wall for name, seconds in busy.items()}
    print("busy, a thread's part of the wall: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    ratios = np.array(times["whole loop"]) / np.array(times["network alone"])
    turns = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"wall over network's, each turn: {turns}; peak memory {memory[0]:.0f} -> {memory[-1]:.0f} MiB")


if __name__ == "__main__":
    main()
