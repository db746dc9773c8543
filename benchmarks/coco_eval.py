"""COCO keypoint evaluation at full size, compared with pycocotools and faster peers: `python benchmarks/coco_eval.py`.

5,000 images with 11,000 people and 100,000 detections are drawn and written as COCO's two files. Each evaluator reads them,
evaluates and summarises in a separate process. All ten figures must equal those of pycocotools to 1e-9. The benchmark then
times the bootstrap of 1,000 resamples, and one evaluation of 72 images, which a search repeats. hotcoco and faster-coco-eval
are included if installed: `pip install --no-deps --target DIR hotcoco faster-coco-eval` and PYTHONPATH=DIR.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from evaluation.latency import peak_rss_mb
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import FIGURES
from evaluation.statistics import bootstrap
from pipeline.datasets.annotations import people
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.results import load_results
from posepress.results import Poses
from posepress.skeletons import COCO_17

IMAGES, DETECTIONS = 5000, 20  # number of images, and of detections in each image


def draw(folder: Path) -> None:
    """Write truth.json and found.json: people of all sizes, crowds, people without labels, near and far detections."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    images, results = [], []
    for image in range(1, IMAGES + 1):
        images.append({"id": image, "file_name": f"{image:012d}.jpg", "height": 480, "width": 640})
        near = []
        for _ in range(int(min(rng.geometric(0.32) - 1, 14))):
            height = rng.uniform(20, 400)
            points = rng.uniform((0, 0), (500, 300)) + rng.random((17, 2)) * (height * 0.5, height)
            visible = rng.integers(0, 3, 17) * (rng.random() > 0.15)
            crowd = rng.random() < 0.02
            visible = visible * (not crowd)
            low, size = points.min(0), np.ptp(points, axis=0)
            keypoints = np.c_[points * (visible[:, None] > 0), visible].round(2)
            near.append((points, height))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "iscrowd": int(crowd),
                    "num_keypoints": int((visible > 0).sum()),
                    "keypoints": keypoints.ravel().tolist(),
                    "bbox": np.r_[low, size].round(2).tolist(),
                    "area": round(float(size.prod() * 0.6), 2),
                }
            )
        for n in range(DETECTIONS):
            if near and n < 2 * len(near):
                points, height = near[n % len(near)]
                found = points + rng.normal(0, height * rng.choice([0.01, 0.03, 0.1]), points.shape)
            else:
                found = rng.uniform(0, 480, 2) + rng.random((17, 2)) * rng.uniform(20, 300)
            keypoints = np.c_[found, np.full(17, 0.5)].round(2)
            score = round(float(rng.random()), 4)
            results.append({"image_id": image, "category_id": 1, "keypoints": keypoints.ravel().tolist(), "score": score})
    person = {"id": 1, "name": "person", "keypoints": list(COCO_17.names), "skeleton": []}
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": [person]}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(results))


def ours(folder: Path, only: int | None = None) -> tuple[list[float], CocoKeypoints]:
    """Our ten figures."""
    data = Coco(folder, folder / "truth.json")
    records = data.records
    found = load_results(folder / "found.json", data.labels, {str(record["id"]) for record in records})
    metric = CocoKeypoints(data.labels, data.labels)
    for n, record in enumerate(records[:only]):
        truth = data[n].truth
        assert truth is not None
        metric.process(str(record["id"]), truth, found[str(record["id"])])
    figures = metric.evaluate()
    return [figures[name] for name in FIGURES], metric


def theirs(name: str, folder: Path) -> list[float]:
    """The ten figures of a peer with pycocotools' interface."""
    if name == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as evaluator  # noqa: N813
    elif name == "hotcoco":
        from hotcoco import COCO
        from hotcoco import COCOeval as evaluator  # noqa: N813
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as evaluator
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        found = truth.load_res(str(folder / "found.json")) if name == "hotcoco" else truth.loadRes(str(folder / "found.json"))
        evaluation = evaluator(truth, found, "keypoints")
        for step in ("evaluate", "accumulate", "summarize"):
            getattr(evaluation, step)()
    return [float(x) for x in evaluation.stats[:10]]


def alone(name: str, folder: Path) -> None:
    """Run one evaluator in this process, and print seconds, memory and figures as JSON. Compiled code is loaded before."""
    if name == "posepress":
        blank = CocoKeypoints(COCO_17, COCO_17)
        blank.process("1", people([]), Poses(np.zeros((0, 17, 3), np.float32), np.zeros(0, np.float32)))
        blank.evaluate()
    started = time.perf_counter()
    figures = ours(folder)[0] if name == "posepress" else theirs(name, folder)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "mib": peak_rss_mb(), "figures": figures}))


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--alone", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = words.parse_args()
    if given.alone:
        alone(given.alone[0], Path(given.alone[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        draw(folder)
        table = Table("evaluator", "read, evaluate, summarise: s", "peak MiB", "largest difference", "AP")
        reference: list[float] = []
        for name in ("pycocotools", "posepress", "hotcoco", "faster-coco-eval"):
            runs = []
            for _ in range(given.repeats):
                command = [sys.executable, __file__, "--alone", name, scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    break
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            if not runs:
                table.add_row(name, "not installed" if "ModuleNotFound" in done.stderr else "failed", "", "", "")
                continue
            figures = runs[0]["figures"]
            reference = reference or figures
            apart = max(abs(a - b) for a, b in zip(figures, reference, strict=True))
            least = min(run["seconds"] for run in runs)
            table.add_row(name, f"{least:.2f}", f"{runs[0]['mib']:.0f}", f"{apart:.1e}", f"{figures[0]:.6f}")
        Console(width=110).print(table)
        _, metric = ours(folder)
        started = time.perf_counter()
        draws = bootstrap(metric.matches(), 1000)
        print(f"bootstrap of 1,000 resamples: {time.perf_counter() - started:.2f} s, AP {draws.interval}")
        _, few = ours(folder, 72)
        times = []
        for _ in range(30):
            started = time.perf_counter()
            few.evaluate()
            times.append(time.perf_counter() - started)
        least, middle = min(times) * 1e3, np.median(times) * 1e3
        print(f"72 images, {72 * DETECTIONS} detections: {least:.1f} ms an evaluation, median {middle:.1f}")


if __name__ == "__main__":
    main()
