"""The evaluation's wall time over that of its slowest part alone, and its memory at 200 and at all images.

    python benchmarks/evaluation_loop.py [--repeats N] [--most N] WORDS...

WORDS are options of the pipeline that set a trained network and its data (experiment=, weights=, model=, data=). Its FP32
engine is built first. Four passes over the validation images are timed in turns: reading and framing alone, the network alone
on all threads (inputs framed beforehand), decoding and merging of single views alone, and the whole loop.
The memory is the peak of a process that evaluates a number of images and nothing else.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from rich.console import Console
from rich.table import Table

from pipeline.decoder_options import decoder_options
from pipeline.launch.cell import Cell
from pipeline.launch.components import build
from pipeline.results.manifest import read_manifest
from pipeline.results.stage import arguments
from posepress.contracts import Runner
from posepress.predict import Selection, Watch, batches, predict
from posepress.resolution import Resolution

STAGES = "stage=[train,export,quantize,build,tune]"
FEW, KEPT = 200, 64  # images of the smaller memory, and images whose inputs and fields are kept
PEAK = "--peak-at"


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--most", type=int, default=None, help="largest number of images; the default takes all")
    words.add_argument(PEAK, type=int, default=None, help="evaluate this number of images and print the peak memory in MiB")
    given, chain = words.parse_known_args()
    chain += [] if any(word.startswith("tracking=") for word in chain) else ["tracking=none"]
    if given.peak_at is not None:
        Loop(chain, given.peak_at).whole()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    folders = folders_of(chain)
    os.environ |= {"ENGINE": str(folders["build"]), "TUNED": str(folders["tune"])}
    loop = Loop(chain, given.most)
    report(loop, loop.timed(given.repeats), [peak(chain, count) for count in (min(FEW, len(loop.images)), len(loop.images))])


def folders_of(chain: Sequence[str]) -> dict[str, Path]:
    """Build the engine, and return the folder of each stage's result."""
    done = subprocess.run([sys.executable, "-m", "pipeline", *chain, STAGES], check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [line.split() for line in done.stderr.splitlines()]
    return {line[0]: Path(line[2]) for line in lines if len(line) > 2 and line[1] in ("done", "fresh")}


def peak(chain: Sequence[str], count: int) -> float:
    """Peak memory in MiB of a process that evaluates a number of images."""
    done = subprocess.run([sys.executable, __file__, PEAK, str(count), *chain], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


class Loop:
    """The evaluation of a configuration, and its parts alone."""

    def __init__(self, chain: Sequence[str], most: int | None) -> None:
        with initialize_config_module("conf", version_base="1.3"):
            cell = Cell(compose("config", list(chain)), list(chain), sweep=False)
            stage: Any = build(arguments(cell.stages["evaluate"]))
        engine = Path(os.environ["ENGINE"])
        built = read_manifest(engine)
        assert built is not None
        self.runner: Runner = stage.backend.load(engine / built["summary"]["engine"])
        decoder = stage.decoder(self.runner.spec, **decoder_options(Path(os.environ["TUNED"]), stage.decoder))
        every = stage.data.open("validation")
        self.images = Selection(every, range(min(len(every), most or len(every))))
        self.framing, self.size, self.batch = stage.framing, Resolution.parse(stage.resolution), stage.batch
        self.decoder = stage.framing.reader(decoder, self.runner.spec)
        self.measure = stage.metric(labels=every.labels, found_labels=self.runner.spec.labels)
        self.watch, self.calls = Watch(), 0

    def loader(self) -> None:
        """Read and frame the images."""
        self.calls = sum(
            1 for b in batches(self.images, self.framing, self.runner.spec.input, self.size, self.batch) if b.views
        )

    def kept(self) -> list[Any]:
        """Some batches with their fields."""
        few = Selection(self.images, range(min(len(self.images), KEPT)))
        ready = [b for b in batches(few, self.framing, self.runner.spec.input, self.size, self.batch) if b.views]
        if not ready:
            raise SystemExit(f"the first {len(few)} validation images have no views; choose other data")
        return [(b, self.runner(self.runner.upload(b.images))) for b in ready]

    def network(self, kept: Sequence[Any]) -> None:
        """Run the network as often as the images need."""
        run = self.runner
        with ThreadPoolExecutor(run.workers) as pool:
            deque(pool.map(lambda n: run(run.upload(kept[n % len(kept)][0].images)), range(self.calls)), maxlen=0)

    def decoding(self, kept: Sequence[Any]) -> None:
        """Decode and merge as often as the images need."""

        def one(n: int) -> None:
            ready, fields = kept[n % len(kept)]
            for part, view in zip(self.decoder.decode(fields, ready.views), ready.views, strict=True):
                self.decoder.merge([part], [view])

        with ThreadPoolExecutor(self.watch.workers["decoding"]) as pool:
            deque(pool.map(one, range(self.calls)), maxlen=0)

    def whole(self) -> None:
        """Predict the images, and give the results to the metric."""
        self.measure.reset()
        found = predict(self.images, self.runner, self.framing, self.decoder, self.size, self.batch, self.watch)
        for sample, result in found:
            self.measure.process(sample.id, sample.truth, result)

    def timed(self, repeats: int) -> dict[str, list[float]]:
        """The seconds of each pass, in turns."""
        kept = self.kept()
        self.loader()
        self.whole()
        self.watch.busy.clear()
        passes: dict[str, Callable[[], None]] = {
            "reading and framing": self.loader,
            "network": lambda: self.network(kept),
            "decoding": lambda: self.decoding(kept),
            "whole": self.whole,
        }
        times: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(repeats):
            for name, run in passes.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        return times


def report(loop: Loop, times: dict[str, list[float]], memory: Sequence[float]) -> None:
    """Print the times, the ratio and the memory."""
    table = Table(
        "pass", "seconds", "ms a call", title=f"{len(loop.images)} images, {loop.calls} calls of the network, {loop.size}"
    )
    for name, seconds in times.items():
        table.add_row(name, f"{np.median(seconds):.2f}", f"{1000 * np.median(seconds) / loop.calls:.2f}")
    Console().print(table)
    parts = np.array([seconds for name, seconds in times.items() if name != "whole"])
    ratios = np.array(times["whole"]) / parts.max(axis=0)
    print(f"whole over the greatest part: {np.median(ratios):.3f}, turns {', '.join(f'{r:.3f}' for r in ratios)}")
    print(
        f"held up by {loop.watch.bottleneck}; peak memory {memory[0]:.0f} MiB at {min(FEW, len(loop.images))} images, "
        f"{memory[1]:.0f} MiB at {len(loop.images)}: {memory[1] / memory[0]:.3f}"
    )


if __name__ == "__main__":
    main()
