"""One-stage decoders on planted outputs in the layouts of public networks."""

import numpy as np
import pytest
from omegaconf import OmegaConf

from pipeline.onnx_files.files import described
from pipeline.onnx_files.outputs import fields_of
from posepress.decoders.boxes import BoxDecoder
from posepress.decoders.onestage import OneStageDecoder
from posepress.decoders.suppression import suppress
from posepress.framing.whole_image import WholeImage
from posepress.geometry import mirrored
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import ROOT

IMAGE, SIZE = Resolution(480, 600), Resolution(640, 640)
K = 17


def preset(name):
    """Description and decoder's options of conf/model/NAME.yaml."""
    config = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/{name}.yaml"))
    return described(config["model"]["spec"]), config["decoder"]


def people(count=5, seed=0):
    """Boxes (corners) and keypoints [N, K, 3] in image pixels, far from each other, and scores."""
    draw = np.random.default_rng(seed)
    low = np.column_stack((np.arange(count) * 110 + draw.uniform(5, 20, count), draw.uniform(20, 200, count)))
    boxes = np.concatenate([low, low + draw.uniform((40, 80), (80, 200), (count, 2))], axis=1)
    points = low[:, None] + draw.random((count, K, 2)) * (boxes[:, None, 2:] - low[:, None])
    scores = draw.uniform(0.3, 0.9, count)
    return boxes, np.concatenate([points, draw.uniform(0.2, 1, (count, K, 1))], axis=2), scores


def in_input(view, spec, boxes, keypoints):
    """The same in pixels of the network's input, in the convention of its description."""
    shift = spec.field("boxes").shift
    ends = view.to_input((boxes - 0.5).reshape(-1, 2, 2)).reshape(-1, 4) - shift
    points = np.concatenate([view.to_input(keypoints[..., :2]) - spec.field("keypoints").shift, keypoints[..., 2:]], axis=2)
    return ends, points.reshape(len(boxes), -1)


def raw(name, ends, scores, points, entries):
    """What the network returns: each person twice, the second worse, among entries with a score of 0."""
    middle = np.concatenate([(ends[:, :2] + ends[:, 2:]) / 2, ends[:, 2:] - ends[:, :2]], axis=1)
    draw = np.random.default_rng(1)
    rows = draw.permutation(entries)[: 2 * len(ends)]
    twice = np.concatenate([scores, scores - 0.1])
    if name == "yolo26_pose":
        rows, twice = rows[: len(ends)], scores
    box = np.tile(middle if name == "yolov8_pose" else ends, (2, 1))[: len(rows)]
    point = np.tile(points, (2, 1))[: len(rows)]
    made = {
        "yolov8_pose": lambda: np.concatenate([box, twice[:, None], point], axis=1),
        "yolo26_pose": lambda: np.concatenate([box, twice[:, None], np.zeros((len(rows), 1)), point], axis=1),
        "rtmo": lambda: np.concatenate([box, twice[:, None], point], axis=1),
    }[name]()
    whole = np.zeros((1, entries, made.shape[1]), np.float32)
    whole[0, :, 2:4] = 1
    whole[0, rows] = made
    if name == "yolov8_pose":
        return {"output0": whole.transpose(0, 2, 1)}
    if name == "yolo26_pose":
        return {"output0": whole}
    return {"dets": whole[..., :5], "keypoints": whole[..., 5:].reshape(1, entries, K, 3)}


@pytest.mark.parametrize(("name", "entries"), [("yolov8_pose", 8400), ("yolo26_pose", 300), ("rtmo", 2000)])
def test_planted_people_are_found_exactly(name, entries):
    spec, options = preset(name)
    boxes, keypoints, scores = people()
    (view,) = WholeImage("pad_image_input").views(IMAGE, SIZE, spec.input)
    ends, points = in_input(view, spec, boxes, keypoints)
    returned = raw(name, ends, scores, points, entries)
    fields = fields_of(spec, {field.name: field.tensor for field in spec.fields}, returned)
    (found,) = OneStageDecoder(spec, **options).decode(fields, [view])
    order = np.argsort(-scores)
    assert found.scores == pytest.approx(scores[order], abs=1e-6)
    assert np.abs(found.keypoints - keypoints[order]).max() < 1e-3
    wanted = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)[order]
    assert np.abs(found.boxes - wanted).max() < 1e-3


def network(axes="NC", classes=1, named=False):
    fields = [OutputSpec("boxes", 1, 4, axes=axes), OutputSpec("scores", 1, classes, axes=axes)]
    fields += [OutputSpec("classes", 1, 1, axes=axes)] if named else [OutputSpec("keypoints", 1, 3 * K, axes=axes)]
    return NetworkSpec(InputSpec("image"), tuple(fields), COCO_17)


