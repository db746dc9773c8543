import numpy as np
import pytest
import torch

from posepress.decoders.simcc import SimccDecoder
from posepress.framing.person_crops import PersonCrops
from posepress.geometry import input_to_cells
from posepress.resolution import Resolution
from posepress.results import Boxes
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

SIZE = Resolution(256, 192)
RTMPOSE = NetworkSpec(
    InputSpec("image"), (OutputSpec("simcc_x", 0.5, 17, 0.5, "CX"), OutputSpec("simcc_y", 0.5, 17, 0.5, "CY")), COCO_17
)


def seen(people, scores=None, spec=RTMPOSE):
    """Lines of planted people [N, 17, 2] in image pixels, with a top of .8 and .6."""
    low, high = people.min(axis=1), people.max(axis=1)
    boxes = Boxes(np.concatenate([low, high - low], axis=1), scores)
    views = PersonCrops().views(Resolution(600, 800), SIZE, spec.input, boxes)
    fields = {}
    for axis, (name, top) in enumerate((("simcc_x", 0.8), ("simcc_y", 0.6))):
        field = spec.field(name)
        cells = np.array(
            [input_to_cells(view.to_input(points)[:, axis], field, SIZE) for points, view in zip(people, views, strict=True)]
        )
        at = np.arange(field.shape(SIZE)[1])
        fields[name] = (top * np.exp(-((at - cells[..., None]) ** 2) / 50)).astype(np.float32)
    return fields, views


def planted(count=6, seed=1):
    draw = np.random.default_rng(seed)
    return draw.uniform((50, 50), (500, 300), (count, 1, 2)) + draw.random((count, 17, 2)) * draw.uniform(
        60, 250, (count, 1, 1)
    )


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_planted_keypoints_are_found_to_half_a_cell(kind):
    people = planted()
    fields, views = seen(people)
    found = SimccDecoder(RTMPOSE).decode({name: kind(values) for name, values in fields.items()}, views)
    for poses, points, view in zip(found, people, views, strict=True):
        assert np.abs(poses.keypoints[0, :, :2] - points).max() <= 0.2501 / view.matrix[0, 0]
        assert poses.keypoints[0, :, 2] == pytest.approx(0.7, abs=0.01), "the mean of both maxima"


def test_rtmposes_cell_over_two_is_a_pixel_of_the_input():
    fields = {"simcc_x": np.zeros((1, 17, 384), np.float32), "simcc_y": np.zeros((1, 17, 512), np.float32)}
    fields["simcc_x"][..., 101] = fields["simcc_y"][..., 40] = 1
    (view,) = PersonCrops().views(SIZE, SIZE, RTMPOSE.input, Boxes(np.array([[0.0, 0, 192, 256]])))
    (found,) = SimccDecoder(RTMPOSE).decode(fields, [view])
    assert np.allclose(view.to_input(found.keypoints[0, :, :2]), [50.5, 20], atol=1e-4)


def test_a_persons_score_has_the_boxs_as_a_factor():
    people = planted(2)
    fields, views = seen(people, np.array([0.5, 1.0]))
    one, other = SimccDecoder(RTMPOSE).decode(fields, views)
    assert one.scores[0] == pytest.approx(other.scores[0] / 2, rel=0.02)


def test_two_of_the_same_person_become_one():
    people = np.repeat(planted(1), 2, axis=0)
    fields, views = seen(people, np.array([0.4, 0.9]))
    for most, count in ((0.9, 1), (1.0, 2)):
        decoder = SimccDecoder(RTMPOSE, nms_oks=most)
        found = decoder.merge(decoder.decode(fields, views), views)
        assert len(found.scores) == count
        assert found.scores.max() == pytest.approx(0.9 * 0.7, abs=0.01)
        assert found.boxes.shape == (count, 4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_lines_that_are_not_finite_cost_their_keypoint_alone(value):
    fields, views = seen(planted(2))
    fields["simcc_x"][0, 3, 7] = value
    bad, good = SimccDecoder(RTMPOSE).decode(fields, views)
    assert bad.counts["images_not_finite"] == 1
    assert good.counts["images_not_finite"] == 0
    assert bad.keypoints[0, 3].tolist() == [0, 0, 0]
    assert (bad.keypoints[0, :, 2] > 0).sum() == 16


def test_wrong_shapes_and_options_are_refused():
    fields, views = seen(planted(1))
    with pytest.raises(ValueError, match=r"'simcc_y' is \[1, 16, 512\], not lines \[1, 17, cells\]; correct model.spec"):
        SimccDecoder(RTMPOSE).decode({**fields, "simcc_y": fields["simcc_y"][:, :16]}, views)
    with pytest.raises(ValueError, match=r"decoder\.nms_oks=0"):
        SimccDecoder(RTMPOSE, nms_oks=0)
    few = NetworkSpec(
        InputSpec("image"), (OutputSpec("simcc_x", 0.5, 5, axes="CX"), OutputSpec("simcc_y", 0.5, 5, axes="CY")), COCO_17
    )
    with pytest.raises(ValueError, match="5 lines of 'simcc_x' do not fit a skeleton of 17 keypoints"):
        SimccDecoder(few)


@pytest.mark.parametrize("kind", ["lines", "maps"])
def test_averaging_with_the_mirrored_view_of_a_person_changes_nothing_of_a_symmetric_network(kind):
    from posepress.decoders.heatmap_argmax import TopDownDecoder

    people = planted(3)
    low, high = people.min(axis=1), people.max(axis=1)
    framing = PersonCrops(flip=True)
    maps = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 17),), COCO_17)
    spec = RTMPOSE if kind == "lines" else maps
    views = framing.views(Resolution(600, 800), SIZE, spec.input, Boxes(np.concatenate([low, high - low], axis=1)))
    assert [view.flipped for view in views] == [False, True] * 3
    fields = {field.name: [] for field in spec.fields}
    for n, view in enumerate(views):
        points = view.to_input(people[n // 2])
        points = points[list(COCO_17.flip)] if view.flipped else points  # a network sees the mirrored person's left as right
        for field in spec.fields:
            if field.is_map:
                x, y = input_to_cells(points, field, SIZE).T[..., None, None]
                rows, columns = np.mgrid[:64, :48]
                fields[field.name].append(np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8))
            else:
                cells = input_to_cells(points[:, int(field.axes == "CY")], field, SIZE)[:, None]
                fields[field.name].append(np.exp(-((np.arange(field.shape(SIZE)[1]) - cells) ** 2) / 50))
    made = {name: np.array(values, np.float32) for name, values in fields.items()}
    decoder = SimccDecoder(spec) if kind == "lines" else TopDownDecoder(spec)
    reader = framing.reader(decoder, spec)
    found = reader.merge(reader.decode(made, views), views)
    scale = 1 / np.array([view.matrix[0, 0] for view in views[::2]])
    order = [int(np.argmin(np.abs(found.keypoints[:, :, :2] - points).mean(axis=(1, 2)))) for points in people]
    assert sorted(order) == [0, 1, 2]
    assert (np.abs(found.keypoints[order, :, :2] - people).max(axis=(1, 2)) < (0.3 if kind == "lines" else 0.5) * scale).all()
    assert reader.merge([], []).keypoints.shape == (0, 17, 3)
