"""Fused convolutions compute what the layers computed."""

import torch
from torch import nn

from pipeline.backends.torch_fusion import _Pointwise, _Spatial, fused
from pipeline.models.lightweight_openpose import LightweightOpenPose


def as_cudnn(x, weight, bias, stride, padding, dilation, groups):
    return torch.relu(nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups))


def calibrated(network):
    """With batch norms that do something."""
    torch.manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 2)
            layer.bias.data.normal_(0, 0.2)
    return network.eval()


def test_a_network_computes_the_same_with_fewer_layers(monkeypatch):
    monkeypatch.setattr(torch, "cudnn_convolution_relu", as_cudnn)  # which a processor has not
    network = calibrated(LightweightOpenPose(width=0.25))
    images = torch.rand(2, 3, 64, 80).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = {name: field.clone() for name, field in network(images).items()}
        found = fused(network)(images)
    for name, field in expected.items():
        assert torch.allclose(found[name], field, atol=1e-4 * float(field.abs().max())), name
    kinds = [type(layer) for layer in network.modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(_Pointwise) > 10
    assert kinds.count(_Spatial) > 10
    assert all(layer.groups > 1 or layer.kernel_size != (3, 3) for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_what_one_kernel_cannot_do_stays():
    plain = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    images = torch.rand(1, 4, 8, 8)
    with torch.inference_mode():
        expected = plain.eval()(images)
        assert torch.equal(fused(plain)(images), expected)
    assert [type(layer) for layer in plain] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