def crowd(count, seed=0):
    draw = np.random.default_rng(seed)
    low = draw.uniform(0, 400, (count, 2))
    return np.concatenate([low, low + draw.uniform(20, 120, (count, 2))], axis=1).astype(np.float32), draw.random(count).astype(
        np.float32
    )


def plain_suppression(boxes, scores, threshold, most_iou):
    """Greedy suppression, written in the plainest way."""
    kept = []
    for n in np.argsort(-scores, kind="stable"):
        if scores[n] <= threshold:
            continue
        for k in kept:
            sides = np.minimum(boxes[n, 2:], boxes[k, 2:]) - np.maximum(boxes[n, :2], boxes[k, :2])
            shared = max(sides[0], 0) * max(sides[1], 0)
            areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[n], boxes[k])]
            if shared / (sum(areas) - shared) > most_iou:
                break
        else:
            kept.append(int(n))
    return kept


@pytest.mark.parametrize("iou", [0.3, 0.65])
@pytest.mark.parametrize("seed", range(4))
def test_suppression_is_the_plain_one(iou, seed):
    boxes, scores = crowd(200, seed)
    rows, ends = suppress(boxes, scores, False, 0.1, iou, (1000, 1000))
    assert rows.tolist() == plain_suppression(boxes, scores, 0.1, iou)
    assert np.array_equal(ends, boxes[rows])
    middles = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    assert suppress(middles, scores, True, 0.1, iou, (1000, 1000))[0].tolist() == rows.tolist()


def test_the_work_of_suppression_is_bounded_whatever_the_network_returns():
    boxes, scores = crowd(100_000)
    best = np.argsort(-scores, kind="stable")[:1000]
    rows, _ = suppress(boxes, scores, False, 0.0, 0.5, (1000, 100_000))
    assert rows.tolist() == best[plain_suppression(boxes[best], scores[best], 0.0, 0.5)].tolist(), "the best 1,000 alone"
    assert suppress(boxes, scores, False, 0.0, 0.5, (1000, 20))[0].tolist() == rows[:20].tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_boxes_and_scores_that_are_not_finite_never_stay(value):
    boxes, scores = crowd(10)
    boxes[2, 0] = boxes[3, 2] = scores[4] = value
    boxes[5] = (10, 10, 10, 20)
    rows, ends = suppress(boxes, scores, False, 0.0, 1.0, (1000, 1000))
    assert not {2, 3, 4, 5} & set(rows.tolist())
    assert np.isfinite(ends).all()


@pytest.mark.parametrize("axes", ["NC", "CN"])
def test_bad_values_are_counted_and_missing(axes):
    fields = {"boxes": np.array([[[10, 10, 50, 90]]]), "scores": np.array([[[0.9]]]), "keypoints": np.full((1, 1, 51), 5.0)}
    fields["keypoints"][0, 0, 3] = np.nan
    fields["keypoints"][0, 0, 8] = 0
    fields = {k: (v if axes == "NC" else v.transpose(0, 2, 1)).astype(np.float32) for k, v in fields.items()}
    (view,) = WholeImage(None).views(SIZE, SIZE, InputSpec("image"))
    (found,) = OneStageDecoder(network(axes)).decode(fields, [view])
    assert found.keypoints[0, 1].tolist() == found.keypoints[0, 2].tolist() == [0, 0, 0]
    assert found.keypoints[0, 0].tolist() == [5, 5, 5]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["boxes", "scores", None])
def test_a_detectors_image_with_values_that_are_not_finite_is_counted(name, value):
    spec = NetworkSpec(InputSpec("image"), network().fields[:2], COCO_17)
    (view,) = WholeImage(None).views(SIZE, SIZE, spec.input)
    boxes, scores = crowd(10)
    fields = {"boxes": boxes[None], "scores": scores[None, :, None]}
    if name:
        fields[name][0, 3] = value
    decoder = BoxDecoder(spec, score_threshold=0, nms_iou=1.0)
    found = decoder.merge(decoder.decode(fields, [view]), [view])
    assert found.counts == {"images_not_finite": int(name is not None)}
    assert len(found.xywh) == 10 - (name is not None)


def test_boxes_of_a_mirrored_view_lie_where_they_were():
    view = WholeImage(None).views(SIZE, SIZE, InputSpec("image"))[0]
    fields = {"boxes": np.array([[[9.5, 10, 49.5, 90]]], np.float32), "scores": np.array([[[0.9]]], np.float32)}
    spec = NetworkSpec(InputSpec("image"), network().fields[:2], COCO_17)
    (plain,) = BoxDecoder(spec).decode(fields, [view])
    (turned,) = BoxDecoder(spec).decode(fields, [mirrored(view, SIZE)])
    assert plain.xywh[0] == pytest.approx([10, 10.5, 40, 80])
    assert turned.xywh[0] == pytest.approx([640 - 50, 10.5, 40, 80])


