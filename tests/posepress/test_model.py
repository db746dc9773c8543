"""`posepress.load`: where models come from, what a call takes and returns, and what is refused."""

import builtins
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import posepress
from posepress.errors import UserError
from posepress.results import Boxes, Poses
from tests.conftest import ROOT
from tests.posepress.planted import BOXES, ONESTAGE, POINTS, WHOLE, one_stage, picture, top_down


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return one_stage(tmp_path_factory.mktemp("planted") / "bundle")


def test_people_are_found_in_pixels_of_the_image(bundle, tmp_path):
    with posepress.load(bundle) as model:
        found = model(picture(tmp_path / "photo.png", height=128, width=128))
    assert len(found) == 2, "the faint third lies below the threshold"
    expected = POINTS[:2].reshape(2, 3, 3)[..., :2]
    np.testing.assert_allclose(found.keypoints[..., :2], (expected + 0.5) * 2 - 0.5, atol=1e-4)
    corners = (BOXES[:2] + 0.5) * 2 - 0.5
    np.testing.assert_allclose(found.boxes[:, 2:], corners[:, 2:] - corners[:, :2], atol=2)


def test_every_kind_of_image_gives_the_same_result(bundle, tmp_path):
    from PIL import Image

    file = picture(tmp_path / "photo.png")
    grey = np.full((64, 64), 90, np.uint8)
    with posepress.load(bundle) as model:
        kinds = [file, str(file), grey, np.dstack([grey] * 3), np.dstack([grey] * 4), Image.fromarray(grey)]
        several = model(kinds)
        for found in [model(kind) for kind in kinds] + several:
            np.testing.assert_array_equal(found.keypoints, several[0].keypoints)
    assert len(several) == len(kinds)


def test_a_threshold_chooses_the_people(bundle):
    with posepress.load(bundle) as model:
        image = np.zeros((64, 64, 3), np.uint8)
        assert [len(model(image, threshold=least)) for least in (0, 0.5, 0.8, 1)] == [3, 2, 1, 0]
        assert model.threshold == 0.3


def test_a_stream_gives_each_image_with_its_result(bundle, tmp_path):
    for n in range(3):
        picture(tmp_path / f"{n}.png", 64 + 8 * n)
    with posepress.load(bundle) as model:
        given = list(model.stream(tmp_path))
    assert [(shot.index, shot.sample.size.height, len(found)) for shot, found in given] == [(0, 64, 2), (1, 72, 2), (2, 80, 2)]


def test_several_threads_may_call_a_model(bundle):
    with posepress.load(bundle) as model, ThreadPoolExecutor(4) as pool:
        images = [np.zeros((64, 64, 3), np.uint8)] * 20
        assert [len(found) for found in pool.map(model, images)] == [2] * 20


def test_a_result_as_plain_data(bundle):
    with posepress.load(bundle) as model:
        found = model(np.zeros((64, 64, 3), np.uint8))
    people = json.loads(json.dumps(found.to_dict()))["people"]
    assert [person["score"] for person in people] == pytest.approx([0.9, 0.6])
    assert people[0]["keypoints"]["left_hand"] == pytest.approx([10, 30, 0.8], abs=1e-3)
    rows = found.to_coco(7)
    assert [(row["image_id"], row["category_id"], len(row["keypoints"])) for row in rows] == [(7, 1, 9)] * 2
    drawn = found.draw(np.zeros((64, 64, 3), np.uint8))
    assert drawn[30, 10].max() > 0
    assert drawn[8, 16].max() > 0


def test_supervision_is_used_where_it_is_installed(monkeypatch):
    found = Poses(np.ones((1, 3, 3), np.float32), np.ones(1, np.float32))
    original = builtins.__import__

    def absent(name, *args, **options):
        if name == "supervision":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()


def test_supervision_gets_points_and_boxes(monkeypatch):
    class Module:
        KeyPoints = staticmethod(dict)
        Detections = staticmethod(dict)

    monkeypatch.setitem(sys.modules, "supervision", Module)
    keypoints = np.array([[[3, 4, 0.5], [9, 9, 0]]], np.float32)
    given = Poses(keypoints, np.ones(1, np.float32)).to_supervision()
    np.testing.assert_array_equal(given["xy"], [[[3, 4], [0, 0]]])
    boxes = Boxes(np.array([[1.0, 2, 3, 4]]), np.array([0.5])).to_supervision()
    np.testing.assert_array_equal(boxes["xyxy"], [[1, 2, 4, 6]])


