r"""The throughput of training in images/s: the loader alone, the network alone, and both together.

A rate comes from the difference between a longer and a shorter run, after a run that does not count. So it contains no start,
compilation or warm-up. The benchmark prints the median of several rates and their range. Images of 384x512 are generated
first; several GPUs share a batch.

    python benchmarks/training.py [--resolution 288x384] [--width 1.0] [--batch 64] [--devices 1,2] \
        [--steps 200] [--repeats 3] [--compile]
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

import conf
from pipeline.datasets.synthetic import Synthetic
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.objectives.heatmap_paf import HeatmapPafObjective
from pipeline.training.augment import Augmentation
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.shard import Material
from pipeline.training.views import Batch, Views
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution

IMAGES = 512


class OneBatch(Views):
    """Views that repeat the first batch, as if the loader took no time."""

    def batches(self, parts: Iterator[range], device: torch.device, many: bool = False) -> Generator[Batch]:
        """The batch of the first part, once for every part."""
        batch = next(super().batches(iter([next(parts)]), device, many))
        yield batch
        for _ in parts:
            yield batch


def loads(views: Views, batch: int, steps: int) -> float:
    """The time of bringing `steps` batches to the device without a network, in seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    for made in views.batches(iter([range(n * batch, (n + 1) * batch) for n in range(steps)]), device, many=True):
        last = made
    float(last[0].sum())  # waits until the device is done
    return time.perf_counter() - began


def trains(views: Views, width: float, given: argparse.Namespace, devices: int, steps: int) -> float:
    """The time of a training including its start, in seconds."""
    training = Training(
        steps=steps, batch_size=given.batch, warmup=1, checkpoint_every=10**9, devices=devices, compile=given.compile
    )
    torch.manual_seed(0)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        train(LightweightOpenPose(width=width), views, training, Path(scratch) / "state.ckpt")
    return time.perf_counter() - began


def rate(run: Callable[[int], float], given: argparse.Namespace) -> str:
    """The median rate of a run in images/s, and its range."""
    run(given.steps)
    found = sorted(2 * given.steps * given.batch / (run(3 * given.steps) - run(given.steps)) for _ in range(given.repeats))
    return f"{found[given.repeats // 2]:,.0f} ({found[0]:,.0f} to {found[-1]:,.0f})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", default="288x384")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=64, help="number of images in a batch, over all devices")
    parser.add_argument("--devices", default="1", help="number of devices sharing a batch; several numbers make several rows")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    size = Resolution.parse(given.resolution)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    title = f"images/s, {where}, {size}, batch {given.batch}, width {given.width}{', compiled' if given.compile else ''}"
    table = Table("devices", "network alone", "network and loader", title=title)
    with tempfile.TemporaryDirectory(prefix="posepress-training-") as name:
        folder = Path(name)
        preset = instantiate(OmegaConf.load(Path(conf.__file__).parent / "data" / "synthetic.yaml").preset, _convert_="all")
        counts = {"train": IMAGES, "unlabelled": 1, "tune": 1, "agreement": 1, "validation": 1}
        data = Synthetic(preset, counts, cache=name)
        network, objective = LightweightOpenPose(width=given.width), HeatmapPafObjective()
        views = Views.of(Material(data, objective, WholeImage(), size, Augmentation(), folder), ["train"], network, 0)
        still = OneBatch(views.shard, objective, network.spec, size, views.augment, 0, views.source)
        loader = rate(partial(loads, views, given.batch), given)
        for devices in map(int, given.devices.split(",")):
            rates = [rate(partial(trains, source, given.width, given, devices), given) for source in (still, views)]
            table.add_row(str(devices), *rates)
    Console(soft_wrap=True).print(table, f"the loader alone, one process: {loader} images/s", highlight=False)


if __name__ == "__main__":
    main()
