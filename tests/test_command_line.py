"""The words of the command: flags in any place, quotes, help, and sweeps whose cells need different stages."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SMOKE, pipeline, refused
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pipeline import __version__, command_line, options, preflight
from pipeline.errors import UserError


def test_flags_stand_in_any_place():
    words = command_line.read(["a=1", "--multirun", "b=2", "--config-dir", "my conf", "c=3", "--cfg=job"])
    assert words.flags == ["--multirun", "--config-dir", "my conf", "--cfg=job"]
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


@pytest.mark.parametrize("words", [["--version"], ["stage=train", "--version"]])
def test_the_version_is_ours(words, tmp_path):
    assert pipeline(*words, "tracking=none", cwd=tmp_path, check=0).stdout == f"posepress {__version__}\n"
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
