"""Ids of people over time, and smooth keypoints."""

import itertools
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from posepress.results import Poses
from posepress.skeletons import COCO_17
from posepress.track import FilterState, OneEuro, Tracker, _assignment
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from tracking import LastPose, Pairs, Walker, crossing, hota, idf1, pairs_of, switches, tracked

SIGMAS = COCO_17.oks_sigmas
RATE = 30
STANDING = Walker(300, 0, 0, 10, np.pi / 4).pose(0)


def poses(*places, score=0.9, height=300, noise=0.0, seed=0):
    """People who stand with the position (x, y), each with all keypoints."""
    draw = np.random.default_rng(seed)
    points = np.array([STANDING * height / 300 + place for place in places]).reshape(-1, 17, 2)
    points = points + draw.normal(0, 1, points.shape) * noise * height
    keypoints = np.dstack([points, np.full(points.shape[:2], score)]).astype(np.float32)
    return Poses(keypoints, np.full(len(places), score, np.float32))


def hide(found, *keypoints):
    """The same people without some keypoints."""
    left = found.keypoints.copy()
    left[:, list(keypoints)] = 0
    return replace(found, keypoints=left)


def joined(*parts):
    return Poses(np.concatenate([part.keypoints for part in parts]), np.concatenate([part.scores for part in parts]))


def ids(found):
    return found.ids.tolist()


# --- people who cross ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_people_who_cross_keep_their_ids(seed):
    video = crossing(seed=seed)
    found, _ = tracked(video, Tracker(SIGMAS))
    assert switches((frame.owners for frame in video), (one.ids for one in found)) <= 4
    assert idf1([pairs_of(frame.truth, one) for frame, one in zip(video, found, strict=True)]) > 0.88
    assert all(one.ids.dtype == np.int64 and len(set(ids(one)) - {0}) == (one.ids > 0).sum() for one in found)


def test_the_people_of_the_videos_cannot_be_told_apart_without_motion():
    videos = [crossing(seed=seed) for seed in range(3)]
    count = [
        switches((frame.owners for frame in video), (one.ids for one in tracked(video, LastPose())[0])) for video in videos
    ]
    assert sum(count) > 20


def test_the_people_of_the_videos_hide_each_other():
    video = crossing()
    hidden = [(frame.truth.keypoints[..., 2] == 0).any(axis=1).sum() + 5 - len(frame.truth.scores) for frame in video]
    assert sum(hidden) > 200
    assert min(len(frame.truth.scores) for frame in video) < 5
    offered = sum(len(frame.truth.scores) for frame in video)
    assert 0.01 < 1 - sum(len(frame.owners) for frame in video) / offered < 0.05


def test_two_people_walk_through_each_other_while_one_is_hidden():
    tracker = Tracker(SIGMAS)
    for n in range(90):
        left, right = 300 + 4 * n, 660 - 4 * n
        everyone = poses((left, 100)) if abs(left - right) < 80 else poses((left, 100), (right, 100))
        given = ids(tracker.update(everyone, n / RATE))
        assert given == ([1, 2] if len(given) == 2 else [1])


# --- ids ----------------------------------------------------------------------------------------------------------------------


def test_an_id_is_given_at_once_and_stays():
    tracker = Tracker(SIGMAS)
    found = poses((100, 100), (500, 100))
    for n in range(5):
        given = tracker.update(found, n / RATE)
        assert ids(given) == [1, 2]
        assert given.ids.dtype == np.int64
        assert given.keypoints is found.keypoints
        found = replace(found, keypoints=found.keypoints + np.float32([2, 0, 0]))
    turned = replace(found, keypoints=found.keypoints[::-1])
    assert ids(tracker.update(turned, 1)) == [2, 1]


@pytest.mark.parametrize(("gap", "expected"), [(0.9, 1), (1.0, 1), (1.1, 2)])
def test_a_lost_person_is_found_again_within_a_second(gap, expected):
    tracker = Tracker(SIGMAS, lost_seconds=1.0)
    for n in range(10):
        tracker.update(poses((100 + 3 * n, 100)), n / RATE)
    for part in (0.3, 0.6):
        assert ids(tracker.update(poses(), 9 / RATE + part * gap)) == []
    assert ids(tracker.update(poses((127 + 90 * gap, 100)), 9 / RATE + gap)) == [expected]


