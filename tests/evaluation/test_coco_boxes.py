import json

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.metrics import coco_boxes
from evaluation.metrics.coco_boxes import FIGURES, CocoBoxes
from evaluation.statistics import bootstrap
from evaluation.truth import People
from posepress.results import Boxes, load_results, save_results
from posepress.skeletons import COCO_17


def scene(seed, images=12):
    """Random people, crowds and boxes of several sizes: truth and predictions by image."""
    draw = np.random.default_rng(seed)
    truth, found = {}, {}
    for image in range(images):
        count = int(draw.integers(0, 6))
        boxes = np.concatenate([draw.uniform(0, 300, (count, 2)), draw.uniform(8, 150, (count, 2))], axis=1)
        crowd = draw.random(count) < 0.2
        areas = boxes[:, 2] * boxes[:, 3] * draw.uniform(0.3, 0.9, count)
        truth[str(image)] = People(np.zeros((count, 17, 3)), boxes, areas, crowd)
        near = np.repeat(boxes, 2, axis=0) + draw.normal(0, 8, (2 * count, 4))
        far = np.concatenate([draw.uniform(0, 300, (3, 2)), draw.uniform(8, 150, (3, 2))], axis=1)
        own = np.concatenate([near, far])
        own[:, 2:] = np.maximum(own[:, 2:], 2)
        found[str(image)] = Boxes(own, np.round(draw.random(len(own)), 2))
    return truth, found


def filled(truth, found):
    metric = CocoBoxes(COCO_17, COCO_17)
    for image, people in truth.items():
        metric.process(image, people, found[image])
    return metric


def reference(truth, found, folder):
    rows = [
        {
            "id": 100 * int(image) + n + 1,
            "image_id": int(image),
            "category_id": 1,
            "bbox": box.tolist(),
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for image, people in truth.items()
        for n, (box, area, crowd) in enumerate(zip(people.boxes, people.areas, people.crowd, strict=True))
    ]
    content = {"images": [{"id": int(i)} for i in truth], "annotations": rows, "categories": [{"id": 1, "name": "person"}]}
    (folder / "truth.json").write_text(json.dumps(content))
    made = filled(truth, found)
    made.write(folder / "found.json", lambda image: {"image_id": int(image), "category_id": 1})
    coco = COCO(str(folder / "truth.json"))
    run = COCOeval(coco, coco.loadRes(str(folder / "found.json")), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "", "", "ar", "ar_small", "ar_medium", "ar_large")
    return {name: value for name, value in zip(names, run.stats, strict=True) if name}


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_pycocotools(seed, tmp_path):
    truth, found = scene(seed)
    found = {i: Boxes(np.round(b.xywh, 3), b.scores) for i, b in found.items()}
    ours = filled(truth, found).evaluate()
    for name, value in reference(truth, found, tmp_path).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert set(ours) == set(FIGURES)


def test_ground_truth_scores_one_and_nothing_found_scores_none():
    truth, _ = scene(1)
    itself = {image: Boxes(people.boxes[~people.crowd]) for image, people in truth.items()}
    assert filled(truth, itself).evaluate()["ap"] == 1.0
    nothing = filled(truth, {image: Boxes(np.zeros((0, 4)), np.zeros(0)) for image in truth})
    assert nothing.evaluate()["ap"] == 0
    assert "no box is found" in nothing.doubts()[0]
    assert not filled(truth, itself).doubts()


def test_compiled_functions_call_those_of_their_own_file_alone():
    own = [value for value in vars(coco_boxes).values() if isinstance(value, Dispatcher)]
    callers = [value.py_func for value in own if value.py_func.__module__ == coco_boxes.__name__]
    assert callers
    for caller in callers:
        named = [caller.__globals__.get(name) for name in caller.__code__.co_names]
        called = [value.py_func for value in named if isinstance(value, Dispatcher)]
        assert {function.__module__ for function in called} <= {coco_boxes.__name__}, caller.__name__


def test_intervals_hold_the_figure():
    metric = filled(*scene(2, 40))
    draws = bootstrap(metric.matches(), 200)
    assert draws.interval.low < metric.evaluate()["ap"] < draws.interval.high


def test_results_survive_their_file(tmp_path):
    _, found = scene(3)
    found["0"] = Boxes(found["0"].xywh, found["0"].scores, {"images_not_finite": 1})
    save_results(tmp_path / "boxes.npz", list(found.items()))
    read = load_results(tmp_path / "boxes.npz")
    assert all(np.array_equal(read[i].xywh, b.xywh) and np.array_equal(read[i].scores, b.scores) for i, b in found.items())
    assert read["0"].counts == {"images_not_finite": 1}
    assert read["1"].counts == {}


def test_images_that_are_not_finite_are_counted():
    truth, found = scene(0)
    metric = filled(truth, {i: Boxes(b.xywh, b.scores, {"images_not_finite": int(i in "37")}) for i, b in found.items()})
    assert metric.counts() == {"images_not_finite": 2}
    metric.reset()
    assert metric.counts() == {"images_not_finite": 0}


def test_bad_images_are_refused():
    truth, found = scene(0)
    metric = filled(truth, found)
    with pytest.raises(ValueError, match="image 0 is evaluated twice"):
        metric.process("0", truth["0"], found["0"])
    with pytest.raises(ValueError, match="image x: a predicted box has a score or a side that is not finite"):
        metric.process("x", truth["0"], Boxes(np.array([[0, 0, np.nan, 1.0]]), np.ones(1)))
