"""Peaks, limbs and their assignment against plain rereadings of what they should do."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from posepress.decoders.heatmap_paf import on_gpu as heatmap_paf_torch
from posepress.decoders.heatmap_paf import peaks
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder, limb_order
from posepress.decoders.heatmap_paf.grouping import _greedy, _hungarian
from posepress.framing.whole_image import WholeImage
from posepress.geometry import View
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
from planted import H, W, plant, recovery

SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)), OPENPOSE_18)
SIZE = Resolution(8 * H, 8 * W)
(VIEW,) = WholeImage(None).views(SIZE, SIZE, SPEC.input)


def slow_peaks(heatmap, threshold):
    """Local maxima cell by cell; of equal neighbours the first in reading order."""
    found = set()
    H, W = heatmap.shape
    for i, j in itertools.product(range(H), range(W)):
        v = heatmap[i, j]
        around = [
            (heatmap[a, b], (a, b) < (i, j))
            for a in range(max(i - 1, 0), min(i + 2, H))
            for b in range(max(j - 1, 0), min(j + 2, W))
            if (a, b) != (i, j)
        ]
        if v > threshold and np.isfinite(v) and not any(u > v or (u == v and before) for u, before in around):
            found.add((i, j))
    return found


@pytest.mark.parametrize("shape", [(46, 62), (3, 70), (2, 5), (1, 1), (5, 13), (40, 2), (30, 33)])
@pytest.mark.parametrize("levels", [4, 1000])
def test_peaks_are_the_local_maxima(shape, levels):
    draw = np.random.default_rng(levels)
    maps = (draw.integers(0, levels, (3, *shape)) / levels).astype(np.float32)  # few levels make plateaus
    found, counts, dropped, strange = peaks.find_peaks(maps, 3, 0.3, shape[0] * shape[1])
    assert (dropped, strange) == (0, False)
    for k in range(3):
        cells = {(int(np.rint(y)), int(np.rint(x))) for x, y, _ in found[k, : counts[k]] + (1e-4, 1e-4, 0)}
        wanted = slow_peaks(maps[k], 0.3)
        assert counts[k] == len(wanted)
        for i, j in wanted:  # the refined place is within half a cell, so one of the neighbours rounds to it
            assert np.abs(found[k, : counts[k], :2] - (j, i)).max(axis=1).min() <= 0.5
        assert len(cells) >= 0.5 * len(wanted)


def test_a_gaussian_is_found_to_a_thousandth_of_a_cell():
    y, x = np.mgrid[:20, :30]
    for at in [(7.3, 9.8), (15.5, 4.01), (20.0, 11.0)]:
        map_ = (0.8 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * 0.9**2))).astype(np.float32)
        found, counts, _, _ = peaks.find_peaks(map_[None], 1, 0.1, 8)
        assert counts[0] == 1
        assert np.abs(found[0, 0, :2] - at).max() < 1e-3


def test_what_has_no_room_is_counted_and_the_highest_stay():
    draw = np.random.default_rng(0)
    maps = np.zeros((1, 40, 40), np.float32)
    maps[0, 1::3, 1::3] = draw.permutation(13 * 13).reshape(13, 13)[:13, :13] / 169 + 0.2
    found, counts, dropped, _ = peaks.find_peaks(maps, 1, 0.1, 20)
    assert (counts[0], dropped) == (20, 149)
    assert sorted(found[0, :20, 2]) == pytest.approx(sorted(np.sort(maps.ravel())[-20:]))
    _, theirs, _ = heatmap_paf_torch.find_peaks(torch.from_numpy(maps[None]), 0.1, 20)
    assert int(theirs[0, 0]) - 20 == dropped


pairs_of = st.integers(1, 9).flatmap(
    lambda a: st.integers(1, 9).flatmap(
        lambda b: st.dictionaries(
            st.tuples(st.integers(0, a - 1), st.integers(0, b - 1)), st.integers(1, 1000).map(lambda n: n / 1000), min_size=1
        ).map(lambda found: (a, b, found))
    )
)


@settings(deadline=None)
@given(pairs_of)
def test_the_optimal_assignment_has_scipys_sum(case):
    nA, nB, found = case
    pairs = np.array(list(found), np.int32)
    scores = np.array(list(found.values()), np.float32)
    kept = _hungarian(scores, pairs, nA, nB)
    cost = np.zeros((nA, nB))
    cost[tuple(pairs.T)] = scores
    rows, columns = linear_sum_assignment(cost, maximize=True)
    assert scores[kept].sum() == pytest.approx(cost[rows, columns].sum(), rel=1e-5)
    for side in pairs[kept].T:
        assert len(set(side.tolist())) == len(kept)
    greedy = _greedy(scores, pairs, nA, nB)
    assert scores[greedy].sum() <= scores[kept].sum() * (1 + 1e-5)
    assert scores[greedy[0]] == scores.max()
    assert (np.diff(scores[kept]) <= 0).all()


def decoded(image, **options):
    decoder = HeatmapPafDecoder(SPEC, heatmap_threshold=0.1, **options)
    return decoder.decode({"heatmaps": image.heatmaps[None], "pafs": image.pafs[None]}, [VIEW])[0]


@pytest.mark.parametrize("assignment", ["greedy", "hungarian"])
@pytest.mark.parametrize(("count", "least", "wrong"), [(1, 0.92, 0), (5, 0.91, 1), (20, 0.93, 1), (50, 0.93, 3)])
def test_planted_people_are_recovered(count, least, wrong, assignment):
    images = [plant(count, seed) for seed in range(4)]
    kept = [recovery(i, decoded(i, assignment=assignment, complete_poses=False).keypoints) for i in images]
    assert sum(k.recovered for k in kept) >= least * sum(k.keypoints for k in kept)
    assert sum(k.wrong for k in kept) <= wrong * 4
    assert sum(k.error for k in kept) < 0.6 * sum(k.recovered for k in kept)


def test_recovery_counts_what_is_wrong():
    image = plant(5, 0)
    found = np.concatenate([image.points, image.present[..., None]], axis=-1).astype(np.float32)
    perfect = recovery(image, found)
    assert (perfect.recovered, perfect.wrong, perfect.whole, perfect.people) == (perfect.keypoints, 0, 5, 5)
    k = int(np.flatnonzero(image.present[0] & image.present[1])[0])
    found[[0, 1], k] = found[[1, 0], k]
    assert recovery(image, found).wrong == 2
    assert recovery(image, found[:0]).recovered == 0


def test_missing_keypoints_are_completed_inside_the_persons_box():
    image = plant(1, 0)
    hole = image.heatmaps.copy()
    nose = OPENPOSE_18.names.index("nose")
    hole[nose] = np.minimum(hole[nose] * 0.1, 0.05)  # too low for a peak at the threshold
    fields = {"heatmaps": hole[None], "pafs": image.pafs[None]}
    (plain,) = HeatmapPafDecoder(SPEC, heatmap_threshold=0.1, complete_poses=False).decode(fields, [VIEW])
    (whole,) = HeatmapPafDecoder(SPEC, heatmap_threshold=0.1, box_margin=0.2).decode(fields, [VIEW])
    assert plain.keypoints[0, nose].tolist() == [0, 0, 0]
    assert not plain.notes["guessed"].any()
    assert whole.notes["guessed"][0, nose]
    assert np.hypot(*(whole.keypoints[0, nose, :2] - image.points[0, nose])) < 8
    low, high = plain.keypoints[0, plain.keypoints[0, :, 2] > 0, :2].min(0), plain.keypoints[0].max(0)[:2]
    margin = 0.2 * (high - low).max() + 16
    assert (whole.keypoints[0, :, :2] > low - margin).all()
    assert (whole.keypoints[0, :, :2] < high + margin).all()
    as_found = whole.as_found()
    assert np.array_equal(as_found.keypoints, plain.keypoints)
    assert as_found.scores == pytest.approx(plain.scores)


def same(ours, theirs, limit=1e-3):
    assert len(ours.scores) == len(theirs.scores)
    first, second = (p.keypoints[np.argsort(p.keypoints[..., 0].sum(1))] for p in (ours, theirs))
    assert np.abs(first[..., :2] - second[..., :2]).max(initial=0) <= limit
    assert np.sort(ours.scores) == pytest.approx(np.sort(theirs.scores), rel=1e-4)


def by_torch(decoder, heatmaps, pafs, view):
    """What the torch decoder makes of fields, here on the processor."""
    limbs, _ = limb_order(SPEC.skeleton)
    options = (limbs, 0.0, decoder.heatmap_threshold, decoder.paf_threshold, decoder.max_peaks)
    maps, limb_maps = torch.from_numpy(heatmaps[:, :18].copy()), torch.from_numpy(pafs.copy())
    made = enumerate(heatmap_paf_torch.candidates(maps, limb_maps, *options))
    return [decoder.people(found or decoder.candidates(h, pafs[n]), h, view) for n, (found, h) in made]


@pytest.mark.parametrize("count", [1, 5, 20, 50])
def test_torch_and_numba_find_the_same_people(count):
    images = [plant(count, seed) for seed in range(2)]
    heatmaps, pafs = (np.stack([getattr(i, name) for i in images]) for name in ("heatmaps", "pafs"))
    decoder = HeatmapPafDecoder(SPEC, heatmap_threshold=0.1)
    for image, theirs in zip(images, by_torch(decoder, heatmaps, pafs, VIEW), strict=True):
        same(decoded(image), theirs)


@pytest.mark.parametrize("kind", ["ones", "zeros", "nan", "noise"])
def test_torch_and_numba_agree_on_what_is_no_network(kind):
    draw = np.random.default_rng(0)
    heatmaps, pafs = draw.random((1, 19, 24, 31), np.float32), draw.random((1, 38, 24, 31), np.float32)
    if kind == "nan":
        heatmaps[:, 3, 4:7] = np.nan
        heatmaps[:, 5, 9, 9] = np.inf
    elif kind != "noise":
        heatmaps[:] = pafs[:] = float(kind == "ones")
    decoder = HeatmapPafDecoder(SPEC, heatmap_threshold=0.97, complete_poses=False)
    (view,) = WholeImage(None).views(Resolution(192, 248), Resolution(192, 248), SPEC.input)
    (ours,) = decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [view])
    (theirs,) = by_torch(decoder, heatmaps, pafs, view)
    same(ours, theirs)
    assert ours.counts["images_not_finite"] == theirs.counts["images_not_finite"] == (kind == "nan")
    assert np.isfinite(ours.keypoints).all()


def test_two_hundred_people_and_noise_are_bounded():
    draw = np.random.default_rng(0)
    noise = draw.random((1, 19, H, W), np.float32), draw.normal(0, 1, (1, 38, H, W)).astype(np.float32)
    crowd = [plant(50, seed) for seed in range(4)]
    packed = (
        np.max([i.heatmaps for i in crowd], axis=0)[None],
        np.sum([i.pafs for i in crowd], axis=0)[None].clip(-1, 1),
    )
    for heatmaps, pafs in (noise, packed):
        decoder = HeatmapPafDecoder(SPEC)
        (found,) = decoder.decode({"heatmaps": heatmaps, "pafs": pafs}, [VIEW])
        candidates = decoder.candidates(heatmaps[0], pafs[0])
        assert candidates.counts.max() <= decoder.max_peaks
        assert len(candidates.scores) <= 19 * decoder.max_peaks**2
        assert np.isfinite(found.keypoints).all()
        assert found.counts["dropped_peaks"] == candidates.dropped


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40))
def test_no_field_breaks_the_decoder(seed, h, w):
    draw = np.random.default_rng(seed)
    heatmaps = draw.normal(0, 1, (1, 19, h, w)).astype(np.float32)
    pafs = draw.normal(0, 1, (1, 38, h, w)).astype(np.float32)
    for field in (heatmaps, pafs):
        field[draw.random(field.shape) < 0.02] = draw.choice([np.nan, np.inf, -np.inf, 0])
    view = View(np.array([[1.0, 0, 0], [0, 1, 0]]), Resolution(8 * h, 8 * w))
    for assignment in ("greedy", "hungarian"):
        (found,) = HeatmapPafDecoder(SPEC, assignment=assignment).decode({"heatmaps": heatmaps, "pafs": pafs}, [view])
        assert np.isfinite(found.keypoints).all()
        assert np.isfinite(found.scores).all()


def test_a_crowd_goes_to_the_host():
    crowd, few = plant(50, 0), plant(1, 0)
    fields = [torch.from_numpy(np.stack([getattr(i, name) for i in (crowd, few)])) for name in ("heatmaps", "pafs")]
    limbs, _ = limb_order(SPEC.skeleton)
    (first, _), (second, _) = heatmap_paf_torch.candidates(fields[0][:, :18], fields[1], limbs, 0.0, 0.1, 0.05, 128)
    assert first is None
    assert second is not None
    (kept, _), _ = heatmap_paf_torch.candidates(fields[0][:, :18], fields[1], limbs, 0.0, 0.1, 0.05, 8)
    assert kept.dropped > 100


def test_a_skeleton_of_two_parts_has_a_tree_in_each():
    skeleton = Skeleton(("a", "b", "c", "d", "e"), ((0, 1), (2, 3), (3, 4)), (0.1,) * 5)
    order, tree = limb_order(skeleton)
    assert tree == 3
    assert sorted(order[:, 2].tolist()) == [0, 1, 2]
