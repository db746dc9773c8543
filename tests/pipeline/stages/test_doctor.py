"""What a machine is told about itself."""

import json

import pytest

from pipeline.results.job import Job
from pipeline.stages import doctor
from tests.conftest import pipeline


def looked(tmp_path, root):
    out = tmp_path / "out"
    out.mkdir()
    job = Job(out, {}, {}, tmp_path / "scratch", tmp_path / "cache")
    doctor.Doctor(str(tmp_path / "outputs"), str(root), "now").run(job)
    return {found["what"]: found for found in json.loads((out / "doctor.json").read_text())}


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