def test_one_person_leaves_and_another_enters():
    tracker = Tracker(SIGMAS)
    assert ids(tracker.update(poses((100, 100), (600, 100)), 0)) == [1, 2]
    assert ids(tracker.update(poses((600, 100)), 0.1)) == [2]
    assert ids(tracker.update(poses((600, 100), (1000, 100)), 0.2)) == [2, 3]
    assert ids(tracker.update(poses((1000, 100), (600, 100), (100, 100)), 3)) == [4, 5, 6]  # all were away for long


def test_ids_never_repeat():
    tracker = Tracker(SIGMAS, lost_seconds=0.1)
    given = [ids(tracker.update(poses((100, 100)), n)) for n in range(5)]
    assert given == [[1], [2], [3], [4], [5]]


def test_reset_begins_another_video():
    tracker = Tracker(SIGMAS, smoothing=OneEuro())
    tracker.update(poses((100, 100)), 5)
    tracker.update(poses((400, 100)), 6)
    tracker.reset()
    found = poses((110, 100))
    given = tracker.update(found, 0)
    assert ids(given) == [1]
    assert np.array_equal(given.keypoints, found.keypoints)


def test_poses_that_resemble_a_person_start_no_track():
    tracker = Tracker(SIGMAS)
    for n in range(10):
        double = poses((106, 102), score=0.5)
        given = ids(tracker.update(joined(double, poses((100, 100), (500, 100))), n / RATE))
        assert given[0] == 0
        assert given[1:] == [1, 2]


def test_a_double_with_a_low_score_does_not_take_the_id():
    tracker = Tracker(SIGMAS)
    tracker.update(poses((100, 100)), 0)
    for n in range(1, 10):
        nearer = poses((100, 100), score=0.2)
        assert ids(tracker.update(joined(nearer, poses((103, 100))), n / RATE)) == [0, 1]


def test_faint_poses_start_no_track_and_continue_one():
    tracker = Tracker(SIGMAS)
    clear, faint = poses((100, 100)), poses((600, 100), score=0.29)
    assert ids(tracker.update(joined(clear, faint), 0)) == [1, 0]
    assert ids(tracker.update(faint, 0.1)) == [0]  # a followed person has a better score
    assert ids(tracker.update(joined(clear, poses((600, 100))), 0.2)) == [1, 2]
    assert ids(tracker.update(joined(faint, clear), 0.3)) == [2, 1]
    assert ids(Tracker(SIGMAS).update(faint, 0)) == [1]  # alone it is the best one


def test_scores_of_any_range_work():
    found = joined(poses((100, 100), score=0.9), poses((500, 100), score=0.9))
    for scores, expected in (([-1.0, -2.0], [1, 0]), ([0.0, 0.0], [1, 2]), ([40.0, 30.0], [1, 2]), ([np.nan, 1.0], [0, 1])):
        assert ids(Tracker(SIGMAS).update(replace(found, scores=np.float32(scores)), 0)) == expected


# --- missing keypoints --------------------------------------------------------------------------------------------------------


def test_images_without_people():
    tracker = Tracker(SIGMAS, smoothing=OneEuro())
    for n in range(3):
        given = tracker.update(poses(), n)
        assert given.ids.shape == (0,)
        assert given.ids.dtype == np.int64
    assert ids(tracker.update(poses((100, 100)), 3)) == [1]


def test_a_person_who_is_partly_hidden_keeps_the_id():
    tracker = Tracker(SIGMAS)
    for n in range(40):
        found = poses((100 + 5 * n, 100), noise=0.01, seed=n)
        found = hide(found, *range(11, 17)) if 10 < n < 20 else hide(found, *range(11)) if 20 <= n < 30 else found
        assert ids(tracker.update(found, n / RATE)) == [1]


