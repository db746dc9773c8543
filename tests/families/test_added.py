"""A whole family added from a folder of its own goes through the chain, and no file or result of the project changes."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.results.content import sha256
from tests.conftest import ROOT, SMOKE, pipeline

ADDED = Path(__file__).parent / "added"
WORDS = ["family=nose_lines", "model=nose_lines", "name=lines"]


@pytest.fixture(scope="module")
def project():
    """The digests of all files of the project."""
    folders = ("posepress", "evaluation", "calib_samplers", "pipeline", "conf")
    return {file: sha256(file) for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml")}


@pytest.fixture(scope="module")
def chain(tmp_path_factory, finished, project):
    """The family's folder, after a sweep over two precisions beside the results of another family."""
    folder = tmp_path_factory.mktemp("added")
    shutil.copytree(ADDED, folder / "mine")
    shutil.copytree(finished / "outputs", folder / "outputs", symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder / "mine"))
        words = ["--config-dir", str(folder / "mine" / "conf"), *SMOKE, *WORDS]
        words += ["stages.train.training.steps=60", "stages.train.training.lr=1e-2"]
        pruned = pipeline(*words, "pruner=l1", "pruner.round_to=4", "pruner.min_num_filters=4", cwd=folder, check=0)
        assert "torch's exporter" not in pruned.stderr, "the short way of the export knows lines"
        yield folder, pipeline("--multirun", *words, "precision=fp32,int8", cwd=folder, check=0)


def test_every_stage_ran(chain):
    folder, _ = chain
    stages = {manifest.parent.parent.name for manifest in (folder / "outputs" / "lines").glob("*/*/manifest.json")}
    assert {"train", "export", "sample", "quantize", "build", "tune", "evaluate", "benchmark"} <= stages
    assert list((folder / "outputs" / "lines").glob("**/report.html"))


def test_its_tables_have_the_columns_of_its_metric(chain):
    folder, done = chain
    (file,) = (folder / "outputs" / "lines").glob("**/results.csv")
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert sorted((row["pruning"], row["precision"]) for row in rows) == [
        ("dense", "fp32"), ("dense", "int8"), ("l1-0.45-min.4-r4", "fp32")
    ]  # fmt: skip
    for row in rows:
        assert 0 <= float(row["f1"]) <= 1
        assert float(row["f1_lo"]) <= float(row["f1"]) <= float(row["f1_hi"])
        assert not [key for key in row if key == "ap" or key.startswith("ap_")]
    assert [float(row["f1_vs_fp32"]) < 0.5 for row in rows if row["f1_vs_fp32"]] == [True]
    assert [float(row["f1_vs_dense"]) < 0.5 for row in rows if row["f1_vs_dense"]] == [True]
    assert "F1" in done.stdout
    assert " AP" not in done.stdout
    page = next((folder / "outputs" / "lines").glob("**/report.html")).read_text()
    assert "F1 of nose columns" in page
    assert "keypoint AP" not in page


def test_it_learns_and_int8_computes_the_same_line(chain):
    folder, _ = chain
    tuned = json.loads(next((folder / "outputs" / "lines" / "tune").glob("*/decoder.json")).read_text())
    assert set(tuned["options"]) == {"threshold"}
    for manifest in (folder / "outputs" / "lines" / "quantize").glob("*int8*/manifest.json"):
        summary = json.loads(manifest.read_text())["summary"]
        assert summary["int8_layers"] == 3
        assert summary["error_lines"] < 0.1


def test_predictions_are_in_its_own_format(chain):
    folder, _ = chain
    for file in (folder / "outputs" / "lines" / "evaluate").glob("*/predictions.json"):
        rows = json.loads(file.read_text())
        assert all(set(row) == {"image_id", "category_id", "x"} for row in rows)
        assert len(rows) == 12
        assert np.isfinite([x for row in rows for x in row["x"]]).all()


def test_no_file_of_the_project_is_touched_and_no_older_result_is_stale(chain, project):
    folder, _ = chain
    assert all(sha256(file) == digest for file, digest in project.items())
    kept = {file: file.stat().st_mtime_ns for file in (folder / "outputs" / "smoke").glob("*/*/manifest.json")}
    words = ["--config-dir", str(folder / "mine" / "conf"), *SMOKE, "precision=int8", "pruner=l1"]
    done = pipeline(*words, cwd=folder, check=0)
    assert "fresh" in done.stdout + done.stderr
    changed = [file for file, before in kept.items() if file.stat().st_mtime_ns != before and "/report" not in str(file)]
    assert not changed


FAILING = """from nose_lines import ColumnDecoder


class Failing(ColumnDecoder):
    def decode(self, fields, views):
        return [][0]
"""


def test_an_error_in_its_code_names_the_line(chain, tmp_path, monkeypatch):
    folder, _ = chain
    (folder / "mine" / "failing.py").write_text(FAILING)
    shutil.copytree(folder / "outputs", tmp_path / "outputs", symlinks=True)
    monkeypatch.syspath_prepend(str(folder / "mine"))
    words = ["--config-dir", str(folder / "mine" / "conf"), *SMOKE, *WORDS, "decoder._target_=failing.Failing"]
    words += ["stage=evaluate", "stages.train.training.steps=60", "stages.train.training.lr=1e-2"]
    files = [*(tmp_path / "outputs" / "lines" / "evaluate").glob("*/*.json")]
    before = {file: sha256(file) for file in files}
    said = pipeline(*words, cwd=tmp_path, check=2).stderr
    assert "error: stage=evaluate: failing.py, line 6: IndexError: list index out of range; correct it (debug=true" in said
    assert "Traceback" not in said
    assert before
    assert before == {file: sha256(file) for file in files}, "earlier results stay"
