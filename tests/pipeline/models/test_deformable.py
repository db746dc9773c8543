"""Deformable convolutions: their values, their gradients, and their form in ONNX."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from pipeline.models.deformable import DeformConv, deform_conv, sampled
from pipeline.models.fastpose import FastPose
from pipeline.onnx_files import export
from pipeline.pruning.costs import macs
from posepress.errors import UserError
from posepress.resolution import Resolution


def given(stride=1, size=(7, 9), kind=torch.float32):
    draw = torch.Generator().manual_seed(0)
    h, w = ((side - 1) // stride + 1 for side in size)
    shapes = ((2, 5, *size), (6, 5, 3, 3), (2, 18, h, w), (2, 9, h, w))
    return [torch.randn(shape, generator=draw, dtype=kind) for shape in shapes]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(7, 9), (1, 4), (3, 1)])
def test_without_displacement_it_is_a_plain_convolution(stride, size):
    x, weight, offset, mask = given(stride, size)
    made = deform_conv(x, weight, torch.zeros_like(offset), torch.ones_like(mask), stride)
    assert torch.allclose(made, F.conv2d(x, weight, stride=stride, padding=1), atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_onnx_s_operator(stride):
    tensors = given(stride)
    names = ["x", "w", "o", "", "m"]
    node = onnx.helper.make_node("DeformConv", names, ["y"], kernel_shape=[3, 3], pads=[1] * 4, strides=[stride] * 2)
    values = dict(zip(["x", "w", "o", "m"], [tensor.numpy() for tensor in tensors], strict=True))
    infos = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in values.items()]
    graph = onnx.helper.make_graph([node], "g", infos, [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, values)
    assert np.allclose(found, deform_conv(*tensors, stride).numpy(), atol=1e-3)


def test_its_gradients_are_those_of_the_sampling():
    ours, plain = ([tensor.requires_grad_() for tensor in given(kind=torch.float64)] for _ in range(2))
    deform_conv(*ours, 1).square().sum().backward()
    sampled(*plain, 1).square().sum().backward()
    assert all(torch.allclose(a.grad, b.grad) for a, b in zip(ours, plain, strict=True))
    torch.library.opcheck(deform_conv, (*given(), 1))


def test_a_network_with_it_is_exported_with_one_node_for_each(tmp_path):
    torch.manual_seed(0)
    network = FastPose(50, 0.25, dcn=True).eval()
    layers = [module for module in network.modules() if isinstance(module, DeformConv)]
    for layer in layers:
        torch.nn.init.normal_(layer.taps.weight, std=0.05)
    file = tmp_path / "model.onnx"
    export.export(network, np.zeros((1, 3, 64, 64), np.float32), 20, file)
    export.simplify(file, 120)
    export.stamp(file, network.spec)
    model = onnx.load(file)
    assert [node.op_type for node in model.graph.node].count("DeformConv") == len(layers) == 13
    images = np.random.default_rng(0).random((2, 3, 96, 64)).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"image": images})
    with torch.no_grad():
        expected = network(torch.from_numpy(images))["heatmaps"].numpy()
    assert np.abs(found - expected).max() < 1e-3 * max(np.abs(expected).max(), 1e-6) + 1e-5


def test_a_network_without_bottlenecks_is_refused():
    with pytest.raises(ValueError, match=r"model\.dcn=true: .* choose model\.depth=50 or 101"):
        FastPose(18, dcn=True)


def test_it_takes_half_precision():
    torch.manual_seed(0)
    layer = DeformConv(16)
    x = torch.randn(1, 16, 8, 8)
    expected = layer(x)
    found = layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_its_products_are_counted():
    plain, deformable = (macs(FastPose(50, 0.25, dcn=dcn), Resolution(64, 64)) for dcn in (False, True))
    taps = [module for module in FastPose(50, 0.25, dcn=True).modules() if isinstance(module, DeformConv)]
    assert deformable > plain
    assert len(taps) == 13


def test_an_opset_without_it_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"stages\.export\.opset=18: .* need 19 or later"):
        export.export(FastPose(50, 0.25, dcn=True).eval(), np.zeros((1, 3, 64, 64), np.float32), 18, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
