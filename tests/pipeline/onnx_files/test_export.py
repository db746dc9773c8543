import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from pipeline.backends.macs import macs as file_macs
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.recording import record
from pipeline.onnx_files import export
from pipeline.onnx_files.adopt import adopt
from pipeline.onnx_files.compare import compare, onnx_reference, torch_reference
from pipeline.onnx_files.files import read_spec
from pipeline.pruning.costs import macs
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec
from tests.conftest import REAL

SHAPES = [(1, 3, 64, 80), (2, 3, 72, 88), (1, 3, 56, 104)]


def inputs():
    draw = np.random.default_rng(0)
    return [draw.normal(0, 1, shape).astype(np.float32) for shape in SHAPES]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return LightweightOpenPose(stages=2, width=0.125).eval()


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export.export(network, inputs()[0], 20, file)
    return file


def test_the_exported_network_is_torchs_at_every_shape(network, file):
    found = compare(file, network.spec, torch_reference(network), inputs(), 1e-4)
    assert found["max_difference"] < 1e-5
    assert found["shapes"] == [list(s) for s in SHAPES]
    graph = onnx.load(file)
    assert graph.opset_import[0].version == 20
    assert [o.name for o in graph.graph.output] == ["heatmaps", "pafs"]
    assert [d.dim_param for d in graph.graph.input[0].type.tensor_type.shape.dim if d.dim_param] == ["batch", "height", "width"]


def test_simplifying_keeps_the_function(network, file, tmp_path):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    assert export.simplify(copy, 120) == "onnxsim"
    assert list(tmp_path.iterdir()) == [copy]
    compare(copy, network.spec, torch_reference(network), inputs(), 1e-4)


def fail_with(monkeypatch, behaviour):
    real_run = subprocess.run

    def run(command, **options):
        tool = command[3]
        if behaviour.get(tool) == "crash":
            return subprocess.CompletedProcess(command, -11, "", "Segmentation fault")
        if behaviour.get(tool) == "hang":
            Path(command[5]).write_bytes(b"half")
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return real_run(command, **options)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize("how", ["crash", "hang"])
def test_a_simplifier_that_fails_is_replaced(network, file, tmp_path, monkeypatch, how):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    fail_with(monkeypatch, {"onnxsim": how})
    assert export.simplify(copy, 60) == "onnxslim"
    assert list(tmp_path.iterdir()) == [copy]
    compare(copy, network.spec, torch_reference(network), inputs(), 1e-4)


def test_both_simplifiers_failing_is_an_error(file, tmp_path, monkeypatch):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    fail_with(monkeypatch, {"onnxsim": "crash", "onnxslim": "hang"})
    with pytest.raises(UserError, match=r"onnxsim ended with -11 \(Segmentation fault\); onnxslim took more than 7 s"):
        export.simplify(copy, 7)
    assert list(tmp_path.iterdir()) == [copy]


class Small(nn.Module):
    """Quick to export, with a batch norm to fold and an option that only its code knows."""

    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 1), OutputSpec("pafs", 4, 1)), OPENPOSE_18)

    def __init__(self, factor=2.0):
        super().__init__()
        self.conv, self.norm, self.factor = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), factor
        nn.init.normal_(self.norm.weight)

    def forward(self, images):
        fields = self.norm(self.conv(images))
        return {"heatmaps": fields.relu(), "pafs": fields * self.factor}


@pytest.fixture
def exports(monkeypatch):
    """Counts what torch exports."""
    calls, real_export = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **options: calls.append(given) or real_export(*given, **options))
    return calls


def test_a_network_of_the_same_structure_takes_its_graph_from_the_cache(tmp_path, exports):
    first, other = Small().eval(), Small().eval()
    for name, network, graphs in (("a", first, "kept"), ("b", other, "kept"), ("c", other, None)):
        export.export(network, inputs()[0], 20, tmp_path / name, graphs=graphs and tmp_path / graphs)
    assert len(exports) == 2
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()
    compare(tmp_path / "b", other.spec, torch_reference(other), inputs(), 1e-5)
    (kept,) = (tmp_path / "kept").iterdir()
    assert not any(i.raw_data for i in onnx.load(kept).graph.initializer if i.name == "network.conv.weight")


