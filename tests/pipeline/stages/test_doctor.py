"""What a machine is told about itself."""

import json
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.probing.machine import findings
from tests.conftest import ROOT, pipeline


def looked(tmp_path, root):
    return {found.what: asdict(found) for found in findings(tmp_path / "outputs", root)}


def test_it_works_where_there_is_nothing_and_looks_again(tmp_path):
    first = pipeline("stage=doctor", "tracking=none", cwd=tmp_path, check=0)
    assert "not installed" in first.stderr
    found = {f["what"]: f for f in json.loads((tmp_path / "outputs/default/doctor/doctor.json").read_text())}
    assert found["TensorRT"]["remedy"] == "pip install tensorrt cuda-python"
    assert "CPUExecutionProvider" in found["onnxruntime"]["found"]
    assert "doctor     done" in pipeline("stage=doctor", "tracking=none", cwd=tmp_path, check=0).stderr


@pytest.mark.parametrize(
    ("version", "can", "cannot"),
    [
        ("10_3", "int8_entropy", "same_compute_capability"),
        ("10_16", "same_compute_capability", None),
        ("11_1", "same_compute_capability", "int8_entropy"),
    ],
)
def test_it_says_what_a_version_can_do(version, can, cannot, tmp_path, monkeypatch):
    monkeypatch.setenv("POSEPRESS_TENSORRT_DOUBLE", version)
    done = pipeline("stage=doctor", "tracking=none", cwd=tmp_path, double=True, check=0)
    assert "Double of a GPU, SM 9.0" in done.stderr
    found = {f["what"]: f for f in json.loads((tmp_path / "outputs/default/doctor/doctor.json").read_text())}
    assert found["TensorRT"]["found"].startswith(version.replace("_", "."))
    assert can in found["TensorRT can"]["found"]
    assert (cannot is None) == ("TensorRT cannot" not in found)
    assert cannot is None or cannot in found["TensorRT cannot"]["found"]


@pytest.mark.parametrize(
    ("board", "supported"),
    [
        ("NVIDIA Jetson TX2 Developer Kit", False),
        ("NVIDIA Jetson Nano Developer Kit", False),
        ("NVIDIA Jetson Orin Nano Developer Kit", True),
    ],
)
def test_boards_that_stop_at_tensorrt_8_are_told_so(board, supported, tmp_path):
    root = tmp_path / "root"
    (root / "proc/device-tree").mkdir(parents=True)
    (root / "proc/device-tree/model").write_text(f"{board}\0")
    (root / "etc").mkdir()
    (root / "etc/nv_tegra_release").write_text("# R36")
    found = looked(tmp_path, root)
    assert found["machine"]["found"] == board
    assert "NVIDIA driver" not in found, "a Jetson has its own"
    expected = "JetPack 6 or 7 brings it" if supported else "not supported: 10.3 is the oldest; build for an Orin or a PC"
    assert found["TensorRT"]["remedy"] == expected


def test_a_gpu_that_does_not_answer_is_said(tmp_path, monkeypatch, doubles):
    from cuda.bindings import runtime

    monkeypatch.setattr(runtime, "DEVICES", 0)
    found = looked(tmp_path, tmp_path)
    assert found["GPU"]["found"] == "does not answer"
    assert "cudaErrorInvalidDevice" in found["GPU"]["remedy"]
    assert "nvidia-smi" in found["GPU"]["remedy"]


