"""The words of the command: flags in any place, quotes, help, and sweeps whose cells need different stages."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pipeline.launch import command_line, options, preflight, sweep
from pipeline.models.trust import network_class, trust
from pipeline.results.content import sha256
from pipeline.results.stage import Stage
from pipeline.version import VERSION
from posepress.errors import UserError
from tests.conftest import ROOT, SMOKE, pipeline, refused


def test_flags_stand_in_any_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("my conf", "x"):
        (tmp_path / folder).mkdir()
    words = command_line.read(["a=1", "--multirun", "b=2", "--config-dir", "my conf", "c=3", "--package=x"])
    assert words.flags == ["--multirun", "--config-dir", "my conf", "--package=x"]
    assert words.options == ["a=1", "b=2", "c=3"]
    assert words.sweep
    assert words.config_dir == "my conf"
    assert command_line.read(["--config-dir=x"]).config_dir == "x"
    assert not command_line.read(["a=1"]).sweep


@pytest.mark.parametrize(
    "value", ["lr=0.1", "my data (1)", "данные", "it's", "a#b", "a&b;c", "x[1]", '"', "a\\'b", "?x=1", "a\nb", "!"]
)
def test_a_value_is_read_as_it_stands(value):
    (word,) = command_line.read([f"data.train.images={value}"]).options
    assert str(OverridesParser.create().parse_override(word).value()) == value


def test_what_hydra_reads_is_left_to_it():
    words = ["scales=[1,2]", "name=x", "~tag", "+a={b:1}", "weights=null", "seed=1", "a=", "b='c,d'"]
    assert command_line.read(words).options == words
    assert command_line.read(["--multirun", "seed=1,2", "c=choice(1,2)"]).options == ["seed=1,2", "c=choice(1,2)"]


def test_a_comma_is_a_sweep_or_is_quoted():
    with pytest.raises(UserError) as error:
        command_line.read(["weights=/data/a,b.pt"])
    hint = re.search(r': "(.*)"$', str(error.value))[1]
    assert command_line.read([hint]).options == ["weights='/data/a,b.pt'"]


def test_the_command_that_the_help_names_shows_every_option(tmp_path):
    shown = pipeline(
        "experiment=smoke", "pruner=l1", "--cfg", "job", "--resolve", "tracking=none", cwd=tmp_path, check=0
    ).stdout
    assert "label: lwop" in shown
    assert "${" not in shown.replace("${hydra", "")


@pytest.mark.parametrize("words", [["--version"], ["stage=train", "--version"]])
def test_the_version_is_ours(words, tmp_path):
    assert pipeline(*words, "tracking=none", cwd=tmp_path, check=0).stdout == f"posepress {VERSION}\n"
    assert not list(tmp_path.iterdir())


def test_no_words_print_the_help(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pipeline"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "python -m pipeline stage=NAME" in done.stdout
    assert "--cfg job" in done.stdout
    assert not list(tmp_path.iterdir())


def skipped(*words, sweep=True):
    plan, left = preflight.planned(command_line.compose([*SMOKE, *words], None), sweep)
    return plan, left


def test_a_cell_of_a_sweep_skips_what_it_does_not_need():
    assert skipped("stage=[export,sample,quantize]") == (["export", "quantize"], ["sample"])
    assert skipped("stage=[export,sample,quantize]", "precision=int8") == (["export", "sample", "quantize"], [])
    assert skipped("stage=sample") == ([], ["sample"])
    assert skipped("stage=doctor") == (["doctor"], [])
    with pytest.raises(UserError, match="outside the chain"):
        skipped("stage=[export,sample]", sweep=False)
    with pytest.raises(UserError, match="no such stage"):
        skipped("stage=[export,smaple]")


def test_a_sweep_over_choices_of_ones_own(smoke):
    """The report finds a folder of choices too, each cell says what it skips, and a stage that none needs is an error."""
    folder = smoke / "own choices (1)"
    (folder / "model").mkdir(parents=True)
    shutil.copy(ROOT / "conf/model/lightweight_openpose_smoke.yaml", folder / "model/mine.yaml")
    words = ["stage=[sample,report]", "precision=fp32,int8", "--multirun", "model=mine", "--config-dir", str(folder), *SMOKE]
    done = pipeline(*words, cwd=smoke, check=0)
    assert done.stderr.count("skipped") == 1
    assert re.search(r"cell 0: .*precision=fp32.*\nsample +skipped: this cell does not need it\n", done.stderr), done.stderr
    assert "report" in done.stderr
    done = pipeline("stage=[sample,report]", "precision=fp32,fp32", "--multirun", *SMOKE, cwd=smoke)
    assert "stage=sample: no cell of this sweep needs it" in refused(done)


def test_cells_are_found_wherever_the_results_lie(tmp_path):
    words = command_line.read(["experiment=smoke", "outputs=a b=c", "seed=1,2", "--multirun"])
    assert [str(folder) for folder in words.outputs()] == ["a b=c"]
    assert [str(folder) for folder in command_line.read(["outputs=x,y", "--multirun"]).outputs()] == ["x", "y"]
    assert [str(folder) for folder in command_line.read(["experiment=smoke"]).outputs()] == ["outputs"]
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/away.yaml").write_text("# @package _global_\noutputs: elsewhere\n")
    words = command_line.read(["--config-dir", str(tmp_path), "experiment=away", "seed=1,2", "--multirun"])
    assert [str(folder) for folder in words.outputs()] == ["elsewhere"]


def test_the_nearest_choice_may_be_ones_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/my_network.yaml").write_text("label: mine\n")
    done = pipeline("--config-dir", str(tmp_path), "model=my_netwrok", "tracking=none", cwd=tmp_path)
    assert "model=my_netwrok: no such choice; did you mean 'my_network'?" in refused(done)


def test_what_another_machine_needs_is_not_looked_for_here(tmp_path, monkeypatch):
    (tmp_path / "needs_a_gpu.py").write_text("import no_such_package_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    node = OmegaConf.create({"_target_": "needs_a_gpu.Network"})
    assert not options.installed(node)
    assert options.installed(OmegaConf.create({"_target_": "pipeline.nowhere.Network"}))
    assert options.installed(OmegaConf.create({"label": "none"}))
    with pytest.raises(UserError, match="needs the Python package 'no_such_package_here', which is not installed here"):
        options.check_component(OmegaConf.create({"model": node}), "model")


def test_experiments_change_no_other_network():
    for experiment in ("smoke", "demo", "demo_untrained"):
        config = command_line.compose([f"experiment={experiment}", "model=mobilenetv2_paf"], None)
        assert config.model.width == command_line.compose(["model=mobilenetv2_paf"], None).model.width
        assert "width" not in command_line.compose([f"experiment={experiment}", "model=onnx", "model.onnx=m"], None).model


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Leaves what became of cells in folders, and finishes the sweep; the folders of the reports that were made."""
    monkeypatch.setattr(sweep, "swept", {})
    made = []

    class Report:
        def __init__(self, config, overrides, sweep):
            self.config = config

        def run(self):
            if self.config.name == "broken":
                raise ZeroDivisionError("a bug in the report")
            made.append((self.config.outputs, self.config.name))

    def finish(*cells):
        for number, (outputs, name, error) in enumerate(cells):
            folder = sweep.run_folder(tmp_path / outputs) / "cells"
            folder.mkdir(parents=True, exist_ok=True)
            sweep.swept[tmp_path / outputs] = None
            overrides = ["outputs=o-${name}", f"name={name}", f"seed={number}"]
            place = {"name": name, "outputs": str(tmp_path / outputs)}
            content = {"overrides": overrides, "error": error, "collect": ["report"], "skipped": [], **place}
            (folder / f"{number:06d}.json").write_text(json.dumps(content))
        sweep.finish_sweep(command_line.read(["--multirun", "outputs=o-${name}", "name=a,b"]))

    monkeypatch.setattr(sweep, "Cell", Report)
    return finish, made


