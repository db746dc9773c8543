"""A result is stale when code changes that it runs, and only then."""

import ast
import shutil
import sys

import pytest

from pipeline.results import fingerprint
from pipeline.results.fingerprint import closure, digest_of_code, networks_of, source_files
from pipeline.results.stage import Stage
from tests.conftest import ROOT


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the project, whose files can be changed."""
    for package in fingerprint.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's package beside the project."""
    folder = tmp_path / "my_nets"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def names(files):
    return {file.name for file in files}


def stage(**options):
    return Stage("train", "a", {"_target_": "pipeline.stages.train.Train", **options})


@pytest.mark.parametrize(
    "new",
    ["pipeline/training/simcc.py", "posepress/decoders/simcc.py", "pipeline/backends/another.py", "pipeline/models/hrnet.py"],
)
def test_a_new_file_makes_nothing_stale(new, copy):
    stages = [Stage(f.stem, "", {"_target_": f"pipeline.stages.{f.stem}.x"}) for f in copy.glob("pipeline/stages/*.py")]
    before = [digest_of_code(source_files(each)) for each in stages]
    (copy / new).write_text("from pipeline.training import loop\n")
    assert [digest_of_code(source_files(each)) for each in stages] == before


def test_a_changed_line_makes_those_stale_that_run_it(copy):
    stages = {name: Stage(name, "", {"_target_": f"pipeline.stages.{name}.x"}) for name in ("train", "tune", "build")}
    before = {name: digest_of_code(source_files(each)) for name, each in stages.items()}
    changes = {"posepress/predict.py": {"tune"}, "pipeline/training/loop.py": {"train"}, "posepress/errors.py": set(stages)}
    for file, stale in changes.items():
        path, text = copy / file, (copy / file).read_text()
        path.write_text(f"{text}\n# another line\n")
        assert {name for name, each in stages.items() if digest_of_code(source_files(each)) != before[name]} == stale
        path.write_text(text)


def test_components_and_given_networks_are_watched():
    given = stage(x={"y": [{"_target_": "evaluation.audit.label"}]})
    files = names(source_files(given, ["pipeline.models.mobilenetv2_paf.MobileNetV2Paf"]))
    assert {"train.py", "audit.py", "mobilenetv2_paf.py"} <= files
    assert "lightweight_openpose.py" not in files


def test_networks_are_those_that_results_name(tmp_path):
    (tmp_path / "architecture.json").write_text('{"target": "my_nets.net.Net", "options": {}}')
    inputs = {"network": [(tmp_path, {"files": {"architecture.json": "", "model.safetensors": ""}})]}
    assert networks_of(inputs) == ["my_nets.net.Net"]


IMPORTS = {
    "from my_nets.blocks import Block": True,
    "from my_nets import blocks": True,
    "import my_nets.blocks": True,
    "import os, my_nets.blocks as b": True,
    "from . import blocks": True,
    "from .blocks import Block": True,
    "from my_nets import (\n    other,  # a remark (in brackets)\n    blocks,\n)": True,
    "from my_nets import \\\n    blocks": True,
    "def build():\n    from my_nets import blocks": True,
    "import os; import my_nets.blocks": True,
    "if True: from my_nets import blocks": True,
    "# from my_nets import blocks": False,
    "from my_nets import other": False,
    "import torch": False,
}


@pytest.mark.parametrize(("line", "followed"), IMPORTS.items())
def test_what_a_users_module_imports_is_watched(line, followed, own):
    (own / "net.py").write_text(f"import math\n{line}\n")
    (own / "blocks.py").write_text("class Block: pass\n")
    files = closure(["my_nets.net"])
    assert names(files) - {"blocks.py"} == {"__init__.py", "net.py"}
    assert ("blocks.py" in names(files)) is followed
    assert "my_nets" not in sys.modules  # nothing was run


def test_a_single_module_and_a_folder_without_init_are_watched(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lone_net.py").write_text("import bare_nets.blocks\n")
    (tmp_path / "bare_nets").mkdir()
    (tmp_path / "bare_nets" / "net.py").write_text("from bare_nets import blocks\n")
    (tmp_path / "bare_nets" / "blocks.py").touch()
    assert names(closure(["lone_net"])) == {"lone_net.py", "blocks.py"}
    assert names(closure(["bare_nets.net"])) == {"net.py", "blocks.py"}


def test_a_module_beside_a_folder_of_its_name_is_watched(own):
    (own / "net.py").write_text("from my_nets import blocks\n")
    (own / "net").mkdir()
    (own / "blocks.py").touch()
    assert names(closure(["my_nets.net"])) == {"__init__.py", "net.py", "blocks.py"}


def test_a_users_neighbouring_modules_are_watched(own):
    (own / "net.py").write_text("import my_layers, numpy, torch.nn\n")
    (own.parent / "my_layers.py").write_text("class Layer: pass\n")
    assert names(closure(["my_nets.net"])) == {"__init__.py", "net.py", "my_layers.py"}


def test_of_a_library_the_module_alone_is_watched():
    files = closure(["torch.nn.modules.linear"])
    assert "linear.py" in names(files)
    assert names(files) <= {"linear.py", "__init__.py"}
    assert closure(["", "no_such_package.net", "sys"]) == []


def test_imports_are_read_as_python_reads_them():
    places = {package: ROOT / package for package in fingerprint.PACKAGES}
    for file in (file for package in fingerprint.PACKAGES for file in (ROOT / package).rglob("*.py")):
        expected = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                expected |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                expected |= {alias.name for alias in node.names}
        found = set(fingerprint._imports(file, "", 0))
        assert expected <= found, file
        assert not [name for name in found - expected if list(fingerprint._files(name, places))], file
