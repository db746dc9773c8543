"""Fusion of convolution, batch norm and ReLU into one kernel.

In half precision, eager torch spends most of its time on the memory traffic between these layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class _Pointwise(nn.Module):
    """A 1x1 convolution, its bias and ReLU as one matrix product with an epilogue of cuBLASLt."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(-1, C)  # a view, not a copy, in channels_last
        # This private function is torch's only access to the epilogue.
        made = torch._addmm_activation(self.bias, pixels, self.weight.t())  # noqa: SLF001
        return made.view(B, H, W, -1).permute(0, 3, 1, 2)


class _Spatial(nn.Module):
    """A convolution of one group, its bias and ReLU as one cuDNN kernel."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        self.weight, self.bias = conv.weight, conv.bias
        self.shape: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.shape)
        return made


def fused(network: nn.Module) -> nn.Module:
    """Fuse the convolutions of a float32 network in evaluation mode in place, and return the network.

    In every `nn.Sequential`, a batch norm is folded into the convolution before it. An ungrouped convolution and the ReLU
    after it become one kernel. Grouped convolutions are not fused with a ReLU, because cuDNN's fused kernel is slower for
    them.
    """
    for parent in [one for one in network.modules() if isinstance(one, nn.Sequential)]:
        layers: list[nn.Module] = []
        for layer in parent:
            last = layers[-1] if layers else None
            if isinstance(last, nn.Conv2d) and isinstance(layer, nn.BatchNorm2d):
                layers[-1] = fuse_conv_bn_eval(last, layer)
            elif isinstance(last, nn.Conv2d) and isinstance(layer, nn.ReLU) and _one_kernel(last):
                layers[-1] = _Pointwise(last) if _is_product(last) else _Spatial(last)
            elif not isinstance(layer, nn.Identity):
                layers.append(layer)
        del parent[:]
        parent.extend(layers)
    return network


def _one_kernel(conv: nn.Conv2d) -> bool:
    return conv.groups == 1 and conv.bias is not None and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _is_product(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)
