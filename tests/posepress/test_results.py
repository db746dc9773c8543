"""Results in COCO's format, in and out."""

import json

import numpy as np
import pytest

from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import FIGURES
from pipeline.datasets.annotations import people
from pipeline.datasets.records import Category
from pipeline.datasets.results import load_results
from posepress.errors import UserError
from posepress.results import Poses
from posepress.skeletons import COCO_17
from tests.evaluation.test_coco_metric import oracle

IMAGES = {"1", "7"}


def result(**changes):
    return {"image_id": 7, "category_id": 1, "keypoints": [1.5, 2.5, 0.5] * 17, "score": 0.7, **changes}


def test_results_are_read_and_every_image_is_there(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps([result(), result(score=0.2)]))
    found = load_results(tmp_path / "r.json", COCO_17, IMAGES)
    assert set(found) == IMAGES
    assert len(found["1"].scores) == 0
    assert found["7"].scores.tolist() == pytest.approx([0.7, 0.2])
    assert found["7"].keypoints.shape == (2, 17, 3)


def test_nothing_found_is_an_ap_of_zero(tmp_path):
    (tmp_path / "r.json").write_text("[]")
    found = load_results(tmp_path / "r.json", COCO_17, {"1"})
    metric = CocoKeypoints(COCO_17, COCO_17)
    box = {"bbox": [0, 0, 50, 100], "area": 4000, "keypoints": [5, 5, 2] * 17}
    metric.process("1", people([box]), found["1"])
    assert metric.evaluate()["ap"] == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "not a list of results"),
        ("[1]", "not a list of results"),
        ('[{"image_id": 7, "keypoints": [], "score": NaN}]', "not JSON"),
        ([{"image_id": 7, "score": 1}], "result 0 has no 'keypoints'"),
        ([result(), {"keypoints": [0] * 51, "score": 1}], "result 1 has no 'image_id'"),
        ([{"image_id": 7, "keypoints": [0] * 51}], "result 0 has no 'score'"),
        ([result(keypoints=[0] * 48)], r"result 0 has 48 keypoint numbers, not 51 \(17 keypoints\)"),
        ([result(keypoints=[0] * 54)], "result 0 has 54 keypoint numbers"),
        ([result(keypoints=None)], "result 0 has no list of keypoint numbers"),
        ([result(keypoints=["x"] * 51)], "must be numbers"),
        ([result(score=None)], "must be numbers"),
        ([result(), result(score=-0.1)], r"result 1 \(score -0\.1\) has a negative score"),
        ('[{"image_id": 7, "keypoints": [1e999], "score": 1}]', "not JSON"),
        ([result(keypoints=["1"] * 51)], "not words, lists or null"),
        ([result(score=True), result(score=False)], "not words, lists or null"),
        ([result(score=[0.1, 0.2])] * 2, "not words, lists or null"),
        ([result(image_id=8), result(image_id=9)], "2 image ids are not of the validation images: 8, 9"),
        ([result(score=0.1), result(), result()], "results 1 and 2 are the same person of image 7"),
    ],
)
def test_bad_results_are_refused(tmp_path, content, message):
    file = tmp_path / "r.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_results(file, COCO_17, IMAGES)
    assert str(file) in str(caught.value)


PERSON = Category(1, "person", COCO_17)


