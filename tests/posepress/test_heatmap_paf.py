import time

import numpy as np
import pytest

from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.truth import People
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder, limb_order
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17, OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import perfect_fields

SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)), OPENPOSE_18)
SIZE = Resolution(368, 496)


def crowd(count, seed=0, size=SIZE):
    """People standing side by side, with jitter."""
    draw = np.random.default_rng(seed)
    upright = {
        "nose": (0, 0.08), "left_eye": (0.03, 0.055), "right_eye": (-0.03, 0.055), "left_ear": (0.065, 0.07),
        "right_ear": (-0.065, 0.07), "left_shoulder": (0.12, 0.2), "right_shoulder": (-0.12, 0.2), "left_elbow": (0.18, 0.36),
        "right_elbow": (-0.18, 0.36), "left_wrist": (0.2, 0.5), "right_wrist": (-0.2, 0.5), "left_hip": (0.08, 0.52),
        "right_hip": (-0.08, 0.52), "left_knee": (0.09, 0.75), "right_knee": (-0.09, 0.75), "left_ankle": (0.1, 0.97),
        "right_ankle": (-0.1, 0.97),
    }  # fmt: skip
    template = np.array([upright[name] for name in COCO_17.names])
    height = min(300.0, 1.9 * size.width / count)
    people = []
    for n in range(count):
        at = ((n + 0.5) * size.width / count, draw.uniform(5, size.height - height - 5))
        people.append(np.c_[template * height + at + draw.normal(0, 0.008 * height, template.shape), np.full(17, 2)])
    keypoints = np.array(people)
    low, high = keypoints[..., :2].min(1), keypoints[..., :2].max(1)
    boxes = np.c_[low, high - low]
    return People(keypoints, boxes, boxes[:, 2] * boxes[:, 3] * 0.5, np.zeros(count, bool))


def fields(truth, view):
    return perfect_fields(truth, view, SPEC)


@pytest.mark.parametrize("mode", [None, "pad_image_input", "adjust_network_input"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_planted_people_are_found_where_they_stand(mode, count):
    truth = crowd(count, seed=count)
    (view,) = WholeImage(mode).views(SIZE, Resolution(368, 432), SPEC.input)
    (found,) = HeatmapPafDecoder(SPEC).decode(fields(truth, view), [view])
    assert len(found.keypoints) == count
    metric = CocoKeypoints(COCO_17, OPENPOSE_18)
    found_points = metric.keypoints(found)
    distance = np.linalg.norm(found_points[:, None, :, :2] - truth.keypoints[None, :, :, :2], axis=-1)
    nearest = distance.mean(axis=2).argmin(axis=1)
    assert sorted(nearest) == list(range(count))
    assert max(np.median(distance[n, g]) for n, g in enumerate(nearest)) < 0.7
    metric.process("1", truth, found)
    assert metric.evaluate()["ap50"] == pytest.approx(1)


def test_a_wrong_pixel_shift_would_be_seen():
    truth = crowd(1)
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    (right,) = HeatmapPafDecoder(SPEC).decode(fields(truth, view), [view])
    shifted = NetworkSpec(SPEC.input, (OutputSpec("heatmaps", 8, 19, -0.5), OutputSpec("pafs", 8, 38, -0.5)), OPENPOSE_18)
    (wrong,) = HeatmapPafDecoder(shifted).decode(fields(truth, view), [view])
    assert np.allclose(right.keypoints[..., :2] - wrong.keypoints[..., :2], 4, atol=0.01)


def test_the_neck_does_not_count_in_the_score():
    truth = crowd(1)
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    (found,) = HeatmapPafDecoder(SPEC).decode(fields(truth, view), [view])
    peaks = np.delete(found.keypoints[0, :, 2], OPENPOSE_18.names.index("neck"))
    assert found.scores[0] == pytest.approx(peaks.sum(), rel=1e-5)


@pytest.mark.parametrize("kind", ["zeros", "ones", "nan", "noise", "infinity"])
def test_no_fields_break_or_stall_the_decoder(kind):
    h, w = 46, 62
    draw = np.random.default_rng(0)
    value = {"zeros": 0.0, "ones": 1.0, "nan": np.nan, "infinity": np.inf}.get(kind)
    shape = (1, 19, h, w), (1, 38, h, w)
    heatmaps, pafs = (draw.random(s, np.float32) if value is None else np.full(s, value, np.float32) for s in shape)
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    decoder = HeatmapPafDecoder(SPEC)
    decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [view])
    started = time.process_time()
    (found,) = decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [view])
    assert time.process_time() - started < 5  # bounded, not timed: the work is limited by max_peaks
    assert found.keypoints.shape[1:] == (18, 3)
    assert np.isfinite(found.keypoints[..., :2]).all()
    if kind in ("zeros", "nan"):
        assert len(found.keypoints) == 0


def test_equal_neighbours_are_one_peak():
    heatmaps, pafs = np.zeros((1, 19, 20, 20), np.float32), np.zeros((1, 38, 20, 20), np.float32)
    heatmaps[0, 1, 5, 5:7] = 0.8  # a plateau of a neck
    heatmaps[0, 2, 5, 12:14] = 0.8
    heatmaps[0, 3, 12, 12:14] = 0.8
    for limb, dx, dy in ((6, 1, 0), (7, 0, 1)):
        pafs[0, 2 * limb], pafs[0, 2 * limb + 1] = dx, dy
    (view,) = WholeImage(None).views(Resolution(160, 160), Resolution(160, 160), SPEC.input)
    (found,) = HeatmapPafDecoder(SPEC).decode({"heatmaps": heatmaps, "pafs": pafs}, [view])
    assert len(found.keypoints) == 1
    assert (found.keypoints[0, :, 2] > 0).sum() == 3


def test_the_highest_peaks_stay_when_there_are_too_many():
    draw = np.random.default_rng(1)
    heatmaps = np.zeros((1, 19, 46, 62), np.float32)
    heatmaps[0, :, ::4, ::4] = draw.uniform(0.1, 0.2, (19, 12, 16))
    truth = crowd(1)
    (view,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)
    clean = fields(truth, view)
    clean["heatmaps"] = np.maximum(clean["heatmaps"], heatmaps)
    (found,) = HeatmapPafDecoder(SPEC, max_peaks=4, min_keypoints=12).decode(clean, [view])
    assert len(found.keypoints) == 1


def test_limbs_are_ordered_as_a_tree_first():
    order, tree = limb_order(OPENPOSE_18)
    assert tree == 17
    reached = {int(order[0, 0]), int(order[0, 1])}
    for a, b, _ in order[1:tree]:
        assert (int(a) in reached) != (int(b) in reached)
        reached |= {int(a), int(b)}
    assert sorted(order[:, 2]) == list(range(19))
