"""Time and memory of sampling calibration images from an annotation file of the size of COCO train2017.

    python benchmarks/sampling.py [--images 118287] [--people 262465] [--num 2000]

The file is generated: people of 17 keypoints with polygons of COCO's usual length.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orjson

from calib_samplers.stratified import Stratified
from evaluation.latency import peak_rss_mb
from pipeline.datasets.coco_split import Coco


def generate(file: Path, images: int, people: int) -> None:
    draw = np.random.default_rng(0)
    owner = np.sort(draw.integers(0, images, people))
    annotations = []
    for n in range(people):
        visible = draw.integers(0, 3, 17)
        points = np.stack([*draw.integers(0, 640, (2, 17)), visible], axis=1)
        points[visible == 0] = 0
        box = [round(float(v), 2) for v in draw.uniform(1, 320, 4)]
        annotations.append(
            {
                "id": n, "image_id": int(owner[n]), "category_id": 1, "iscrowd": 0, "bbox": box, "area": 0.5 * box[2] * box[3],
                "num_keypoints": int((visible > 0).sum()), "keypoints": points.ravel().tolist(),
                "segmentation": [np.round(draw.uniform(0, 640, 56), 2).tolist()],
            }
        )  # fmt: skip
    listed = [{"id": n, "file_name": f"{n:012}.jpg", "height": 480, "width": 640} for n in range(images)]
    file.write_bytes(orjson.dumps({"images": listed, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118287)
    parser.add_argument("--people", type=int, default=262465)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.file:
        started = time.perf_counter()
        table = Coco(asked.file.parent, asked.file).table()
        read = time.perf_counter() - started
        chosen = Stratified(asked.num).sample(table)
        taken = time.perf_counter() - started
        print(f"{len(chosen.ids)} of {len(table['id'])} images: {taken:.1f} s ({read:.1f} s reading)")
        print(f"peak {peak_rss_mb():.0f} MiB, of a file of {asked.file.stat().st_size / 2**20:.0f} MiB")
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "annotations.json"
        generate(file, asked.images, asked.people)
        subprocess.run([sys.executable, __file__, "--file", str(file), "--num", str(asked.num)], check=True)


if __name__ == "__main__":
    main()