def test_boxes_as_plain_data():
    boxes = Boxes(np.array([[1.0, 2, 30, 40], [3, 3, 5, 5]]), np.array([0.9, 0.2]))
    assert boxes.above(0.3).to_dict() == {"boxes": [{"box": [1, 2, 30, 40], "score": 0.9}]}
    assert boxes.to_coco(5)[1] == {"image_id": 5, "category_id": 1, "bbox": [3, 3, 5, 5], "score": 0.2}
    assert Boxes(boxes.xywh).above(0.3).to_dict()["boxes"][1] == {"box": [3, 3, 5, 5]}
    assert boxes.draw(np.zeros((64, 64, 3), np.uint8)).max() > 0


# --- boxes of people -------------------------------------------------------------------------------------------------------


def test_a_top_down_network_takes_boxes(tmp_path):
    with posepress.load(top_down(tmp_path / "crops")) as model:
        found = model(np.zeros((200, 200, 3), np.uint8), boxes=[[10, 20, 64, 64], [100, 90, 32, 32]])
        assert model.needs_boxes
    np.testing.assert_allclose(found.keypoints[:, 0, :2], [[10 + 21.5, 20 + 9.5], [100 + 10.5, 90 + 4.5]], atol=0.51)


def test_a_top_down_network_asks_its_detector(tmp_path):
    finder = one_stage(tmp_path / "finder")
    with posepress.load(top_down(tmp_path / "crops"), detector=finder) as model:
        image = np.zeros((64, 64, 3), np.uint8)
        assert len(model(image)) == 2
        assert [len(found) for found in model([image, image])] == [2, 2]
        assert len(model(image, boxes=[[1, 1, 9, 9]])) == 1, "given boxes come first"


def test_a_bundle_brings_its_detector(tmp_path):
    folder = top_down(tmp_path / "crops", detector="finder")
    one_stage(folder / "finder")
    with posepress.load(folder) as model:
        assert len(model(np.zeros((64, 64, 3), np.uint8))) == 2


def test_a_detector_may_run_on_each_nth_image(tmp_path):
    finder = one_stage(tmp_path / "finder")
    with posepress.load(top_down(tmp_path / "crops"), detector=finder) as model:
        calls = []
        whole = model.detector.decoder.decode
        object.__setattr__(model.detector, "decoder", _Counting(model.detector.decoder, whole, calls))
        from posepress.resolution import Resolution
        from posepress.results import Sample

        image = np.zeros((64, 64, 3), np.uint8)
        samples = [Sample(str(n), Resolution(64, 64), lambda: image, None) for n in range(7)]
        assert [len(found) for _, found in model.predict(samples, every=3)] == [2] * 7
    assert len(calls) == 3


class _Counting:
    def __init__(self, decoder, decode, calls):
        self._decoder, self._decode, self._calls = decoder, decode, calls

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def decode(self, fields, views):
        self._calls.append(1)
        return self._decode(fields, views)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (None, "give boxes=, or a detector"),
        ([[1, 2, 3]], "rows of x, y, width and height"),
        ([[1, 2, 3, float("nan")]], "not finite"),
        ([[1, 2, 0, 4]], "not above 0"),
    ],
)
def test_wrong_boxes_are_refused(tmp_path, boxes, message):
    with posepress.load(top_down(tmp_path / "crops")) as model, pytest.raises(UserError, match=message):
        model(np.zeros((64, 64, 3), np.uint8), boxes=boxes)


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "give uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        ("nothing.jpg", "nothing.jpg"),
    ],
)
def test_what_is_no_image_is_refused(bundle, image, message):
    with posepress.load(bundle) as model, pytest.raises(UserError, match=message):
        model(image)


def test_a_closed_model_is_refused(bundle):
    model = posepress.load(bundle)
    model.close()
    model.close()
    with pytest.raises(UserError, match="closed"):
        model(np.zeros((4, 4, 3), np.uint8))


