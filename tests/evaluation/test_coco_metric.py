import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.metrics.oks import FIGURES
from evaluation.statistics import Draws, bootstrap, paired
from pipeline.datasets.annotations import people
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.results import load_results
from posepress.results import Poses
from posepress.skeletons import COCO_17, OPENPOSE_18


def world(seed, images=40, ties=True):
    """Random truth with crowds and people without keypoints, and detections near and far from it."""
    draw = np.random.default_rng(seed)
    truth, found = {}, {}
    for image in range(1, images + 1):
        records, poses, scores = [], [], []
        for _ in range(draw.integers(0, 5)):
            height = draw.uniform(15, 300)
            at = draw.uniform(0, 300, 2)
            points = at + draw.random((17, 2)) * (height * 0.5, height)
            visible = draw.integers(0, 3, 17) * (draw.random() > 0.15)
            keypoints = np.c_[points * (visible[:, None] > 0), visible]
            low, size = points.min(0), np.ptp(points, axis=0)
            record = {
                "keypoints": np.round(keypoints, 2).ravel().tolist(),
                "bbox": [*low, *size],
                "area": float(np.prod(size) * 0.6),
                "num_keypoints": int((visible > 0).sum()),
                "iscrowd": 0,
                "category_id": 1,
            }
            if draw.random() < 0.1:
                record |= {"iscrowd": 1, "num_keypoints": 0, "keypoints": [0] * 51}
            records.append(record)
            for _ in range(draw.integers(0, 3)):
                poses.append(points + draw.normal(0, height * draw.choice([0.01, 0.05, 0.2]), points.shape))
                scores.append(round(float(draw.random()), 1 if ties else 9))
        for _ in range(draw.integers(0, 25) if image % 7 == 0 else 1):
            poses.append(draw.uniform(0, 400, (17, 2)))
            scores.append(float(draw.random()))
        truth[image] = records
        keypoints = np.zeros((len(poses), 17, 3), np.float32)
        if poses:
            keypoints[..., :2], keypoints[..., 2] = poses, 0.5
        found[image] = Poses(keypoints, np.array(scores, np.float32))
    return truth, found