def test_a_person_without_keypoints_has_no_id():
    found = hide(poses((100, 100), (500, 100)), *range(17))
    assert ids(Tracker(SIGMAS, smoothing=OneEuro()).update(found, 0)) == [0, 0]


def test_people_without_common_keypoints_are_not_compared():
    tracker = Tracker(SIGMAS)
    tracker.update(hide(poses((100, 100)), *range(8)), 0)
    assert ids(tracker.update(hide(poses((100, 100)), *range(8, 17)), 0.1)) == [2]


def test_one_keypoint_is_enough():
    tracker = Tracker((0.1,), smoothing=OneEuro())
    for n in range(30):
        keypoints = np.float32([[[100 + n, 50, 0.8]], [[400 - n, 50, 0.8]]])
        assert ids(tracker.update(Poses(keypoints, np.float32([0.8, 0.8])), n / RATE)) == [1, 2]


def test_filled_in_keypoints_do_not_count():
    found = poses((100, 100))
    wrong = found.keypoints.copy()
    guessed = np.zeros((1, 17), bool)
    guessed[0, 5:] = True
    wrong[0, 5:, :2] = 900
    tracker = Tracker(SIGMAS, smoothing=OneEuro())
    tracker.update(found, 0)
    given = tracker.update(replace(found, keypoints=wrong, notes={"guessed": guessed}), 0.1)
    assert ids(given) == [1]
    assert np.array_equal(given.keypoints[0, 5:], wrong[0, 5:])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_nothing_is_nan_and_ids_differ(data):
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    K = data.draw(st.sampled_from([1, 2, 17]))
    tracker, seconds = Tracker((0.05,) * K, smoothing=OneEuro()), 0.0
    for _ in range(6):
        people = data.draw(st.integers(0, 4))
        seconds += data.draw(st.sampled_from([1e-6, 0.03, 0.9, 50.0]))
        keypoints = draw.choice([0, 1, 7.5, 700, -50, 1e30, np.nan, np.inf], (people, K, 3)).astype(np.float32)
        scores = draw.choice([0, 0.5, 3, -1, np.nan, np.inf], people).astype(np.float32)
        with np.errstate(all="raise", under="ignore"):
            given = tracker.update(Poses(keypoints, scores), seconds)
        assert np.isfinite(given.keypoints).all()
        assert given.keypoints.dtype == np.float32
        there = given.ids[given.ids > 0].tolist()
        assert len(set(there)) == len(there)


# --- the assignment -----------------------------------------------------------------------------------------------------------


def best_sum(values):
    """The greatest sum of pairs, found by trying all."""
    if values.shape[0] > values.shape[1]:
        values = values.T
    rows = range(values.shape[0])
    return max(
        sum(max(values[r, c], 0) for r, c in zip(rows, order, strict=True))
        for order in itertools.permutations(range(values.shape[1]), len(rows))
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 3), (4, 6), (6, 4), (6, 6), (2, 7)])
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_the_assignment_is_the_best_of_all(shape, levels):
    draw = np.random.default_rng(levels)
    for _ in range(30):
        values = np.maximum(draw.integers(-levels // 3, levels, shape) / levels, 0)  # few levels make ties
        columns = _assignment(values)
        chosen = np.flatnonzero(columns >= 0)
        assert len(set(columns[chosen].tolist())) == len(chosen)
        assert (values[chosen, columns[chosen]] > 0).all()
        assert values[chosen, columns[chosen]].sum() == pytest.approx(best_sum(values))


def test_the_assignment_of_a_hundred_people_is_that_of_scipy():
    draw = np.random.default_rng(0)
    for shape in ((100, 100), (60, 100), (100, 60)):
        values = draw.random(shape) ** 3
        columns = _assignment(values)
        chosen = np.flatnonzero(columns >= 0)
        assert values[chosen, columns[chosen]].sum() == pytest.approx(values[linear_sum_assignment(-values)].sum())


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0)])
def test_an_assignment_of_no_people_is_empty(shape):
    assert _assignment(np.zeros(shape)).tolist() == [-1] * shape[0]


# --- smoothing ----------------------------------------------------------------------------------------------------------------


