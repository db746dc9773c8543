"""A given network is not tried on thousands of drawn images that the command did not name."""

import pytest

from pipeline.launch import command_line
from pipeline.launch.cell import Cell
from posepress.errors import UserError


def preflight(*words):
    read = command_line.read(["tracking=none", "model=onnx", "model.onnx=there.onnx", *words])
    Cell(command_line.compose(read.options, None), read.options, read.sweep).preflight()


@pytest.mark.parametrize("stage", ["stage=all", "stage=export", "stage=[export,build,evaluate]"])
def test_the_images_of_a_given_network_are_named(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.launch.preflight.check_files", lambda stage: None)
    with pytest.raises(UserError, match=r"data: .* name the images .* or data=synthetic, which draws 9,700 images"):
        preflight(stage)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_is_named_before_its_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there\.onnx: no such file"):
        preflight()


@pytest.mark.parametrize("words", [["data=synthetic"], ["experiment=smoke"]])
def test_images_that_are_named_are_taken(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there\.onnx: no such file"):
        preflight(*words)


def test_what_is_no_onnx_file_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"there\.onnx: "):
        preflight("data=synthetic", "stage=export")


def test_a_report_needs_no_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preflight("stage=report")
    assert not list(tmp_path.iterdir())
