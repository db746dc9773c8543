import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO

from evaluation.metrics.coco_keypoints import CocoKeypoints
from pipeline.datasets.coco import SPLITS
from pipeline.datasets.drawing import VERSION, Preset, generate
from pipeline.datasets.synthetic import Synthetic
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.results import Poses
from posepress.skeletons import COCO_17
from tests.conftest import ROOT

PRESET = Preset(Resolution(200, 240), (1, 6), (0.2, 0.9), 8, 2, 0.5, 0.5, 0.25)


def test_the_ap_of_the_truth_is_one_and_of_nothing_zero(images):
    data = images.open("validation")
    perfect, nothing = CocoKeypoints(COCO_17, COCO_17), CocoKeypoints(COCO_17, COCO_17)
    for sample in (data[i] for i in range(len(data))):
        labelled = sample.truth.keypoints[(sample.truth.keypoints[..., 2] > 0).any(axis=1)]
        perfect.process(sample.id, sample.truth, Poses(labelled.astype(np.float32), np.ones(len(labelled), np.float32)))
        nothing.process(sample.id, sample.truth, Poses(np.zeros((0, 17, 3), np.float32), np.zeros(0, np.float32)))
    assert perfect.evaluate()["ap"] == pytest.approx(1, abs=1e-9)
    assert nothing.evaluate()["ap"] == 0


def test_pycocotools_loads_it_and_agrees_on_masks(images):
    file = images.folder / "annotations" / "validation.json"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    assert coco.anns
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        ys, xs = np.nonzero(mask)
        assert annotation["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        visible = np.array(annotation["keypoints"]).reshape(-1, 3)[:, 2]
        assert annotation["num_keypoints"] == (visible > 0).sum()


def test_people_are_varied():
    records = [generate(PRESET, [0, n])[1] for n in range(60)]
    persons = [sum(1 for r in found if not r["iscrowd"]) for found in records]
    assert {1, 6} <= set(persons) | {6}
    assert max(persons) >= 5
    every = [r for found in records for r in found]
    assert any(r["iscrowd"] for r in every)
    assert all(r["num_keypoints"] == 0 for r in every if r["iscrowd"])
    assert any(not r["iscrowd"] and r["num_keypoints"] == 0 for r in every), "some people are too hidden to label"
    visibility = np.concatenate([np.array(r["keypoints"]).reshape(-1, 3)[:, 2] for r in every])
    assert set(visibility) == {0, 1, 2}
    heights = [r["bbox"][3] / 200 for r in every if r["num_keypoints"] > 10]
    assert min(heights) < 0.35
    assert max(heights) > 0.75


def test_labelled_keypoints_lie_in_the_image_and_visible_ones_on_the_person():
    for n in range(20):
        _, records = generate(PRESET, [7, n])
        for record in records:
            points = np.array(record["keypoints"]).reshape(-1, 3)
            points = points[points[:, 2] > 0]
            x, y, width, height = record["bbox"]
            seen = points[points[:, 2] == 2]
            assert ((points[:, 0] > -0.6) & (points[:, 0] < 240) & (points[:, 1] > -0.6) & (points[:, 1] < 200)).all()
            assert ((seen[:, 0] >= x - 1) & (seen[:, 0] <= x + width + 1)).all()
            assert ((seen[:, 1] >= y - 1) & (seen[:, 1] <= y + height + 1)).all()


def test_a_seed_gives_one_image():
    image, records = generate(PRESET, [1, 2])
    again, same = generate(PRESET, [1, 2])
    assert (image == again).all()
    assert records == same
    other, _ = generate(PRESET, [1, 3])
    assert (image != other).any()


def test_the_digest_follows_from_every_option(images):
    base = {"preset": PRESET, "counts": dict.fromkeys(SPLITS, 2), "seed": 0}
    digests = {
        Synthetic(**{**base, **change}).digest(["train"])
        for change in ({}, {"seed": 1}, {"counts": dict.fromkeys(SPLITS, 3)}, {"preset": images.preset})
    }
    assert len(digests) == 4
    assert Synthetic(**base).digest(["train"]) != Synthetic(**base).digest(["tune"])
    content = json.loads((images.folder / "annotations" / "train.json").read_text())
    assert f"version {VERSION}" in content["info"]["description"]
    assert images.identity in content["info"]["description"]


def test_the_splits_share_nothing(images):
    parts = [images.open(split) for split in SPLITS]
    ids = [record["id"] for part in parts for record in part.records]
    assert len(ids) == len({str(i) for i in ids}) == sum(images.counts.values())
    assert images.open("unlabelled")[0].truth is None


def test_an_empty_split_is_refused():
    with pytest.raises(UserError, match=r"data\.counts\.validation=0"):
        Synthetic(PRESET, {**dict.fromkeys(SPLITS, 2), "validation": 0})
    with pytest.raises(UserError, match=r"data\.counts\.valid"):
        Synthetic(PRESET, {**dict.fromkeys(SPLITS, 2), "valid": 1})


def test_generating_needs_neither_torch_nor_opencv():
    code = (
        "import sys; from posepress.spec import Resolution; from pipeline.datasets.drawing import Preset, generate;"
        "generate(Preset(Resolution(64, 80), (1, 2), (.5, .9), 2, 1, .5, .5, 0), [0]);"
        "print([m for m in ('torch', 'cv2', 'onnx', 'onnxruntime', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
