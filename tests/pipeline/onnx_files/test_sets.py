"""Adoption of files whose outputs are sets, lines or detections without a batch, and the guess of their family."""

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from omegaconf import OmegaConf
from onnx import TensorProto, helper, numpy_helper

from pipeline.onnx_files.adopt import adopt
from pipeline.onnx_files.compare import compare, onnx_reference
from pipeline.onnx_files.files import described
from pipeline.onnx_files.given import check_request
from pipeline.onnx_files.guess import anatomy, guess, report
from posepress.decoders.boxes import BoxDecoder
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from tests.conftest import ROOT

SIZE = Resolution(64, 64)


def saved(folder, outputs, batch="n", nhwc=False, more=()):
    """A file that returns the given values times one plus the image's mean, by name."""
    values = [numpy_helper.from_array(value.astype(np.float32), f"{name}_values") for name, value in outputs.items()]
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[0, 1, 2, 3], keepdims=0),
        *(helper.make_node("Mul", [f"{name}_values", "mean"], [f"{name}_scaled"]) for name in outputs),
        *(helper.make_node("Add", [f"{name}_values", f"{name}_scaled"], [name]) for name in outputs),
        *more,
    ]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * value.ndim) for name, value in outputs.items()]
    shape = [batch, 64, 64, 3] if nhwc else [batch, 3, 64, 64]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)
    model = helper.make_model(
        helper.make_graph(nodes, "g", [image], infos, values), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, folder / "given.onnx")
    return folder / "given.onnx"


def preset(name, **changes):
    spec = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/model/{name}.yaml").model.spec)
    return {**spec, **changes}


def fields(file, raw, outputs=None):
    """The adopted file's fields for an image, which equal those of the given file."""
    made = adopt(file, raw, outputs, SIZE)
    image = np.random.default_rng(0).random((1, 3, 64, 64)).astype(np.float32)
    out = file.with_name("adopted.onnx")
    onnx.save(made.model, out)
    compare(out, made.spec, onnx_reference(file, made.spec, made.sources), [image], 1e-6)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [field.name for field in made.spec.fields]
    return dict(zip(names, session.run(names, {made.spec.input.name: image}), strict=True)), 1 + image.mean()


def random(*shape):
    return np.random.default_rng(1).random(shape)


def test_one_output_of_yolo_is_split_by_channels(tmp_path):
    values = random(1, 56, 90)
    found, factor = fields(saved(tmp_path, {"output0": values}, 1), preset("yolov8_pose"))
    assert [field.shape for field in found.values()] == [(1, 4, 90), (1, 1, 90), (1, 51, 90)]
    assert np.concatenate(list(found.values()), axis=1) == pytest.approx(values * factor, rel=1e-5)


def test_its_output_may_have_any_name_where_it_is_the_only_one(tmp_path):
    found, _ = fields(saved(tmp_path, {"something": random(1, 300, 57)}, 1), preset("yolo26_pose"))
    assert [field.shape for field in found.values()] == [(1, 300, 4), (1, 300, 1), (1, 300, 1), (1, 300, 51)]


def test_detections_with_keypoints_of_their_own_are_reshaped(tmp_path):
    dets, points = random(1, 40, 5), random(1, 40, 17, 3)
    found, factor = fields(saved(tmp_path, {"dets": dets, "keypoints": points}, 1), preset("rtmo"))
    assert found["scores"] == pytest.approx(dets[..., 4:] * factor, rel=1e-5)
    assert found["keypoints"].reshape(1, 40, 17, 3) == pytest.approx(points * factor, rel=1e-5)


def test_a_detector_without_a_batch_gets_one(tmp_path):
    spec = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/detector/faster_rcnn.yaml").spec)
    spec["fields"][2]["dtype"] = "float32"
    outputs = {"boxes": random(7, 4), "labels": np.ones(7), "scores": random(7)}
    found, factor = fields(saved(tmp_path, outputs, 1), spec)
    assert {name: field.shape for name, field in found.items()} == {
        "boxes": (1, 7, 4),
        "scores": (1, 7, 1),
        "classes": (1, 7, 1),
    }
    assert found["boxes"][0] == pytest.approx(outputs["boxes"] * factor, rel=1e-5)