class ReadTwice(Small):
    """Its convolution is read by the batch norm and by another field."""

    def forward(self, images):
        made = self.conv(images)
        return {"heatmaps": self.norm(made).relu(), "pafs": made}


class TwoNorms(Small):
    """One weight, two convolutions, and a batch norm for each."""

    def __init__(self):
        super().__init__()
        self.second = nn.BatchNorm2d(4)
        nn.init.normal_(self.second.weight)

    def forward(self, images):
        return {"heatmaps": self.norm(self.conv(images)), "pafs": self.second(self.conv(images.flip(1)))}


class BiasReadTwice(Small):
    def forward(self, images):
        fields = super().forward(images)
        return fields | {"pafs": fields["pafs"] * self.conv.bias[:, None, None]}


class OfOneWeight(Small):
    """Two layers have one weight, and one of them is run."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3, padding=1)
        self.twin.weight = self.conv.weight


class TwoNames(Small):
    """A layer under two names, run by the first."""

    def __init__(self):
        super().__init__()
        self.again = self.conv


class NormAndRelu(nn.BatchNorm2d):
    def forward(self, images):
        return super().forward(images).relu()


class NormSubclass(Small):
    def __init__(self):
        super().__init__()
        self.norm = NormAndRelu(4)


class Hooked(Small):
    def __init__(self):
        super().__init__()
        self.norm.register_forward_hook(lambda module, given, made: made * 1.0006)


class PlainFilter(Small):
    """A filter that is no parameter."""

    def __init__(self):
        super().__init__()
        self.filters = [torch.randn(4, 3, 3, 3)]

    def forward(self, images):
        fields = self.norm(nn.functional.conv2d(images, self.filters[0], padding=1))
        return {"heatmaps": fields, "pafs": fields * 2}


class FrozenNorm(nn.BatchNorm2d):
    """It never trains, and says that it does."""

    def train(self, mode=True):
        return self

    def forward(self, images):
        return nn.functional.batch_norm(images, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class FrozenStatistics(Small):
    def __init__(self):
        super().__init__()
        self.norm = FrozenNorm(4)


class Enlarged(Small):
    """The size of its input is in its operators."""

    def forward(self, images):
        fields = super().forward(nn.functional.avg_pool2d(images, 4))
        return {name: nn.functional.interpolate(field, size=images.shape[2:]) for name, field in fields.items()}


class Squeezed(Small):
    """It divides by the number of cells of a coarse map, which is the same for inputs of nearly one size."""

    def forward(self, images):
        fields = super().forward(images)
        coarse = nn.functional.avg_pool2d(fields["heatmaps"], 32, ceil_mode=True)
        mean = coarse.sum((2, 3), keepdim=True) / (coarse.shape[2] * coarse.shape[3])
        return {name: field * torch.sigmoid(mean) for name, field in fields.items()}


class BatchAlone(Small):
    spec = replace(Small.spec, dynamic=frozenset({"batch"}))

    def forward(self, images):
        fields = super().forward(images)
        return {name: field.reshape(-1, 4, 64 * 80).softmax(2).reshape(-1, 4, 64, 80) for name, field in fields.items()}


@pytest.mark.parametrize(
    ("make", "folded", "size"),
    [
        *((make, True, size) for make in (Small, Enlarged, Squeezed) for size in ((64, 80), (320, 384))),
        *((make, True, (64, 80)) for make in (TwoNames, BatchAlone)),
        *((make, False, (64, 80)) for make in (ReadTwice, TwoNorms, BiasReadTwice, OfOneWeight)),
        *((make, False, (64, 80)) for make in (NormSubclass, Hooked, PlainFilter, FrozenStatistics)),
    ],
)
def test_shorter_ways_keep_the_function(make, folded, size, tmp_path, exports):
    torch.manual_seed(1)
    network = make().eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    example = np.zeros((1, 3, *size), np.float32)
    fixed = make is BatchAlone
    for name, graphs in (("model", tmp_path / "kept"), ("again", tmp_path / "kept")):
        export.export(network, example, 20, tmp_path / name, graphs=graphs)
        others = [(3, 3, 64, 80)] if fixed else [(3, 3, 256, 160), (1, 3, 40, 208), (2, 3, 368, 432)]
        draw = np.random.default_rng(4)
        images = [draw.normal(0, 1, shape).astype(np.float32) for shape in others]
        compare(tmp_path / name, network.spec, torch_reference(network), images, 1e-5)
    assert len(exports) == 1, "the second takes the kept graph"
    assert folded != any(isinstance(module, nn.BatchNorm2d) for module in exports[0][0].modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Varied(Small):
    """Its result follows from a private attribute, a closure, a constant and the size of its input; no option shows them."""

    def __init__(self, limit=6.0, slope=1.0, step=2.0, constant=1.0):
        super().__init__()
        self._limit, self._constant = limit, [torch.tensor(constant)]
        self.act = lambda x: x * slope
        self.step = step

    def forward(self, images):
        fields = super().forward(images)
        wide = self.step if images.shape[3] > 80 else 1.0
        return {
            "heatmaps": self.act(fields["heatmaps"]).clamp(max=self._limit) * self._constant[0],
            "pafs": fields["pafs"] * wide,
        }


def test_another_structure_has_another_key():
    def key(network, more=1):
        ordered = export._Ordered(network.eval(), ["heatmaps", "pafs"])
        return export._key(ordered, [more, *(record(ordered, images).digest for images in inputs())])

    hooked = Varied()
    hooked.conv.register_forward_hook(lambda module, given, found: found + 1)
    same = key(Varied())
    assert same == key(Varied())
    others = [
        key(network)
        for network in (Varied(limit=1.5), Varied(slope=2.0), Varied(step=3.0), Varied(constant=2.0), hooked, Small())
    ]
    assert len({same, key(Varied(), 2), *others}) == 8


class Raises(Small):
    def forward(self, images):
        raise NotImplementedError


class FollowsValues(Small):
    """Which operators run follows from what is in the image: one recording says nothing of another image."""

    def forward(self, images):
        fields = super().forward(images)
        return fields if images.mean() > 0 else {name: -field for name, field in fields.items()}


@pytest.mark.parametrize("make", [Raises, FollowsValues])
def test_what_cannot_be_recorded_has_no_key(make):
    assert record(make().eval(), inputs()[0]) is None


class Tied(Small):
    """Two convolutions of one weight."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(3, 4, 3, padding=1)
        self.twin.weight = self.conv.weight

    def forward(self, images):
        return super().forward(images) | {"pafs": self.twin(images)}


