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
from posepress.predict import Watch, batches, predict
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
    images, framing = Coco(given.images), WholeImage(given.mode)
    count = min(len(images), given.limit or len(images))
    decoder = HeatmapPafDecoder(runner.spec)

    def loader() -> None:
        deque(batches(images, framing, runner.spec.input, given.resolution, given.batch, range(count)), maxlen=0)

    few = [b.images for b in batches(images, framing, runner.spec.input, given.resolution, given.batch, range(min(count, 64)))]
    full = [b for b in few if len(b) == len(few[0])]
    calls = -(-count // given.batch)

    def network() -> None:
        with ThreadPoolExecutor(runner.workers) as pool:
            deque(pool.map(lambda n: runner(runner.upload(full[n % len(full)])), range(calls)), maxlen=0)

    watch = Watch()

    def loop() -> None:
        deque(predict(images, runner, framing, decoder, given.resolution, given.batch, range(count), watch), maxlen=0)

    passes = {"loader alone": loader, "network alone": network, "whole loop": loop}
    times: dict[str, list[float]] = {name: [] for name in passes}
    network()
    loop()
    watch.busy.clear()
    memory = []
    for _ in range(given.repeats):
        for name, run in passes.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    table = Table("pass", "images/s", "wall over network's", title=f"{count} images, batch {given.batch}, {given.resolution}")
    best = {name: min(found) for name, found in times.items()}
    for name, seconds in best.items():
        shown = calls * given.batch if name == "network alone" else count
        table.add_row(name, f"{shown / seconds:.1f}", f"{seconds / best['network alone']:.3f}")
    Console().print(table)
    least = min(count / best["loader alone"], calls * given.batch / best["network alone"])
    print(f"the loop reaches {count / best['whole loop'] / least:.3f} of the slower of the two; held up by {watch.bottleneck}")
    shares = {name: seconds / watch.workers.get(name, 1) / sum(times["whole loop"]) for name, seconds in watch.busy.items()}
    print("busy, a thread's part of the wall: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))
    ratios = np.array(times["whole loop"]) / np.array(times["network alone"])
    turns = ", ".join(f"{r:.3f}" for r in ratios)
    print(f"wall over network's, each turn: {turns}; peak memory {memory[0]:.0f} -> {memory[-1]:.0f} MiB")


if __name__ == "__main__":
    main()
