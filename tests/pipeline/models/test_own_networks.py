"""Networks of others: what cannot be pruned is left out and named, everything trains, and mistakes are told in one line."""

import json
import math
import re
import sys
import types
import warnings
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from pipeline.launch import command_line
from pipeline.launch.options import check_added, check_component
from pipeline.models import contract, store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.objectives.heatmap_paf import HeatmapPafObjective
from pipeline.onnx_files import export
from pipeline.pruning import graph, trial
from pipeline.pruning import groups as groups_
from pipeline.pruning.costs import Costs
from pipeline.pruning.cycle import Cycle
from pipeline.pruning.graph import groups, survey
from pipeline.pruning.groups import LAYERS, mask, remove, replay
from pipeline.pruning.plan import choose
from pipeline.pruning.pruner import Pruner
from pipeline.pruning.semi_structured import is_sparse
from pipeline.pruning.sensitivity import curves
from pipeline.pruning.sparse24 import Sparse24
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from pipeline.pruning.trial import apart
from pipeline.report.pruning import norm_plot, section
from pipeline.results.job import Job
from pipeline.stages import prune, sensitivity
from pipeline.stages import train as stage
from pipeline.training.augment import NONE
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.sparsity import Penalty
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17, OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.pipeline.models.test_networks import MAKERS
from tests.pipeline.pruning.test_pruning import EVERY, UNetLike

C, SIZE = 8, Resolution(32, 48)


