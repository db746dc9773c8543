import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REAL
from torch import nn

from evaluation.types import Resolution
from pipeline.errors import UserError
from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.pruning import L1Pruner, folded_weights, macs, normalised, replay

MAKERS = [partial(LightweightOpenPose, stages=2, width=0.25), partial(MobileNetV2Paf, width=0.5)]
SIZE = Resolution(96, 128)


def trained(make, seed=0):
    """A network with random but lively weights and statistics."""
    torch.manual_seed(seed)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, std=0.1)
    return network.eval()


def outputs(network, size=SIZE):
    torch.manual_seed(1)
    with torch.no_grad():
        fields = network.eval()(torch.rand(2, 3, size.height, size.width))
    return torch.cat([fields["heatmaps"], fields["pafs"]], dim=1)


@pytest.mark.parametrize("make", MAKERS)
def test_fields_are_as_described(make):
    network = make()
    fields = network.eval()(torch.rand(2, 3, 96, 128))
    assert list(fields) == [f.name for f in network.spec.fields]
    for spec in network.spec.fields:
        assert fields[spec.name].shape == (2, spec.channels, 96 // spec.stride, 128 // spec.stride)
    earlier = set(network.train()(torch.rand(1, 3, 96, 128))) - set(fields)
    assert {"heatmaps.0", "pafs.0"} <= earlier


@pytest.mark.parametrize("stages", [2, 5, 7])
def test_stages_add_fields_to_train_on(stages):
    network = LightweightOpenPose(stages=stages, width=0.125).train()
    fields = network(torch.rand(1, 3, 64, 64))
    assert len(fields) == 2 * stages
    assert len(network.ignored_layers) == 2 * stages


@pytest.mark.parametrize(
    ("options", "message"), [({"stages": 1}, r"stages=1"), ({"stages": 8}, "stages=8"), ({"width": 0}, "width=0")]
)
def test_impossible_networks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LightweightOpenPose(**options)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("ratio", [None, 0.3, 0.6])
def test_saving_and_loading_changes_nothing(make, ratio, tmp_path):
    network, history = trained(make), []
    if ratio is not None:
        history = L1Pruner(pruning_ratio=ratio).prune(network)
    before = outputs(network)
    store.save(network, tmp_path, make, history)
    loaded, again, replayed = store.load(tmp_path)
    assert torch.equal(outputs(loaded), before)
    assert again.keywords == make.keywords
    assert replayed == history


@pytest.mark.parametrize("make", MAKERS)
def test_pruning_removes_what_it_says_and_keeps_the_heads(make):
    network = trained(make)
    dense = macs(network, SIZE)
    heads = [head.out_channels for head in network.ignored_layers]
    L1Pruner(pruning_ratio=0.5, round_to=8).prune(network)
    assert 0.2 < macs(network, SIZE) / dense < 0.55
    assert [head.out_channels for head in network.ignored_layers] == heads
    kept = set(network.ignored_layers)
    inner = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m not in kept and m.groups == 1]
    assert all(m.out_channels % 8 == 0 for m in inner)
    assert outputs(network).shape == (2, 57, 12, 16)