def oracle(truth, found):
    """pycocotools' ten figures."""
    annotations = [{"id": 1000 * i + n + 1, "image_id": i, **r} for i, records in truth.items() for n, r in enumerate(records)]
    coco = COCO()
    names = {"keypoints": list(COCO_17.names), "skeleton": []}
    coco.dataset = {
        "images": [{"id": i} for i in truth],
        "annotations": annotations,
        "categories": [{"id": 1, **names}],
        "info": {},
    }
    results = [
        {"image_id": i, "category_id": 1, "keypoints": k.astype(np.float64).ravel().tolist(), "score": float(s)}
        for i, poses in found.items()
        for k, s in zip(poses.keypoints, poses.scores, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def evaluated(truth, found):
    metric = CocoKeypoints(COCO_17, COCO_17)
    for image in reversed(list(truth)):  # the order of arrival does not matter
        metric.process(str(image), people(truth[image]), found[image])
    return metric


@pytest.mark.parametrize("seed", range(6))
def test_all_ten_figures_are_those_of_pycocotools(seed):
    truth, found = world(seed)
    figures = evaluated(truth, found).evaluate()
    assert np.allclose([figures[name] for name in FIGURES], oracle(truth, found), atol=1e-9, rtol=0)
    assert 0.02 < figures["ap"] < 0.98


def test_repeating_an_image_counts_it_twice():
    truth, found = world(3, ties=False)  # copies of equal scores could stand in another order
    metric = evaluated(truth, found)
    chosen = np.array([0, 0, 5, 9, 9, 9, 20])
    twice_truth, twice_found = {}, {}
    for n, index in enumerate(chosen):
        twice_truth[n + 1], twice_found[n + 1] = truth[index + 1], found[index + 1]
    ours, theirs = metric.evaluate(chosen), evaluated(twice_truth, twice_found).evaluate()
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_nothing_found_is_zero_and_nobody_there_is_minus_one():
    truth, found = world(1)
    nothing = {image: Poses(np.zeros((0, 17, 3), np.float32), np.zeros(0, np.float32)) for image in truth}
    assert evaluated(truth, nothing).evaluate()["ap"] == 0
    assert evaluated({1: []}, {1: found[1]}).evaluate()["ap"] == -1


def test_bad_detections_are_refused():
    truth, found = world(1)
    metric = evaluated(truth, found)
    with pytest.raises(ValueError, match="image 1 is evaluated twice"):
        metric.process("1", people(truth[1]), found[1])
    metric.reset()
    poses = Poses(np.zeros((1, 17, 3), np.float32), np.array([np.nan], np.float32))
    with pytest.raises(ValueError, match="not finite"):
        metric.process("1", people(truth[1]), poses)


@pytest.mark.parametrize("part", ["keypoints", "boxes", "areas"])
def test_ground_truth_that_is_not_finite_is_refused(part):
    truth, found = world(3)
    image = next(n for n, one in truth.items() if one)
    person = people(truth[image], 17)
    values = getattr(person, part).copy()
    values.flat[0] = np.nan
    with pytest.raises(ValueError, match="image 1: the ground truth has a keypoint, a box or an area that is not finite"):
        CocoKeypoints(COCO_17, COCO_17).process("1", replace(person, **{part: values}), found[image])


def test_skeletons_are_joined_by_name():
    metric = CocoKeypoints(COCO_17, OPENPOSE_18)
    keypoints = np.zeros((1, 18, 3), np.float32)
    keypoints[0, OPENPOSE_18.names.index("left_wrist")] = (7, 8, 0.9)
    joined = metric.keypoints(Poses(keypoints, np.ones(1, np.float32)))
    assert joined[0, COCO_17.names.index("left_wrist")].tolist() == pytest.approx([7, 8, 0.9])
    assert np.count_nonzero(joined) == 3
    other = COCO_17.__class__(("hoof", "tail"), (), (0.1, 0.1))
    with pytest.raises(ValueError, match="share no name"):
        CocoKeypoints(COCO_17, other)


def test_intervals_hold_the_value_and_pair_what_is_equal(tmp_path):
    truth, found = world(2)
    matches = evaluated(truth, found).matches()
    draws = bootstrap(matches, 200)
    interval = draws.interval
    assert interval.low < interval.value < interval.high
    assert interval.value == evaluated(truth, found).evaluate()["ap"]
    assert np.array_equal(bootstrap(matches, 60).values, draws.values[:60])
    worse = {image: Poses(poses.keypoints + 3, poses.scores) for image, poses in found.items()}
    draws.save(tmp_path / "draws.npz")
    same = paired(Draws.load(tmp_path / "draws.npz"), draws)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    drop = paired(bootstrap(evaluated(truth, worse).matches(), 200), draws)
    assert drop.high < 0
    assert drop.high - drop.low < interval.high - interval.low  # pairing removes what the images share
    fewer = bootstrap(evaluated({k: v for k, v in truth.items() if k > 3}, found).matches(), 20)
    with pytest.raises(ValueError, match="different images"):
        paired(fewer, draws)


def test_resamples_without_people_do_not_count():
    truth, found = world(1, images=12, ties=False)
    empty = {image: [] for image in truth}
    person = next(records for records in truth.values() if any(r["num_keypoints"] for r in records))
    empty[1] = person
    draws = bootstrap(evaluated(empty, found).matches(), 200)
    assert np.isnan(draws.values).any()
    assert 0 <= draws.interval.low <= draws.interval.high <= 1
    nobody = bootstrap(evaluated({image: [] for image in truth}, found).matches(), 20)
    assert (nobody.value, nobody.interval.low, nobody.interval.high) == (-1, -1, -1)
    difference = paired(nobody, nobody)
    assert (difference.value, difference.low, difference.high) == (0, 0, 0)


# --- whole files: other categories, and all that a record may lack ---------------------------------------------------------

DOG = {"id": 18, "name": "dog"}


def mixed(seed):
    """An annotation file and results with other categories, crowds, areas of 0, absent areas and counts, and empty images."""
    draw = np.random.default_rng(seed)
    truth, found = world(100 + seed, images=25, ties=bool(seed % 2))
    annotations, results = [], []
    for image, records in truth.items():
        for record in records:
            number = len(annotations) + 1
            new = {**record, "id": number, "image_id": image}
            if draw.random() < 0.3:
                new["category_id"] = 18
                if draw.random() < 0.5:
                    new = {key: value for key, value in new.items() if key not in ("keypoints", "num_keypoints")}
            elif draw.random() < 0.1:
                new["area"] = 0
            elif draw.random() < 0.1:
                del new["area"]
            elif draw.random() < 0.1:
                new["num_keypoints"] = int(draw.integers(0, 2)) * 17  # whatever the points say
            elif draw.random() < 0.1:
                del new["num_keypoints"]
            elif draw.random() < 0.1:
                new["iscrowd"] = 1  # with labelled points
            elif draw.random() < 0.1:
                new |= {"bbox": [0, 0, 0, 0]}
            annotations.append(new)
        for points, score in zip(found[image].keypoints.astype(np.float64), found[image].scores.tolist(), strict=True):
            category = 18 if draw.random() < 0.3 else 1
            results.append({"image_id": image, "category_id": category, "keypoints": points.ravel().tolist(), "score": score})
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400} for i in [*truth, 900]]
    person = {"id": 1, "name": "person", "keypoints": list(COCO_17.names), "skeleton": []}
    return {"info": {}, "images": images, "annotations": annotations, "categories": [DOG, person]}, results


