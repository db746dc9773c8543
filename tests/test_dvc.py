"""dvc.yaml says what the code says, and `dvc repro` does nothing that is not needed."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from test_config import compose

import pipeline.__main__ as main
from pipeline.artifacts import Stage

CONTENT = yaml.safe_load((ROOT / "dvc.yaml").read_text())
VARS = {key: value for entry in CONTENT["vars"] for key, value in entry.items()}


def filled(text, item):
    """DVC's interpolation of variables and matrix items."""

    def value(match):
        found = {**VARS, "item": item}
        for key in match[1].split("."):
            found = found[key]
        return str(found)

    return re.sub(r"\$\{([\w.]+)\}", value, text)


def commands():
    for name, stage in CONTENT["stages"].items():
        axes = {key: VARS[value.strip("${}")] for key, value in stage.get("matrix", {}).items()}
        for values in itertools.product(*axes.values()):
            item = dict(zip(axes, values, strict=True))
            lists = {k: [filled(e, item) for e in stage.get(k, [])] for k in ("deps", "outs")}
            params = [filled(next(iter(e)), item) for e in stage["params"]]
            yield pytest.param(
                filled(stage["cmd"], item), lists["deps"], lists["outs"], params, id=f"{name}-{len(item)}-{values}"[:60]
            )


@pytest.mark.parametrize(("command", "deps", "outs", "params"), list(commands()))
def test_every_command_makes_its_outputs_from_its_dependencies(command, deps, outs, params):
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "pipeline"]
    config = compose(*words[3:])
    names = main._plain(config.stage)
    names = [names] if isinstance(names, str) else names
    stages = {name: Stage.from_config(name, main._resolved(config.stages[name])) for name in config.stages}
    root = f"outputs/{config.name}"
    expected = [f"{root}/{n}/{stages[n].address}".rstrip("/") for n in names]
    assert outs == expected
    needed = set()
    for name in names:
        needed |= set(stages[name].code)
        for upstream in stages[name].inputs.values():
            if stages[upstream].aside:
                continue  # DVC's chain has none
            address = "" if stages[name].collect else stages[upstream].address
            needed.add(f"{root}/{upstream}/{address}".rstrip("/"))
        if stages[name].device:
            needed.add("outputs/cache/device.json")
        assert f"conf/stages/{name}.yaml" in params
    covered = {d for d in needed if any(d == e or d.startswith(f"{e}/") for e in deps)}
    assert needed - covered - set(outs) == set()
    extra = {d for d in deps if d not in needed and not any(n.startswith(f"{d}/") for n in needed)}
    assert extra <= {f"{root}/sample/{VARS['calibration']}"}  # of the precisions that need no calibration
    for file in [*params, *(d for d in deps if not d.startswith("outputs/"))]:
        assert (ROOT / file).exists(), file


@pytest.fixture
def project(tmp_path):
    """A clone of the working tree whose DVC chain is the smoke experiment's, with one network and one resolution."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        if not name.startswith(("tests/", "benchmarks/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    content = yaml.safe_load((tmp_path / "dvc.yaml").read_text())
    dense = "lwop-s2-w0.125"
    content["vars"] = [
        {"experiment": "smoke"}, {"dense": dense}, {"pruned": f"{dense}_l1-0.45-r16"}, {"calibration": "stratified-8-s0"},
        {"resolutions": ["64x80"]},
        {"networks": [{"pruner": "none", "label": f"{dense}_dense", "weights": f"train/{dense}"}]},
        {"precisions": [{"name": "int8", "label": "int8-auto-stratified-8-s0"}]},
    ]  # fmt: skip
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def repro(project, *words):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    env = {**os.environ, "PYTHONPATH": str(project), "PATH": path, "DVC_NO_ANALYTICS": "1"}
    env.pop("POSEPRESS_RUN", None)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", *words], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return re.findall(r"Running stage '([^']+)'", done.stdout)


def test_repro_runs_what_changed_and_nothing_else(project):
    first = repro(project)
    assert len(first) == len(set(first)) == 10
    assert first[-1] == "report"
    table = project / "outputs/smoke/report/results.csv"
    assert len(table.read_text().splitlines()) == 2
    assert repro(project) == [], "a second one does nothing"
    content = yaml.safe_load((project / "dvc.yaml").read_text())
    next(v for v in content["vars"] if "resolutions" in v)["resolutions"] = ["64x80", "72x88"]
    (project / "dvc.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    added = repro(project)
    assert {name.partition("@")[0] for name in added} == {"quantize", "build", "tune", "measure", "report"}
    assert len(added) == 5
    assert all("72x88" in name for name in added if name != "report")
    assert len(table.read_text().splitlines()) == 3
    manifest = json.loads((project / "outputs/smoke/report/manifest.json").read_text())
    assert manifest["summary"]["engines"] == 2