def test_boxes_for_other_images_are_refused(bundle):
    with posepress.load(bundle) as model, pytest.raises(UserError, match="1 entries in boxes for 2 images"):
        model([np.zeros((4, 4, 3), np.uint8)] * 2, boxes=[[]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder": {"_target_": "os.system", "command": "true"}}, "no part of posepress"),
        ({"framing": {"_target_": "subprocess.run"}}, "no part of posepress"),
        ({"decoder": {**ONESTAGE, "_target_": "posepress.decoders.onestage.Nothing"}}, "cannot be loaded"),
        ({"decoder": {**ONESTAGE, "form": "polar"}}, "does not fit"),
        ({"decoder": {**ONESTAGE, "unknown": 1}}, "does not fit"),
        ({"framing": {**WHOLE, "keep_aspect_ratio_mode": "bend"}}, "does not fit"),
        ({"framing": 3}, "wrong type"),
        ({"batch": 0}, "wrong type"),
        ({"resolution": "tall"}, "HEIGHTxWIDTH"),
        ({"engine": "../engine.onnx"}, "no name of a file in the bundle"),
        ({"engine": "other.onnx"}, "missing"),
        ({"detector": ".."}, "no name of a file in the bundle"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        posepress.load(one_stage(tmp_path / "bundle", **change))


def test_damaged_descriptions_and_engines_are_refused(tmp_path):
    folder = one_stage(tmp_path / "bundle")
    (folder / "model.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        posepress.load(folder)
    (folder / "model.json").write_text("[]")
    with pytest.raises(UserError, match="holds no object"):
        posepress.load(folder)
    (folder / "model.json").write_text("{}")
    with pytest.raises(UserError, match="'engine' is missing"):
        posepress.load(folder)
    one_stage(folder)
    (folder / "engine.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot load it"):
        posepress.load(folder)


def test_an_absent_provider_is_named(tmp_path):
    with pytest.raises(UserError, match="NoProvider, which this ONNX Runtime lacks"):
        posepress.load(one_stage(tmp_path / "bundle", provider="NoProvider"))


# --- results below outputs/ ------------------------------------------------------------------------------------------------


def results(folder, name="demo", address="net_fp32", tuned=0.5):
    """What the stages build, tune and evaluate leave of an engine."""
    root = folder / "outputs" / name
    build, tune, evaluate = root / "build" / address, root / "tune/net", root / "evaluate" / address
    one_stage(build)
    (build / "model.json").unlink()
    for place in (tune, evaluate):
        place.mkdir(parents=True)
    (tune / "decoder.json").write_text(json.dumps({"options": {"nms_iou": tuned}}))
    (build / "manifest.json").write_text(json.dumps({"stage": "build", "digest": "d"}))
    config = {
        "axes": {"backend": "onnxruntime"}, "backend": {"provider": "CPUExecutionProvider"}, "resolution": "64x64", "batch": 1,
        "framing": WHOLE, "decoder": {**ONESTAGE, "_partial_": True, "nms_iou": [0.65, 0.8]},
    }  # fmt: skip
    inputs = {"engine": [{"stage": "build", "address": address, "digest": "d"}], "tuned": [{"stage": "tune", "address": "net"}]}
    (evaluate / "manifest.json").write_text(json.dumps({"stage": "evaluate", "config": config, "inputs": inputs}))
    return build, evaluate


def test_a_result_is_run_as_it_was_evaluated(tmp_path):
    build, evaluate = results(tmp_path)
    for given in (build, build / "engine.onnx", evaluate, "demo/net_fp32", "net_fp32"):
        with posepress.load(given, outputs=tmp_path / "outputs") as model:
            assert model.decoder.nms_iou == 0.5
            assert len(model(np.zeros((64, 64, 3), np.uint8))) == 2


def test_without_tuning_the_first_candidate_counts(tmp_path):
    build, evaluate = results(tmp_path)
    manifest = json.loads((evaluate / "manifest.json").read_text())
    del manifest["inputs"]["tuned"]
    (evaluate / "manifest.json").write_text(json.dumps(manifest))
    with posepress.load(build) as model:
        assert model.decoder.nms_iou == 0.65


def test_results_that_do_not_tell_how_to_run_are_refused(tmp_path):
    build, _ = results(tmp_path)
    results(tmp_path, "other")
    outputs = tmp_path / "outputs"
    with pytest.raises(UserError, match="several results have this address"):
        posepress.load("net_fp32", outputs=outputs)
    with pytest.raises(UserError, match="did you mean 'demo/net_fp32'"):
        posepress.load("demo/net_fp33", outputs=outputs)
    with pytest.raises(UserError, match="no engine in this folder"):
        posepress.load(tmp_path)
    with pytest.raises(UserError, match="no engine that Posepress made"):
        posepress.load(picture(tmp_path / "alone" / "photo.png"))
    (build / "manifest.json").write_text(json.dumps({"stage": "build", "digest": "another"}))
    with pytest.raises(UserError, match="not evaluated"):
        posepress.load(build)
    (build / "manifest.json").write_text(json.dumps({"stage": "prune"}))
    with pytest.raises(UserError, match="result of the stage 'prune'"):
        posepress.load(build)


def test_an_engine_of_another_backend_is_refused(tmp_path):
    build, _ = results(tmp_path)
    (build / "engine.onnx").rename(build / "engine.pt2")
    with pytest.raises(UserError, match="runs with backend=onnxruntime alone"):
        posepress.load(build)


def test_loading_imports_nothing_heavy(bundle):
    code = f"""
import sys, posepress
assert "numpy" not in sys.modules and "cv2" not in sys.modules, "import posepress is quick"
model = posepress.load({str(bundle)!r})
import numpy
assert len(model(numpy.zeros((64, 64, 3), numpy.uint8))) == 2
heavy = [name for name in ("torch", "hydra", "omegaconf", "mlflow", "onnx", "pipeline", "evaluation") if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
