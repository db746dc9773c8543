"""What comes from others is data: it runs no code, reads no files of this machine, and writes nothing but its own place."""

import json
import sys
from functools import partial

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.trust import trust


@pytest.fixture(autouse=True)
def untrusting():
    trust([], None)
    yield
    trust([], None)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder of a small network, and a function that changes its architecture.json."""
    make = partial(LightweightOpenPose, stages=2, width=0.125)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    store.save(make(), folder, make, [])

    def change(**changes):
        file = folder / store.ARCHITECTURE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return folder, change


NETS = """
import pathlib
from torch import nn
pathlib.Path(__file__).with_name("imported").touch()

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        pathlib.Path(__file__).with_name("made").touch()

def build(**options):
    return Net()
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of somebody else on the path, which leaves a file when it is imported."""
    (tmp_path / "others_nets.py").write_text(NETS)
    (tmp_path / "reexporting.py").write_text("from others_nets import Net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("others_nets", "reexporting"):
        sys.modules.pop(name, None)


def test_a_checkpoint_of_our_own_networks_loads(checkpoint):
    network, make, history = store.load(checkpoint[0])
    assert isinstance(network, LightweightOpenPose)
    assert make.keywords == {"stages": 2, "width": 0.125}
    assert history == []


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.Popen", "torch.nn.Linear", "builtins.eval", "pipeline.processes.pool", "others_nets.Net",
     "pipeline.modelsx.Net", "print"],
)  # fmt: skip
def test_a_class_of_another_module_is_not_even_imported(target, checkpoint, nets):
    folder, change = checkpoint
    change(target=target, options={})
    with pytest.raises(UserError, match=rf"architecture\.json: its network is {target}, .*add trusted_modules=\[") as found:
        store.load(folder)
    assert f"trusted_modules=[{target.rpartition('.')[0] or target}]" in str(found.value)
    assert not (nets / "imported").exists()


@pytest.mark.parametrize(
    "target",
    [
        "pipeline.models.store.read_weights",
        "pipeline.models.store.partial",
        "pipeline.models.onnx_graph.onnx",
        "pipeline.models.lightweight_openpose.nn",
        "pipeline.models.none",
        "pipeline.models.none.Net",
        "pipeline.models.store.SafetensorError",
        "pipeline.models",
        "", None, 5, ["os.system"], "../x", "os.system; x", "pipeline.models..x", ".x",
    ],
)  # fmt: skip
def test_what_is_no_network_is_refused(target, checkpoint):
    folder, change = checkpoint
    change(target=target, options={})
    with pytest.raises(UserError, match=r"architecture\.json: "):
        store.load(folder)


def test_networks_of_modules_that_the_command_names_load(checkpoint, nets):
    folder, change = checkpoint
    change(target="others_nets.Net", options={"any": 1})
    trust(["others_nets"], None)
    with pytest.raises(UserError, match="a checkpoint of another network"):  # its weights are not this network's
        store.load(folder)
    assert (nets / "made").exists()
    change(target="others_nets.build")
    with pytest.raises(UserError, match=r"others_nets\.build is no class of a network"):
        store.load(folder)
    change(target="reexporting.Net")
    trust(["reexporting"], None)
    with pytest.raises(UserError, match=r"reexporting\.Net is no class of a network"):
        store.load(folder)


@pytest.mark.parametrize(
    ("own", "target"), [("others_nets.Net", "Net"), ("reexporting.Net", "Net"), ("others_nets.build", "build")]
)
def test_the_commands_own_network_loads(own, target, checkpoint, nets):
    folder, change = checkpoint
    change(target=f"others_nets.{target}", options={})
    trust([], own)
    with pytest.raises(UserError, match="a checkpoint of another network"):
        store.load(folder)
    assert (nets / "made").exists()


@pytest.mark.parametrize("names", ["my.nets", [5], ["a b"], ["../x"], [""], None])
def test_trusted_modules_are_names(names):
    with pytest.raises(UserError, match=r"trusted_modules=.*give them like trusted_modules=\[my\.nets\]"):
        trust(names, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"width": "wide"}},
        {"options": {"width": 1e9}},
        {"options": {"stages": -1}},
        {"options": {"unknown": 1}},
        {"options": ["stages"]},
        {"options": None},
        {"pruning": None},
        {"pruning": [["backbone.0.0", True, [-1]]]},
        {"pruning": [["backbone.0.0", True, ["0"]]]},
        {"pruning": [["backbone.0.0", True]]},
        {"pruning": [["none", True, [0]]]},
        {"pruning": [5]},
        {"pruning": [[None, "2:4", []]]},
        {"pruning": [["none", "2:4", []]]},
    ],
)
def test_a_structure_that_is_none_is_refused(changes, checkpoint):
    folder, change = checkpoint
    change(**changes)
    with pytest.raises(UserError, match=r"architecture\.json: "):
        store.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{", '{"target": "os.system"}', "5"])
def test_a_damaged_description_is_refused(text, checkpoint):
    folder, _ = checkpoint
    (folder / store.ARCHITECTURE).write_text(text)
    with pytest.raises(UserError, match=r"architecture\.json: .*make it again"):
        store.load(folder)


def test_damaged_weights_are_refused(checkpoint):
    folder, _ = checkpoint
    blob = (folder / store.WEIGHTS).read_bytes()
    for damage in (b"", blob[: len(blob) // 2], b"\xff" * 100):
        (folder / store.WEIGHTS).write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or missing"):
            store.load(folder)
    (folder / store.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or missing"):
        store.load(folder)


class Peeking(nn.Module):
    """A network that looks at its weights while it is made, which weights without storage do not allow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.spec = LightweightOpenPose(stages=2, width=0.125).spec
        if float(self.layer.weight.sum()) == 5:
            raise ValueError


def test_a_network_that_looks_at_its_weights_loads(tmp_path):
    make = partial(Peeking)
    network = make()
    store.save(network, tmp_path, make, [])
    trust([Peeking.__module__], None)
    loaded, _, _ = store.load(tmp_path)
    assert torch.equal(loaded.layer.weight, network.layer.weight)
