"""Deformable convolutions (DCNv2, arXiv:1811.11168) as one operator, which ONNX calls DeformConv."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from onnxscript import opset19
from torch import Tensor, nn
from torch.nn import functional as F

_TAPS = 9  # of a kernel of 3x3
_PADDING = 1


def sampled(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, stride: int) -> Tensor:
    """A deformable 3x3 convolution with a padding of 1, by bilinear sampling.

    Args:
        x: features [B, C, H, W]; outside they are 0.
        weight: weights [O, C, 3, 3].
        offset: displacement of each tap in cells, y before x, [B, 18, h, w].
        mask: factor of each tap, [B, 9, h, w].
        stride: distance of the outputs, in cells.

    Returns:
        The outputs [B, O, h, w].
    """
    B, C, H, W = x.shape
    h, w = offset.shape[2:]
    rows = torch.arange(h, device=x.device, dtype=x.dtype)[:, None] * stride - _PADDING
    columns = torch.arange(w, device=x.device, dtype=x.dtype) * stride - _PADDING
    taps = torch.arange(_TAPS, device=x.device, dtype=x.dtype)[:, None, None]
    moved = offset.reshape(B, _TAPS, 2, h, w)
    y = moved[:, :, 0] + rows + torch.div(taps, 3, rounding_mode="floor")
    place = moved[:, :, 1] + columns + taps % 3
    grid = torch.stack(((2 * place + 1) / W - 1, (2 * y + 1) / H - 1), dim=-1)
    values = F.grid_sample(x, grid.reshape(B, _TAPS * h, w, 2), align_corners=False)
    seen = (values.reshape(B, C, _TAPS, h, w) * mask[:, None]).reshape(B, C * _TAPS, h * w)
    return torch.matmul(weight.reshape(len(weight), -1), seen).reshape(B, -1, h, w)


@torch.library.custom_op("posepress::deform_conv", mutates_args=())
def deform_conv(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, stride: int) -> Tensor:
    """`sampled` as one operator."""
    return sampled(x, weight, offset, mask, stride)


@deform_conv.register_fake
def _(x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, stride: int) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape[0], weight.shape[0], *offset.shape[2:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients, from a second pass, so that a training keeps no sampled values."""
    with torch.enable_grad():
        given = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        x, weight, offset, mask = given
        made = sampled(x, weight, offset, mask, ctx.stride)
    return (*torch.autograd.grad(made, given, gradient), None)


deform_conv.register_autograd(_backward, setup_context=_keep)


def _written(x: Any, weight: Any, offset: Any, mask: Any, stride: int) -> Any:
    """The operator of ONNX."""
    around = 4 * [_PADDING]
    return opset19.DeformConv(x, weight, offset, None, mask, kernel_shape=[3, 3], pads=around, strides=[stride, stride])


class DeformConv(nn.Conv2d):
    """A 3x3 convolution that learns where each of its nine taps reads, and how much it counts.

    Attributes:
        onnx_forms: the ONNX form of the operator, for the export.
    """

    onnx_forms: ClassVar[Mapping[Any, Callable[..., Any]]] = {torch.ops.posepress.deform_conv.default: _written}

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, channels, 3, stride, _PADDING, bias=False)
        self.taps = nn.Conv2d(channels, 3 * _TAPS, 3, stride, _PADDING)

    def start(self) -> None:
        """Let all taps begin where a plain convolution has them."""
        nn.init.zeros_(self.taps.weight)
        assert self.taps.bias is not None
        nn.init.zeros_(self.taps.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, channels, H / stride, W / stride] of features [B, channels, H, W]."""
        taps = self.taps(x)
        with torch.autocast(x.device.type, enabled=False):  # half precision would round the positions
            offset, mask = taps.float().split((2 * _TAPS, _TAPS), dim=1)
            made: Tensor = deform_conv(x.float(), self.weight.float(), offset, mask.sigmoid(), self.stride[0])
        return (made if self.bias is None else made + self.bias[:, None, None]).to(x.dtype)


def deformable(channels: int, stride: int) -> nn.Sequential:
    """A deformable convolution with batch norm and ReLU."""
    return nn.Sequential(DeformConv(channels, stride), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