def test_every_folder_and_name_of_a_sweep_has_a_report(swept, tmp_path):
    finish, made = swept
    finish(("x", "a", None), ("y", "a", None), ("y", "b", None))
    assert made == [(str(tmp_path / "x"), "a"), (str(tmp_path / "y"), "a"), (str(tmp_path / "y"), "b")]


def test_a_failed_report_hides_no_failed_cell_and_is_none(swept, capsys):
    finish, made = swept
    with pytest.raises(UserError) as error:
        finish(("x", "broken", None), ("y", "a", "no memory"), ("y", "b", None))
    assert str(error.value).startswith("1 of 3 cells and the report failed:")
    assert "no memory" in str(error.value)
    assert "ZeroDivisionError: a bug in the report" in str(error.value)
    assert "Traceback" in capsys.readouterr().err
    assert [name for _, name in made] == ["b"]


def test_a_sweep_without_cells_is_an_error(swept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no cell of this sweep wrote its outcome there"):
        swept[0]()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("def broken(:", "cannot be imported (SyntaxError: "),
        ("unknown_name", "cannot be imported (NameError: name 'unknown_name'"),
        ("import no_such_package_here", "cannot be imported (ModuleNotFoundError: No module named 'no_such_package_here')"),
        ("from json import nothing", "cannot be imported (ImportError: cannot import name 'nothing'"),
    ],
)
def test_a_trusted_module_that_fails_says_why(code, says, tmp_path, monkeypatch):
    monkeypatch.setenv("POSEPRESS_TRUSTED_MODULES", "")
    name = f"nets_that_fail_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trust([name], None)
    with pytest.raises(UserError) as error:
        network_class(f"{name}.Net", tmp_path / "architecture.json")
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    trust(["no_such_module_here"], None)
    with pytest.raises(UserError, match="put its module on PYTHONPATH"):
        network_class("no_such_module_here.Net", tmp_path / "architecture.json")


def test_what_an_addition_belongs_to_may_need_another_machine(tmp_path, monkeypatch):
    (tmp_path / "fails_when_read.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = OmegaConf.create({"backend": {"_target_": "fails_when_read.Runner", "foo": 1}})
    with pytest.raises(UserError, match=r"^backend\._target_=.*ZeroDivisionError"):
        options.check_added(config, ["+backend.foo=1"])


def test_an_export_of_another_file_is_adopted_anew(tmp_path):
    def write(value):
        tensor = onnx.numpy_helper.from_array(np.float32([value]), "w")
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [tensor])), tmp_path / "m.onnx")

    write(1)
    file, given = tmp_path / "m.onnx", {"spec": {"stride": 8}, "outputs": None, "resolution": "64x80", "opset": 20}
    manifest = {"config": {**given, "onnx": {"sha256": sha256(file)}}}
    assert preflight._adopted(manifest, Stage("export", "a", given), file)
    assert not preflight._adopted(None, Stage("export", "a", given), file)
    assert not preflight._adopted(manifest, Stage("export", "a", {**given, "outputs": {"a": "b"}}), file)
    assert not preflight._adopted(manifest, Stage("export", "a", {**given, "spec": {"stride": 4}}), file)
    write(2)
    assert not preflight._adopted(manifest, Stage("export", "a", given), file)
