"""Stages on annotation files of others: what they write, say and refuse. The engine is a fake that knows the truth."""

import json
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import pytest

from evaluation.metrics.coco_keypoints import CocoKeypoints
from pipeline.datasets import synthetic
from pipeline.datasets.coco import CocoSplits
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.drawing import Preset
from pipeline.datasets.packaged import Packaged, pack
from pipeline.datasets.results import load_results
from pipeline.deploy.device_figures import check_figures
from pipeline.report.collect import columns
from pipeline.results.job import Job
from pipeline.stages import evaluate, tune
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from posepress.results import Poses
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.pipeline.datasets.test_annotation_values import DOG, HAND, PERSON, content, person, written

SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 8, 18),), COCO_17)
POINTS = np.array(person()["keypoints"], np.float32).reshape(1, 17, 3)


class Engine:
    """Runs nothing."""

    spec, workers = SPEC, 1

    def upload(self, images):
        return images

    def __call__(self, images):
        return {"heatmaps": np.zeros((len(images), 18, 8, 8), np.float32)}


class Backend:
    name = "fake"

    @contextmanager
    def load(self, engine):
        yield Engine()


@dataclass
class Knowing:
    """Finds one person at the same place in every image."""

    spec: NetworkSpec = SPEC
    result: ClassVar[type] = Poses

    def decode(self, fields, views):
        return [Poses(POINTS.copy(), np.ones(1, np.float32), notes={"features": np.ones((1, 2), np.float32)}) for _ in views]

    def merge(self, parts, views):
        return parts[0]

    def draw(self, image, found):
        return image

    def readings(self, found):
        return {}


@pytest.fixture
def splits(tmp_path):
    """Validation images of one person each, with an annotation file that can be changed."""

    def make(raw=None, images=3, ids=None, **options):
        ids = ids or list(range(1, images + 1))
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        for n in range(images):
            cv2.imwrite(str(folder / f"{n}.png"), np.full((80, 90, 3), n, np.uint8))
        listed = [{"id": i, "file_name": f"{n}.png", "height": 80, "width": 90} for n, i in enumerate(ids)]
        people = [person(id=n + 1, image_id=i) for n, i in enumerate(ids)]
        file = written(tmp_path, {**content(), "images": listed, "annotations": people, **(raw or {})})
        part = {"images": folder, "annotations": file}
        named = {"train": {"a": []}, "tune": {"a": []}, "validation": {"a": "all"}}
        data = CocoSplits(part, part, cache=str(tmp_path / "cache"), **options)
        whole = Coco(folder, file, category=options.get("category"), upright=options.get("upright"))
        data.__dict__["parts"] = {split: whole for split in named if split == "validation"}
        return data

    return make


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "read_manifest", lambda folder: {"summary": {"engine": "engine"}})

    def run(data, pictures=2):
        job = Job(tmp_path / "out", {"engine": tmp_path}, {}, tmp_path / "scratch", tmp_path / "cache")
        job.out.mkdir()
        size, metric = "64x64", CocoKeypoints
        stage = evaluate.Evaluate(
            data, Backend(), WholeImage(), partial(Knowing), metric, None, size, 1, {"data": "test"}, pictures, 5
        )
        return stage.run(job), job.out

    return run


def test_an_id_that_is_a_path_names_no_file(splits, evaluated, tmp_path):
    ids = ["../../escaped", str(tmp_path / "absolute"), "plain"]
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    summary, out = evaluated(splits(ids=ids), pictures=3)
    assert summary["ap"] == pytest.approx(1)
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert not any("escaped" in str(path) or "absolute" in str(path) for path in new)
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "000001.jpg", "000002.jpg", "000003.jpg", "captions.json",
    ]  # fmt: skip
    assert not (tmp_path.parent / "escaped.jpg").exists()
    assert {record["image_id"] for record in json.loads((out / "predictions.json").read_text())} == set(ids)


def test_captions_hold_addresses_of_the_web_alone(splits, evaluated):
    urls = ["javascript:alert(1)", "https://example.org/a.jpg", "/etc/passwd"]
    listed = [
        {"id": n + 1, "file_name": f"{n}.png", "height": 80, "width": 90, "flickr_url": url} for n, url in enumerate(urls)
    ]
    _, out = evaluated(splits({"images": listed}), pictures=3)
    captions = json.loads((out / "pictures/captions.json").read_text())
    assert list(captions.values()) == ["", "https://example.org/a.jpg", ""]


def test_the_category_is_a_figure_and_predictions_are_of_it(splits, evaluated, capsys):
    dogs = [person(id=90 + n, image_id=n + 1, category_id=18, bbox=[50, 50, 9, 9], keypoints=None) for n in range(3)]
    people = [person(id=n, image_id=n, category_id=5) for n in (1, 2, 3)]
    raw = {"categories": [DOG, {**PERSON, "id": 5}], "annotations": people + dogs}
    summary, out = evaluated(splits(raw))
    assert summary["category"] == json.loads((out / "metrics.json").read_text())["category"] == "person"
    assert summary["ap"] == pytest.approx(1)
    check_figures(summary, "what a device brings back")
    assert "category" in columns([])
    assert {record["category_id"] for record in json.loads((out / "predictions.json").read_text())} == {5}
    said = capsys.readouterr().err
    assert "3 annotations of other categories than person are left out; data.category chooses" in said