def smooth(points, sizes=100.0, beta=0.05):
    """The filtered places [T, 2] of one keypoint, 30 images a second."""
    state, out = FilterState.empty(1, 1), []
    for n, point in enumerate(points):
        state = OneEuro(beta=beta).step(state, np.reshape(point, (1, 1, 2)), np.ones((1, 1), bool), np.array([sizes]), n / RATE)
        out.append(state.points[0, 0])
    return np.array(out)


def plain_one_euro(values, minimum_cutoff, beta, derivative_cutoff):
    """Algorithm 1 of Casiez et al. for one coordinate, value by value."""

    def alpha(cutoff):
        return 1 / (1 + RATE / (2 * np.pi * cutoff))

    out, speed = [values[0]], 0.0
    for value in values[1:]:
        speed += alpha(derivative_cutoff) * ((value - out[-1]) * RATE - speed)
        share = alpha(minimum_cutoff + beta * abs(speed))
        out.append(share * value + (1 - share) * out[-1])
    return out


def test_the_filter_is_that_of_the_paper():
    draw = np.random.default_rng(0)
    x = np.cumsum(draw.normal(0, 3, 60))
    points = np.stack([x, np.zeros(60)], axis=1)
    assert smooth(points, sizes=100.0)[:, 0] == pytest.approx(plain_one_euro(x, 1.0, 0.05, 1.0))


def test_a_still_person_jitters_less():
    draw = np.random.default_rng(0)
    points = np.array([640, 360]) + draw.normal(0, 1, (300, 2))
    assert smooth(points)[30:].std(axis=0).max() < 0.5 * points[30:].std(axis=0).min()


def test_a_moving_person_lags_little():
    times = np.arange(60) / RATE
    points = np.stack([150 * times, 0 * times], axis=1)  # 1.5 sizes a second, as a person walks
    lag = points[-1, 0] - smooth(points)[-1, 0]
    assert 0 < lag < 3  # percent of the size
    assert points[-1, 0] - smooth(points, beta=0)[-1, 0] > 15


def test_the_filter_does_not_depend_on_the_resolution():
    draw = np.random.default_rng(0)
    points = draw.normal(0, 3, (50, 2)).cumsum(axis=0)
    assert 4 * smooth(points, 100.0) == pytest.approx(smooth(4 * points, 400.0))


def test_a_missing_keypoint_keeps_its_state():
    filter_, there = OneEuro(), np.ones((1, 2), bool)
    state = filter_.step(FilterState.empty(1, 2), np.full((1, 2, 2), 5.0), there, np.array([50.0]), 0.0)
    state = filter_.step(state, np.full((1, 2, 2), 9.0), np.array([[True, False]]), np.array([50.0]), 0.1)
    assert state.seconds.tolist() == [[0.1, 0]]
    assert state.points[0, 1].tolist() == [5, 5]
    assert 5 < state.points[0, 0, 0] < 9


def test_the_tracker_smooths_each_person():
    draw = np.random.default_rng(0)
    tracker = Tracker(SIGMAS, smoothing=OneEuro())
    raw, out = [], []
    for n in range(90):
        found = poses((100, 100), (500, 100), noise=0.01, seed=n)
        order = draw.permutation(2)
        found = hide(Poses(found.keypoints[order], found.scores[order]), *([3] if n % 4 == 0 else []))
        given = tracker.update(found, n / RATE)
        assert np.array_equal(given.keypoints[..., 2], found.keypoints[..., 2])
        assert n % 4 or not given.keypoints[:, 3].any()
        back = np.argsort(given.ids)
        raw.append(found.keypoints[back])
        out.append(given.keypoints[back])
    kept = [k for k in range(17) if k != 3]
    raw, out = (np.array(values)[30:, :, kept, :2].std(axis=0) for values in (raw, out))
    assert (out.mean(axis=(1, 2)) < 0.6 * raw.mean(axis=(1, 2))).all()