def reference(raw, results):
    """pycocotools' ten figures of people, once what it needs is there: an absent area is the box's, a count the points."""
    filled = []
    for record in raw["annotations"]:
        points = record.get("keypoints") or [0] * 51
        count = record.get("num_keypoints", sum(v > 0 for v in points[2::3]))
        box = record["bbox"]
        if not any(box) and any(points[2::3]):
            seen = np.reshape(points, (17, 3))
            seen = seen[seen[:, 2] > 0, :2]
            box = [*seen.min(0), *np.ptp(seen, axis=0)]
        area = record.get("area", box[2] * box[3])
        filled.append({**record, "keypoints": points, "num_keypoints": count, "area": area})
    coco = COCO()
    coco.dataset = {**raw, "annotations": filled}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([dict(record) for record in results]), "keypoints")
        evaluation.params.catIds = [1]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("seed", range(16))
def test_files_with_other_categories_give_the_figures_of_pycocotools(tmp_path, seed):
    raw, results = mixed(seed)
    (tmp_path / "truth.json").write_text(json.dumps(raw))
    (tmp_path / "found.json").write_text(json.dumps(results))
    data = Coco(tmp_path, tmp_path / "truth.json")
    loaded = load_results(tmp_path / "found.json", data.labels, {str(r["id"]) for r in data.records}, data.truth.category)
    metric = CocoKeypoints(data.labels, data.labels)
    for n in range(len(data)):
        metric.process(data[n].id, data[n].truth, loaded[data[n].id])
    ours, theirs = metric.evaluate(), reference(raw, results)
    assert np.allclose([ours[name] for name in FIGURES], theirs, atol=1e-9, rtol=0)
    assert 0.002 < ours["ap"] < 0.98
    assert data.truth.left_out == sum(a["category_id"] == 18 for a in raw["annotations"]) > 0


@pytest.mark.parametrize("ids", [["-3", "-12", "5"], ["007", "7", "70"], ["²", "1", "3"], ["a", "B", "10"]])
def test_any_id_is_ordered_and_written_as_it_is(ids, tmp_path):
    truth, found = world(1, images=3)
    metric = CocoKeypoints(COCO_17, COCO_17)
    for name, image in zip(ids, truth, strict=True):
        metric.process(name, people(truth[image]), found[image])
    metric.evaluate()
    metric.write(tmp_path / "r.json", lambda image: {"image_id": image, "category_id": 1})
    assert {record["image_id"] for record in json.loads((tmp_path / "r.json").read_text())} <= set(ids)
    if "-3" in ids:
        assert metric.images == ["-12", "-3", "5"]
