"""The networks of people in boxes, points and lines: their outputs, any skeleton, and what can be pruned."""

import numpy as np
import pytest
import torch

from pipeline.models.contract import check
from pipeline.models.fastpose import FastPose
from pipeline.models.hrnet import HRNet
from pipeline.models.onestage_pose import OneStagePose
from pipeline.models.simcc import SimCC
from pipeline.models.simplebaseline import SimpleBaseline
from pipeline.pruning.costs import macs
from pipeline.pruning.graph import survey
from posepress.resolution import Resolution

SIZE = Resolution(64, 96)
HAND = {"names": [f"p{n}" for n in range(21)], "edges": [[0, 1]], "sigmas": [0.03] * 21}
NETWORKS = {
    "simplebaseline": lambda **more: SimpleBaseline(18, 0.25, 64, **more),
    "simplebaseline-50": lambda **more: SimpleBaseline(50, 0.25, 64, **more),
    "fastpose": lambda **more: FastPose(18, 0.3, **more),
    "fastpose-50": lambda **more: FastPose(50, 0.25, **more),
    "fastpose-dcn": lambda **more: FastPose(50, 0.25, dcn=True, **more),
    "hrnet": lambda **more: HRNet(0.25, **more),
    "simcc": lambda **more: SimCC("64x96", 18, 0.25, **more),
    "onestage_pose": lambda **more: OneStagePose(0.125, **more),
}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]().eval()


def test_outputs_are_as_described_for_any_skeleton(network):
    check(network, SIZE)
    name = next(name for name, make in NETWORKS.items() if type(make()) is type(network))
    hand = NETWORKS[name](skeleton=HAND)
    check(hand, SIZE)
    assert hand.spec.skeleton.names == tuple(HAND["names"])
    assert {field.channels for field in hand.spec.fields} & {21, 63}


def test_most_layers_can_be_pruned_and_what_cannot_is_said(network):
    found = survey(network)
    assert len(found.groups) >= 10
    shuffles = isinstance(network, FastPose)
    assert all(("PixelShuffle" in reason) == shuffles for reason in found.reasons())
    producers = {part.name for group in found.groups for part in group.producers}
    heads = {name for name, module in network.named_modules() if module in list(network.ignored_layers)}
    assert not producers & heads


def test_channels_are_multiples_of_eight(network):
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m not in list(network.ignored_layers)]
    assert min(layer.out_channels for layer in layers) >= 8
    odd = {layer.out_channels for layer in layers if layer.out_channels % 8}
    assert not odd or isinstance(network, FastPose), "a shuffle divides the channels by four"


@pytest.mark.parametrize(
    ("make", "params", "gmacs"), [(HRNet, 28.5, 7.6), (lambda: SimpleBaseline(50), 34.0, 5.4), (FastPose, 32.2, 5.9)]
)
def test_full_networks_have_the_size_of_their_papers(make, params, gmacs):
    """A stride-2 transposed convolution of 4x4 counts four products an output cell; papers count sixteen."""
    full = make()
    assert sum(p.numel() for p in full.parameters()) / 1e6 == pytest.approx(params, rel=0.02)
    assert macs(full, Resolution(256, 192)) / 1e9 == pytest.approx(gmacs, rel=0.06)


def test_the_cells_of_a_one_stage_network_are_those_of_its_strides():
    network = OneStagePose(0.125).eval()
    with torch.no_grad():
        made = network(torch.zeros(1, 3, 64, 96))
    middle = (made["boxes"][0, :, :2] + made["boxes"][0, :, 2:]) / 2
    assert made["boxes"].shape[1] == sum(64 // s * (96 // s) for s in (8, 16, 32))
    wanted = [((np.arange(96 // s) + 0.5) * s - 0.5, (np.arange(64 // s) + 0.5) * s - 0.5) for s in (8, 16, 32)]
    grid = np.concatenate([np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2) for xs, ys in wanted])
    assert np.abs(middle.numpy() - grid).max() < 8, "an untrained box lies around its cell"
    assert ((made["scores"] > 0) & (made["scores"] < 0.2)).all()


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match=r"model\.depth=34: choose 18, 50, 101"):
        SimpleBaseline(34)
    with pytest.raises(ValueError, match="skeleton=coco: choose coco_17, openpose_18"):
        OneStagePose(0.125, skeleton="coco")
