"""Pruning: what is judged, what goes, that nothing else changes, and every refusal."""

import csv
import json
import math
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn
from torch.nn import functional as F

from evaluation.metrics.coco_keypoints import CocoKeypoints
from pipeline.backends.torch import Torch
from pipeline.launch import labels
from pipeline.launch.cell import Cell
from pipeline.models import store
from pipeline.onnx_files.files import Shapes
from pipeline.probing.exported import exported
from pipeline.pruning import semi_structured
from pipeline.pruning.costs import Costs, macs
from pipeline.pruning.criteria import importance, taylor_gates
from pipeline.pruning.cycle import Cycle
from pipeline.pruning.graph import groups
from pipeline.pruning.groups import folded, mask, normalised, remove, replay
from pipeline.pruning.plan import Step, UnreachableError, choose
from pipeline.pruning.pruner import Criterion, Equalization, Pruner, Target
from pipeline.pruning.sensitivity import curves
from pipeline.pruning.sparse24 import Sparse24
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from pipeline.pruning.trial import Trial
from pipeline.report.pruning import curve, section
from pipeline.results.stage import arguments
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import SMOKE, pipeline, refused
from tests.pipeline.models.test_networks import MAKERS, SIZE, outputs, trained


class UNetLike(nn.Module):
    """What the pose networks lack: transposed convolutions, nested concatenations, and a sum of one with the other."""

    spec = NetworkSpec(
        input=InputSpec("image", multiple=8),
        fields=(OutputSpec("heatmaps", 1, 19), OutputSpec("pafs", 1, 38)),
        labels=OPENPOSE_18,
    )

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.deep_norm = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(64, 16, 2, stride=2)
        self.joined = nn.Conv2d(32, 24, 3, padding=1)
        self.skip = nn.Conv2d(3, 24, 1)
        self.head = nn.Conv2d(40, 57, 1)

    @property
    def ignored_layers(self):
        return [self.head]

    def forward(self, x):
        first = F.relu(self.norm(self.first(x)))
        down = torch.sigmoid(self.down(first))  # not zero at zero: masking must be done where channels are read
        deep = F.relu6(self.deep_norm(self.deep(down)))
        up = self.up(torch.cat((deep, down), 1))
        joined = F.silu(self.joined(torch.cat((up, first), 1))) + self.skip(x)
        field = self.head(torch.cat((joined, up), 1))
        return {"heatmaps": field[:, :19], "pafs": field[:, 19:]}


EVERY = [*MAKERS, UNetLike]


class Chain(nn.Module):
    """Four groups of 64 channels: their sizes go down in fine steps, and a plan for them is made at once."""

    spec = UNetLike.spec

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)))
        self.head = nn.Conv2d(64, 57, 1)

    @property
    def ignored_layers(self):
        return [self.head]

    def forward(self, x):
        for layer in self.body:
            x = F.relu(layer(x))
        field = self.head(x)
        return {"heatmaps": field[:, :19], "pafs": field[:, 19:]}


@pytest.fixture(autouse=True)
def timed_for_a_moment(monkeypatch):
    """What a comparison of real networks says is not looked at here."""
    monkeypatch.setattr("pipeline.pruning.cycle._SECONDS", 0.3)


_verdicts = {}
_broken = Trial.broken


@pytest.fixture(autouse=True)
def tried_once(monkeypatch):
    """A trial's weights are random, so its verdict is the same for every network of a structure; test_own_networks tries."""

    def broken(trial, found):
        structure = (type(trial.network), str(trial.network), tuple(group.size for group in found))
        if structure not in _verdicts:
            _verdicts[structure] = _broken(trial, found)
        return _verdicts[structure]

    monkeypatch.setattr(Trial, "broken", broken)


def pruned(network, **options):
    plan = choose(Pruner(**{"pruning_ratio": 0.5, **options}), network, SIZE)
    return plan, remove(network, plan.dropped)


