"""dvc.yaml says what the code says."""

import itertools
import re
import shlex

import pytest
import yaml
from conftest import ROOT
from test_config import compose

import pipeline.__main__ as main
from pipeline.artifacts import Stage, value_at

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
        needed |= {str(file) for key in stages[name].files if (file := value_at(stages[name].options, key)) is not None}
        if stages[name].device:
            needed.add("outputs/cache/device.json")
        assert f"conf/stages/{name}.yaml" in params
    covered = {d for d in needed if any(d == e or d.startswith(f"{e}/") for e in deps)}
    assert needed - covered - set(outs) == set()
    extra = {d for d in deps if d not in needed and not any(n.startswith(f"{d}/") for n in needed)}
    assert extra <= {f"{root}/sample/{VARS['calibration']}"}  # of the precisions that need no calibration
    for file in [*params, *(d for d in deps if not d.startswith("outputs/"))]:
        assert (ROOT / file).exists(), file