def test_predictions_of_a_category_of_id_0_are_read_again(splits, evaluated):
    raw = {
        "categories": [{**PERSON, "id": 0}, DOG],
        "annotations": [person(id=n, image_id=n, category_id=0) for n in (1, 2, 3)],
    }
    data = splits(raw)
    _, out = evaluated(data)
    whole = data.open("validation")
    ids = {str(record["id"]) for record in whole.records}
    found = load_results(out / "predictions.json", COCO_17, ids, whole.truth.category)
    assert all(len(found[i].scores) for i in ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"area": 0, "keypoints": [11, 12, 2] * 16 + [41, 52, 1]}, ["AP is 0.000, implausible", "area is 0 for 3 of 3 people"]),
        ({"bbox": None}, ["3 people have no box, or an empty one", "top-down"]),
        ({"num_keypoints": 0}, ["num_keypoints is 0 for 2 people"]),
        ({"keypoints": [100, 120, 2] * 17}, ["100 % of the labelled keypoints lie outside their images"]),
        ({"bbox": [50, 50, 85, 75]}, ["100 % of the boxes have their centre outside", "not two corners"]),
        ({"keypoints": [0] * 51}, ["num_keypoints is above 0 for 3 people without labelled keypoints"]),
        ({"keypoints": [70, 70, 2] * 17, "area": 1.0}, ["AP is 0.000, implausible", "may be untrained"]),
    ],
)
def test_what_an_implausible_figure_may_mean_is_said(splits, evaluated, capsys, change, words):
    people = [person(id=n, image_id=n, **change) for n in (1, 2, 3)]
    if "num_keypoints" in change:
        people[0]["num_keypoints"] = 17
    evaluated(splits({"annotations": people}))
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_thresholds_from_few_tune_images_are_doubted(splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "candidates", lambda options: [{}])

    def tuned(images):
        data = splits(images=images)
        data.parts["tune"] = data.parts.pop("validation")
        out = tmp_path / f"tuned{images}"
        out.mkdir()
        stage = tune.Tune(data, Backend(), WholeImage(), partial(Knowing), CocoKeypoints, None, "64x64")
        stage.run(Job(out, {"network": tmp_path}, {}, tmp_path / "scratch", tmp_path / "cache"))
        return capsys.readouterr().err

    assert "thresholds chosen on 3 tune images may not fit other images; name more in data.splits" in tuned(3)
    assert "thresholds chosen" not in tuned(5)


def test_a_package_carries_the_category_and_how_images_are_turned(splits, tmp_path):
    hands = [
        {"id": n, "image_id": n, "category_id": 2, "bbox": [0, 0, 9, 9], "keypoints": [1, 2, 2, 3, 4, 2, 5, 6, 2]}
        for n in (1, 2, 3)
    ]
    people = [person(id=10 + n, image_id=n, segmentation=[[1, 2, 3, 4, 5, 6]]) for n in (1, 2, 3)]
    for category, expected in (("hand", hands), ("person", people)):
        data = splits({"categories": [HAND, PERSON], "annotations": hands + people}, category=category, upright=False)
        out = tmp_path / f"package-{category}"
        out.mkdir()
        data.digest(["validation"])
        pack(data, out)
        part = Packaged(str(out)).open("validation")
        assert part.labels == data.open("validation").labels
        assert part.truth.category.name == category
        assert part.upright is False
        assert [a["id"] for r in part.records for a in r["annotations"]] == [a["id"] for a in expected]
        assert part[0].truth.keypoints.tolist() == data.open("validation")[0].truth.keypoints.tolist()
    listed = json.loads((out / "data.json").read_text())
    (out / "data.json").write_text(json.dumps({**listed, "files": {"../../x": "0"}}))
    with pytest.raises(UserError, match=r"\.\./\.\./x: not the file that was packaged"):
        Packaged(str(out)).open("validation")


def test_many_unlabelled_images_are_not_kept(tmp_path):
    """A sample of an image without labels holds none of its pixels."""
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((300, 400, 3), np.uint8))
    sample = Coco(Path(tmp_path))[0]
    assert sample.size == Resolution(300, 400)
    held = [cell.cell_contents for cell in getattr(sample.read, "__closure__", None) or ()]
    assert not any(isinstance(value, np.ndarray) for value in held)
    assert sample.read().shape == (300, 400, 3)


def test_drawing_a_data_set_is_said_before_it_begins(tmp_path, monkeypatch, capsys):
    def stop(workers):
        raise InterruptedError

    monkeypatch.setattr(synthetic.processes, "pool", stop)
    preset = Preset(Resolution(96, 120), (1, 1), (0.5, 0.9), 0, 0, 0.0, 0.0, 0.0)
    data = synthetic.Synthetic(preset, dict.fromkeys(synthetic.SPLITS, 2000), 0, str(tmp_path))
    with pytest.raises(InterruptedError):
        data.open("train")
    assert "drawing 10,000 images of 96x120 once, into" in capsys.readouterr().err
