import numpy as np
import pytest
import torch

from posepress.decoders.heatmap_argmax import TopDownDecoder
from posepress.framing.person_crops import PersonCrops
from posepress.geometry import cells_to_input, input_to_cells
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

SPEC = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 17),), COCO_17)
SIZE = Resolution(256, 192)


def seen(people, sigma=2.0, noise=0.0, seed=0):
    """Maps of planted people [N, 17, 2] in image pixels, each seen through the crop of its box."""
    draw = np.random.default_rng(seed)
    low, high = people.min(axis=1), people.max(axis=1)
    views = PersonCrops().views(Resolution(600, 800), SIZE, SPEC.input, Boxes(np.concatenate([low, high - low], axis=1)))
    y, x = np.mgrid[:64, :48]
    maps = []
    for points, view in zip(people, views, strict=True):
        cells = input_to_cells(view.to_input(points), SPEC.field("heatmaps"))
        away = (x - cells[:, 0, None, None]) ** 2 + (y - cells[:, 1, None, None]) ** 2
        maps.append(0.9 * np.exp(-away / (2 * sigma**2)) + draw.normal(0, noise, away.shape))
    return np.array(maps, np.float32), views


def planted(count=12, seed=1):
    draw = np.random.default_rng(seed)
    return draw.uniform((50, 50), (500, 300), (count, 1, 2)) + draw.random((count, 17, 2)) * draw.uniform(
        60, 250, (count, 1, 1)
    )


@pytest.mark.parametrize(("refinement", "limit"), [("none", 0.62), ("shift", 0.36), ("dark", 0.02)])
def test_refinements_come_nearer_to_the_keypoint(refinement, limit):
    people = planted()
    maps, views = seen(people)
    decoder = TopDownDecoder(SPEC, refinement=refinement)
    found = decoder.merge(decoder.decode({"heatmaps": maps}, views), views)
    cells = np.array([4 / view.matrix[0, 0] for view in views])  # image pixels a cell
    error = np.hypot(*(found.keypoints[..., :2] - people).transpose(2, 0, 1)) / cells[:, None]
    assert np.percentile(error, 90) < limit
    assert found.scores == pytest.approx(found.keypoints[..., 2].mean(axis=1))


def test_dark_withstands_noise():
    people = planted()
    maps, views = seen(people, noise=0.04)
    error = {}
    for refinement in ("none", "shift", "dark"):
        decoder = TopDownDecoder(SPEC, refinement=refinement)
        found = decoder.merge(decoder.decode({"heatmaps": torch.from_numpy(maps)}, views), views)
        error[refinement] = np.median(np.hypot(*(found.keypoints[..., :2] - people).transpose(2, 0, 1)))
    assert error["dark"] < 0.4 * error["shift"] < 0.4 * error["none"]


@pytest.mark.parametrize("refinement", ["none", "shift", "dark"])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf, -1.0])
def test_no_map_breaks_it(refinement, value):
    _, views = seen(planted(1))
    decoder = TopDownDecoder(SPEC, refinement=refinement)
    (found,) = decoder.decode({"heatmaps": np.full((1, 17, 64, 48), value, np.float32)}, views)
    assert len(found.scores) == (value == 1)
    assert found.counts["images_not_finite"] == (not np.isfinite(value))
    assert np.isfinite(found.keypoints).all()


def test_one_bad_map_spoils_no_other():
    people = planted(1)
    maps, views = seen(people)
    maps[0, 3, 10, 10], maps[0, 4] = np.nan, -np.inf
    (found,) = TopDownDecoder(SPEC).decode({"heatmaps": maps}, views)
    assert found.counts["images_not_finite"]
    assert found.keypoints[0, 4].tolist() == [0, 0, 0]
    assert (found.keypoints[0, :, 2] > 0).sum() == 16
    assert np.abs(found.keypoints[0, 3, :2] - people[0, 3]).max() < 5


def test_an_image_without_people_is_empty():
    decoder = TopDownDecoder(SPEC)
    assert PersonCrops().views(Resolution(10, 10), SIZE, SPEC.input, Boxes(np.zeros((0, 4)))) == []
    assert decoder.merge([], []).keypoints.shape == (0, 17, 3)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"decoder\.refinement=best: unknown; use none, shift, dark"):
        TopDownDecoder(SPEC, refinement="best")
    with pytest.raises(ValueError, match=r"decoder\.sigma=0"):
        TopDownDecoder(SPEC, sigma=0)
    for threshold in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"decoder\.keypoint_threshold=.*: choose a number from 0 to 1"):
            TopDownDecoder(SPEC, keypoint_threshold=threshold)
    few = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 5),), COCO_17)
    with pytest.raises(ValueError, match="5 heatmaps do not fit a skeleton of 17"):
        TopDownDecoder(few)
    with pytest.raises(ValueError, match="needs a box for each person"):
        PersonCrops().views(SIZE, SIZE, SPEC.input)


def test_udp_places_the_first_and_last_cells_on_the_first_and_last_pixels():
    field = OutputSpec("heatmaps", 4, 17, udp=True)
    spec = NetworkSpec(InputSpec("image"), (field,), COCO_17)
    assert cells_to_input(np.array([[0.0, 0.0], [47.0, 63.0]]), field, SIZE) == pytest.approx(np.array([[0, 0], [191, 255]]))
    points = np.random.default_rng(0).uniform(0, 190, (5, 2))
    assert cells_to_input(input_to_cells(points, field, SIZE), field, SIZE) == pytest.approx(points)
    inside = torch.from_numpy(points)
    assert torch.allclose(cells_to_input(input_to_cells(inside, field, SIZE), field, SIZE), inside)
    (view,) = PersonCrops().views(SIZE, SIZE, spec.input, Boxes(np.array([[0.0, 0, 192, 256]])))
    maps = np.zeros((1, 17, 64, 48), np.float32)
    maps[..., 63, 47] = 1
    (found,) = TopDownDecoder(spec, refinement="none").decode({"heatmaps": maps}, [view])
    assert view.to_input(found.keypoints[0, 0, :2]) == pytest.approx([191, 255], abs=1e-3)
    with pytest.raises(ValueError, match="the cells of 'heatmaps' depend on the input's size"):
        cells_to_input(points, field)


def test_a_persons_score_has_the_boxs_as_a_factor_and_doubles_go():
    people = np.repeat(planted(1), 2, axis=0)
    maps, _ = seen(people)
    low, high = people.min(axis=1), people.max(axis=1)
    boxes = Boxes(np.concatenate([low, high - low], axis=1), np.array([0.5, 0.8]))
    views = PersonCrops().views(Resolution(600, 800), SIZE, SPEC.input, boxes)
    decoder = TopDownDecoder(SPEC)
    found = decoder.decode({"heatmaps": maps}, views)
    assert found[0].scores / found[1].scores == pytest.approx([0.5 / 0.8])
    merged = decoder.merge(found, views)
    assert merged.scores == pytest.approx(found[1].scores)
    assert merged.boxes == pytest.approx(boxes.xywh[1:].astype(np.float32))
    assert len(TopDownDecoder(SPEC, nms_oks=1.0).merge(found, views).scores) == 2