def test_tied_weights_are_filled_in_under_both_names(tmp_path, exports):
    network = Tied().eval()
    export.export(network, inputs()[0], 20, tmp_path / "a", graphs=tmp_path / "kept")
    with torch.no_grad():
        network.conv.weight *= 1.0003
    export.export(network, inputs()[0], 20, tmp_path / "b", graphs=tmp_path / "kept")
    assert len(exports) == 1
    compare(tmp_path / "b", network.spec, torch_reference(network), inputs(), 1e-5)


def test_a_kept_graph_that_is_damaged_or_of_another_network_is_exported_anew(tmp_path, exports, monkeypatch):
    def exported(network):
        export.export(network.eval(), inputs()[0], 20, tmp_path / "model", graphs=tmp_path / "kept")
        compare(tmp_path / "model", network.spec, torch_reference(network), inputs()[:1], 1e-5)
        return len(exports)

    assert exported(Small()) == 1
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert exported(Small()) == 2
    monkeypatch.setattr(export, "_key", lambda *_: file.stem)  # a key that is too coarse
    assert exported(Small(5.0)) == 3


class Frozen(nn.Module):
    """Its result depends on the parity of the input's height: an exporter freezes the branch."""

    spec = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 1, 3), OutputSpec("pafs", 1, 3)), OPENPOSE_18)

    def forward(self, images):
        heatmaps = images * 2 if (images.shape[2] // 8) % 2 == 0 else images * 3
        return {"heatmaps": heatmaps, "pafs": images}


def test_a_branch_on_the_size_is_found(tmp_path):
    network = Frozen().eval()
    file = tmp_path / "frozen.onnx"
    try:
        export.export(network, inputs()[0], 20, file)
    except Exception as error:  # some exporters refuse, which is as good
        assert "height" in str(error) or "Constraints" in str(error)
        return
    with pytest.raises(UserError, match="'heatmaps' differs from its source|does not run at"):
        compare(file, network.spec, torch_reference(network), inputs(), 1e-4)


def test_a_difference_is_reported(network, file):
    def louder(images):
        return {name: field * 1.01 for name, field in torch_reference(network)(images).items()}

    with pytest.raises(UserError, match=r"differs from its source by 0\.00?99?.*tolerance=0.0001"):
        compare(file, network.spec, louder, inputs(), 1e-4)


def test_the_description_travels_in_the_file(network, file, tmp_path):
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="no network description"):
        read_spec(copy)
    export.stamp(copy, network.spec)
    export.stamp(copy, network.spec)
    assert read_spec(copy) == network.spec
    assert len(onnx.load(copy).metadata_props) == len({p.key for p in onnx.load(copy).metadata_props})