def test_pruning_silent_channels_changes_no_output():
    network = trained(MAKERS[0])
    with torch.no_grad():  # the second half of all channels is silent: no weights in, no bias, no scale
        for conv, norm in normalised(network).items():
            half = conv.out_channels // 2
            conv.weight[half:] = 0
            norm.weight[half:] = norm.bias[half:] = norm.running_mean[half:] = 0
        for conv in (m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1 and m.in_channels != 3):
            features = 32 if conv.in_channels == 32 + 57 else conv.in_channels  # the rest are earlier fields
            conv.weight[:, features // 2 : features] = 0
    before, dense = outputs(network), macs(network, SIZE)
    L1Pruner(pruning_ratio=0.5, round_to=1, min_num_filters=1).prune(network)
    assert macs(network, SIZE) < 0.4 * dense
    assert torch.allclose(outputs(network), before, atol=1e-5)


def test_batch_norm_decides_with_the_weights():
    network = trained(MAKERS[0])
    conv, norm = next((c, n) for c, n in normalised(network).items() if c.groups == 1 and c.kernel_size == (3, 3))
    weights = list(folded_weights(network, normalised(network)))
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    expected = conv.weight * scale[:, None, None, None]
    assert any(w.shape == expected.shape and torch.allclose(w, expected) for w in weights)
    assert len(weights) == sum(isinstance(m, nn.Conv2d) for m in network.modules()) - len(network.ignored_layers)


def test_thresholds_are_relative_to_the_greatest():
    counts = []
    for threshold in (0.2, 0.5, 0.8):
        network = trained(MAKERS[0])
        with contextlib.suppress(UserError):
            L1Pruner(pruning_ratio=None, pruning_threshold=threshold).prune(network)
        counts.append(sum(p.numel() for p in network.parameters()))
    assert counts[0] >= counts[1] > counts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 1.0}, "1.0 is no ratio"),
        ({"pruning_ratio": -0.1}, "-0.1 is no ratio"),
        ({"pruning_ratio": 0.5, "pruning_threshold": 0.5}, "either pruning_ratio or pruning_threshold"),
        ({"pruning_ratio": None}, "either pruning_ratio or pruning_threshold"),
    ],
)
def test_impossible_prunings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        L1Pruner(**options)


def test_pruning_nothing_is_refused():
    with pytest.raises(UserError, match="nothing to remove"):
        L1Pruner(pruning_ratio=0.0).prune(trained(MAKERS[0]))


def test_an_empty_history_replays_as_nothing():
    network = trained(MAKERS[0])
    before = outputs(network)
    replay(network, [])
    assert torch.equal(outputs(network), before)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    network = trained(MAKERS[0])
    file = tmp_path / "other.pt"
    state = network.state_dict()
    first, _second = list(state)[:2]
    del state[first]
    torch.save({**state, "foreign.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=f"1 missing: {first}; 1 left over: foreign.weight"):
        store.load_state(MAKERS[0](), store.read_weights(file), file)
    with pytest.raises(UserError, match="of another shape"):
        store.load_state(LightweightOpenPose(stages=2, width=0.5), network.state_dict(), file)


def test_wrapped_state_dicts_load(tmp_path):
    network = trained(MAKERS[0])
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "wrapped.pth")
    other = MAKERS[0]()
    store.load_state(other, store.read_weights(tmp_path / "wrapped.pth"), tmp_path / "wrapped.pth")
    assert torch.equal(outputs(other), outputs(network))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x02cposix\nsystem\nq\x00."])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    file = tmp_path / "broken.pt"
    file.write_bytes(content)
    with pytest.raises(UserError, match="weights=.*broken.pt"):
        store.read_weights(file)
    with pytest.raises(UserError, match="cannot read the file"):
        store.read_weights(tmp_path / "none.pt")


@pytest.mark.real
@pytest.mark.parametrize("shape", [(1, 3, 368, 432), (2, 3, 112, 160)])
def test_real_weights_give_what_the_published_onnx_file_gives(shape):
    import onnxruntime

    folder = REAL / "weights" / "bottomup_mobilenetv2_paf"
    file = folder / "mobilenetv2_w1.4_paf_state.pt"
    network = MobileNetV2Paf()
    store.load_state(network, store.read_weights(file), file)
    images = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    session = onnxruntime.InferenceSession(str(folder / "mobilenetv2_w1.4_paf.onnx"))
    (expected,) = session.run(None, {"image": images})
    with torch.no_grad():
        fields = network.eval()(torch.from_numpy(images))
    ours = torch.cat([fields["heatmaps"], fields["pafs"]], dim=1).numpy()
    assert np.abs(ours - expected).max() < 1e-4


@pytest.mark.real
def test_a_public_checkpoint_with_a_key_too_few_is_refused(tmp_path):
    file = REAL / "weights" / "bottomup_mobilenetv2_paf" / "mobilenetv2_w1.4_paf_state.pt"
    state = store.read_weights(file)
    state.pop("Openpose.MConv_Stage3_L1_2_pointwise.bias")
    with pytest.raises(UserError, match=r"1 missing: stages\.2\.L1\.1\.pointwise\.bias"):
        store.load_state(MobileNetV2Paf(), state, file)
