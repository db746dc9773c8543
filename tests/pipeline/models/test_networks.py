from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.pruning.groups import remove, replay
from pipeline.pruning.plan import choose
from pipeline.pruning.pruner import Pruner
from posepress.errors import UserError
from posepress.resolution import Resolution
from tests.conftest import REAL

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
        history = remove(network, choose(Pruner(pruning_ratio=ratio), network, SIZE).dropped)
    before = outputs(network)
    store.save(network, tmp_path, make, history)
    loaded, again, replayed = store.load(tmp_path)
    assert torch.equal(outputs(loaded), before)
    assert again.keywords == make.keywords
    assert replayed == history


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
