"""ResNet (arXiv:1512.03385), as a backbone; with squeeze-and-excitation (arXiv:1709.01507) as FastPose has it."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Depth = Literal[18, 50, 101]
Stem = Literal["7x7", "3x3"]
_BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # residual blocks of each of the four stages


def scaled(channels: int, width: float) -> int:
    """A number of channels times a width factor, as a multiple of 8 and at least 16."""
    return max(16, int(channels * width + 4) // 8 * 8)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True, groups: int = 1) -> nn.Sequential:
    """A convolution with batch norm and, unless `relu` is false, a ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


def initialise(network: nn.Module) -> None:
    """Draw the weights of all convolutions for ReLU networks (arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class _Excitation(nn.Module):
    """Squeeze-and-excitation: each channel is multiplied by a gate that its mean over the image decides."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(channels // reduction, 8), 1)
        self.up = nn.Conv2d(max(channels // reduction, 8), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.relu(self.down(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.up(gate))


class Residual(nn.Module):
    """A residual block of two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: stride of the 3x3 convolution, or of the first of two.
        bottleneck: channels inside a bottleneck; None makes a block of two 3x3 convolutions.
        excitation: whether squeeze-and-excitation ends the branch.
        middle: the 3x3 convolution of a bottleneck; None makes a plain one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        bottleneck: int | None = None,
        excitation: bool = False,
        middle: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if bottleneck is None:
            layers: list[nn.Module] = [conv(inputs, outputs, 3, stride), conv(outputs, outputs, relu=False)]
        else:
            layers = [
                conv(inputs, bottleneck, 1),
                middle or conv(bottleneck, bottleneck, 3, stride),
                conv(bottleneck, outputs, 1, relu=False),
            ]
        self.branch = nn.Sequential(*layers, *([_Excitation(outputs)] if excitation else []))
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of branch and shortcut, [B, outputs, H / stride, W / stride]."""
        return torch.relu(torch.add(self.branch(x), self.shortcut(x)))


class ResNet(nn.Module):
    """The convolutional part of a ResNet: features at stride 32.

    Args:
        depth: 18, 50 or 101 layers.
        width: factor of all channel counts.
        stem: "7x7" is one convolution and a max pooling, as in the paper; "3x3" is two convolutions.
        excitation: whether the first block of each stage has squeeze-and-excitation.
        deformable: makes the 3x3 convolution of a bottleneck in the last three stages, from (channels, stride); None makes
            plain ones.

    Raises:
        ValueError: the depth is another one.
    """

    def __init__(
        self,
        depth: int = 50,
        width: float = 1.0,
        stem: Stem = "7x7",
        excitation: bool = False,
        deformable: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"model.depth={depth}: choose {', '.join(map(str, _BLOCKS))}")
        inputs = scaled(64, width)
        if stem == "7x7":
            self.stem = nn.Sequential(conv(3, inputs, 7, 2), nn.MaxPool2d(3, 2, 1))
        else:
            self.stem = nn.Sequential(conv(3, inputs, 3, 2), conv(inputs, inputs, 3, 2))
        stages = []
        for stage, count in enumerate(_BLOCKS[depth]):
            channels = scaled(64 * 2**stage, width)
            outputs = channels if depth == 18 else 4 * channels
            inner = None if depth == 18 else channels
            blocks = []
            for n in range(count):
                stride = 2 if n == 0 and stage > 0 else 1
                middle = deformable(channels, stride) if deformable is not None and stage > 0 and inner else None
                blocks.append(Residual(inputs, outputs, stride, inner, excitation and n == 0, middle))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.channels = inputs

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, channels, H / 32, W / 32] of images [B, 3, H, W]."""
        features: Tensor = self.stages(self.stem(images))
        return features