def test_results_of_another_category_are_left_out(tmp_path, capsys):
    dog = {"image_id": 9, "category_id": 18, "keypoints": [1, 2], "score": "none"}
    (tmp_path / "r.json").write_text(json.dumps([dog, result(), result(score=0.2, category_id=None), dog]))
    found = load_results(tmp_path / "r.json", COCO_17, IMAGES, PERSON)
    assert found["7"].scores.tolist() == [0.7, 0.2]
    assert "r.json: 2 results of other categories than person are left out; data.category" in capsys.readouterr().err
    (tmp_path / "r.json").write_text(json.dumps([dog, result(), dog, result()]))
    with pytest.raises(UserError, match="results 1 and 3 are the same person of image 7"):
        load_results(tmp_path / "r.json", COCO_17, IMAGES, PERSON)
    (tmp_path / "r.json").write_text(json.dumps([dog, dog, {**dog, "category_id": 3}]))
    with pytest.raises(UserError, match=r"no result has the category_id 1 \(person\), but 2 have 18; .* data\.category"):
        load_results(tmp_path / "r.json", COCO_17, IMAGES, PERSON)
    (tmp_path / "r.json").write_text(json.dumps([result(), result(category_id=[1])]))
    with pytest.raises(UserError, match=r"result 1: category_id is a list of 1"):
        load_results(tmp_path / "r.json", COCO_17, IMAGES, PERSON)


def test_a_mark_nested_points_and_odd_ids_are_read_or_named(tmp_path):
    nested = result(keypoints=[[1.5, 2.5, 0.5]] * 17)
    (tmp_path / "r.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([nested]).encode())
    assert load_results(tmp_path / "r.json", COCO_17, IMAGES)["7"].keypoints[0, 3].tolist() == [1.5, 2.5, 0.5]
    for wrong, words in (([7], "a list of 1"), (7.0, "7.0"), (None, "null")):
        (tmp_path / "r.json").write_text(json.dumps([result(image_id=wrong)]))
        with pytest.raises(UserError, match=f"an image_id is {words}"):
            load_results(tmp_path / "r.json", COCO_17, IMAGES)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot read it.*check the path"):
        load_results(tmp_path / "none.json", COCO_17, IMAGES)


def test_what_is_written_reads_the_same(tmp_path):
    draw = np.random.default_rng(0)
    metric = CocoKeypoints(COCO_17, COCO_17)
    keypoints = draw.uniform(0, 400, (3, 17, 3)).astype(np.float32)
    metric.process("7", people([]), Poses(keypoints, np.array([0.9, 0.5, 0.4], np.float32)))
    metric.write(tmp_path / "r.json", lambda image: {"image_id": image, "category_id": 1})
    found = load_results(tmp_path / "r.json", COCO_17, IMAGES)["7"]
    assert np.abs(found.keypoints - keypoints).max() < 1e-3
    assert found.scores == pytest.approx([0.9, 0.5, 0.4])


def test_scores_that_differ_little_keep_their_order(tmp_path):
    """Saturated confidences differ below what float32 holds, and AP follows from their order."""
    draw = np.random.default_rng(0)
    truth, results = {}, []
    for image in range(1, 21):
        points = draw.uniform(0, 300, 2) + draw.random((17, 2)) * 150
        keypoints = np.c_[points, np.full(17, 2)]
        box = [*points.min(0), *np.ptp(points, axis=0)]
        truth[str(image)] = [{"bbox": box, "area": box[2] * box[3], "keypoints": keypoints.ravel().tolist()}]
        for n in range(4):
            found = np.c_[points + (0 if n == 2 else 500), np.full(17, 0.5)]
            score = 1 - 1e-8 * draw.random()
            results.append({"image_id": image, "category_id": 1, "keypoints": found.ravel().tolist(), "score": score})
    (tmp_path / "r.json").write_text(json.dumps(results))
    loaded = load_results(tmp_path / "r.json", COCO_17, set(truth))
    metric = CocoKeypoints(COCO_17, COCO_17)
    for image, records in truth.items():
        metric.process(image, people(records), loaded[image])
    ours = metric.evaluate()
    annotated = {int(i): [{**r, "num_keypoints": 17, "iscrowd": 0, "category_id": 1} for r in rs] for i, rs in truth.items()}
    theirs = oracle(annotated, {int(i): poses for i, poses in loaded.items()})
    assert np.allclose([ours[name] for name in FIGURES], theirs, atol=1e-9, rtol=0)
    assert 0.1 < ours["ap"] < 0.9
