"""Each family of the project goes through the whole chain, with the committed network of its quickstart."""

import csv
import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from pipeline.edge import CONFIG
from pipeline.launch.labels import register
from posepress.results import load_results
from tests.conftest import ROOT, pipeline

FEW = [
    "data.counts={train: 40, unlabelled: 4, tune: 12, agreement: 6, validation: 30}", "sampler.num_images=12", "tracking=none",
    "stages.retrain.training.steps=30", "stages.retrain.training.batch_size=8", "stages.benchmark.seconds=0.2",
]  # fmt: skip
LEARNT = {"topdown": 0.23, "simcc": 0.21, "onestage": 0.02}  # AP of the pruned network after 30 steps; before them it is 0
LEAST = {"topdown": 0.7, "simcc": 0.65, "onestage": 0.45}  # AP of the dense network on the 30 images


@pytest.fixture(scope="module", params=list(LEAST))
def chain(request, tmp_path_factory):
    """A family's folder after a sweep over the dense and the pruned network in INT8."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "data").symlink_to(ROOT / "data")
    words = [f"experiment={request.param}_quickstart", *FEW, "pruner=none,l1", "precision=int8"]
    return request.param, folder, pipeline("--multirun", *words, cwd=folder, check=0)


def figures(folder):
    (file,) = (folder / "outputs").glob("*/report/results.csv")
    with file.open() as stream:
        return {row["pruning"].partition("-")[0]: row for row in csv.DictReader(stream)}


def test_the_committed_network_finds_people_in_int8(chain):
    family, folder, _ = chain
    dense = figures(folder)["dense"]
    assert float(dense["ap"]) > LEAST[family]
    for manifest in (folder / "outputs").glob("*/quantize/*dense*int8*/manifest.json"):
        assert json.loads(manifest.read_text())["summary"]["int8_layers"] > 15


def test_the_pruned_network_learns_and_runs(chain):
    family, folder, done = chain
    rows = figures(folder)
    assert float(rows["l1"]["macs"]) < 0.8 * float(rows["dense"]["macs"])
    assert float(rows["l1"]["ap"]) > LEARNT[family]
    assert "AP" in done.stdout
    (curve,) = (folder / "outputs").glob("*/retrain/*/curve.json")
    assert np.isfinite([row[1] for row in json.loads(curve.read_text())]).all()


def test_times_of_people_are_measured_where_each_has_a_view(chain):
    family, folder, _ = chain
    measured = []
    for file in (folder / "outputs").glob("*/benchmark/*/latency.json"):
        times = json.loads(file.read_text())
        if family == "onestage":
            assert "image_1_ms" not in times
        else:
            assert 0 < times["image_1_ms"] < times["image_5_ms"] < times["image_20_ms"]
            measured.append(str(times["image_5_ms"]))
    assert {row["image_5_ms"] for row in figures(folder).values()} <= {*(measured or [""])}
    assert {row["chain_5_ms"] + row["boxes"] for row in figures(folder).values()} == {""}, "there is no detector"
    (page,) = (folder / "outputs").glob("*/report/report.html")
    assert ("Time of an image with 1, 5 and 20 people" in page.read_text()) == bool(measured)


def test_batches_hold_the_people_of_several_images(chain):
    family, folder, _ = chain
    words = [f"experiment={family}_quickstart", *FEW, "pruner=none", "precision=int8", "batch=8"]
    pipeline(*words, "stage=[build,evaluate]", cwd=folder, check=0)
    one, eight = (
        json.loads(next((folder / "outputs").glob(f"*/evaluate/*dense*-b{batch}/metrics.json")).read_text()) for batch in (1, 8)
    )
    assert eight["ap"] == pytest.approx(one["ap"], abs=0.01)


@pytest.mark.parametrize("chain", ["onestage"], indirect=True)
def test_a_one_stage_network_is_the_detector_of_a_top_down_network(chain):
    _, folder, _ = chain
    (engine,) = (folder / "outputs").glob("*/build/*dense*int8*-b1")
    words = ["experiment=topdown_quickstart", *FEW, "pruner=none", "detector=own", f"detector.file={engine}"]
    pipeline(*words, "detector.resolution=192x224", "detector.score_threshold=0.3", cwd=folder, check=0)
    (evaluated,) = (folder / "outputs/topdown_quickstart/evaluate").glob("*_by-*")
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert metrics["ap"] > 0.6
    assert metrics["agreement_ap"] > 0.9, "images without labels have boxes, too"
    (timed,) = (folder / "outputs/topdown_quickstart/benchmark").glob("*_by-*")
    times = json.loads((timed / "latency.json").read_text())
    assert times["chain_5_ms"] == pytest.approx(times["detector_ms"] + times["image_5_ms"])
    with (folder / "outputs/topdown_quickstart/report/results.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert row["chain_5_ms"] == str(times["chain_5_ms"])
    assert evaluated.name.endswith(f"_by-{row['boxes']}")
    kept = [load_results(file) for file in (folder / "outputs/cache/boxes").glob("*.npz")]
    assert {len(found) for found in kept} >= {30, 12, 6}, "validation, tune and agreement images"
    assert all(np.all(boxes.scores > 0.3) for found in kept for boxes in found.values())
    words += ["detector.resolution=192x224", "detector.score_threshold=0.3", "target=onnxruntime"]
    again = pipeline(*words, "stage=[train,tune]", cwd=folder, check=0)
    pipeline(*words, "stage=package", cwd=folder, check=0)
    assert {line.split()[1] for line in again.stderr.splitlines() if line.startswith(("train ", "tune "))} == {"fresh"}
    (package,) = (folder / "outputs/topdown_quickstart/package").iterdir()
    there = OmegaConf.load(package / CONFIG)
    register()
    assert there.detector is None
    assert there.addresses.evaluate == evaluated.name
    assert (package / "outputs/topdown_quickstart/tune" / there.addresses.tune).is_dir()
    assert (package / "data/validation/boxes.json").exists()