def masked(network, plan):
    dense = deepcopy(network)
    for group in plan.groups:
        mask(dense, group, plan.dropped.get(group.name, ()))
    return dense


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"pruning_ratio": 0.4, "round_to": 1, "min_num_filters": 1},
        {"pruning_ratio": 0.7, "global_pruning": True, "criterion": "l2"},
        {"pruning_ratio": 0.5, "global_pruning": True, "isomorphic": True, "criterion": "l1"},
        {"pruning_ratio": None, "pruning_threshold": 0.8, "normalizer": "max", "criterion": "l1", "round_to": 1},
    ],
)
def test_a_pruned_network_is_the_dense_one_with_its_channels_masked(make, options):
    network = trained(make)
    dense = deepcopy(network)
    plan, history = pruned(network, **options)
    expected = outputs(masked(dense, plan))
    assert (outputs(network) - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = make()
    replay(again, history)
    again.load_state_dict(network.state_dict())
    assert torch.equal(outputs(again), outputs(network))


@pytest.mark.parametrize("make", EVERY)
def test_costs_are_what_the_pruned_network_has(make):
    network = trained(make)
    found = groups(network)
    plan, _ = pruned(deepcopy(network), pruning_ratio=0.3)
    expected = Costs(network, found, SIZE)(plan.kept)
    remove(network, plan.dropped)
    assert expected["params"] == sum(p.numel() for p in network.parameters())
    assert expected["macs"] == macs(network, SIZE)


def test_macs_are_counted_by_hand():
    network = UNetLike()
    pixels = SIZE.height * SIZE.width
    full = 16 * 3 * 9 + 32 * 24 * 9 + 24 * 3 + 57 * 40
    assert macs(network, SIZE) == pixels * full + pixels // 4 * (32 * 16 * 9 + 32 * 32 * 9 + 64 * 16 * 4)


@pytest.mark.parametrize("make", EVERY)
def test_heads_and_multiples_stay(make):
    network = trained(make)
    heads = [head.out_channels for head in network.ignored_layers]
    pruned(network, pruning_ratio=0.5, round_to=8)
    assert [head.out_channels for head in network.ignored_layers] == heads
    assert all(group.size % 8 == 0 for group in groups(network))


def test_silent_channels_go_first_and_nothing_changes():
    network = trained(MAKERS[0])
    for group in groups(network):
        silent = range(group.size // 2, group.size)
        mask(network, group, silent)
        for part in group.parts:
            if part.outputs:
                gone = part.channels[torch.isin(part.roots, torch.tensor(silent))]
                for values in part.layer.state_dict().values():
                    if values.dim():
                        values[gone] = 0
    before, dense = outputs(network), macs(network, SIZE)
    plan, _ = pruned(network, criterion="group_l1", round_to=1, min_num_filters=1)
    assert macs(network, SIZE) < 0.4 * dense
    assert torch.allclose(outputs(network), before, atol=1e-5)
    assert all(min(plan.dropped[g.name]) >= g.size // 2 for g in plan.groups if g.name in plan.dropped)


def test_batch_norm_decides_with_the_weights():
    network = trained(UNetLike)
    with torch.no_grad():
        network.norm.weight[3] = 1e-4  # the filter is as large as the others, what it gives is not
    group = next(g for g in groups(network) if any(p.name == "first" for p in g.producers))
    for criterion in ("l1", "l2", "bn_scale"):
        (values,) = importance(network, [group], criterion, None, "union")
        assert values.argmin() == 3, criterion
    conv, norm = network.first, normalised(network)[network.first]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    (l1,) = importance(network, [group], "l1", None, "union")
    assert torch.allclose(l1.float(), (conv.weight * scale[:, None, None, None]).abs().sum((1, 2, 3)), rtol=1e-5)


def test_folding_is_what_the_network_computes():
    network = trained(UNetLike)
    norm = normalised(network)[network.deep]
    x = torch.rand(1, 32, 8, 8)
    bias = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
    with torch.no_grad():
        expected = norm.eval()(network.deep(x))
        assert torch.allclose(F.conv2d(x, folded(network.deep, norm), bias, padding=1), expected, atol=1e-4)


class Fixed:
    """Views of one batch, and a loss of its own."""

    def __init__(self, batch):
        self.batch, self.objective = batch, self

    def batches(self, parts, device):
        return [(self.batch.to(device), None)]

    @staticmethod
    def loss(fields, _):
        return {name: field.square().sum() for name, field in fields.items()}


@pytest.mark.parametrize(("norm", "layer", "channels"), [("norm", "first", 16), (None, "joined", 24)])
def test_taylor_is_the_squared_gradient_of_a_gate(norm, layer, channels):
    network, views = trained(UNetLike), Fixed(torch.rand(2, 3, 16, 16))
    gates = taylor_gates(network, views)
    gate = torch.ones(channels, requires_grad=True)
    getattr(network, norm or layer).register_forward_hook(lambda _m, _i, out: out * gate[:, None, None])
    sum(Fixed.loss(network(views.batch), None).values()).backward()
    assert torch.allclose(gates[getattr(network, layer)].float(), gate.grad**2, rtol=1e-3)


@pytest.mark.parametrize("how", get_args(Equalization))
def test_tied_layers_agree_as_they_are_told(how):
    network = trained(UNetLike)
    group = next(g for g in groups(network) if {p.name for p in g.producers} == {"joined", "skip"})
    (found,) = importance(network, [group], "l2", "max", how)
    norms = [layer.weight.flatten(1).norm(dim=1) for layer in (network.joined, network.skip)]
    a, b = (n / n.max() for n in norms)
    expected = {
        "union": torch.maximum(a, b),
        "intersection": torch.minimum(a, b),
        "arithmetic_mean": (a + b) / 2,
        "geometric_mean": (a * b).sqrt(),
    }[how]
    assert torch.allclose(found.float(), expected, rtol=1e-5)


def test_normalizers_divide_by_the_layers_own_size():
    network = trained(UNetLike)
    (group,) = [g for g in groups(network) if [p.name for p in g.producers] == ["down"]]
    (plain,), (most,), (whole,) = (importance(network, [group], "l1", n, "union") for n in (None, "max", "L2"))
    assert torch.allclose(most, plain / plain.max())
    assert torch.allclose(whole, plain / plain.norm())


def test_a_network_without_batch_norms_cannot_be_judged_by_them():
    with pytest.raises(UserError, match="criterion=bn_scale: this network has no batch norm; choose l1"):
        pruned(trained(MAKERS[1]), criterion="bn_scale")
    plan, _ = pruned(trained(UNetLike), criterion="bn_scale")
    assert {g.name for g, r in zip(plan.groups, plan.ranked, strict=True) if r is None} & set(plan.dropped) == set()


def test_groups_and_ratios_of_ones_own():
    network = trained(MAKERS[0])
    plan, _ = pruned(
        deepcopy(network),
        excluded_layers=["backbone.3.*"],
        pruning_ratio_dict={"initial.0.*": 0.75},
        round_to=4,
        min_num_filters=4,
    )
    kept = {part.name: keep / g.size for g, keep in zip(plan.groups, plan.kept, strict=True) for part in g.producers}
    assert kept["backbone.3.1.0"] == 1
    assert kept["initial.0.0"] == 0.25
    assert kept["backbone.9.1.0"] == 0.5
    plan, _ = pruned(deepcopy(network), pruning_ratio=0.9, max_pruning_ratio=0.5, round_to=1)
    assert min(k / g.size for g, k in zip(plan.groups, plan.kept, strict=True)) >= 0.5


def test_all_groups_can_be_ranked_together_or_with_their_likes():
    network = trained(MAKERS[0])
    for options in ({"global_pruning": True}, {"global_pruning": True, "isomorphic": True}):
        plan, _ = pruned(deepcopy(network), round_to=1, min_num_filters=1, criterion="l1", **options)
        shares = [k / g.size for g, k in zip(plan.groups, plan.kept, strict=True)]
        assert sum(plan.kept) / sum(g.size for g in plan.groups) == pytest.approx(0.5, abs=0.03)
        assert max(shares) - min(shares) > 0.05
        alike = {}
        for group, kept in zip(plan.groups, plan.kept, strict=True):
            alike.setdefault(group.signature(), []).append((kept, group.size))
        parts = [sum(kept for kept, _ in own) / sum(size for _, size in own) for own in alike.values()]
        assert (max(abs(part - 0.5) for part in parts) < 0.05) == ("isomorphic" in options)


@pytest.mark.parametrize("how", [{"global_pruning": True}, {"sensitivity": "sensitivity"}])
def test_layers_that_stay_do_not_make_others_go_or_stay(how):
    network = trained(MAKERS[0])
    found = groups(network)
    told = {g.name: {"0.25": 0.1 + 0.01 * n, "0.5": 0.3, "0.9": 1.0} for n, g in enumerate(found)}
    pruner = Pruner(pruning_ratio=0.5, excluded_layers=["backbone.*"], round_to=1, min_num_filters=1, criterion="l1", **how)
    plan = choose(pruner, network, SIZE, curves=told if "sensitivity" in how else None)
    open_ones = [n for n, g in enumerate(found) if not any(p.outputs and p.name.startswith("backbone.") for p in g.parts)]
    assert all(k == g.size for n, (g, k) in enumerate(zip(found, plan.kept, strict=True)) if n not in open_ones)
    assert sum(plan.kept[n] for n in open_ones) / sum(found[n].size for n in open_ones) == pytest.approx(0.5, abs=0.03)


class SteppedProbe:
    """Times a network by its MACs, in steps as those of a GPU."""

    primary = "ap"

    def __init__(self, times):
        self.times, self.backend, self.framing = times, Torch(), WholeImage(None)

    def latencies(self, candidates, seconds):
        return [next(ms for least, ms in self.times if candidate >= least) for candidate in candidates]

    def figures(self, candidate):
        return {}


def latency_of(monkeypatch, value, times, round_to=4):
    """The latency that a pruning to a target lands at."""
    network = trained(Chain)
    whole = macs(network, SIZE)
    monkeypatch.setattr("pipeline.pruning.cycle.exported", lambda net, size, *_: macs(net, size) / whole)
    monkeypatch.setattr("pipeline.pruning.cycle.Candidate", float)
    pruner = Pruner(target="latency", value=value, round_to=round_to, min_num_filters=4, criterion="l1", max_pruning_ratio=0.8)
    cycle = Cycle(network, pruner, SIZE, SteppedProbe(times))
    cycle.run()
    return cycle.rows[-1]["latency_ms"]


def test_a_latency_is_reached_closely_or_from_below(monkeypatch, capsys):
    fine = [(n / 100, n / 10) for n in range(100, -1, -1)]
    assert latency_of(monkeypatch, "0.6x", fine) == pytest.approx(6.0, rel=0.05)
    assert latency_of(monkeypatch, "5.0ms", fine) == pytest.approx(5.0, rel=0.05)
    coarse = [(0.9, 10.0), (0.45, 5.6), (0.0, 4.0)]
    assert latency_of(monkeypatch, "0.5x", coarse) == 4.0, "what is nearer is too slow"
    assert "the nearest latency below 0.500x is 0.400x" in capsys.readouterr().err
    assert latency_of(monkeypatch, "0.9x", [(0.6, 10.0), (0.0, 5.0)]) == 5.0, "though what is as slow as dense is nearer"
    with pytest.raises(UserError, match=r"pruner.value=0.3x: cannot be reached; the nearest is pruner.value=0\.4x"):
        latency_of(monkeypatch, "0.3x", coarse)
    with pytest.raises(UserError, match=r"pruner.value=3ms: cannot be reached; the nearest is pruner.value=4ms with"):
        latency_of(monkeypatch, "3ms", coarse)
    with pytest.raises(
        UserError, match=r"pruner.value=0.01x: cannot be reached; the nearest is pruner.value=(0\.\d+)x"
    ) as told:
        latency_of(monkeypatch, "0.01x", fine, round_to=None)
    nearest = float(re.search(r"nearest is pruner.value=(\S+)x", str(told.value))[1])
    assert latency_of(monkeypatch, f"{nearest}x", fine, round_to=None) == pytest.approx(10 * nearest, rel=0.05)


def test_a_size_that_no_divisor_reaches_is_refused_with_what_single_channels_reach(monkeypatch):
    monkeypatch.setattr("pipeline.pruning.cycle.exported", lambda *_: 1.0)
    pruner = Pruner(target="macs", value="0.01x", round_to=None, min_num_filters=4, criterion="l1")
    with pytest.raises(UserError, match=r"the nearest is pruner\.value=(\S+) with .*round_to=1: take that") as told:
        Cycle(trained(Chain), pruner, SIZE, SteppedProbe([(0.0, 10.0)])).run()
    nearest = re.search(r"nearest is pruner.value=(\S+)x", str(told.value))[1]
    cycle = Cycle(trained(Chain), replace(pruner, value=f"{nearest}x", round_to=1), SIZE)
    cycle.run()
    assert cycle.rows[-1]["macs"] / cycle.rows[0]["macs"] == pytest.approx(float(nearest), rel=0.01)


@pytest.mark.parametrize("value", ["0.5x", "5ms"])
def test_a_latency_is_refused_where_every_pruning_is_slower(monkeypatch, value):
    slower = [(0.99, 10.0), (0.0, 19.0)]
    with pytest.raises(
        UserError, match=r"no network tried is faster here .*takes 1\.9 times as long.*choose pruner.target=macs"
    ):
        latency_of(monkeypatch, value, slower)


@pytest.mark.parametrize("framing", ["keep_aspect_ratio_mode=adjust_network_input", "scales=[0.5,1.0]"])
def test_steps_are_measured_at_every_size_that_a_framing_makes(smoke, framing):
    words = [*SMOKE, "stage=prune", "pruner=l1", "pruner.target=macs", "pruner.value=0.6x", "pruner.round_to=4"]
    words += ["pruner.min_num_filters=4", "resolution=64x64", framing]
    pipeline(*words, cwd=smoke, check=0)
    (folder,) = (smoke / "outputs" / "smoke" / "prune").glob("*macs-0.6x*")
    assert all({"ap", "latency_ms"} <= set(row) for row in json.loads((folder / "steps.json").read_text())["steps"])


def test_a_latency_that_nothing_measures_is_refused():
    pruner = Pruner(target="latency", value="0.5x")
    with pytest.raises(
        UserError, match=r"target=latency: nothing measures it; it takes tune images.*stages.prune.backend=null"
    ):
        Cycle(trained(MAKERS[0]), pruner, SIZE).run()


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize(("kind", "part"), [("macs", 0.6), ("macs", 0.35), ("params", 0.5)])
def test_targets_are_met_closely_and_never_passed(make, kind, part):
    network = trained(make)
    dense = Costs(network, [], SIZE)([])[kind]
    pruner = Pruner(target=kind, value=f"{part}x", round_to=4, min_num_filters=4)
    plan = choose(pruner, network, SIZE, step=Step({kind: part * dense}))
    remove(network, plan.dropped)
    reached = Costs(network, [], SIZE)([])[kind] / dense
    assert 0.9 * part <= reached <= part


def test_what_cannot_be_reached_says_what_can():
    network = trained(MAKERS[0])
    with pytest.raises(UnreachableError) as error:
        choose(Pruner(target="macs", value="0.01x"), network, SIZE, step=Step({"macs": 0.01 * macs(network, SIZE)}))
    plan = choose(Pruner(target="macs", value="0.5x"), network, SIZE, step=Step({"macs": error.value.least}))
    remove(network, plan.dropped)
    assert macs(network, SIZE) == error.value.least


def test_sensitivity_finds_what_matters_and_leaves_the_network_alone():
    network = trained(UNetLike)
    found = groups(network)
    silent = next(g for g in found if any(p.name == "down" for p in g.producers))
    mask(network, silent, range(silent.size))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = network(image)["heatmaps"]

    def error(net):
        with torch.no_grad():
            return {"error": float((net(image)["heatmaps"] - expected).square().sum())}

    made = curves(network, found, importance(network, found, "l1", None, "union"), error)["error"]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert set(made[silent.name].values()) == {0.0}
    assert made["first"]["0.9"] > made["first"]["0.1"] > 0
    plan = choose(
        Pruner(pruning_ratio=0.5, sensitivity="sensitivity", round_to=1, min_num_filters=1), network, SIZE, curves=made
    )
    kept = dict(zip((g.name for g in plan.groups), plan.kept, strict=True))
    assert kept[silent.name] / silent.size <= 0.1 + 1 / silent.size
    assert sum(plan.kept) / sum(g.size for g in found) == pytest.approx(0.5, abs=0.1)


def test_looking_at_a_network_leaves_its_modes_and_gradients_alone():
    network = trained(MAKERS[0]).train()
    network.backbone[0].eval()
    modes = [module.training for module in network.modules()]
    groups(network), macs(network, SIZE), normalised(network)
    choose(Pruner(pruning_ratio=0.5), network, SIZE)
    assert [module.training for module in network.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_near_dead_channels_are_counted():
    network = trained(UNetLike)
    assert Cycle(network, Pruner(pruning_ratio=0.5), SIZE).near_dead == 0
    with torch.no_grad():
        network.deep.weight[:5] = 0
    mask(network, next(g for g in groups(network) if g.name == "deep"), range(5))
    assert Cycle(network, Pruner(pruning_ratio=0.5), SIZE).near_dead == 5


def test_a_pruning_in_steps_that_was_killed_goes_on(tmp_path):
    pruner = Pruner(iterative_steps=3, target="macs", value="0.5x", round_to=4, min_num_filters=4, criterion="l1")
    looked = []

    def cycle(killed_in, memory):
        def retrain(network, step):
            if step == killed_in:
                raise KeyboardInterrupt
            for p in network.parameters():  # as a training of that step that is finished
                p.data.mul_(1 + 0.1 * torch.rand(p.shape, generator=torch.Generator().manual_seed(step)))

        made = Cycle(trained(MAKERS[0]), pruner, SIZE, retrain=retrain, memory=memory)
        row, plan = made._row, made._plan
        made._row = lambda name: looked.append(name) or row(name)
        made._plan = lambda *given: looked.append("plan") or plan(*given)
        return made

    whole = cycle(None, None)
    whole.run()
    looked.clear()
    killed = cycle(2, tmp_path / "cycle.json")
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    assert looked == ["dense", "plan", "plan", "1", "1, trained", "plan", "2"]
    looked.clear()
    again = cycle(None, tmp_path / "cycle.json")
    again.run()
    assert looked == ["2, trained", "plan", "3"], "what was measured or chosen before is not again"
    assert again.rows == whole.rows
    assert torch.equal(outputs(again.network), outputs(whole.network))
    (tmp_path / "cycle.json").write_text("{")
    with pytest.raises(UserError, match=r"cycle\.json: cannot be read .*force=true"):
        cycle(None, tmp_path / "cycle.json")


def test_torch_prunings_default_prunes_and_replays():
    network = trained(MAKERS[0])
    dense = macs(network, SIZE)
    history = TorchPruningDefault(pruning_ratio=0.5).prune(network)
    assert 0.15 < macs(network, SIZE) / dense < 0.4
    again = MAKERS[0]()
    replay(again, history)
    again.load_state_dict(network.state_dict())
    assert torch.equal(outputs(again), outputs(network))


def test_two_of_four_weights_are_zero_and_stay_so(tmp_path):
    network = trained(MAKERS[0])
    dense = deepcopy(network)
    history = Sparse24().prune(network)
    layers = dict(network.named_modules())
    assert len(history) > 20
    for name, kind, _ in history:
        weight = layers[name].weight.detach()
        assert kind == semi_structured.KIND
        assert semi_structured.is_sparse(weight.numpy())
        shape = (weight.shape[0], weight.shape[1] // 4, 4, -1)
        fours = dict(dense.named_modules())[name].weight.abs().reshape(shape)
        kept, gone = (weight.reshape(shape) != 0), (weight.reshape(shape) == 0)
        assert ((fours * kept).amax(2) >= (fours * gone).amax(2)).all()
    store.save(network, tmp_path, MAKERS[0], history)
    loaded, _, again = store.load(tmp_path)
    assert again == history
    assert torch.equal(outputs(loaded), outputs(network))
    assert len(semi_structured.zeros(loaded)) == len(history)
    with torch.no_grad():
        layers[history[0][0]].weight += 1
    store.save(network, tmp_path, MAKERS[0], history)
    with pytest.raises(UserError, match="are not 2:4 sparse, though architecture.json says so"):
        store.load(tmp_path)
    excluded = Sparse24(excluded_layers=["backbone.*", "backbone.3.*"]).prune(trained(MAKERS[0]))
    assert not any(name.startswith("backbone") for name, _, _ in excluded)
    with pytest.raises(UserError, match=r"excluded_layers=backbon\.0: matches no layer"):
        Sparse24(excluded_layers=["backbon.0"]).prune(trained(MAKERS[0]))
    with pytest.raises(UserError, match="excluded_layers: no layer is left that can be sparse"):
        Sparse24(excluded_layers=["*"]).prune(trained(MAKERS[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 1.0}, r"pruner.pruning_ratio=1.0: not a ratio; choose 0 to below 1 \(1 would empty the layer\)"),
        ({"pruning_ratio": -0.1}, "pruning_ratio=-0.1: not a ratio"),
        ({"pruning_ratio_dict": {"a": 1}}, "pruning_ratio_dict.a=1: not a ratio.*empty the layer"),
        ({"max_pruning_ratio": 1.0}, "max_pruning_ratio=1.0: not a ratio"),
        ({"pruning_threshold": 0.5}, "give one of pruning_ratio, pruning_threshold and target"),
        ({"pruning_ratio": None}, "give one of pruning_ratio, pruning_threshold and target"),
        ({"pruning_ratio": None, "pruning_threshold": -1}, "pruning_threshold=-1: not a threshold"),
        ({"criterion": "l3"}, r"pruner.criterion=l3.*choose l1, l2"),
        ({"normalizer": "l2"}, "normalizer=l2.*choose null, max, L2"),
        ({"equalization_criterion": "onion"}, r"onion \(did you mean union\?\)|onion.*union"),
        ({"equalization_criterion": "intersection"}, "=intersection: group_l1 judges tied layers as one"),
        ({"round_to": 0}, "round_to=0: choose a whole number, at least 1"),
        ({"min_num_filters": 0}, "min_num_filters=0"),
        ({"isomorphic": True}, "needs pruner.global_pruning=true"),
        ({"global_pruning": True, "sensitivity": "sensitivity"}, "both set the ratios"),
        ({"pruning_ratio": None, "target": "flops"}, "target=flops.*choose null, params, macs, latency"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Pruner(**{"pruning_ratio": 0.5, **options})


@pytest.mark.parametrize("value", ["2x", "1x", "0x", "-1", "nan", "0.5y", "", None, "2ms"])
def test_what_is_no_target_is_refused(value):
    with pytest.raises(UserError, match="pruner.value=.*not a target for macs; give a part"):
        Target.parse("macs", value)


def test_targets_are_read_as_people_write_them():
    assert Target.parse("macs", "0.5x").of(10) == 5
    assert Target.parse("params", "1.2M").of(1e9) == 1.2e6
    assert Target.parse("macs", "3G").value == 3e9
    assert Target.parse("latency", "2.0ms").of(9.0) == 2.0
    assert Target.parse("latency", "0.6x").of(9.0) == pytest.approx(5.4)
    with pytest.raises(UserError, match="not a target for latency"):
        Target.parse("latency", "3G")
    for kind, text in (("latency", "0.6"), ("macs", "0.5"), ("params", "3ms")):
        with pytest.raises(UserError, match=rf"pruner.value={text}: not a target for {kind}; .*like 0.5x"):
            Target.parse(kind, text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"excluded_layers": ["backbon.0"]}, r"excluded_layers=backbon\.0: matches no layer that can be pruned.*backbone"),
        ({"pruning_ratio_dict": {"nothing": 0.5}}, "pruning_ratio_dict=nothing: matches no layer"),
        ({"pruning_ratio": 0.0}, "nothing to remove with pruning_ratio=0.0"),
        ({"pruning_ratio": 0.1, "round_to": None, "unmeasured": 64}, "nothing to remove with .*round_to=64"),
        ({"sensitivity": "sensitivity"}, "pruner.sensitivity: the curves of the stage"),
        ({"pruning_ratio": None, "pruning_threshold": 2, "normalizer": "max"}, "every channel lies below it.*lie in .* to 1 "),
        ({"pruning_ratio": None, "pruning_threshold": 1e-9}, "no channel lies below it, none would go; the norms.*lie in"),
        (
            {"pruning_ratio": None, "pruning_threshold": 0.6, "normalizer": "max", "min_num_filters": 999},
            "nothing to remove.*norms of .*raise the threshold",
        ),
    ],
)
def test_prunings_that_do_nothing_or_too_much_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        pruned(trained(MAKERS[0]), **options)


def test_a_history_of_another_network_is_refused(tmp_path):
    network = trained(MAKERS[0])
    _, history = pruned(network)
    store.save(network, tmp_path, MAKERS[0], history)
    file = tmp_path / store.ARCHITECTURE
    content = json.loads(file.read_text())
    for name, ids, message in (("backbone.99", [0], "does not have"), (history[0][0], [9999], "channel 9999 of")):
        content["pruning"] = [[name, True, ids]]
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=rf"architecture.json: .*{message}"):
            store.load(tmp_path)


def test_every_criterion_ranks_every_group_of_a_network_with_batch_norms():
    network = trained(MAKERS[0])
    found = groups(network)
    gates = taylor_gates(network, Fixed(torch.rand(1, 3, 64, 64)))
    orders = set()
    for criterion in get_args(Criterion):
        ranked = importance(network, found, criterion, None, "union", gates)
        assert all(r is not None and len(r) == g.size and bool((r >= 0).all()) for g, r in zip(found, ranked, strict=True))
        orders.add(tuple(torch.cat(ranked).argsort().tolist()))
    assert len(orders) == len(get_args(Criterion))


@pytest.mark.parametrize(
    ("kind", "text", "dense", "least"),
    [
        ("macs", "0.1x", 3e9, 0.01234 * 3e9),
        ("macs", "0.1x", 3e9, 0.98765 * 3e9),
        ("params", "1M", 4e6, 1234567.0),
        ("latency", "2ms", 10.0, 2.0004),
        ("latency", "2ms", 10.0, 0.03712),
    ],
)
def test_the_nearest_value_that_is_told_can_be_reached(kind, text, dense, least):
    told = Target.parse(kind, text).words(least, dense)
    assert " " not in told
    assert least * (1 - 1e-9) <= Target.parse(kind, told).of(dense) <= 1.01 * least


def test_the_command_prunes_in_steps_without_a_teacher(smoke):
    words = [*SMOKE, "stage=prune", "pruner=l1", "pruner.target=macs", "pruner.value=0.6x"]
    words += ["pruner.iterative_steps=2", "pruner.round_to=4", "pruner.min_num_filters=4", "stages.prune.backend=null"]
    pipeline(*words, "stages.retrain.distillation=null", cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/prune").glob("*macs*")
    half = json.loads((folder / "steps.json").read_text())["steps"][2]["macs"]
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    steps = json.loads((folder / "manifest.json").read_text())["config"]["training"]
    assert summary["train_macs"] == 3 * half * steps["steps"] * steps["batch_size"], "nobody looked but the network itself"


def test_the_command_prunes_to_a_target_in_steps(smoke):
    words = [*SMOKE, "stage=prune", "pruner=l1", "pruner.target=macs", "pruner.value=0.6x"]
    words += ["pruner.iterative_steps=2", "pruner.round_to=4", "pruner.min_num_filters=4"]
    pipeline(*words, cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/prune").glob("*macs*")
    rows = json.loads((folder / "steps.json").read_text())["steps"]
    assert [row["step"] for row in rows] == ["dense", "1", "1, trained", "2"]
    ratios = [row["macs"] / rows[0]["macs"] for row in rows]
    assert ratios[0] == 1
    assert 0.75 <= ratios[1] == ratios[2] <= 0.8
    assert 0.55 <= ratios[3] <= 0.6
    assert all({"latency_ms", "ap"} <= set(row) for row in rows)
    manifest = json.loads((folder / "manifest.json").read_text())["summary"]
    assert manifest["train_macs"] > 0
    assert math.isclose(manifest["macs"], rows[3]["macs"])
    labelled = [np.load(file) for file in (smoke / "outputs/cache/shards").glob("*/label.labelled.npy")]
    assert sorted(bool(some.all()) for some in labelled) == [False, True]  # the short training saw images without labels


def test_torch_times_the_network_that_it_will_run(tmp_path):
    network = trained(MAKERS[0])
    history = remove(network, choose(Pruner(pruning_ratio=0.5), network, SIZE).dropped)
    candidate = exported(network, SIZE, partial(store.save, network, make=MAKERS[0], history=history))
    (tmp_path / "engine").mkdir()
    with Torch().load(Torch().build(candidate.write(tmp_path), Shapes((SIZE,) * 3, (1, 1, 1)), tmp_path / "engine")) as runner:
        assert type(runner.network) is type(network)
        assert macs(runner.network, SIZE) == macs(network, SIZE)


def test_a_target_out_of_reach_is_refused_with_the_nearest(smoke):
    words = [*SMOKE, "stage=prune", "pruner=l1", "pruner.target=macs"]
    words += ["stages.prune.backend=null"]
    text = refused(pipeline(*words, "pruner.value=0.01x", cwd=smoke))
    assert "pruner.value=0.01x: cannot be reached; the nearest is pruner.value=" in text
    assert not list((smoke / "outputs/smoke/prune").glob("*macs*"))
    nearest = re.search(r"the nearest is (pruner\.value=\S+) with", text)[1]
    pipeline(*words, nearest, cwd=smoke, check=0)


def test_sparse_weights_are_found_in_the_onnx_file(smoke):
    pipeline(*SMOKE, "stage=[prune,retrain,export]", "pruner=sparse24", cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/export").glob("*sparse24*")
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    graph = onnx.load(folder / "model.onnx").graph
    assert summary["sparse24_layers"] == len(semi_structured.sparse_layers(graph)) > 20
    sizes = {i.name: np.prod(i.dims) for i in graph.initializer}
    assert sum(sizes[n.input[1]] for n in graph.node if n.op_type == "Conv") == pytest.approx(sum(sizes.values()), rel=0.1)


def test_the_control_trains_as_long_as_all_of_it_took(tmp_path):
    words = [*SMOKE, f"outputs={tmp_path}", "pruner=l1", "pruner.round_to=4", "pruner.min_num_filters=4"]
    pipeline(*words, "stage=[train,prune,retrain]", cwd=tmp_path, check=0)
    done = pipeline(*words, "stage=retrain", "control=scratch", "control_seed=1", cwd=tmp_path, check=0)
    found = {}
    for stage in ("train", "prune", "retrain"):
        for folder in (tmp_path / "smoke" / stage).iterdir():
            found[f"{stage}{'-scratch' if 'scratch1' in folder.name else ''}"] = json.loads(
                (folder / "manifest.json").read_text()
            )["summary"]
    own = 3 * found["retrain"]["macs"]
    assert found["retrain"]["train_macs"] == 2 * 4 * (own + found["train"]["macs"]), "a teacher's look is paid for"
    spent = found["train"]["train_macs"] + found["prune"]["train_macs"] + found["retrain"]["train_macs"]
    assert found["retrain-scratch"]["train_macs"] == pytest.approx(spent, abs=0.5 * 4 * own)
    assert found["retrain-scratch"]["macs"] == found["retrain"]["macs"]
    assert f"{found['retrain-scratch']['steps']} steps" in done.stderr
    words += ["name=given", "control=scratch", "stage=[train,prune,retrain]"]
    patient = pipeline(*words, "stages.train.training.patience=2", cwd=tmp_path)
    assert "early stopping (patience=2) makes the compute of retraining unpredictable; set stages.retrain" in refused(patient)
    weights = next((tmp_path / "smoke" / "train").glob("*/model.safetensors"))
    text = refused(pipeline(*words, f"weights={weights}", cwd=tmp_path))
    assert "control=scratch: the dense network came trained (weights=), so the compute of its training is not known" in text
    assert not (tmp_path / "given").exists(), "before anything is trained"
    text = refused(pipeline(*SMOKE, f"outputs={tmp_path}", "pruner=l1", "control=scrap", "stage=retrain", cwd=tmp_path))
    assert "control=scrap: choose pruned, scratch or null" in text
    text = refused(pipeline(*SMOKE, f"outputs={tmp_path}", "control=scratch", cwd=tmp_path))
    assert "control=scratch: there is no pruner; add pruner=l1" in text


def test_the_curve_keeps_prunings_apart_and_what_was_not_retrained_aside():
    def row(pruning, macs, ap):
        figures = {"ap": ap, "ap_lo": ap - 0.01, "ap_hi": ap + 0.02, "metric": CocoKeypoints.info}
        return {"pruning": pruning, "precision": "fp32", "network": "net", "macs": macs, **figures}

    rows = [row("dense", 4e9, 0.8), row("l1-0.5", 1e9, 0.6), row("l1-0.3", 2e9, 0.7), row("l1-0.5-pruned", 1e9, 0.0)]
    rows += [row("l1-0.5-scratch0", 1e9, 0.5), row("torch_pruning-0.5", 1e9, 0.4), row("torch_pruning-0.5-pruned", 1e9, 0.1)]
    assert curve([{**rows[0], "precision": "int8"}, *rows[1:4]]) is None
    assert curve([rows[0], rows[1], rows[5]]) is not None
    drawn = {series.name: series for series in curve(rows).data}
    line = drawn.pop("dense and retrained")
    assert line.mode == "markers+lines"
    assert line.x == (1.0, 2.0, 4.0)
    assert line.y == (0.6, 0.7, 0.8)
    assert line.error_y.array == pytest.approx((0.02,) * 3)
    assert line.error_y.arrayminus == pytest.approx((0.01,) * 3)
    assert {name: (series.y, series.visible) for name, series in drawn.items()} == {
        "from scratch": ((0.5,), True),
        "Torch-Pruning as it comes, retrained": ((0.4,), True),
        "not retrained": ((0.0,), "legendonly"),
        "Torch-Pruning as it comes, not retrained": ((0.1,), "legendonly"),
    }


def test_curves_of_other_images_or_resolutions_are_other_plots():
    about = {"data": "set", "network": "net", "keep_aspect_ratio_mode": "pad", "backend": "torch", "precision": "fp32"}

    def rows(digest, resolution):
        return [
            defaultdict(
                str,
                about,
                data_digest=digest,
                resolution=resolution,
                pruning=pruning,
                macs=macs,
                ap=ap,
                ap_lo=ap,
                ap_hi=ap,
                metric=CocoKeypoints.info,
            )
            for pruning, macs, ap in (("dense", 4e9, 0.8), ("l1-0.3", 2e9, 0.7), ("l1-0.5", 1e9, 0.6))
        ]

    drawn = []
    both = rows("a" * 64, "64x80") + rows("a" * 64, "96x96")
    page = section([], both, lambda figure: drawn.append([len(series.x) for series in figure.data]) or "plot")
    assert drawn == [[3], [3]]
    assert "AP against MACs: set · net · 64x80 · pad · torch<" in page
    page = section([], both + rows("b" * 64, "64x80"), lambda figure: "plot")
    assert all(f"64x80 · pad · torch · images {digest * 12}<" in page for digest in "ab")


def test_what_ranks_channels_is_in_the_address_of_the_sensitivity(smoke, monkeypatch):
    seen = []
    monkeypatch.setattr("pipeline.stages.sensitivity.importance", lambda *how: seen.append(how[2:5]) or importance(*how))
    monkeypatch.chdir(smoke)
    labels.register()
    addresses = set()
    other = "pruner.equalization_criterion=intersection"
    for more in ([], ["pruner.normalizer=L2"], ["pruner.normalizer=L2", other]):
        words = [*SMOKE, "pruner=l1", "pruner.criterion=l2", "pruner.sensitivity=sensitivity", "stage=sensitivity", *more]
        with initialize_config_module("conf", version_base="1.3"):
            cell = Cell(compose("config", words), words, sweep=False)
        addresses.add(cell.stages["sensitivity"].address)
    assert len(addresses) == 3
    cell.run()
    assert seen == [("l2", "L2", "intersection")]


def test_the_report_shows_the_control_beside_the_rest(smoke):
    words = [
        *SMOKE,
        "pruner=l1",
        "pruner.round_to=4",
        "pruner.min_num_filters=4",
        "pruner.sensitivity=sensitivity",
    ]
    words += ["stage=[sensitivity,prune,retrain,export,quantize,build,tune,evaluate,report]", "control=null,pruned,scratch"]
    pipeline("--multirun", *words, cwd=smoke, check=0)
    page = (smoke / "outputs/smoke" / "report" / "report.html").read_text()
    for text in (
        "pruned and retrained",
        "from scratch, seed 0",
        "AP against MACs",
        "channels are near dead",
        ": steps",
        ": sensitivity",
        ": norms of the dense",
    ):
        assert text in page, text
    rows = list(csv.DictReader((smoke / "outputs/smoke" / "report" / "results.csv").open()))
    assert len(rows) == 4 + 3
    assert {row["pruning"].rpartition("-")[2] for row in rows} == {"dense", "r16", "r4", "pruned", "scratch0"}


@pytest.mark.parametrize(
    "words",
    [
        ("pruner=l1", "pruner.excluded_layers=[{}]"),
        ("pruner=l1", "pruner.pruning_ratio_dict={{{}: 0.5}}"),
        ("pruner=sparse24", "pruner.excluded_layers=[{}]"),
    ],
)
def test_prunings_of_other_layers_have_other_addresses(words):

    def label(layers):
        with initialize_config_module("conf", version_base="1.3"):
            config = compose("config", ["experiment=smoke", *(word.format(layers) for word in words)])
            return labels.label(config, "pruner")

    labels.register()
    assert label("initial.0.0") == label("initial.0.0")
    assert label("initial.0.0") != label("initial.1.0")


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (["keep_aspect_ratio_mode=null"], ["keep_aspect_ratio_mode=pad_image_input"], True),
        (["backend=torch", "precision=fp32"], ["backend=torch", "precision=fp16"], False),
        (["stages.retrain.distillation=null"], [], False),
        (["backend=tensorrt", "rebuild=0"], ["backend=tensorrt", "rebuild=1"], False),
        (
            ["backend=tensorrt", "backend.timing_cache=null", "rebuild=0"],
            ["backend=tensorrt", "backend.timing_cache=null", "rebuild=1"],
            False,
        ),
        (
            ["backend=tensorrt", "backend.timing_cache=own", "rebuild=0"],
            ["backend=tensorrt", "backend.timing_cache=own", "rebuild=1"],
            False,
        ),
        (["backend=tensorrt", "precision=fp16"], ["backend=tensorrt", "precision=int8"], True),
        (
            ["backend=tensorrt", "precision=fp16", "pruner.target=latency"],
            ["backend=tensorrt", "precision=int8", "pruner.target=latency"],
            False,
        ),
    ],
)
def test_cells_of_a_sweep_share_a_measured_pruning_or_have_their_own(one, other, apart):
    def prune(words):
        words = ["experiment=smoke", "pruner=l1", "pruner.target=macs", "pruner.value=0.5x", "stage=prune", *words]
        with initialize_config_module("conf", version_base="1.3"):
            cell = Cell(compose("config", words), words, sweep=False)
        return cell.stages["prune"].address, arguments(cell.stages["prune"])

    (first, options), (second, others) = prune(one), prune(other)
    assert (first != second) == apart
    assert apart or options == others