def test_a_category_is_chosen_by_name_or_number():
    spec = NetworkSpec(
        InputSpec("image"), network(classes=3).fields[:2], type(COCO_17)(("cat", "person", "dog"), (), (0.1,) * 3)
    )
    (view,) = WholeImage(None).views(SIZE, SIZE, spec.input)
    boxes = np.array([[[0, 0, 50, 50], [100, 100, 150, 150]]], np.float32)
    scores = np.array([[[0.9, 0.1, 0.0], [0.2, 0.8, 0.1]]], np.float32)
    for category in ("person", 1):
        (found,) = BoxDecoder(spec, category=category, score_threshold=0.5).decode({"boxes": boxes, "scores": scores}, [view])
        assert found.scores == pytest.approx([0.8])
    named = NetworkSpec(spec.input, network(named=True).fields, spec.labels)
    classes = np.array([[[0], [1]]], np.int64)
    (found,) = BoxDecoder(named, category="person").decode(
        {"boxes": boxes, "scores": scores[..., 1:2] + 0.5, "classes": classes}, [view]
    )
    assert found.xywh[0] == pytest.approx([100.5, 100.5, 50, 50])
    with pytest.raises(ValueError, match=r"^category=horse: the network's classes are cat, person, dog"):
        BoxDecoder(spec, category="horse")
    with pytest.raises(ValueError, match=r"^category=7: there are 3 classes; choose 0 to 2"):
        BoxDecoder(spec, category=7)


def test_outputs_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"'keypoints' has 15 values an entry, and needs 51 \(x, y and score of 17 keypoints\)"
    ):
        OneStageDecoder(
            NetworkSpec(InputSpec("image"), (*network().fields[:2], OutputSpec("keypoints", 1, 15, axes="NC")), COCO_17)
        )
    with pytest.raises(ValueError, match="has no output 'keypoints'"):
        OneStageDecoder(NetworkSpec(InputSpec("image"), network().fields[:2], COCO_17))
    (view,) = WholeImage(None).views(SIZE, SIZE, InputSpec("image"))
    fields = {name: np.zeros((1, 7, c), np.float32) for name, c in (("boxes", 4), ("scores", 1), ("keypoints", 50))}
    with pytest.raises(ValueError, match=r"'keypoints' is \[1, 7, 50\], not a set \[n, entries, 51\]"):
        OneStageDecoder(network()).decode(fields, [view])
    with pytest.raises(ValueError, match=r"decoder\.form=xywh: choose xyxy, cxcywh"):
        OneStageDecoder(network(), form="xywh")


def test_pictures_leave_out_faint_detections_and_figures_do_not():
    spec = network()
    (view,) = WholeImage(None).views(SIZE, SIZE, spec.input)
    boxes = np.array([[[100, 100, 200, 300], [400, 100, 500, 300]]], np.float32)
    points = np.concatenate([np.full((1, 2, K, 2), 150), np.ones((1, 2, K, 1))], axis=-1).astype(np.float32)
    points[0, 1, :, 0] = 450
    fields = {"boxes": boxes, "scores": np.array([[[0.9], [0.1]]], np.float32), "keypoints": points.reshape(1, 2, -1)}
    image = np.zeros((640, 640, 3), np.uint8)
    people = OneStageDecoder(spec)
    found = people.merge(people.decode(fields, [view]), [view])
    detector = BoxDecoder(NetworkSpec(InputSpec("image"), spec.fields[:2], COCO_17))
    detected = detector.merge(detector.decode(fields, [view]), [view])
    assert len(found.scores) == len(detected.xywh) == 2
    for drawn in (people.draw(image, found), detector.draw(image, detected)):
        assert drawn[:, :320].any()
        assert not drawn[:, 380:].any()


def test_an_image_without_people_has_no_poses():
    sizes = {"boxes": 4, "scores": 1, "keypoints": 3 * K}
    outputs = tuple(OutputSpec(name, 1, size, axes="NC") for name, size in sizes.items())
    spec = NetworkSpec(InputSpec("image"), outputs, COCO_17)
    size = Resolution(64, 64)
    views = WholeImage().views(size, size, spec.input)
    fields = {name: np.zeros((1, 84, count), np.float32) for name, count in sizes.items()}
    (poses,) = OneStageDecoder(spec).decode(fields, views)
    assert poses.keypoints.shape == (0, K, 3)
    assert poses.boxes.shape == (0, 4)
    assert poses.counts == {"images_not_finite": 0}
    broken = {**fields, "keypoints": np.full_like(fields["keypoints"], np.nan), "scores": np.ones_like(fields["scores"])}
    (poses,) = OneStageDecoder(spec).decode({**broken, "boxes": broken["boxes"] + [0, 0, 9, 9]}, views)
    assert poses.counts == {"images_not_finite": 1}
    assert not poses.keypoints.any()
