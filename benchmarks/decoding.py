"""Decoding fields into people, compared with peers: `python benchmarks/decoding.py [--peers FOLDER] [--real ENGINE ...]`.

It uses planted fields of 46x62 cells and one thread. It prints the least and median time in ms, and the share of recovered
people (see benchmarks/planted.py). With --real it also prints the AP on real images, with equal fields for each
decoder: give a built engine.onnx, --images and --annotations. Peers' people are scored by the sum of their keypoints'
scores, like ours without fitted scores. Missing keypoints stay zeros for all decoders except "completed".
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from planted import STRIDE, H, W, plant, recovery
from rich.console import Console
from rich.table import Table

from evaluation.metrics.coco_keypoints import CocoKeypoints
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from posepress.results import Poses
from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

F32 = NDArray[np.float32]
Decoders = dict[str, Callable[[F32, F32], F32]]
SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)), OPENPOSE_18)
PEOPLE = (1, 5, 20, 50)


def ours(**options: object) -> Callable[[F32, F32], F32]:
    """Our decoder at OpenPose's threshold, from fields to people in image pixels."""
    size = Resolution(H * STRIDE, W * STRIDE)
    (view,) = WholeImage(None).views(size, size, SPEC.input)
    decoder = HeatmapPafDecoder(SPEC, **{"heatmap_threshold": 0.1, "complete_poses": False, **options})  # type: ignore[arg-type]
    return lambda heatmaps, pafs: decoder.decode({"heatmaps": heatmaps[None], "pafs": pafs[None]}, [view])[0].keypoints


def planted(decoders: Decoders, seeds: int) -> Table:
    """Times and recovery of each decoder, for each number of people."""
    table = Table("decoder", "people", "ms, least", "ms, median", "keypoints", "people whole", "wrong an image", "error, px")
    for count in PEOPLE:
        images = [plant(count, seed) for seed in range(seeds)]
        for name, decode in decoders.items():
            found = [decode(image.heatmaps, image.pafs) for image in images]
            times: list[float] = []
            for image in images:
                began, n = time.perf_counter(), 0
                while n < 3 or time.perf_counter() - began < 0.2:
                    start = time.perf_counter()
                    decode(image.heatmaps, image.pafs)
                    times.append(time.perf_counter() - start)
                    n += 1
            kept = [recovery(image, people) for image, people in zip(images, found, strict=True)]
            recovered = sum(k.recovered for k in kept)
            table.add_row(
                name,
                str(count),
                f"{min(times) * 1e3:.3f}",
                f"{np.median(times) * 1e3:.3f}",
                f"{recovered / sum(k.keypoints for k in kept):.3f}",
                f"{sum(k.whole for k in kept) / (count * seeds):.3f}",
                f"{sum(k.wrong for k in kept) / seeds:.2f}",
                f"{sum(k.error for k in kept) / max(recovered, 1):.2f}",
            )
        table.add_section()
    return table


def real(decoders: Decoders, engine: Path, images: Path, annotations: Path, size: Resolution) -> Table:
    """AP of each decoder on the fields that an engine returns."""
    from pipeline.backends.onnxruntime import OnnxRuntime
    from pipeline.datasets.coco_split import Coco
    from posepress.predict import batches

    data, framing = Coco(images, annotations), WholeImage("adjust_network_input")
    runner = OnnxRuntime().load(engine)
    plain = {"heatmap_threshold": 0.05, "paf_threshold": 0.05}
    own = {
        "ours": HeatmapPafDecoder(runner.spec, **plain, complete_poses=False),  # type: ignore[arg-type]
        "ours, threshold .1": HeatmapPafDecoder(runner.spec, heatmap_threshold=0.1, complete_poses=False),
        "ours, completed": HeatmapPafDecoder(runner.spec, **plain),  # type: ignore[arg-type]
    }
    metrics = {name: CocoKeypoints(data.labels, OPENPOSE_18) for name in (*own, *decoders)}
    for batch in batches(data, framing, runner.spec.input, size):
        fields = runner.download(runner(runner.upload(batch.images)))
        (view,), (sample,) = batch.views, batch.samples
        assert sample.truth is not None
        for name, decoder in own.items():
            metrics[name].process(sample.id, sample.truth, decoder.decode(fields, [view])[0])
        for name, decode in decoders.items():
            people = decode(*(np.ascontiguousarray(fields[field][0]) for field in ("heatmaps", "pafs")))
            there = people[..., 2] > 0
            points = np.where(there[..., None], view.to_image(people[..., :2]), 0)
            poses = np.concatenate([points, people[..., 2:]], axis=-1).astype(np.float32)
            scores = people[..., 2].clip(0).sum(axis=1)
            metrics[name].process(sample.id, sample.truth, Poses(poses, scores.astype(np.float32)))
    table = Table("decoder", "AP", "AP50", "AP75", title=f"{len(data)} images, height {size.height}, free width")
    for name, metric in metrics.items():
        figures = metric.evaluate()
        table.add_row(name, *(f"{figures[f]:.3f}" for f in ("ap", "ap50", "ap75")))
    return table


def main() -> None:
    """Print the tables."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--peers", type=Path, help="a folder of clones, see benchmarks/peers/__init__.py")
    words.add_argument("--seeds", type=int, default=10)
    words.add_argument("--real", type=Path, help="engine.onnx of a network of this kind")
    words.add_argument("--images", type=Path)
    words.add_argument("--annotations", type=Path)
    words.add_argument("--resolution", type=Resolution.parse, default=Resolution(368, 432))
    given = words.parse_args()
    cv2.setNumThreads(1)
    peers: Decoders = {}
    if given.peers:
        from peers import load

        peers = dict(load(given.peers))
    mine = {"ours": ours(), "ours, hungarian": ours(assignment="hungarian"), "ours, completed": ours(complete_poses=True)}
    console = Console(width=120)
    console.print(planted({**mine, **peers}, given.seeds))
    if given.real:
        console.print(real(peers, given.real, given.images, given.annotations, given.resolution))


if __name__ == "__main__":
    main()
