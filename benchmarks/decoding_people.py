"""Decoding of top-down, SimCC and one-stage networks, on one thread: `taskset -c 0 python benchmarks/decoding_people.py`.

It prints the median of 1,000 calls for 20 people: maps of 64x48 and 17 keypoints, lines of a 256x192 input, 8,400 candidates.
Beside them stand the shares that any decoder needs: numpy's argmax, and a plain suppression in torch.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from posepress.decoders.heatmap_argmax import TopDownDecoder
from posepress.decoders.onestage import OneStageDecoder
from posepress.decoders.simcc import SimccDecoder
from posepress.framing.person_crops import PersonCrops
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

PEOPLE, K, SIZE = 20, 17, Resolution(256, 192)
CANDIDATES = 8400


def median(call: Callable[[], object], calls: int = 1000) -> float:
    """The median of some calls in ms, after a warm-up."""
    times = []
    for n in range(calls + 20):
        start = time.perf_counter()
        call()
        if n >= 20:
            times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)


def top_down(table: Table) -> None:
    """Rows of heatmaps and of lines."""
    draw = np.random.default_rng(0)
    boxes = Boxes(np.column_stack([draw.uniform(0, 400, (PEOPLE, 2)), draw.uniform(50, 200, (PEOPLE, 2))]), draw.random(PEOPLE))
    views = PersonCrops().views(Resolution(600, 800), SIZE, InputSpec("image"), boxes)
    rows, columns = np.mgrid[:64, :48]
    x, y = (draw.uniform(4, most, (PEOPLE, K, 1, 1)) for most in (44, 60))
    maps = (0.9 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)).astype(np.float32)
    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, K),), COCO_17)
    for refinement in ("none", "shift", "dark"):
        decoder = TopDownDecoder(spec, refinement=refinement)
        table.add_row(f"heatmaps, {refinement}", f"{median(partial(decoder.decode, {'heatmaps': maps}, views)):.3f}")
    table.add_row("numpy's argmax of the maps alone", f"{median(lambda: maps.reshape(PEOPLE, K, -1).argmax(2)):.3f}")
    lines = {"simcc_x": draw.random((PEOPLE, K, 384), np.float32), "simcc_y": draw.random((PEOPLE, K, 512), np.float32)}
    fields = (OutputSpec("simcc_x", 0.5, K, axes="CX"), OutputSpec("simcc_y", 0.5, K, axes="CY"))
    simcc = SimccDecoder(NetworkSpec(InputSpec("image"), fields, COCO_17))
    table.add_row("SimCC's lines", f"{median(lambda: simcc.decode(lines, views)):.3f}")
    table.add_row("numpy's argmax of the lines alone", f"{median(lambda: [line.argmax(2) for line in lines.values()]):.3f}")


def plain_suppression(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, most: float) -> torch.Tensor:
    """Greedy suppression with torch's vector operations, one kept box after the other."""
    rows = (scores > threshold).nonzero()[:, 0]
    order = rows[scores[rows].argsort(descending=True)]
    kept = []
    while len(order):
        best, rest = boxes[order[0]], boxes[order[1:]]
        kept.append(order[0])
        sides = (torch.minimum(best[2:], rest[:, 2:]) - torch.maximum(best[:2], rest[:, :2])).clamp(min=0)
        shared = sides.prod(1)
        areas = (rest[:, 2:] - rest[:, :2]).prod(1) + (best[2:] - best[:2]).prod()
        order = order[1:][shared / (areas - shared) <= most]
    return torch.stack(kept)


def one_stage(table: Table) -> None:
    """Rows of sets, in both orders of their axes."""
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 500, (1, CANDIDATES, 2))
    boxes = np.concatenate([low, low + draw.uniform(20, 120, (1, CANDIDATES, 2))], axis=-1).astype(np.float32)
    scores = (draw.random((1, CANDIDATES, 1)) * 0.009).astype(np.float32)
    for n in range(PEOPLE):
        rows = np.arange(15) + 15 * n
        corner = np.array([110.0 * (n % 5), 130.0 * (n // 5)])
        boxes[0, rows] = np.r_[corner, corner + 100] + draw.normal(0, 3, (15, 4))
        scores[0, rows, 0] = draw.uniform(0.1, 0.9, 15)
    points = draw.uniform(0, 600, (1, CANDIDATES, 3 * K)).astype(np.float32)
    (view,) = WholeImage().views(Resolution(600, 800), Resolution(640, 640), InputSpec("image"))
    for axes in ("NC", "CN"):
        channels = (("boxes", 4), ("scores", 1), ("keypoints", 3 * K))
        spec = NetworkSpec(InputSpec("image"), tuple(OutputSpec(n, 1, c, axes=axes) for n, c in channels), COCO_17)
        fields = {"boxes": boxes, "scores": scores, "keypoints": points}
        if axes == "CN":
            fields = {name: np.ascontiguousarray(values.transpose(0, 2, 1)) for name, values in fields.items()}
        decoder = OneStageDecoder(spec)
        found = len(decoder.decode(fields, [view])[0].scores)
        assert found == PEOPLE
        table.add_row(f"sets, {axes}", f"{median(partial(decoder.decode, fields, [view])):.3f}")
    torch.set_num_threads(1)
    given = torch.from_numpy(boxes[0]), torch.from_numpy(scores[0, :, 0])
    table.add_row("a plain suppression in torch alone", f"{median(lambda: plain_suppression(*given, 0.01, 0.65), 300):.3f}")


def main() -> None:
    """Print the table."""
    table = Table("decoding of 20 people", "p50, ms")
    top_down(table)
    one_stage(table)
    Console(width=80).print(table)


if __name__ == "__main__":
    main()