def test_macs_of_the_file_are_those_of_the_network(network, file):
    for size in (Resolution(64, 80), Resolution(96, 128)):
        assert sum(file_macs(onnx.load(file), size, network.spec.input).values()) == macs(network, size)


RAW = {
    "input": {"name": "image", "order": "BGR", "range": 255.0, "multiple": 16},
    "fields": [{"name": "heatmaps", "stride": 8, "channels": 19}, {"name": "pafs", "stride": 8, "channels": 38}],
    "labels": "openpose_18",
}


def joined(file, tmp_path):
    """The network's file with its outputs joined into one, as others publish theirs."""
    model = onnx.load(file)
    names = [o.name for o in model.graph.output]
    model.graph.node.append(onnx.helper.make_node("Concat", names, ["both"], axis=1))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("both", onnx.TensorProto.FLOAT, ["n", 57, "h", "w"]))
    onnx.save(model, tmp_path / "joined.onnx")
    return tmp_path / "joined.onnx"


def test_a_file_with_one_output_is_adopted(network, file, tmp_path):
    source = joined(file, tmp_path)
    adopted = adopt(source, RAW, None, Resolution(64, 80))
    onnx.save(adopted.model, tmp_path / "adopted.onnx")
    reference = onnx_reference(source, adopted.spec, adopted.sources)
    found = compare(tmp_path / "adopted.onnx", adopted.spec, reference, inputs()[:1], 1e-6)
    assert found["max_difference"] == 0
    compare(tmp_path / "adopted.onnx", adopted.spec, torch_reference(network), inputs(), 1e-4)


def test_a_file_with_named_outputs_is_adopted_as_it_is(file):
    adopted = adopt(file, RAW, None, Resolution(64, 80))
    assert len(adopted.model.graph.node) == len(onnx.load(file).graph.node)
    assert adopted.notes == []


@pytest.mark.real
def test_the_published_file_is_adopted(tmp_path):
    source = REAL / "weights/bottomup_mobilenetv2_paf/mobilenetv2_w1.0_paf.onnx"
    adopted = adopt(source, RAW, None, Resolution(112, 160))
    onnx.save(adopted.model, tmp_path / "adopted.onnx")
    images = [np.random.default_rng(0).uniform(0, 255, (1, 3, 112, 160)).astype(np.float32)]
    reference = onnx_reference(source, adopted.spec, adopted.sources)
    assert compare(tmp_path / "adopted.onnx", adopted.spec, reference, images, 1e-4)
