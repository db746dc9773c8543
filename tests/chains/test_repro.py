"""`dvc repro` does what is needed and nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests import forks
from tests.conftest import ROOT, compiled_before, shared_exports


@pytest.fixture
def project(tmp_path, finished):
    """A clone of the working tree whose DVC chain is the smoke experiment's, with one network and one resolution."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        if not name.startswith(("tests/", "benchmarks/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name)
    compiled_before(tmp_path)
    config = tmp_path / "conf" / "config.yaml"
    assert "tracking: mlflow" in config.read_text()
    config.write_text(config.read_text().replace("tracking: mlflow", "tracking: none"))
    content = yaml.safe_load((tmp_path / "dvc.yaml").read_text())
    dense = "lwop-s2-w0.125"
    content["vars"] = [
        {"experiment": "smoke"}, {"network": "conf/experiment/smoke.yaml"},
        {"dense": dense}, {"pruned": f"{dense}_l1-0.45-r16"}, {"calibration": "stratified-8-s0"},
        {"resolutions": ["64x80"]},
        {"networks": [{"pruner": "none", "label": f"{dense}_dense", "weights": f"train/{dense}"}]},
        {"precisions": [{"name": "fp32", "options": "", "label": "fp32"}]},
    ]  # fmt: skip
    for unneeded in ("prune", "retrain"):  # of the dense network; test_dvc.py compares their commands with the code
        del content["stages"][unneeded]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


PYTHON = """#!{python} -IS
import os, sys
sys.path.insert(0, {root!r})
from tests import forks
assert sys.argv[1:3] == ["-m", "pipeline"], sys.argv
sys.exit(forks.ask({server!r}, sys.argv[3:], os.getcwd(), os.environ, None))
"""


@pytest.fixture
def python(project, tmp_path_factory):
    """A folder with a `python` that forks the commands of the project, instead of importing all of it for each."""
    folder = tmp_path_factory.mktemp("bin")
    with forks.serving(project) as server:
        text = PYTHON.format(python=sys.executable, root=str(ROOT), server=str(server))
        (folder / "python").write_text(text)
        (folder / "python").chmod(0o755)
        yield folder


def repro(project, python, *words):
    path = os.pathsep.join([str(python), os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {**os.environ, "PYTHONPATH": str(project), "PATH": path, "DVC_NO_ANALYTICS": "1"}
    env.pop("POSEPRESS_RUN", None)
    with shared_exports(project):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", *words], cwd=project, env=env, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def test_repro_runs_what_changed_and_nothing_else(project, python):
    first = repro(project, python)
    assert len(first) == len(set(first)) == 8
    assert first[-1] == "report"
    table = project / "outputs/smoke/report/results.csv"
    assert len(table.read_text().splitlines()) == 2
    assert repro(project, python) == [], "a second one does nothing"
    content = yaml.safe_load((project / "dvc.yaml").read_text())
    next(v for v in content["vars"] if "resolutions" in v)["resolutions"] = ["64x80", "72x88"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    added = repro(project, python)
    assert {name.partition("@")[0] for name in added} == {"quantize", "build", "tune", "measure", "report"}
    assert len(added) == 5
    assert all("72x88" in name for name in added if name != "report")
    assert len(table.read_text().splitlines()) == 3
    manifest = json.loads((project / "outputs/smoke/report/manifest.json").read_text())
    assert manifest["summary"]["engines"] == 2