def normed(given, made, size=3, stride=1, parts=1):
    layer = nn.Conv2d(given, made, size, stride, size // 2, groups=parts, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(made), nn.ReLU())


class Block(nn.Module):
    """What is tried, `inner`, between two convolutions that are like all others."""

    def __init__(self, inner, given=C, made=C):
        super().__init__()
        self.before, self.inner, self.after = normed(C, given), inner, normed(made, C, 1)

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Does(nn.Module):
    """A function of a tensor, and of modules that it has."""

    def __init__(self, does, **own):
        super().__init__()
        self.does = does
        for name, module in own.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.does(self, x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=1)
        self.two.weight = self.one.weight

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(C, 2, batch_first=True)

    def forward(self, x):
        words = x.flatten(2).transpose(1, 2)
        return (words + self.heads(words, words, words)[0]).transpose(1, 2).reshape(x.shape)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def shuffled(_, x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def last(own, x):
    return own.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def frozen(module):
    return module.requires_grad_(False)


def parameter(*shape, value=None):
    return nn.Parameter(torch.randn(shape) if value is None else torch.full(shape, value))


def residual(own, x):
    return x + own.scale * own.inner(x)


def halves(own, x):
    one, two = x.chunk(2, 1)
    return torch.cat([one, two, own.inner(two)], 1)


def pooled(own, x):
    return x + own.line(own.pool(x).flatten(1))[:, :, None, None]


def hidden(inner):
    """A branch that is hardly seen in the outputs."""
    return Block(Does(residual, scale=parameter(C, 1, 1, value=1e-6), inner=inner))


def conv(given=C, made=C):
    return nn.Conv2d(given, made, 3, padding=1)


BLOCKS = {
    "plain": lambda: Block(normed(C, C)),
    "transposed": lambda: Block(nn.Sequential(nn.Conv2d(C, C, 2, 2), nn.ConvTranspose2d(C, C, 2, 2))),
    "depthwise": lambda: Block(normed(C, C, parts=C)),
    "instance_norm": lambda: Block(nn.InstanceNorm2d(C, affine=True)),
    "prelu": lambda: Block(nn.PReLU(C)),
    "scale": lambda: hidden(normed(C, C)),
    "plain_norm": lambda: Block(nn.Sequential(conv(), nn.BatchNorm2d(C, affine=False))),
    "pooled": lambda: Block(Does(pooled, pool=nn.AdaptiveAvgPool2d(2), line=nn.Linear(4 * C, C))),
    "frozen": lambda: Block(frozen(normed(C, C))),
    "weight_norm": lambda: Block(nn.utils.parametrizations.weight_norm(conv())),
    "old_weight_norm": lambda: Block(old_weight_norm(conv())),
    "spectral_norm": lambda: Block(nn.utils.parametrizations.spectral_norm(conv())),
    "pixel_shuffle": lambda: Block(nn.Sequential(nn.PixelShuffle(2), nn.AvgPool2d(2)), 4 * C),
    "pixel_unshuffle": lambda: Block(nn.Sequential(nn.PixelUnshuffle(2), nn.Upsample(scale_factor=2)), C, 4 * C),
    "chunk": lambda: Block(Does(halves, inner=normed(C // 2, C // 2)), C, C + C // 2),
    "slice": lambda: Block(Does(lambda _, x: x[:, : C // 2] + x[:, C // 2 :]), C, C // 2),
    "picked": lambda: Block(Does(lambda _, x: x[:, [1, 0, *range(2, C)]])),
    "multiplier": lambda: Block(normed(C, 2 * C, parts=C), C, 2 * C),
    "grouped": lambda: Block(normed(C, C, parts=2)),
    "channel_shuffle": lambda: Block(Does(shuffled)),
    "group_norm": lambda: Block(nn.GroupNorm(2, C)),
    "one_group_norm": lambda: Block(nn.GroupNorm(1, C)),
    "functional_norm": lambda: Block(Does(lambda _, x: F.group_norm(x, 2))),
    "layer_norm": lambda: Block(Does(last, norm=nn.LayerNorm(C))),
    "hidden_norm": lambda: hidden(nn.Sequential(normed(C, C), nn.GroupNorm(1, C))),
    "softmax": lambda: Block(Does(lambda _, x: x.softmax(1))),
    "mean": lambda: Block(Does(lambda _, x: x - x.mean(1, keepdim=True))),
    "attention": lambda: Block(Attention()),
    "einsum": lambda: Block(
        Does(lambda own, x: torch.einsum("nchw,cd->ndhw", x, own.weight), weight=parameter(C, C)),
    ),
    "filter": lambda: Block(
        Does(lambda own, x: F.conv2d(x, own.weight, padding=1, groups=C), weight=parameter(C, 1, 3, 3)),
    ),
    "tied": lambda: Block(Tied()),
    "three_dimensional": lambda: Block(Does(lambda own, x: own.inner(x[:, None])[:, 0], inner=nn.Conv3d(1, 1, 1))),
    "line": lambda: Block(Does(lambda own, x: own.inner(x.flatten(2)).view_as(x), inner=nn.Conv1d(C, C, 1))),
}
FOLLOWED = (
    "plain", "transposed", "depthwise", "instance_norm", "prelu", "scale", "plain_norm", "pooled", "frozen", "weight_norm",
    "old_weight_norm", "spectral_norm",
)  # fmt: skip
NAMED = {  # what the reason names
    "pixel_shuffle": "PixelShuffle", "pixel_unshuffle": "PixelUnshuffle", "chunk": "Split", "slice": "Slice", "picked": "Index",
    "multiplier": "depthwise convolution with 2 outputs", "grouped": "grouped convolution", "channel_shuffle": "Transpose",
    "group_norm": "GroupNorm", "one_group_norm": "GroupNorm", "functional_norm": "NativeGroupNorm", "layer_norm": "LayerNorm",
    "hidden_norm": "GroupNorm", "softmax": "Softmax", "mean": "Mean", "attention": "MultiheadAttention",
    "einsum": "block.inner.weight", "filter": "block.inner.weight", "tied": "shares a weight", "three_dimensional": "Conv3d",
    "line": "Conv1d",
}  # fmt: skip
SPEC = NetworkSpec(InputSpec("image", multiple=16), (OutputSpec("heatmaps", 4, 19), OutputSpec("pafs", 4, 38)), OPENPOSE_18)


class Own(nn.Module):
    spec = SPEC

    def __init__(self, kind="plain"):
        super().__init__()
        self.stem, self.block = nn.Sequential(normed(3, C, 3, 2), normed(C, C, 3, 2)), BLOCKS[kind]()
        self.heads = nn.ModuleList(nn.Conv2d(C, n, 1) for n in (19, 38))

    @property
    def ignored_layers(self):
        return [self.heads]  # a container of them

    def forward(self, x):
        x = self.block(self.stem(x))
        return dict(zip(("heatmaps", "pafs"), (head(x) for head in self.heads), strict=True))


MODULE = types.ModuleType("pipeline.models.tested_own")  # where a file of one's own would lie
for own_class in (Own,):
    own_class.__module__ = MODULE.__name__
    setattr(MODULE, own_class.__name__, own_class)


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)


def lively(kind, seed=0):
    torch.manual_seed(seed)
    network = Own(kind)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return network.eval()


def outputs(network):
    image = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.cat([*network.eval()(image).values()], 1)


SMALL = {"pruning_ratio": 0.5, "round_to": 2, "min_num_filters": 2}


def left_out(network):
    return {name for own in survey(network).left_out for name in own.layers}


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_is_pruned_gives_what_the_masked_network_gives(kind, tmp_path):
    network = lively(kind)
    plan = choose(Pruner(**SMALL), network, SIZE)
    dense = contract.duplicate(network)
    contract.fold(dense)
    for group in plan.groups:
        mask(dense, group, plan.dropped.get(group.name, ()))
    history = remove(network, plan.dropped)
    assert apart(network, dense, SIZE) < 1e-5
    store.save(network, tmp_path, partial(Own, kind=kind), history)
    loaded, *_ = store.load(tmp_path)
    assert torch.equal(outputs(loaded), outputs(network))


@pytest.mark.parametrize("kind", FOLLOWED)
def test_what_can_be_followed_is_pruned(kind):
    network = lively(kind)
    assert not survey(network).left_out
    plan = choose(Pruner(**SMALL), network, SIZE)
    expected = Costs(network, plan.groups, SIZE)(plan.kept)
    remove(network, plan.dropped)
    assert expected["params"] == sum(p.numel() for p in network.parameters())
    assert expected["macs"] == Costs(network, [], SIZE)([])["macs"]
    assert all(layer.out_channels == C // 2 for layer in (network.stem[0][0], network.block.after[0]))


@pytest.mark.parametrize("kind", NAMED)
def test_what_cannot_be_followed_is_left_out_and_named(kind):
    network = lively(kind)
    surveyed = survey(network)
    assert NAMED[kind] in surveyed.words()
    assert "block.before.0" in left_out(network) or "block.inner" in surveyed.words()
    assert {group.name for group in surveyed.groups} >= {"stem.0.0", "block.after.0"}, "the others are pruned"


def test_every_kind_is_in_one_of_the_lists():
    assert {*FOLLOWED, *NAMED} == {*BLOCKS}


def test_the_verdict_is_the_structures_alone():
    one, other = lively("hidden_norm"), lively("hidden_norm", seed=3)
    with torch.no_grad():
        for weight in other.block.inner.parameters():
            weight.zero_()  # what is behind it cannot be seen in the outputs
    assert left_out(one) == left_out(other) != set()
    state = torch.random.get_rng_state()
    modes = [module.training for module in one.train().modules()]
    before = {name: values.clone() for name, values in one.state_dict().items()}
    assert survey(one).words() == survey(deepcopy(one)).words()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in one.modules()] == modes
    assert all(torch.equal(values, before[name]) for name, values in one.state_dict().items())


def test_a_network_with_many_odd_groups_is_tried_in_halves(monkeypatch):
    class Deep(Own):
        def __init__(self):
            super().__init__()
            kinds = ("plain", "group_norm", "depthwise", "layer_norm", "scale", "mean")
            self.block = nn.Sequential(*(BLOCKS[kind]() for kind in kinds))

    torch.manual_seed(0)
    network, tried = Deep(), []
    fault = trial.Trial._fault
    monkeypatch.setattr(trial.Trial, "_fault", lambda trial, chosen: tried.append(len(chosen)) or fault(trial, chosen))
    assert left_out(network) == {f"block.{n}.before.0" for n in (1, 3, 5)}
    assert len(tried) <= 12
    tried.clear()
    assert left_out(network) == {f"block.{n}.before.0" for n in (1, 3, 5)}
    assert not tried, "once a network"


def test_groups_that_are_right_alone_and_wrong_together_are_left_out(monkeypatch):
    network = lively("plain")
    names = [group.name for group in survey(deepcopy(network)).groups]
    monkeypatch.setattr(
        trial.Trial, "_fault", lambda _, chosen: "together" if {*names[:2]} <= {group.name for group in chosen} else None
    )
    assert left_out(network) == {names[1]}


@pytest.mark.parametrize("make", [*EVERY, partial(UNetLike)])
def test_networks_that_can_be_followed_keep_their_groups(make):
    network = make()
    names = {module: name for name, module in network.named_modules()}
    order = {name: n for n, name in enumerate(names.values())}
    expected = []
    for group in groups_.traced(network).get_all_groups(list(network.ignored_layers), list(LAYERS)):
        parts = [
            (names[layer], item.dep.handler.__name__ == "prune_out_channels", item.idxs, item.root_idxs)
            for item in group
            if isinstance(layer := item.dep.target.module, (*LAYERS, nn.BatchNorm2d))
        ]
        if all(
            getattr(layer := network.get_submodule(p[0]), "groups", 1) in (1, getattr(layer, "in_channels", 1)) for p in parts
        ):
            expected.append((names[group[0].dep.target.module], len(group[0].idxs), parts))
    found = [
        (g.name, g.size, [(p.name, p.outputs, p.channels.tolist(), p.roots.tolist()) for p in g.parts]) for g in groups(network)
    ]
    assert found == sorted(expected, key=lambda group: order[group[0]])
    assert not survey(network).left_out


def test_a_network_that_nothing_can_be_pruned_of_says_why():
    class Norms(Own):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, C, 4, 4), nn.GroupNorm(2, C))
            self.block = nn.Identity()

    why = r"no channels (that|of).* can be (removed|pruned).*stem\.0 \(GroupNorm: .*choose"
    network = Norms()
    with pytest.raises(UserError, match=why):
        choose(Pruner(**SMALL), network, SIZE)
    with pytest.raises(UserError, match=why):
        Penalty(network, "l1", 1.0)
    broken = Norms()
    broken.forward = lambda x: {"heatmaps": x.view(1, 7)}
    with pytest.raises(
        UserError, match=r"Norms\.forward fails on images \[1, 3, 128, 128\] in evaluation: RuntimeError: shape"
    ):
        choose(Pruner(**SMALL), broken, SIZE)


def test_what_torch_pruning_raises_is_no_fault_of_forward(monkeypatch):
    def fails(*_):
        raise KeyError("odd")

    monkeypatch.setattr(graph, "traced", fails)
    assert "the network cannot be followed: KeyError: 'odd'" in survey(Own()).words()


def test_layers_that_are_left_out_may_be_excluded_too():
    network = lively("group_norm")
    plan = choose(Pruner(**SMALL, excluded_layers=["block.before.*", "stem.0.*"]), network, SIZE)
    assert {*plan.dropped} == {"stem.1.0", "block.after.0"}
    with pytest.raises(UserError, match=r"excluded_layers=block\.befor\.0: matches no layer"):
        choose(Pruner(**SMALL, excluded_layers=["block.befor.0"]), network, SIZE)


def test_an_output_that_is_in_no_list_of_heads_is_left_out():
    class Forgets(Own):
        @property
        def ignored_layers(self):
            return [self.heads[0]]

    assert "heads.1 (they reach an output; is a head missing in ignored_layers?)" in survey(Forgets()).words()


def test_frozen_layers_stay_frozen_where_they_are_pruned():
    network = lively("frozen")
    inner = network.block.inner
    names = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    history = remove(network, choose(Pruner(**SMALL), network, SIZE).dropped)
    again = Own("frozen")
    replay(again, history)
    for pruned in (network, again):
        assert pruned.block.inner[0].out_channels == C // 2
        assert [name for name, weight in pruned.named_parameters() if not weight.requires_grad] == names
    assert inner is network.block.inner


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
def test_other_prunings_take_computed_weights_too(kind, tmp_path):
    for pruner in (Sparse24(), TorchPruningDefault(0.5)):
        network = lively(kind)
        history = pruner.prune(network)
        store.save(network, tmp_path, partial(Own, kind=kind), history)
        loaded, *_ = store.load(tmp_path)
        assert torch.equal(outputs(loaded), outputs(network))
        if isinstance(pruner, Sparse24):
            assert is_sparse(loaded.block.inner.weight.detach().numpy())


def test_a_network_that_torch_pruning_breaks_is_refused():
    with pytest.raises(UserError, match=r"pruner=torch_pruning: .*cannot prune this network \(.*choose pruner=l1"):
        TorchPruningDefault(0.5).prune(lively("pixel_shuffle"))


def test_sensitivity_and_penalties_take_the_groups_that_are_left():
    network = lively("pixel_shuffle")
    network.train()
    found = groups(network)
    made = curves(network.eval(), found, [torch.rand(g.size) for g in found], lambda net: {"loss": float(outputs(net).sum())})
    assert {*made["loss"]} == {g.name for g in found}
    penalty = Penalty(network, "group_lasso", 1.0)
    penalty().backward()
    assert network.stem[0][0].weight.grad is not None


# ---------- stages ----------


def job(folder, name="train", **inputs):
    (folder / name).mkdir()
    return Job(folder / name, inputs, {}, folder / f"scratch-{name}", folder / "cache")


def training(**options):
    small = {"steps": 2, "batch_size": 2, "warmup": 0, "precision": "32-true", "accelerator": "cpu"}
    return Training(**{**small, **options})


def trained(folder, images, make=None, weights=None, resolution="32x48", objective=None, **options):
    make = partial(Own) if make is None else make
    learns = HeatmapPafObjective() if objective is None else objective
    given = stage.Train(None, make, weights, images, learns, resolution, 0, WholeImage(), NONE, training(**options), None)
    return given.run(job(folder))


def pruning(folder, images, pruner):
    framing, learns = WholeImage(None), HeatmapPafObjective()
    given = prune.Prune(
        pruner, images, None, framing, None, 4, learns, "32x48", "32x48", 0, WholeImage(), NONE, training(steps=0), None
    )
    return given.run(job(folder, "prune", network=folder / "train"))


@pytest.mark.parametrize("kind", ["pixel_shuffle", "chunk", "multiplier", "tied", "weight_norm", "old_weight_norm", "frozen"])
def test_networks_train_and_nothing_is_measured_for_pruning(kind, images, tmp_path, monkeypatch):
    monkeypatch.setattr(graph, "survey", lambda _: pytest.fail("nothing is pruned"))
    monkeypatch.setattr(stage, "groups", lambda _: pytest.fail("nothing is pruned"))
    found = trained(tmp_path, images, partial(Own, kind=kind))
    assert found["loss"] > 0
    assert not (tmp_path / "train" / "norms.json").exists()
    loaded, make, history = store.load(tmp_path / "train")
    assert history == []
    fresh = make()
    assert not torch.equal(outputs(fresh), outputs(loaded))
    live, kept = fresh.state_dict(), store.load_file(tmp_path / "train" / store.WEIGHTS)
    assert {*live} - {*kept} == ({"block.inner.two.weight"} if kind == "tied" else set())
    if kind == "tied":
        assert loaded.block.inner.two.weight is loaded.block.inner.one.weight
    if kind == "frozen":
        torch.manual_seed(0)
        assert torch.equal(Own(kind).block.inner[0].weight, loaded.block.inner[0].weight)


def test_a_penalty_measures_the_groups_that_are_left(images, tmp_path):
    trained(tmp_path, images, partial(Own, kind="chunk"), regularization_type="l1", kernel_regularization_factor=1e-4)
    norms = json.loads((tmp_path / "train" / "norms.json").read_text())
    assert {*norms} == {"before", "after"}
    assert {*norms["after"]} == {"stem.0.0", "stem.1.0", "block.after.0"}


def test_a_pruning_names_what_it_leaves_out(images, tmp_path, capsys):
    trained(tmp_path, images, partial(Own, kind="group_norm"))
    capsys.readouterr()
    found = pruning(tmp_path, images, Pruner(**SMALL))
    told = capsys.readouterr().err
    assert len(re.findall("left out of pruning: block.before.0 .GroupNorm: ", told)) == 1
    ((reason, layers),) = found["left_out"].items()
    assert reason.startswith("GroupNorm: ")
    assert layers == ["block.before.0"]
    assert found["pruned_against_masked"] < 1e-5
    made = types.SimpleNamespace(made_of={"train": tmp_path / "train", "prune": tmp_path / "prune"})
    page = section([made], [], lambda _: "<div>plot</div>")
    assert "Left out of pruning: block.before.0 (GroupNorm: " in page
    assert "norms of the dense network" in page
    assert len(norm_plot(json.loads((tmp_path / "prune" / "norms.json").read_text()), None).data) == 1


@pytest.mark.parametrize("kind", ["weight_norm", "old_weight_norm"])
@pytest.mark.parametrize("criterion", ["group_l1", "taylor"])
def test_computed_weights_become_plain_ones_where_they_are_pruned(kind, criterion, images, tmp_path, capsys):
    trained(tmp_path, images, partial(Own, kind=kind))
    dense, *_ = store.load(tmp_path / "train")
    gone = groups(dense)[0]
    made = curves(dense, [gone], [torch.arange(gone.size)], lambda net: {"sum": float(outputs(net).sum())})
    assert made["sum"][gone.name]["0.1"] != made["sum"][gone.name]["0.9"]
    capsys.readouterr()
    found = pruning(tmp_path, images, Pruner(**SMALL, criterion=criterion))
    assert capsys.readouterr().err.count("pruning replaces computed weights") == 1
    assert found["pruned_against_masked"] < 1e-5
    assert found["macs_ratio"] < 0.5
    loaded, *_ = store.load(tmp_path / "prune")
    assert loaded.block.inner.weight.is_leaf


def test_a_pruning_that_changes_the_network_is_refused(images, tmp_path, monkeypatch):
    trained(tmp_path, images, partial(Own, kind="group_norm"))
    monkeypatch.setattr(trial.Trial, "broken", lambda *_: [])
    with pytest.raises(
        UserError, match=r"(differs from the masked one by|fails).*; leave out block\.before\.0 with pruner\.excluded_layers$"
    ):
        pruning(tmp_path, images, Pruner(**SMALL))
    monkeypatch.setattr(Cycle, "_faults", lambda *_: [])
    (tmp_path / "prune").rmdir()
    with pytest.raises(
        UserError, match=r"leave out some of the 4 groups that were tried \(stem\.0\.0, .*; none is wrong alone"
    ):
        pruning(tmp_path, images, Pruner(**SMALL))


def test_a_yaml_that_makes_the_network_itself_is_refused(images, tmp_path):
    with pytest.raises(UserError, match=r"model: add `_partial_: true` to the yaml of .*Own; stages make the network"):
        trained(tmp_path, images, Own())


def test_sensitivity_says_why_there_is_nothing_to_measure(images, tmp_path, monkeypatch):
    trained(tmp_path, images)
    monkeypatch.setattr(sensitivity, "survey", lambda _: graph.Survey([], [graph.LeftOut(["stem"], "no reason")]))
    with pytest.raises(UserError, match=r"left out are stem \(no reason\)"):
        sensitivity.Sensitivity(images, HeatmapPafObjective(), "32x48", WholeImage(), NONE, "l1", None, "union", 4).run(
            job(tmp_path, "s", network=tmp_path / "train")
        )


def test_computed_weights_are_exported(tmp_path):
    network = lively("weight_norm")
    network.block.before[0] = old_weight_norm(conv())
    image = torch.rand(1, 3, 32, 48)
    export.export(network, image.numpy(), 20, tmp_path / "m.onnx", any_shape=False)
    found = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).run(["heatmaps"], {"image": image.numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - network(image)["heatmaps"].numpy()).max() < 1e-5


def test_computed_weights_train_on_one_device(images, tmp_path):
    network = lively("weight_norm")
    views = types.SimpleNamespace(resolution=SIZE)
    with pytest.raises(UserError, match=r"training\.devices=2.*weight_norm.*one device"):
        train(network, views, training(devices=2), tmp_path / "c.ckpt")


# ---------- mistakes ----------


def changed(**members):
    """A class like `Own`, with other members."""
    return type("Own", (Own,), {"__module__": MODULE.__name__, **members})


def fails(own, x):
    raise KeyError("nothing here")


def returns(does):
    return changed(forward=lambda self, x: does(Own.forward(self, x)))


def specified(fields=SPEC.fields, labels=OPENPOSE_18):
    return changed(spec=NetworkSpec(SPEC.input, tuple(fields), labels))


def outer(own):
    raise RuntimeError("first line\nsecond line")


HEAT, PAF = SPEC.fields
NO_NETWORK = type("Plain", (), {})
MISTAKES = {
    "no module": (NO_NETWORK, r"Plain is no torch\.nn\.Module"),
    "a function": (lambda: None, r"is no torch\.nn\.Module"),
    "no spec": (changed(spec=None), "has no `spec`; describe"),
    "a dict": (changed(spec={"input": {}}), "has a dict as `spec`"),
    "no heads": (changed(ignored_layers=None), "has no `ignored_layers`"),
    "a method": (changed(ignored_layers=lambda self: []), r"no list \(is @property missing\?\)"),
    "names": (changed(ignored_layers=["heads.0"]), "ignored_layers holds a str, which is no layer"),
    "a stranger": (changed(ignored_layers=[nn.Conv2d(1, 1, 1)]), "ignored_layers holds a Conv2d, which is no layer"),
    "constructor": (changed(__init__=outer), r"cannot be made: RuntimeError: first line \(test_own_networks\.py, line \d+\)$"),
    "forward": (
        changed(forward=fails),
        r"forward fails on images \[2, 3, 32, 48\] in evaluation: KeyError: 'nothing here' \(test_own",
    ),
    "a tensor": (
        returns(lambda out: out["pafs"]),
        r"forward returns a tensor \[2, 38, 8, 12\]; return a dict with 'heatmaps', 'pafs'",
    ),
    "a tuple": (returns(lambda out: tuple(out.values())), "forward returns a tuple of 2; return a dict"),
    "nothing": (returns(lambda out: None), "forward returns None; return a dict"),
    "a name": (
        returns(lambda out: {"heat": out["heatmaps"], "pafs": out["pafs"]}),
        "expected 'heatmaps', 'pafs', found 'heat', 'pafs'",
    ),
    "one more": (
        returns(lambda out: {**out, "aux": out["pafs"]}),
        r"found 'heatmaps', 'pafs', 'aux' \(in training only, .* as 'heatmaps\.0'",
    ),
    "stride": (
        specified((OutputSpec("heatmaps", 8, 19), PAF)),
        r"heatmaps: expected \[2, 19, 4, 6\] \(19 channels, stride 8\), found a tensor \[2, 19, 8, 12\], which is 19 "
        "channels, stride 4",
    ),
    "channels": (
        specified((HEAT, OutputSpec("pafs", 4, 36))),
        r"pafs: expected \[2, 36, .*found a tensor \[2, 38, .*38 channels",
    ),
    "rank": (returns(lambda out: {k: v.flatten(2) for k, v in out.items()}), r"found a tensor \[2, 19, 96\]"),
    "dtype": (returns(lambda out: {k: v.long() for k, v in out.items()}), r"found a tensor \[2, 19, 8, 12\] of int64"),
    "no tensor": (returns(lambda out: {**out, "pafs": [out["pafs"]]}), "pafs: expected .* found a list of 1"),
    "other limbs": (
        specified(labels=Skeleton(OPENPOSE_18.names, OPENPOSE_18.limbs[:5], OPENPOSE_18.sigmas)),
        r"cannot be trained here: spec says 38 channels of 'pafs', but its labels need 10: two channels a limb \(5\)",
    ),
    "other keypoints": (
        specified(labels=Skeleton(("top", *OPENPOSE_18.names[1:]), OPENPOSE_18.limbs, OPENPOSE_18.sigmas)),
        r"cannot be trained here: spec's labels name the keypoint 'top'; the data does not label it: the network has 18 "
        r"keypoints \(top, neck, .*left_ear\), the data 17 \(nose, left_eye, .*right_ankle\); give skeleton=FILE",
    ),
    "another family": (
        changed(
            spec=NetworkSpec(SPEC.input, (HEAT,), OPENPOSE_18),
            forward=lambda own, x: {"heatmaps": Own.forward(own, x)["heatmaps"]},
        ),
        r"cannot be trained here, because its outputs are not those of HeatmapPafObjective \(.*pafs.*\); choose the family",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_data_are_read(mistake, tmp_path):
    make, message = MISTAKES[mistake]
    data = types.SimpleNamespace(open=lambda _: types.SimpleNamespace(labelled=True, labels=COCO_17))  # without images
    with pytest.raises(UserError, match=message) as told:
        trained(tmp_path, data, partial(make))
    assert "\n" not in str(told.value)
    assert not list((tmp_path / "train").iterdir())


def test_an_earlier_stages_field_is_learnt_from_and_a_wrong_one_refused(images, tmp_path):
    earlier = changed(forward=lambda own, x: (out := Own.forward(own, x)) | ({"pafs.0": out["pafs"]} if own.training else {}))
    assert trained(tmp_path, images, partial(earlier))["loss"] > 0
    wrong = changed(forward=lambda own, x: (out := Own.forward(own, x)) | ({"pafs.0": out["heatmaps"]} if own.training else {}))
    with pytest.raises(UserError, match=r"pafs\.0: expected \[2, 38, 8, 12\]"):
        contract.check(wrong(), SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"width": 0.125},
            r"model\.width=0\.125: .*Own has no option 'width' "
            r"\(it has kind\); where an experiment sets it, add ~model\.width",
        ),
        ({"knd": "plain"}, r"no option 'knd'; did you mean 'kind'\?"),
        ({"kind": "nothing"}, r"cannot be made: KeyError: 'nothing' \(test_own_networks"),
    ],
)  # fmt: skip
def test_options_that_a_network_does_not_have_are_named(options, message):
    with pytest.raises(UserError, match=message):
        contract.created(partial(Own, **options))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Own(:", r"model\._target_=\S+: its module cannot be imported \(SyntaxError: "),
        ("from evaluation.types import FieldSpec\nFieldSpec('pafs', 0, 38)", r"cannot be imported \(ValueError: stride=0"),
        ("import nothing_here", "needs the Python package 'nothing_here', which is not installed"),
        ("", "no such class or function"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(text, message, tmp_path, monkeypatch):
    name = f"nets{len(text)}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=message) as told:
        check_component(OmegaConf.create({"model": {"_target_": f"{name}.Own", "_partial_": True}}), "model")
    assert "\n" not in str(told.value)


def test_an_option_that_an_experiment_sets_for_another_network_is_named():
    model = {"_target_": f"{MODULE.__name__}.Own", "_partial_": True, "width": 0.125, "label": "own"}
    with pytest.raises(UserError, match=r"model\.width: no such option; where an experiment sets it .*, add ~model\.width"):
        check_component(OmegaConf.create({"model": model}), "model")


@pytest.mark.parametrize("model", ["mobilenetv2_paf", "lightweight_openpose_smoke"])
@pytest.mark.parametrize("option", ["width", "depth"])
def test_an_option_is_taken_out_whether_it_is_there_or_not(model, option):
    words = command_line.read(["experiment=smoke", f"model={model}", f"~model.{option}", "tracking=none"])
    config = command_line.compose(words.options, None)
    check_added(config, words.options)
    assert option not in config.model
    assert "label" in config.model.about


def test_an_option_without_a_default_is_asked_for():
    needs = changed(__init__=lambda self, width: Own.__init__(self))
    with pytest.raises(UserError, match=r"needs the option 'width'; give model\.width=VALUE"):
        contract.created(partial(needs))
    anything = changed(__init__=lambda self, **options: Own.__init__(self))
    assert isinstance(contract.created(partial(anything, any=3)), Own)


def test_a_resolution_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"training_resolution=40x48: .*multiples of 16 \(its spec\.input\); choose 48x48"):
        trained(tmp_path, None, resolution="40x48")


def test_adopted_weights_are_checked_too(tmp_path):
    make = partial(specified((OutputSpec("heatmaps", 8, 19), PAF)))
    torch.save(make().state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="heatmaps: expected"):
        trained(tmp_path, None, make, str(tmp_path / "w.pt"), steps=0)


# ---------- state files ----------


def loaded(raw, folder, kind="plain", name="w.pt"):
    file = folder / name
    torch.save(raw, file)
    network = Own(kind)
    store.load_state(network, store.read_weights(file), file)
    return network


def under(prefix, state):
    return {prefix + name: values for name, values in state.items()}


@pytest.mark.parametrize("kind", ["plain", "tied", "weight_norm", "old_weight_norm"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "a.b.c."])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model_state_dict", "model", "ema", "checkpoint.weights"])
def test_states_of_others_are_read(kind, prefix, wrapper, tmp_path, capsys):
    network = lively(kind)
    raw = under(prefix, network.state_dict())
    for key in reversed([key for key in wrapper.split(".") if key]):
        optimiser = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}
        raw = {key: raw, "epoch": 3, "optimizer": optimiser, "args": {"lr": 0.1}}
    assert torch.equal(outputs(loaded(raw, tmp_path, kind)), outputs(network))
    told = capsys.readouterr().err
    plain = not wrapper and prefix in ("", "_orig_mod.")
    assert len(told.splitlines()) == (0 if not wrapper and not prefix else len(told.splitlines()))
    if not plain:
        assert told.count("\n") == 1
        assert wrapper in told
        assert prefix.replace("_orig_mod.", "") in told


def test_what_lies_beside_a_network_is_counted(tmp_path, capsys):
    network = lively("plain")
    raw = under("model.", network.state_dict()) | {"criterion.weight": torch.zeros(3)}
    assert torch.equal(outputs(loaded({"state_dict": raw}, tmp_path)), outputs(network))
    assert "read 'state_dict', names without 'model.'; 1 tensors beside them are not the network's" in capsys.readouterr().err


def test_a_state_of_a_part_is_read_into_a_network_that_wraps_it(tmp_path):
    class Wrapper(nn.Module):
        spec, ignored_layers = SPEC, ()

        def __init__(self):
            super().__init__()
            self.net = Own()

    inner, wrapper = lively("plain"), Wrapper()
    torch.save(inner.state_dict(), tmp_path / "w.pt")
    store.load_state(wrapper, store.read_weights(tmp_path / "w.pt"), tmp_path / "w.pt")
    assert torch.equal(outputs(wrapper.net), outputs(inner))


def test_two_states_that_fit_are_refused_unless_they_are_one(tmp_path):
    one, other = lively("plain").state_dict(), lively("plain", 5).state_dict()
    with pytest.raises(UserError, match="several states in it fit Own: 'model'; 'ema'; save the one that is meant"):
        loaded({"model": one, "ema": other}, tmp_path)
    loaded({"model": one, "ema": one}, tmp_path)


def test_tied_weights_that_differ_are_refused(tmp_path):
    network = lively("tied")
    state = dict(network.state_dict())
    state["block.inner.two.weight"] = state["block.inner.two.weight"] + 1
    with pytest.raises(UserError, match=r"block\.inner\.two\.weight differs from block\.inner\.one\.weight, although"):
        loaded(state, tmp_path, "tied")
    del state["block.inner.one.weight"]  # either name will do
    assert torch.equal(loaded(state, tmp_path, "tied").block.inner.one.weight, state["block.inner.two.weight"])


def test_keys_that_do_not_fit_are_listed_with_the_nearest(tmp_path):
    state = dict(lively("plain").state_dict())
    state["stem.0.0.wieght"] = state.pop("stem.0.0.weight")
    with pytest.raises(UserError) as told:
        loaded({"model": under("module.", state)}, tmp_path)
    assert "(read as 'model', names without 'module.'): 1 missing: stem.0.0.weight; 1 left over: stem.0.0.wieght" in str(
        told.value
    )
    assert "nearest to stem.0.0.weight there is stem.0.0.wieght" in str(told.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.to_sparse(), "is sparse"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "holds qint8"),
        (lambda w: w.to("meta"), "has no values"),
        (lambda w: w.to(torch.int8), "holds int8"),
        (lambda w: w.to(torch.int64), "holds int64"),
        (lambda w: w.to(torch.complex64), "holds complex64"),
        (lambda w: w.clone().fill_(math.nan), "holds values that are not finite"),
        (lambda w: w.clone().fill_(math.inf), "holds values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights_are_refused_by_name(change, message):
    network = LightweightOpenPose(stages=2, width=0.125)
    state = network.state_dict()
    name = next(name for name in state if name.endswith("weight"))
    for whole in ({**state, name: change(state[name])}, {"model": {**state, name: change(state[name])}}):
        with pytest.raises(UserError, match=rf"w\.pt: {re.escape(name)} {message}"):
            store.load_state(network, whole, Path("w.pt"))
    halved = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    store.load_state(network, halved, Path("w.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of git-lfs, not the file; fetch it"),
        (b"\n<!DOCTYPE html><html>not found</html>", "a web page, not the file; download"),
        (b"garbage" * 50, "not a state file of tensors"),
    ],
)
def test_what_was_downloaded_in_place_of_a_file_is_named(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        store.read_weights(tmp_path / "w.pt")
    assert "weights_only" not in str(told.value)


def test_files_that_hold_no_state_say_what_they_are(tmp_path):
    network = Own()
    torch.save(network.heads[0], tmp_path / "module.pt")
    torch.jit.save(torch.jit.script(nn.Conv2d(1, 1, 1)), tmp_path / "script.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    made = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [])
    onnx.save(onnx.helper.make_model(made), tmp_path / "net.onnx")
    (tmp_path / "net.pt").write_bytes((tmp_path / "net.onnx").read_bytes())
    (tmp_path / "net.engine").write_bytes(b"plan")
    for name, message in (
        (
            "module.pt",
            r"more than tensors \(torch\.nn\.modules\.conv\.Conv2d\), which would run code.*save network\.state_dict\(\)",
        ),
        ("script.pt", r"a TorchScript archive; save torch\.jit\.load\(FILE\)\.state_dict\(\)"),
        ("none.pt", "not a state dict of tensors"),
        ("net.onnx", r"give model=onnx model\.onnx=\S+net\.onnx instead of weights="),
        ("net.pt", r"an ONNX file; give model=onnx model\.onnx=\S+net\.pt instead"),
        ("net.engine", r"give model=plan model\.plan=\S+net\.engine instead"),
    ):
        with pytest.raises(UserError, match=message):
            store.read_weights(tmp_path / name)


def test_safetensors_are_read_by_content(tmp_path):
    network = lively("plain")
    store.save(network, tmp_path, partial(Own), [])
    (tmp_path / store.WEIGHTS).rename(tmp_path / "w.bin")
    again = Own()
    store.load_state(again, store.read_weights(tmp_path / "w.bin"), tmp_path / "w.bin")
    assert torch.equal(outputs(again), outputs(network))


@pytest.mark.parametrize("make", MAKERS)
def test_buffers_that_share_memory_are_saved(make, tmp_path):
    network = make()
    weight = next(network.parameters())
    network.register_buffer("view", weight.data[:1])
    store.save(network, tmp_path, make, [])
    assert torch.equal(store.load_file(tmp_path / store.WEIGHTS)["view"], weight.data[:1])
