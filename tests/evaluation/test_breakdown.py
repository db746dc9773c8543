"""Where AP is lost, agreement with FP32, fitted scores and averaged views."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.metrics import score_fit as scores
from evaluation.metrics.agreement import PoseAgreement, reference_people
from evaluation.metrics.coco_breakdown import by_keypoint, by_stratum, errors
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.truth import People
from pipeline.datasets.annotations import people
from posepress.decoders.averaged import AveragedFields
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder
from posepress.framing.person_crops import PersonCrops
from posepress.framing.whole_image import WholeImage
from posepress.geometry import input_to_cells, mirrored
from posepress.resolution import Resolution
from posepress.results import Boxes, Poses
from posepress.skeletons import COCO_17, OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import perfect_fields
from tests.evaluation.test_coco_metric import evaluated, world

LEFT, RIGHT = COCO_17.names.index("left_wrist"), COCO_17.names.index("right_wrist")


def standing(x, height=200.0, seed=0):
    """A person's keypoints [17, 2]."""
    draw = np.random.default_rng(seed)
    return np.array([x, 50.0]) + draw.random((17, 2)) * (height / 2, height)


def truth_of(*persons, visible=2):
    points = np.array(persons)
    low, high = points.min(1), points.max(1)
    keypoints = np.concatenate([points, np.full((*points.shape[:2], 1), visible)], axis=-1)
    return People(keypoints, np.c_[low, high - low], (high - low).prod(1) * 0.5, np.zeros(len(points), bool))


def poses_of(*persons, score=None):
    keypoints = np.concatenate([np.array(persons), np.full((len(persons), 17, 1), 0.8)], axis=-1).astype(np.float32)
    return Poses(keypoints, np.linspace(0.9, 0.5, len(persons)).astype(np.float32) if score is None else np.float32(score))


def metric_of(*images):
    metric = CocoKeypoints(COCO_17, COCO_17)
    for n, (truth, found) in enumerate(images):
        metric.process(str(n + 1), truth, found)
    return metric


def test_perfect_people_have_no_errors():
    a, b = standing(0), standing(400, seed=1)
    figures = errors(metric_of((truth_of(a, b), poses_of(a, b))).people(), COCO_17)
    assert figures["error_good"] == 1
    assert figures["background"] == figures["missed"] == 0
    assert not any(value for name, value in figures.items() if name.startswith("gain_"))


def test_each_kind_of_error_is_told_from_the_others():
    a, b = standing(0), standing(400, seed=1)
    swapped, inverted, missed, jittered = (a.copy() for _ in range(4))
    swapped[LEFT] = b[LEFT]
    inverted[LEFT] = a[RIGHT]
    missed[LEFT] = (-900, -900)
    size = np.sqrt(truth_of(a).areas[0])
    # exp(-d2 / (8 sigma2 area)) is .7 here: between .5 and .85
    jittered[LEFT, 0] += size * 2 * COCO_17.sigmas[LEFT] * np.sqrt(-2 * np.log(0.7))
    for kind, first in (("swap", swapped), ("inversion", inverted), ("miss", missed), ("jitter", jittered)):
        figures = errors(metric_of((truth_of(a, b), poses_of(first, b))).people(), COCO_17)
        for other in ("swap", "inversion", "miss", "jitter"):
            assert figures[f"error_{other}"] == pytest.approx((kind == other) / 34), (kind, other)
        assert figures["error_good"] == pytest.approx(33 / 34)
        if kind != "jitter":
            assert figures[f"gain_{kind}"] > 0.005


def test_background_and_missed_people_are_counted():
    a, b = standing(0), standing(400, seed=1)
    ghost = standing(3000, seed=2)
    figures = errors(metric_of((truth_of(a, b), poses_of(ghost, a))).people(), COCO_17)
    assert figures["background"] == 0.5
    assert figures["missed"] == 0.5
    assert figures["gain_background"] > 0.2  # the ghost is the surest


def test_ap_of_a_keypoint_falls_with_that_keypoint_alone():
    a = standing(0)
    wrong = a.copy()
    wrong[LEFT] += 500
    figures = by_keypoint(metric_of((truth_of(a), poses_of(wrong))).people(), COCO_17)
    assert figures["left_wrist"] == 0
    assert all(value == pytest.approx(1) for name, value in figures.items() if name != "left_wrist")


def test_strata_see_their_own_images_and_people():
    a, b = standing(0), standing(400, seed=1)
    lonely = truth_of(a), poses_of(a)
    nothing = Poses(np.zeros((0, 17, 3), np.float32), np.zeros(0, np.float32))
    crowd = truth_of(*(standing(300 * n, seed=n) for n in range(6))), nothing
    hidden = truth_of(a, b, visible=1), nothing
    figures = by_stratum(metric_of(lonely, crowd, hidden).people())
    assert figures["persons_1"] == pytest.approx(1)
    assert figures["persons_2-4"] == 0
    assert figures["persons_5+"] == 0
    assert 0 < figures["hidden_0"] < 0.5
    assert figures["hidden_above_.25"] == 0
    assert figures["hidden_to_.25"] == -1