def test_a_person_who_comes_back_is_not_smoothed_with_old_keypoints():
    tracker = Tracker(SIGMAS, lost_seconds=1.0, smoothing=OneEuro())
    tracker.update(poses((100, 100)), 0)
    for n in range(1, 45):
        tracker.update(hide(poses((100, 100)), 9), n / RATE)
    found = poses((104, 100))
    given = tracker.update(found, 1.5)
    assert ids(given) == [1]
    assert np.array_equal(given.keypoints[0, 9], found.keypoints[0, 9])
    assert not np.array_equal(given.keypoints[0, 10], found.keypoints[0, 10])


# --- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [1.0, 0.5, np.nan, np.inf, "2", None])
def test_times_must_grow(seconds):
    tracker = Tracker(SIGMAS)
    tracker.update(poses((100, 100)), 1.0)
    with pytest.raises(ValueError, match=f"^seconds={'null' if seconds is None else str(seconds).removesuffix('.0')}: "):
        tracker.update(poses((100, 100)), seconds)
    assert ids(tracker.update(poses((100, 100)), 1.1)) == [1]


def test_times_of_a_filter_must_grow():
    state = OneEuro().step(FilterState.empty(1, 1), np.zeros((1, 1, 2)), np.ones((1, 1), bool), np.ones(1), 2.0)
    with pytest.raises(ValueError, match="^seconds=2: not later than the image before, 2; give times that grow"):
        OneEuro().step(state, np.zeros((1, 1, 2)), np.ones((1, 1), bool), np.ones(1), 2.0)


def test_another_number_of_keypoints_is_refused():
    with pytest.raises(ValueError, match=r"^keypoints: shape \[1, 17, 3\]; give \[N, 2, 3\], as there are 2 sigmas"):
        Tracker((0.1, 0.1)).update(poses((100, 100)), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigmas": ()}, "sigmas=[]: "),
        ({"sigmas": (0.1, 0.0)}, "sigmas[1]=0.0: "),
        ({"least_oks": 0}, "least_oks=0: "),
        ({"least_oks": 1.5}, "least_oks=1.5: "),
        ({"lost_seconds": -1}, "lost_seconds=-1: "),
        ({"lost_seconds": np.nan}, "lost_seconds=nan: "),
        ({"smoothing": True}, "smoothing=True: "),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Tracker(**{"sigmas": SIGMAS, **options})


@pytest.mark.parametrize("options", [{"minimum_cutoff": 0}, {"beta": -0.1}, {"derivative_cutoff": np.inf}])
def test_wrong_options_of_a_filter_are_refused(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"^smoothing.{name}="):
        OneEuro(**options)


# --- the figures of the benchmark ---------------------------------------------------------------------------------------------


def images(truths, givens):
    """Images of people who are found exactly, from the true and the given ids of each."""
    return [Pairs(np.array(t), np.array(g), np.eye(len(t))) for t, g in zip(truths, givens, strict=True)]


def test_figures_of_right_ids():
    right = images([[1, 2]] * 10, [[7, 4]] * 10)
    assert idf1(right) == hota(right) == 1


def test_figures_of_ids_that_change_in_the_middle():
    half = images([[1]] * 10, [[1]] * 5 + [[2]] * 5)
    assert idf1(half) == pytest.approx(0.5)  # 5 of 10 pairs belong to the better half: 2 * 5 / 20
    assert hota(half) == pytest.approx(np.sqrt(0.5))  # each pair: 5 hits of 10 images


def test_figures_of_missed_people():
    missed = [Pairs(np.array([1, 2]), np.array([1]), np.array([[1.0], [0.0]]))] * 10
    assert idf1(missed) == pytest.approx(2 * 10 / 30)
    assert hota(missed) == pytest.approx(np.sqrt(0.5))


def test_hota_counts_thresholds_that_the_similarity_reaches():
    near = [Pairs(np.array([1]), np.array([1]), np.array([[0.5]]))] * 4
    assert hota(near) == pytest.approx(10 / 19)


def test_switches_are_changes_of_a_persons_id():
    owners = [np.array(one) for one in ([1, 2], [2, 1], [1], [1, 2])]
    given = [np.array(one) for one in ([5, 6], [6, 5], [0], [6, 5])]
    assert switches(owners, given) == 2
