"""Decoding of planted people, one thread: `python benchmarks/decoding.py`.

Fields of 46x62 cells (a 368x496 input at stride 8) hold 1, 5, 20 or 50 people; the time is that of
`HeatmapPafDecoder.decode`, from fields to poses in image pixels, the minimum and the median of many calls.
"""

import time

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from evaluation.heatmap_paf import HeatmapPafDecoder
from evaluation.skeletons import COCO_17
from evaluation.types import People, Resolution
from evaluation.views import WholeImage
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.training.heatmap_paf import HeatmapPafObjective, named_keypoints

SIZE = Resolution(368, 496)
SPEC = LightweightOpenPose.spec
UPRIGHT = np.array([
    (0, 0.08), (0.03, 0.055), (-0.03, 0.055), (0.065, 0.07), (-0.065, 0.07), (0.12, 0.2), (-0.12, 0.2), (0.18, 0.36),
    (-0.18, 0.36), (0.2, 0.5), (-0.2, 0.5), (0.08, 0.52), (-0.08, 0.52), (0.09, 0.75), (-0.09, 0.75), (0.1, 0.97), (-0.1, 0.97),
])  # fmt: skip


def plant(count: int, seed: int) -> tuple[People, dict[str, np.ndarray]]:
    """People on a jittered lattice, and noisy fields of them."""
    draw = np.random.default_rng(seed)
    columns = int(np.ceil(np.sqrt(count * 1.8)))
    rows = -(-count // columns)
    height = min(0.95 * SIZE.height / rows, 2.0 * SIZE.width / columns)
    people = []
    for n in range(count):
        at = ((n % columns + 0.5) * SIZE.width / columns, (n // columns) * SIZE.height / rows)
        points = UPRIGHT * height + at + draw.normal(0, 0.012 * height, UPRIGHT.shape)
        people.append(np.c_[points, np.full(len(COCO_17.names), 2)])
    keypoints = np.array(people)
    low, high = keypoints[..., :2].min(1), keypoints[..., :2].max(1)
    truth = People(keypoints, np.c_[low, high - low], np.prod(high - low, axis=1), np.zeros(count, bool))
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    targets = HeatmapPafObjective().targets(truth, view, SPEC)
    return truth, {name: (targets[name] * 0.8 + smooth(draw, targets[name].shape))[None] for name in ("heatmaps", "pafs")}


def smooth(draw: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of standard deviation 0.02 blurred over 3x3 cells: the fields of networks are smooth."""
    noise = np.stack([cv2.GaussianBlur(channel, (3, 3), 0.8) for channel in draw.normal(0, 1, shape).astype(np.float32)])
    return 0.02 * noise / noise.std()


def main() -> None:
    """Print the table."""
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    table = Table("heatmap threshold", "people", "minimum ms", "median ms", "found", "keypoints within 4 px")
    for threshold in (0.1, 0.05):
        decoder = HeatmapPafDecoder(SPEC, heatmap_threshold=threshold)
        for count in (1, 5, 20, 50):
            times, near, total, found = [], 0, 0, 0
            for seed in range(5):
                truth, fields = plant(count, seed)
                (poses,) = decoder.decode(fields, [view])
                for _ in range(60):
                    started = time.perf_counter()
                    decoder.decode(fields, [view])
                    times.append(time.perf_counter() - started)
                points, labelled = named_keypoints(truth, view, SPEC.skeleton)
                present = poses.keypoints[..., 2] > 0
                distance = np.linalg.norm(points[:, None] - poses.keypoints[None, ..., :2], axis=-1)
                near += int(((distance <= 4) & present[None] & labelled[:, None]).any(axis=1).sum())
                total += int(labelled.sum())
                found += len(poses.scores)
            figures = (min(times) * 1e3, np.median(times) * 1e3, found / 5, near / total)
            table.add_row(str(threshold), str(count), *(f"{figure:.3f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