@pytest.mark.parametrize("seed", range(3))
def test_the_breakdown_of_random_worlds_adds_up(seed):
    truth, found = world(seed)
    metric = evaluated(truth, found)
    figures = metric.details()["errors"]
    shares = [figures[f"error_{kind}"] for kind in ("good", "jitter", "inversion", "swap", "miss")]
    assert sum(shares) == pytest.approx(1)
    assert all(figures[f"gain_{kind}"] >= -1e-9 for kind in ("jitter", "inversion", "swap", "miss", "background"))
    before = metric.evaluate()
    assert metric.evaluate() == before, "the breakdown leaves the metric as it was"


def test_nobody_found_and_nobody_there_break_no_breakdown():
    nothing = Poses(np.zeros((0, 17, 3), np.float32), np.zeros(0, np.float32))
    for image in ((people([]), nothing), (people([]), poses_of(standing(0))), (truth_of(standing(0)), nothing)):
        tables = metric_of(image).details()
        assert np.isfinite([x for table in tables.values() for x in table.values()]).all()


# --- agreement -------------------------------------------------------------------------------------------------------------


def seventeen(*persons, scores=0.8):
    found = poses_of(*persons)
    keypoints = found.keypoints.copy()
    keypoints[..., 2] = np.reshape(np.broadcast_to(scores, len(persons)), (-1, 1))
    return Poses(keypoints, found.scores)


def agreement(reference, found):
    metric = PoseAgreement(COCO_17)
    for n, (theirs, ours) in enumerate(zip(reference, found, strict=True)):
        metric.process(str(n), theirs, ours)
    return metric


def test_an_engine_agrees_with_itself():
    reference = [seventeen(standing(0), standing(400, seed=1)), seventeen(standing(10, seed=3))]
    metric = agreement(reference, reference)
    assert metric.evaluate()["ap"] == pytest.approx(1)
    assert metric.counts()["people"] == 3


def test_weak_reference_people_are_neither_wanted_nor_blamed():
    sure, weak = standing(0), standing(400, seed=1)
    reference = [seventeen(sure, weak, scores=[0.8, 0.3])]
    truth = reference_people(reference[0])
    assert truth.ignored.tolist() == [False, True]
    assert truth.areas[0] == pytest.approx(0.5 * np.prod(np.ptp(sure, axis=0)), rel=1e-4)
    for found in (seventeen(sure), seventeen(weak, sure)):
        assert agreement(reference, [found]).evaluate()["ap"] == pytest.approx(1)
    ghost = seventeen(standing(3000, seed=5), sure)
    assert agreement(reference, [ghost]).evaluate()["ap"] == pytest.approx(0.5)


def test_detections_are_uncut():
    ghosts = [standing(3000 + 300 * n, seed=n) for n in range(25)]
    reference = [seventeen(standing(0))]
    assert agreement(reference, [seventeen(*ghosts, standing(0))]).evaluate()["ap"] > 0


def test_missing_joints_of_the_reference_do_not_count():
    reference = seventeen(standing(0))
    reference.keypoints[0, :5] = 0
    found = seventeen(standing(0))
    found.keypoints[0, :5, :2] += 300
    assert agreement([reference], [found]).evaluate()["ap"] == pytest.approx(1)


def test_where_the_reference_is_sure_of_nobody_there_is_no_figure():
    assert agreement([seventeen(standing(0), scores=0.2)], [seventeen(standing(0))]).evaluate()["ap"] == -1


# --- fitted scores ---------------------------------------------------------------------------------------------------------


def test_a_fit_finds_what_makes_a_person_well_placed():
    draw = np.random.default_rng(0)
    metric, results = CocoKeypoints(COCO_17, COCO_17), []
    for n in range(60):
        person = standing(0, seed=n)
        quality = draw.random()
        found = poses_of(person + draw.normal(0, 1 + 30 * (1 - quality), person.shape))
        features = np.array([[draw.random(), quality, 1.0]], np.float32)  # the plain score says nothing here
        results.append((truth_of(person), Poses(found.keypoints, features[:, 0], {"features": features})))
    weights = scores.fit(metric, results)
    assert len(weights) == 3
    assert weights[1] > 5 * abs(weights[0])
    plain, fitted = CocoKeypoints(COCO_17, COCO_17), CocoKeypoints(COCO_17, COCO_17)
    for n, (truth, found) in enumerate(results):
        plain.process(str(n), truth, found)
        fitted.process(str(n), truth, Poses(found.keypoints, found.notes["features"] @ np.float32(weights)))
    assert fitted.evaluate()["ap"] > plain.evaluate()["ap"] + 0.02


