"""The option `detector`: a choice, a file, a folder or an address; and the stages that see the boxes that it finds."""

import re

import pytest

from pipeline.datasets.detector import Detector
from pipeline.launch import command_line, wiring
from pipeline.launch.detector import find_detector
from posepress.errors import UserError

ADDRESS = "onestage-w0.32_dense_192x224_pad_int8-auto_onnxruntime-b1"


def composed(*words):
    return command_line.compose(["experiment=topdown_quickstart", "tracking=none", *words], None)


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/one/build" / ADDRESS
    folder.mkdir(parents=True)
    (folder / "engine.onnx").write_bytes(b"network")
    return tmp_path / "outputs"


@pytest.mark.parametrize("given", [ADDRESS, f"one/build/{ADDRESS}", f"outputs/one/build/{ADDRESS}"])
def test_an_address_is_that_of_a_folder_below_outputs(outputs, given):
    words = command_line.read([f"detector={given}"]).options
    assert words[0] == "detector=own"
    config = composed(*words)
    find_detector(config)
    assert config.detector.file == f"outputs/one/build/{ADDRESS}"
    wiring.settle(config)
    assert config.addresses.evaluate.endswith(f"_by-{ADDRESS}")
    assert config.axes.boxes == ADDRESS


def test_an_address_of_two_results_is_refused(outputs):
    (outputs / "two/build" / ADDRESS).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{re.escape(ADDRESS)}: the address of several results .*one/build.*two/build"):
        find_detector(composed("detector=own", f"detector.file={ADDRESS}"))


def test_what_is_no_address_stays_for_the_check_of_files(outputs):
    config = composed("detector=own", "detector.file=nowhere_at_all_x")
    find_detector(config)
    assert config.detector.file == "nowhere_at_all_x"


def stages(*words):
    config = command_line.compose([*words, "tracking=none"], None)
    wiring.settle(config)
    wiring.wire(config, config.stages)
    return config


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=topdown_quickstart", "detector=own", "detector.file=a.onnx"],
        ["family=topdown", "model=simplebaseline", "data=coco", "data.boxes=found.json"],
    ],
)
def test_stages_that_make_a_network_take_annotated_boxes(words):
    config = stages(*words)
    for name in ("train", "prune", "retrain", "sensitivity", "sample", "quantize", "qat", "export"):
        data = config.stages[name]._get_node("data")
        if data is not None:
            assert (data.get("detector"), data.get("boxes", "annotations")) == (None, "annotations"), name
    for name in ("tune", "evaluate", "benchmark", "package"):
        data = config.stages[name]._get_node("data")._value()
        assert data == "${data}", name


def test_without_a_detector_all_stages_take_the_data_as_it_is():
    config = stages("experiment=topdown_quickstart")
    assert {config.stages[name]._get_node("data")._value() for name in ("train", "evaluate", "quantize")} == {"${data}"}


def test_no_weights_train_a_quickstart_from_nothing():
    assert stages("experiment=topdown_quickstart").stages.train.training.steps == 0
    assert stages("experiment=topdown_quickstart", "weights=null").stages.train.training.steps == 4000


def test_the_name_of_a_folder_with_a_point_is_whole():
    label = Detector.label_of
    assert label({"file": f"outputs/one/build/{ADDRESS}"}, {}) == ADDRESS
    assert label({"file": f"outputs/one/build/{ADDRESS}/engine.onnx"}, {}) == ADDRESS
    assert label({"file": "detectors/yolo11n.v2.onnx", "score_threshold": 0.2}, {}) == "yolo11n.v2-s0.2"