def one_image_detector(folder, shape, kind=TensorProto.FLOAT, opset=17):
    """A detector of one image without a batch axis: two boxes, their labels, and as scores the mean pixel and half of it."""
    axes = [0, 1, 2]
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=axes, keepdims=0),
        helper.make_node("Mul", ["parts", "mean"], ["scores"]),
        helper.make_node("Identity", ["ends"], ["boxes"]),
        helper.make_node("Identity", ["numbers"], ["labels"]),
    ]
    constants = {
        "parts": np.array([1, 0.5], np.float32),
        "ends": np.array([[8, 8, 24, 40], [30, 30, 50, 60]], np.float32),
        "numbers": np.array([1, 1]),
    }
    value = helper.make_tensor_value_info
    outputs = [
        value("boxes", TensorProto.FLOAT, ["m", 4]),
        value("labels", TensorProto.INT64, ["m"]),
        value("scores", TensorProto.FLOAT, ["m"]),
    ]
    tensors = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph(nodes, "g", [value("images", kind, shape)], outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), folder / "given.onnx")
    return folder / "given.onnx"


@pytest.mark.parametrize(
    ("shape", "changes", "opset"),
    [
        ((3, 64, 64), {}, 17),
        ((3, "h", "w"), {}, 17),
        ((3, 64, 64), {}, 11),
        ((64, 64, 3), {"layout": "NHWC"}, 17),
        ((3, 64, 64), {"dtype": "uint8", "range": 255.0}, 17),
    ],
)
def test_a_detector_of_one_image_without_a_batch_axis_finds_its_boxes(tmp_path, shape, changes, opset):
    spec = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/detector/faster_rcnn.yaml").spec)
    spec["input"] |= changes
    kind = TensorProto.UINT8 if "dtype" in changes else TensorProto.FLOAT
    file = one_image_detector(tmp_path, shape, kind, opset)
    made = adopt(file, spec, None, SIZE)
    (said,) = [note for note in made.notes if "batch" in note]
    assert "a batch of one image is put in front" in said
    assert not [note for note in made.notes if "is called" in note]
    free = {"height", "width"} if "h" in shape else set()
    assert made.spec.dynamic == free
    image = np.random.default_rng(0).random((1, 3, 64, 64)).astype(np.float32)
    image = (255 * image).astype(np.uint8) if "dtype" in changes else image
    image = image.transpose(0, 2, 3, 1) if "layout" in changes else image
    alone = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    boxes, labels, scores = alone.run(["boxes", "labels", "scores"], {"images": image[0]})
    session = onnxruntime.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [field.name for field in made.spec.fields]
    found = dict(zip(names, session.run(names, {made.spec.input.name: image}), strict=True))
    assert np.array_equal(found["boxes"], boxes[None])
    assert np.array_equal(found["classes"][0, :, 0], labels)
    assert found["scores"][0, :, 0] == pytest.approx(scores)
    (view,) = WholeImage(None).views(SIZE, SIZE, made.spec.input)
    (people,) = BoxDecoder(made.spec, category="person", nms_iou=1.0).decode(found, [view])
    assert people.xywh[0] == pytest.approx([8, 8, 16, 32])


def test_a_given_network_of_one_image_is_told_how_to_get_a_batch_axis(tmp_path):
    file = one_image_detector(tmp_path, (3, 64, 64))
    spec = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/detector/faster_rcnn.yaml").spec)
    said = r"its input .*is \[3, 64, 64\], which has no batch axis; export a module that takes images \[1, 3, h, w\]"
    with pytest.raises(UserError, match=said):
        check_request(file, described(spec), "fp32", {}, {}, True)
    with pytest.raises(UserError, match=said):
        anatomy(file)


def suppressing(folder):
    """A detector that suppresses boxes itself, behind the tensors "raw" and "certain"."""
    constants = {"most": np.int64(5), "overlap": np.float32(0.5), "least": np.float32(0.1), "two": np.int64(2)}
    more = [helper.make_node("Constant", [], [n], value=numpy_helper.from_array(np.array(v))) for n, v in constants.items()]
    more += [
        helper.make_node("NonMaxSuppression", ["raw", "certain", "most", "overlap", "least"], ["kept"], name="nms"),
        helper.make_node("Gather", ["kept", "two"], ["rows"], axis=1),
        helper.make_node("Gather", ["raw", "rows"], ["boxes"], axis=1),
        helper.make_node("Gather", ["certain", "rows"], ["scores"], axis=2),
    ]
    outputs = {"raw": 10 * random(1, 30, 4), "certain": random(1, 1, 30)}
    file = saved(folder, outputs, 1, more=more)
    model = onnx.load(file)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 3) for n in ("boxes", "scores"))
    onnx.save(model, file)
    return file, outputs


