"""Decoding on a GPU up to limb scores, and grouping on the host: `python benchmarks/decoding_gpu.py [--batch 32] [--people 5]`.

The fields are planted. The GPU's part is timed with CUDA events over successive calls, and the rest with the host's
clock. The people must equal those that the CPU decodes, to 1e-3 pixels.
"""

import argparse
import time

import numpy as np
import torch
from planted import STRIDE, H, W, plant
from rich.console import Console
from rich.table import Table

from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder, limb_order
from posepress.decoders.heatmap_paf.on_gpu import OFTEN, TOP, to_candidates, to_host, to_scores
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)), OPENPOSE_18)
CALLS = 200


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    words.add_argument("--people", type=int, default=5)
    given = words.parse_args()
    size = Resolution(H * STRIDE, W * STRIDE)
    (view,) = WholeImage(None).views(size, size, SPEC.input)
    decoder = HeatmapPafDecoder(SPEC, heatmap_threshold=0.1)
    limbs, _ = limb_order(OPENPOSE_18)
    table = Table(
        "batch", "GPU, us an image", "copy to host, us", "grouping, us", "CPU alone, us", "largest difference, px", "dropped"
    )
    for batch in given.batch:
        images = [plant(given.people, seed) for seed in range(batch)]
        heatmaps = np.stack([image.heatmaps for image in images])
        pafs = np.stack([image.pafs for image in images])
        maps_there, pafs_there = torch.from_numpy(heatmaps[:, :18]).cuda().contiguous(), torch.from_numpy(pafs).cuda()
        options = (limbs, 0.0, decoder.heatmap_threshold, decoder.paf_threshold, TOP)
        for _ in range(OFTEN + 5):  # the decoder is fused after this number of calls with one shape
            to_scores(maps_there, pafs_there, *options)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(CALLS):
            made = to_scores(maps_there, pafs_there, *options)
        end.record()
        torch.cuda.synchronize()
        gpu = start.elapsed_time(end) / CALLS * 1e3 / batch
        begin = time.perf_counter()
        for _ in range(20):
            peaks, counts, strange, scores, fields = to_host(*made, maps_there)
        copied = (time.perf_counter() - begin) / 20 * 1e6 / batch
        times = []
        for _ in range(10):
            begin = time.perf_counter()
            candidates = list(to_candidates(peaks, counts, strange, scores, limbs))
            for c, maps in zip(candidates, fields, strict=True):
                decoder.people(c, maps, view)
            times.append(time.perf_counter() - begin)
        worst = 0.0
        whole = decoder.decode({"heatmaps": torch.from_numpy(heatmaps).cuda(), "pafs": pafs_there}, [view] * batch)
        on_cpu = decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [view] * batch)
        begin = time.perf_counter()
        decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [view] * batch)
        cpu = (time.perf_counter() - begin) * 1e6 / batch
        for ours, theirs in zip(whole, on_cpu, strict=True):
            assert len(ours.scores) == len(theirs.scores), "the GPU and the CPU decoded different numbers of people"
            first, second = (poses.keypoints[np.argsort(poses.keypoints[..., 0].sum(1))] for poses in (ours, theirs))
            worst = max(worst, float(np.abs(first - second).max(initial=0)))
        dropped = sum(c.dropped for c in candidates)
        figures = (gpu, copied, min(times) * 1e6 / batch, cpu)
        table.add_row(str(batch), *(f"{figure:.1f}" for figure in figures), f"{worst:.1e}", str(dropped))
    Console().print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    Console().print(table)


if __name__ == "__main__":
    main()
