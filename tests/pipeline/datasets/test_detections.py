"""Boxes from a file of detections, and from a detector that runs."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.datasets.coco import CocoSplits
from pipeline.datasets.detections import check_inside, read_boxes
from pipeline.datasets.detector import Detector
from pipeline.datasets.outside import outside
from posepress.errors import UserError
from posepress.resolution import Resolution

RIGHT = {"image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "score": 0.5}


def written(folder, rows):
    file = folder / "found.json"
    file.write_text(json.dumps(rows))
    return file


def test_boxes_are_read_by_image(tmp_path):
    file = written(tmp_path, [RIGHT, {**RIGHT, "image_id": 2}, {**RIGHT, "score": 0.25, "bbox": [0, 0, 5, 5]}])
    found = read_boxes(file, 1)
    assert set(found) == {"1", "2"}
    assert found["1"].xywh.tolist() == [[10, 20, 30, 40], [0, 0, 5, 5]]
    assert found["1"].scores.tolist() == [0.5, 0.25]


def test_other_categories_are_left_out(tmp_path):
    file = written(tmp_path, [RIGHT, {**RIGHT, "category_id": 18}])
    assert len(read_boxes(file, 1)["1"].scores) == 1
    with pytest.raises(UserError, match=r"no detection has the category_id 7, but 2 have 1, 18; correct category_id"):
        read_boxes(file, 7)


def test_detections_of_other_categories_and_images_are_counted(tmp_path, capsys):
    file = written(tmp_path, [RIGHT, {**RIGHT, "category_id": 18}, {**RIGHT, "image_id": 77}, {**RIGHT, "image_id": 77}])
    assert set(read_boxes(file, 1, {"1", "2"})) == {"1"}
    said = capsys.readouterr().err
    assert f"{file}: 1 of 4 detections have another category_id than 1, like 18, and are left out" in said
    assert f"{file}: 2 of 4 detections name images that are not in the data, like image_id 77, and are left out" in said
    with pytest.raises(UserError, match=r"no image_id \(1, 77, \.\.\.\) is that of an image here"):
        read_boxes(file, 1, {"2"})
    capsys.readouterr()
    read_boxes(written(tmp_path, [RIGHT]), 1, {"1", "2"})
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": 1}, "not a list of detections"),
        ([{"image_id": 1}], "detection 0 has no image_id, bbox and score"),
        ([RIGHT, {**RIGHT, "bbox": [1, 2, 3]}], r"detection 1: bbox is .*give x, y, width and height in pixels"),
        ([{**RIGHT, "bbox": [1, 2, 0, 3]}], "width and height must be above 0"),
        ([{**RIGHT, "bbox": [1, 2, -4, 3]}], "width and height must be above 0"),
        ([{**RIGHT, "bbox": [1, 2, None, 3]}], "give x, y, width and height in pixels"),
        ([{**RIGHT, "score": "high"}], "score is the text 'high'; give a number"),
    ],
)
def test_wrong_detections_are_named(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        read_boxes(written(tmp_path, rows), 1)


def test_infinite_numbers_are_refused(tmp_path):
    file = tmp_path / "found.json"
    for text in ("NaN", "Infinity", "1e999"):
        file.write_text(json.dumps([RIGHT]).replace("30", text))
        with pytest.raises(UserError):
            read_boxes(file, 1)


def test_corners_and_other_images_are_told(tmp_path):
    corners = read_boxes(written(tmp_path, [{**RIGHT, "bbox": [300, 200, 380, 300]}, RIGHT]), 1)
    size = {"1": Resolution(320, 400)}
    with pytest.raises(UserError, match="50% of the boxes end outside of their images, so bbox seems to hold two corners"):
        check_inside(corners, size, tmp_path / "found.json")
    with pytest.raises(UserError, match=r"no image_id \(1, \.\.\.\) is that of an image here"):
        check_inside(corners, {"9": Resolution(3, 3)}, tmp_path / "found.json")
    check_inside(read_boxes(written(tmp_path, [RIGHT]), 1), size, tmp_path / "found.json")


def test_boxes_outside_of_their_images_are_counted(tmp_path, capsys):
    size, file = {"1": Resolution(320, 400), "2": Resolution(320, 400)}, tmp_path / "found.json"
    inside = [RIGHT, {**RIGHT, "bbox": [-5, -5, 10, 10]}, {**RIGHT, "bbox": [395, 315, 5, 5]}] * 3
    check_inside(read_boxes(written(tmp_path, inside), 1), size, file)
    assert not capsys.readouterr().err
    away = [{**RIGHT, "image_id": 2, "bbox": [-50, 20, 30, 40]}, {**RIGHT, "bbox": [10, 320, 30, 40]}]
    found = read_boxes(written(tmp_path, [*inside, *away]), 1)
    check_inside(found, size, file)
    said = capsys.readouterr().err
    assert f"{file}: 2 boxes lie wholly outside their images, like [" in said
    assert "[10.0, 320.0, 30.0, 40.0] in image 1 of 320x400" in said
    assert "give bbox as x, y, width and height in pixels" in said


@pytest.mark.parametrize(
    ("box", "away"),
    [
        ([-10, 0, 10, 5], True), ([0, -10, 5, 10], True), ([90, 0, 5, 5], True), ([0, 80, 5, 5], True), ([-9, -9, 1, 1], True),
        ([-10, 0, 11, 5], False), ([0, -10, 5, 11], False), ([89, 79, 50, 50], False), ([-9, -9, 900, 900], False),
        ([0, 0, 0, 0], False), ([90, 80, 0, 0], False),
    ],
)  # fmt: skip
def test_a_box_is_outside_on_every_side(box, away):
    assert outside(np.array([box], float), np.array([90, 80])).tolist() == [away]


@pytest.fixture(scope="module")
def generated(finished):
    """The folder of a generated data set."""
    return next((finished / "outputs/cache/synthetic").glob("v*/splits.json")).parent


def data(folder, cache, **options):
    parts = [
        {"images": folder / f"images/{name}", "annotations": folder / f"annotations/{name}.json"}
        for name in ("train", "validation")
    ]
    return CocoSplits(*parts, {"images": folder / "images/unlabelled"}, str(folder / "splits.json"), str(cache), **options)


def test_a_file_gives_the_boxes_of_the_images_that_it_lists(generated, tmp_path):
    plain = data(generated, tmp_path)
    ids = [record.id for record in plain.open("validation").images]
    rows = [{**RIGHT, "image_id": int(image), "score": 0.25} for image in ids[:-2]]
    own = data(generated, tmp_path, boxes=str(written(tmp_path, rows)))
    part = own.open("validation")
    assert part[0].boxes.xywh.tolist() == [[10, 20, 30, 40]]
    assert part[0].boxes.scores.tolist() == [0.25]
    assert len(part[len(ids) - 1].boxes.xywh) == 0
    (doubt,) = [doubt for doubt in part.doubts(tmp_path) if "no box" in doubt]
    assert doubt.startswith(f"no box for 2 of {len(ids)} images: their people count as missed")
    assert not [doubt for doubt in plain.open("validation").doubts(tmp_path) if "no box" in doubt]
    assert own.open("train")[0].boxes.scores is None, "training takes annotations"
    assert own.open("tune")[0].boxes.scores is None, "no tune image is in the file"
    assert own.open("agreement")[0].boxes is None
    assert own.digest(["train"]) == plain.digest(["train"])
    assert own.digest(["validation"]) != plain.digest(["validation"])


def fixed_detector(folder, boxes, scores, opset=17):
    """An ONNX file that finds the same boxes in every image of 96x120."""
    values = {"box_values": np.array(boxes, np.float32)[None], "score_values": np.array(scores, np.float32)[None]}
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Squeeze", ["mean", "axis"], ["row"]),
        helper.make_node("Mul", ["row", "zero"], ["nothing"]),
        helper.make_node("Add", ["box_values", "nothing"], ["boxes"]),
        helper.make_node("Add", ["score_values", "nothing"], ["scores"]),
    ]
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    constants += [
        numpy_helper.from_array(np.array([3], np.int64), "axis"),
        numpy_helper.from_array(np.zeros(1, np.float32), "zero"),
    ]
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", len(scores), c]) for n, c in (("boxes", 4), ("scores", 1))
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 96, 120])
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], outputs, constants), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 8
    onnx.save(model, folder / "detector.onnx")
    return str(folder / "detector.onnx")


SPEC = {
    "input": {"name": "image", "multiple": 1},
    "fields": [
        {"name": "boxes", "stride": 1, "channels": 4, "axes": "NC"},
        {"name": "scores", "stride": 1, "channels": 1, "axes": "NC"},
    ],
    "labels": {"names": ["person"], "colours": [[255, 0, 0]]},
}


def test_a_detector_gives_the_boxes_of_all_images_that_are_not_trained_on(generated, tmp_path):
    file = fixed_detector(tmp_path, [[9.5, 19.5, 39.5, 59.5], [0, 0, 10, 10]], [[0.9], [0.01]])
    found = data(generated, tmp_path / "cache", detector=Detector(file, SPEC, resolution="96x120"))
    for split in ("tune", "validation", "agreement", "unlabelled"):
        boxes = found.open(split)[0].boxes
        assert boxes.xywh == pytest.approx(np.array([[10, 20, 30, 40]]), abs=1e-4)
        assert boxes.scores == pytest.approx([0.9])
    assert found.open("train")[0].boxes.scores is None
    assert len(list((tmp_path / "cache/boxes").glob("*.npz"))) == 4
    (tmp_path / "detector.onnx").write_bytes((tmp_path / "detector.onnx").read_bytes())
    again = data(generated, tmp_path / "cache", detector=Detector(file, SPEC, resolution="96x120"))
    assert again.digest(["validation"]) == found.digest(["validation"])
    stricter = data(generated, tmp_path / "cache", detector=Detector(file, SPEC, resolution="96x120", score_threshold=0.95))
    assert stricter.digest(["validation"]) != found.digest(["validation"])
    assert stricter.digest(["train"]) == found.digest(["train"])
    assert len(stricter.open("validation")[0].boxes.xywh) == 0


def test_a_detector_of_ten_thousand_boxes_returns_the_best(generated, tmp_path):
    draw = np.random.default_rng(0)
    low = draw.uniform(0, 80, (10_000, 2))
    file = fixed_detector(tmp_path, np.concatenate([low, low + 5], axis=1), draw.random((10_000, 1)))
    boxes = data(generated, tmp_path / "cache", detector=Detector(file, SPEC, resolution="96x120")).open("validation")[0].boxes
    assert 20 < len(boxes.xywh) <= 100
    assert (np.diff(boxes.scores) <= 0).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"file": "nowhere.onnx"}, "detector.file=nowhere.onnx: no such file; give an ONNX file, or a folder"),
        ({"category": "horse"}, "category=horse: the network's classes are person"),
        ({"spec": None}, r"^detector\.file=.*no network description in its metadata.*detector=yolo, detector=faster_rcnn or"),
        ({"outputs": {"boxes": "nothing"}}, r"^detector\.file=.*correct detector\.spec\.fields"),
    ],
)
def test_wrong_detectors_are_named(generated, tmp_path, options, said):
    file = fixed_detector(tmp_path, [[0, 0, 9, 9]], [[0.9]])
    made = Detector(**{"file": file, "spec": SPEC, "resolution": "96x120", **options})
    with pytest.raises(UserError, match=said):
        data(generated, tmp_path / "cache", detector=made).open("validation")