def test_a_network_that_suppresses_boxes_is_cut_before_that_or_said(tmp_path):
    file, outputs = suppressing(tmp_path)
    spec = preset("yolo_boxes", labels={"names": ["a"], "colours": []})
    spec["fields"] = [
        {"name": "boxes", "stride": 1, "channels": 4, "axes": "NC"},
        {"name": "scores", "stride": 1, "channels": 1, "axes": "CN"},
    ]
    found, factor = fields(file, spec, {"boxes": "raw", "scores": "certain"})
    assert found["boxes"] == pytest.approx(outputs["raw"] * factor, rel=1e-5)
    made = adopt(file, spec, {"boxes": "raw", "scores": "certain"}, SIZE)
    assert "NonMaxSuppression" not in [node.op_type for node in made.model.graph.node]
    assert not [note for note in made.notes if "suppresses" in note]
    (said,) = [note for note in adopt(file, spec, None, SIZE).notes if "suppresses" in note]
    assert "its node 'nms'" in said
    assert "'model.outputs={boxes: raw, scores: certain}'" in said
    assert said in [words for what, words in anatomy(file).rows if what == "suppression"]


def test_a_cut_needs_the_tensor_of_each_field(tmp_path):
    file, _ = suppressing(tmp_path)
    spec = {**preset("yolo_boxes", labels={"names": ["a"], "colours": []})}
    spec["fields"] = [
        {"name": n, "stride": 1, "channels": c, "axes": a} for n, c, a in (("boxes", 4, "NC"), ("scores", 1, "CN"))
    ]
    made = adopt(file, spec, {"boxes": "raw"}, SIZE)  # the file has an output of the other field's name
    assert dict(made.sources) == {"boxes": "raw", "scores": "scores"}
    with pytest.raises(
        UserError, match=r"no tensor 'certian' for scores; did you mean 'certain'.*like 'raw', needs the tensor"
    ):
        adopt(file, spec, {"boxes": "raw", "scores": "certian"}, SIZE)
    spec["fields"][1]["name"] = "classes"
    (said,) = [note for note in adopt(file, spec, {"classes": "scores"}, SIZE).notes if "suppresses" in note]
    assert "model.outputs" not in said


def test_a_network_that_cannot_be_cut_there_is_refused(tmp_path, monkeypatch):
    file, _ = suppressing(tmp_path)
    monkeypatch.setattr(onnx.utils.Extractor, "extract_model", lambda *_: onnx.ModelProto())
    spec = {**preset("yolo_boxes", labels={"names": ["a"], "colours": []})}
    spec["fields"] = [{"name": "boxes", "stride": 1, "channels": 4, "axes": "NC"}]
    with pytest.raises(UserError, match=r"cannot be cut at 'raw' \(.*\); name another tensor, or an output"):
        adopt(file, spec, {"boxes": "raw"}, SIZE)


def test_logits_get_their_activation(tmp_path):
    raw = {
        "input": {"name": "image", "multiple": 1},
        "fields": [{"name": "heatmaps", "stride": 4, "channels": 17, "activation": "sigmoid"}],
        "labels": "coco_17",
    }
    values = 4 * random(1, 17, 16, 16) - 2
    found, factor = fields(saved(tmp_path, {"heatmaps": values}, 1), raw)
    assert found["heatmaps"] == pytest.approx(1 / (1 + np.exp(-values * factor)), rel=1e-4)
    with pytest.raises(UserError, match=r"fields\[0\]\.activation=softmax: choose sigmoid"):
        adopt(tmp_path / "given.onnx", {**raw, "fields": [{**raw["fields"][0], "activation": "softmax"}]}, None, SIZE)


def test_channels_that_do_not_add_up_are_named(tmp_path):
    file = saved(tmp_path, {"output0": random(1, 55, 90)}, 1)
    with pytest.raises(
        UserError, match=r"'output0' is \[n, 55, 90\], and model.spec.fields shares it among 4 boxes \+ 1 scores"
    ):
        adopt(file, preset("yolov8_pose"), None, SIZE)