def test_a_given_file_is_looked_into_and_its_preprocessing_found(tmp_path):
    (tmp_path / "data").symlink_to(ROOT / "data")
    few = "data.counts={train: 8, unlabelled: 1, tune: 8, agreement: 1, validation: 1}"
    pipeline("experiment=topdown_quickstart", few, "tracking=none", "stage=[train,export]", cwd=tmp_path, check=0)
    (file,) = (tmp_path / "outputs/topdown_quickstart/export").glob("*/model.onnx")
    given = ["tracking=none", "stage=doctor", "model=onnx", f"model.onnx={file}", "training_resolution=160x128"]
    done = pipeline(*given, cwd=tmp_path, check=0)
    assert "topdown: 17 maps at stride 4" in " ".join(done.stderr.split())
    assert "family=topdown" in done.stdout
    assert "trying" not in done.stderr, "no data are named"
    spec = ["family=topdown", "model.spec.input={name: image, multiple: 32}", "model.spec.labels=coco_17"]
    spec += ["model.spec.fields=[{name: heatmaps, stride: 4, channels: 17}]", "data=synthetic_demo", few]
    done = pipeline(*given, *spec, cwd=tmp_path, check=0)
    best = next(line for line in done.stdout.splitlines() if "the best finds the most" in line)
    assert "model.spec.input.range=1.0 model.spec.input.mean=[0.4" in best, "the generated people are coloured in any way"
    found = json.loads((tmp_path / "outputs/default/doctor/manifest.json").read_text())["summary"]["tried"]
    assert len(found) == 8
    assert found["RGB, ImageNet's mean and std"] > max(found.values()) - 0.02 > 0.5
    assert max(score for name, score in found.items() if "ImageNet" not in name) < max(found.values()) - 0.05


def test_the_options_of_all_families_with_this_shape_are_printed(tmp_path):
    values = numpy_helper.from_array(np.ones((1, 56, 100), np.float32), "values")
    nodes = [
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Mul", ["values", "mean"], ["output0"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 64, 64])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 56, 100])
    graph = helper.make_graph(nodes, "g", [image], [output], [values])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "given.onnx")
    done = pipeline("tracking=none", "stage=doctor", "model=onnx", "model.onnx=given.onnx", cwd=tmp_path, check=0)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("  model.onnx=given.onnx") and " model=yolov8_pose " in line]
    place = lines.index("or, if it is of the family boxes (100 entries of a box and 52 scores):")
    assert " model=yolo_boxes " in lines[place + 1]
    assert "model.spec.fields.1.channels=52" in lines[place + 1]


def test_exchanged_lines_of_simcc_are_found_on_images(tmp_path):
    """Lines over columns and rows have one shape if the input is square, so that only results tell them apart."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    few = "data.counts={train: 8, unlabelled: 1, tune: 8, agreement: 1, validation: 1}"
    pipeline("experiment=simcc_quickstart", few, "tracking=none", "stage=[train,export]", cwd=tmp_path, check=0)
    (file,) = (tmp_path / "outputs/simcc_quickstart/export").glob("*/model.onnx")
    model = onnx.load(file)
    onnx.save(_square(model), tmp_path / "square.onnx")
    given = ["tracking=none", "stage=doctor", "model=rtmpose", "model.onnx=square.onnx", "training_resolution=160x160"]
    given += ["model.spec.labels=coco_17", "data=synthetic_demo", few]
    for first, second, words in (("simcc_x", "simcc_y", False), ("simcc_y", "simcc_x", True)):
        fields = [
            f"{{name: {name}, stride: .5, channels: 17, axes: C{axis}, tensor: {tensor}}}"
            for name, axis, tensor in (("simcc_x", "X", first), ("simcc_y", "Y", second))
        ]
        done = pipeline(*given, f"model.spec.fields=[{', '.join(fields)}]", "force=true", cwd=tmp_path, check=0)
        best = next(line for line in done.stdout.splitlines() if "the best finds the most" in line)
        assert ("'model.outputs={simcc_x: simcc_x, simcc_y: simcc_y}'" in best) == words


def _square(model):
    """A network for 160x128 as one for 160x160: it reads the middle, and its line over the columns gets empty ends."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    image, (line,) = made.graph.input[0], [out for out in made.graph.output if out.name == "simcc_x"]
    for node in made.graph.node:
        node.input[:] = ["middle" if name == image.name else name for name in node.input]
        node.output[:] = ["short" if name == "simcc_x" else name for name in node.output]
    constants = {"from": [16], "to": [144], "axis": [3], "around": [0, 0, 32, 0, 0, 32]}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(np.array(v, np.int64), n) for n, v in constants.items())
    made.graph.node.insert(0, onnx.helper.make_node("Slice", [image.name, "from", "to", "axis"], ["middle"], name="middle"))
    made.graph.node.append(onnx.helper.make_node("Pad", ["short", "around"], ["simcc_x"], name="padded"))
    image.type.tensor_type.shape.dim[3].dim_value = 160
    line.type.tensor_type.shape.dim[2].dim_value = 320
    del made.metadata_props[:]
    onnx.checker.check_model(made)
    return made
