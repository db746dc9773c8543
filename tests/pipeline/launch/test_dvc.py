"""dvc.yaml says what the code says: `make dvc.yaml` writes the source files that each stage runs."""

import itertools
import re
import shlex

import pytest
import yaml

from pipeline.launch.cell import plain, resolved
from pipeline.results.fingerprint import source_files
from pipeline.results.stage import Stage, value_at
from tests.conftest import ROOT
from tests.pipeline.launch.test_config import compose

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


def items(stage):
    """The items of a stage's matrix."""
    axes = {key: VARS[value.strip("${}")] for key, value in stage.get("matrix", {}).items()}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def stages_of(command):
    """The stages that a command runs, all stages of its configuration, and the configuration."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "pipeline"]
    config = compose(*words[3:])
    names = plain(config.stage)
    stages = {name: Stage.from_config(name, resolved(config.stages[name])) for name in config.stages}
    return [names] if isinstance(names, str) else names, stages, config


def code_of(command):
    """The source files whose edit makes the results of a command stale."""
    names, stages, config = stages_of(command)
    files = set()
    for name in names:
        holds = {"train", "prune", "retrain"}.intersection(stages[name].inputs.values())
        files |= set(source_files(stages[name], [str(config.model["_target_"])] if holds else []))
    return {str(file.relative_to(ROOT)) for file in files}


def commands():
    for name, stage in CONTENT["stages"].items():
        for item in items(stage):
            lists = {k: [filled(e, item) for e in stage.get(k, [])] for k in ("deps", "outs")}
            params = [filled(next(iter(e)), item) for e in stage["params"]]
            yield pytest.param(
                filled(stage["cmd"], item),
                lists["deps"],
                lists["outs"],
                params,
                id=f"{name}-{len(item)}-{tuple(item.values())}"[:60],
            )


@pytest.mark.parametrize(("command", "deps", "outs", "params"), list(commands()))
def test_every_command_makes_its_outputs_from_its_dependencies(command, deps, outs, params):
    names, stages, config = stages_of(command)
    root = f"outputs/{config.name}"
    expected = [f"{root}/{n}/{stages[n].address}".rstrip("/") for n in names]
    assert outs == expected
    needed = set()
    for name in names:
        for upstream in stages[name].inputs.values():
            if stages[upstream].aside:
                continue  # DVC's chain has none
            address = "" if stages[name].collect else stages[upstream].address
            needed.add(f"{root}/{upstream}/{address}".rstrip("/"))
        needed |= {str(file) for key in stages[name].files if (file := value_at(stages[name].options, key)) is not None}
        if stages[name].device:
            needed.add("outputs/cache/device.json")
        assert f"conf/stages/{name}.yaml" in params
    assert needed - set(deps) - set(outs) == set()
    extra = {d for d in deps if d not in needed and not d.endswith(".py")}
    assert extra <= {f"{root}/sample/{VARS['calibration']}"}  # of the precisions that need no calibration
    for file in [*params, *(d for d in deps if not d.startswith("outputs/"))]:
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", CONTENT["stages"])
def test_a_stage_depends_on_the_code_it_runs(name):
    stage = CONTENT["stages"][name]
    listed = [dep for dep in stage["deps"] if dep.endswith(".py")]
    needed = set().union(*(code_of(filled(stage["cmd"], item)) for item in items(stage)))
    assert sorted(needed) == listed, "write them: make dvc.yaml"


if __name__ == "__main__":
    text = (ROOT / "dvc.yaml").read_text()
    for name, stage in CONTENT["stages"].items():
        code = sorted(set().union(*(code_of(filled(stage["cmd"], item)) for item in items(stage))))
        others = [dep for dep in stage["deps"] if "outputs/" in dep or "$" in dep]
        start = text.index("    deps:\n", text.index(f"  {name}:\n"))
        end = text.index("    params:\n", start)
        text = text[:start] + "    deps:\n" + "".join(f"      - {dep}\n" for dep in [*code, *others]) + text[end:]
    (ROOT / "dvc.yaml").write_text(text)