def test_too_few_people_fit_nothing():
    person = standing(0)
    found = Poses(poses_of(person).keypoints, np.ones(1, np.float32), notes={"features": np.ones((1, 3), np.float32)})
    assert scores.fit(CocoKeypoints(COCO_17, COCO_17), [(truth_of(person), found)] * 5) is None
    assert scores.fit(CocoKeypoints(COCO_17, COCO_17), []) is None


def test_who_stands_on_an_ignored_person_teaches_nothing():
    person = standing(0)
    truth = truth_of(person)
    truth.keypoints[..., 2] = 0
    metric = CocoKeypoints(COCO_17, COCO_17)
    assert np.isnan(scores.placed(metric, truth, poses_of(person))).all()


def test_fitted_scores_are_positive_and_keep_their_order():
    from tests.posepress.test_heatmap_paf import crowd, fields

    truth = crowd(3)
    (view,) = WholeImage(None).views(Resolution(368, 496), Resolution(368, 496), SPEC.input)
    weights = [-1.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0]
    (plain,) = HeatmapPafDecoder(SPEC).decode(fields(truth, view), [view])
    (fitted,) = HeatmapPafDecoder(SPEC, score_weights=weights).decode(fields(truth, view), [view])
    assert ((fitted.scores > 0) & (fitted.scores < 1)).all()
    assert np.array_equal(np.argsort(fitted.scores), np.argsort(-plain.scores))


# --- several views ---------------------------------------------------------------------------------------------------------

SPEC = NetworkSpec(InputSpec("image", multiple=8), (OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)), OPENPOSE_18)


def anatomical(seed=0):
    """A person whose limbs are of a person's lengths, so that decoding finds all of it."""
    from tests.posepress.test_heatmap_paf import crowd

    return crowd(1, seed)


@pytest.mark.parametrize("options", [{"flip": True}, {"scales": (0.5, 1.0, 1.5)}, {"scales": (1.0, 2.0), "flip": True}])
@pytest.mark.parametrize("mode", [None, "pad_image_input", "adjust_network_input"])
def test_averaged_views_find_people_where_one_view_does(options, mode):
    truth, size = anatomical(), Resolution(368, 496)
    framing = WholeImage(mode, **options)
    assert framing.averaged
    views = framing.views(size, Resolution(368, 432), SPEC.input)
    decoder = HeatmapPafDecoder(SPEC, complete_poses=False)
    read = AveragedFields(decoder, SPEC)
    parts = []
    for view in views:
        parts += read.decode(perfect_fields(truth, view, SPEC), [view])
    found = read.merge(parts, views)
    assert len(found.scores) == 1
    points = CocoKeypoints(COCO_17, OPENPOSE_18).keypoints(found)
    assert (points[0, :, 2] > 0).all()
    assert np.median(np.hypot(*(points[0, :, :2] - truth.keypoints[0, :, :2]).T)) < 1.2


def test_left_and_right_are_told_apart_in_a_mirrored_view():
    truth, size = anatomical(), Resolution(368, 496)
    (view,) = WholeImage(None).views(size, size, SPEC.input)
    turned = mirrored(view, size)
    read = AveragedFields(HeatmapPafDecoder(SPEC, complete_poses=False), SPEC)
    parts = []
    for each in (view, turned):
        parts += read.decode(perfect_fields(truth, each, SPEC), [each])
    alone = read.merge(parts[:1], [view])
    both = read.merge(parts, [view, turned])
    assert np.abs(alone.keypoints[..., :2] - both.keypoints[..., :2]).max() < 0.05


sizes = st.builds(Resolution, st.integers(16, 3000), st.integers(16, 3000))


@settings(deadline=None)
@given(sizes, st.integers(2, 40), st.integers(2, 40), st.booleans(), st.integers(0, 10**6))
def test_points_survive_the_way_to_the_cells_and_back(size, h, w, flipped, seed):
    draw = np.random.default_rng(seed)
    points = draw.uniform((0, 0), (size.width, size.height), (20, 2))
    resolution = Resolution(8 * h, 8 * w)
    low = draw.uniform((0, 0), (size.width, size.height), (1, 2))
    boxes = np.concatenate([low, draw.uniform(1, 500, (1, 2))], axis=1)
    spec = OutputSpec("heatmaps", 8, 1, shift=draw.uniform(-0.5, 0.5))
    views = [
        WholeImage(mode).views(size, resolution, SPEC.input)[0] for mode in (None, "pad_image_input", "adjust_network_input")
    ]
    for view in [*views, *PersonCrops().views(size, resolution, SPEC.input, Boxes(boxes))]:
        seen = mirrored(view, size) if flipped else view
        cells = input_to_cells(seen.to_input(points), spec)
        back = seen.to_image((cells + spec.shift + 0.5) * 8 - 0.5)
        assert np.abs(back - points).max() < 1e-3
        assert seen.flipped == flipped