@pytest.mark.parametrize(
    ("outputs", "family", "words"),
    [
        ({"o": random(1, 56, 90)}, "onestage", ["model=yolov8_pose", "model.spec.labels=coco_17"]),
        ({"o": random(1, 5 + 63, 90)}, "onestage", ["model=yolov8_pose", "model.spec.fields.2.channels=63"]),
        ({"o": random(1, 300, 57)}, "onestage", ["model=yolo26_pose"]),
        ({"dets": random(1, 40, 5), "keypoints": random(1, 40, 17, 3)}, "onestage", ["model=rtmo"]),
        ({"a": random(1, 17, 128), "b": random(1, 17, 128)}, "simcc", ["model=rtmpose"]),
        ({"o": random(1, 56, 300)}, "onestage", ["model=yolov8_pose", "model.spec.labels=coco_17"]),
        ({"o": random(1, 300, 405)}, "onestage", ["model=yolo26_pose", "model.spec.fields.3.channels=399"]),
        ({"o": random(1, 84, 90)}, "boxes", ["model=yolo_boxes", "model.spec.labels=coco_80"]),
        ({"o": random(1, 57, 300)}, "boxes", ["model=yolo_boxes", "model.spec.fields.1.channels=53"]),
        ({"o": random(1, 300, 8400)}, "boxes", ["model=yolo_boxes", "model.spec.fields.1.channels=296"]),
        ({"o": random(1, 5, 90)}, "boxes", ["model=yolo_boxes", "model.spec.fields.1.channels=1"]),
        ({"b": random(1, 90, 4), "s": random(1, 90, 1)}, "boxes", ["family=boxes"]),
        ({"h": random(1, 17, 16, 16)}, "topdown", ["family=topdown", "model.spec.labels=coco_17"]),
        ({"h": random(1, 19, 8, 8), "p": random(1, 38, 8, 8)}, "heatmap_paf", ["family=heatmap_paf"]),
        ({"x": random(1, 7)}, "", []),
    ],
)
def test_the_family_is_guessed_from_the_shapes(tmp_path, outputs, family, words):
    file = saved(tmp_path, outputs, 1)
    made = guess(file, anatomy(file))
    assert made.family == family
    assert set(words) <= set(made.words)


@pytest.mark.parametrize("classes", [4, 7, 10, 52, 91])
def test_a_shape_that_pose_networks_and_detectors_share_gets_the_options_of_both(tmp_path, classes):
    file = saved(tmp_path, {"output0": random(1, 4 + classes, 100)}, 1)
    rows, made = report(file)
    K = (classes - 1) // 3
    assert made.family == "onestage"
    assert f"{K} keypoints; a detector of {classes} classes has the same shape" in made.why
    assert "model=yolov8_pose" in made.words
    (row,) = [row for row in rows if row[0] == "or"]
    assert row[1] == f"boxes: 100 entries of a box and {classes} scores"
    assert row[2] == "or the options after them"
    words = made.others[0].words
    assert {f"model.onnx={file}", "model=yolo_boxes", f"model.spec.fields.1.channels={classes}"} <= set(words)


def test_the_options_of_a_detector_of_91_classes_describe_it(tmp_path):
    file = saved(tmp_path, {"output0": random(1, 95, 100)}, 1)
    words = guess(file, anatomy(file)).others[0].words
    given = OmegaConf.load(ROOT / "conf/model/yolo_boxes.yaml")
    for word in words[3:]:  # after the file, its size and the preset
        option, _, value = word.partition("=")
        OmegaConf.update(given, option, yaml.safe_load(value))
    made = adopt(file, OmegaConf.to_container(given.model.spec), None, SIZE)
    assert BoxDecoder(made.spec, category="person").spec.labels.names[1] == "person"


def test_a_detector_alone_has_no_other_options(tmp_path):
    rows, made = report(saved(tmp_path, {"output0": random(1, 84, 90)}, 1))
    assert not made.others
    assert "or" not in [row[0] for row in rows]


@pytest.mark.parametrize(("kind", "name"), [(TensorProto.BFLOAT16, "bfloat16"), (TensorProto.DOUBLE, "double")])
def test_inputs_of_other_types_are_refused(tmp_path, kind, name):
    model = onnx.load(saved(tmp_path, {"h": random(1, 17, 16, 16)}, 1))
    model.graph.input[0].type.tensor_type.elem_type = kind
    model.graph.input[0].name = "pixels"
    model.graph.node.insert(0, helper.make_node("Cast", ["pixels"], ["image"], to=TensorProto.FLOAT))
    onnx.save(model, tmp_path / "given.onnx")
    with pytest.raises(UserError, match=f"its input 'pixels' is {name}; export it with float32 images"):
        anatomy(tmp_path / "given.onnx")


def test_the_anatomy_says_what_a_file_is(tmp_path):
    file = saved(tmp_path, {"h": random(1, 17, 16, 16)}, 1, nhwc=True)
    found = anatomy(file)
    assert (found.layout, found.channels, found.dtype, found.size) == ("NHWC", 3, "float32", SIZE)
    rows = dict(found.rows)
    assert rows["opset"] == "17"
    assert "ReduceMean" in rows["operators"]
    assert "model.spec.input.layout=NHWC" in guess(file, found).words
    with pytest.raises(UserError, match="not a valid ONNX file"):
        anatomy(ROOT / "README.md")
