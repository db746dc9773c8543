"""Lightweight OpenPose (Osokin 2018, arXiv:1811.12004): a dilated MobileNet with stages that refine heatmaps and PAFs."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

_BACKBONE = (  # output channels, stride and dilation of each separable convolution of MobileNet v1 up to conv5_5
    (64, 1, 1), (128, 2, 1), (128, 1, 1), (256, 2, 1), (256, 1, 1), (512, 1, 1), (512, 1, 2), (512, 1, 1), (512, 1, 1),
    (512, 1, 1), (512, 1, 1),
)  # fmt: skip


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _separable(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, inputs, 3, stride, dilation, inputs), _conv(inputs, outputs, 1))


class _Residual(nn.Module):
    def __init__(self, first: nn.Module, rest: nn.Module) -> None:
        super().__init__()
        self.first, self.rest = first, rest

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.add(x, self.rest(x))


class _Heads(nn.Module):
    """Heatmaps and PAFs from shared features."""

    def __init__(self, features: int, hidden: int, heatmaps: int, pafs: int) -> None:
        super().__init__()
        self.heatmaps = nn.Sequential(_conv(features, hidden, 1), nn.Conv2d(hidden, heatmaps, 1))
        self.pafs = nn.Sequential(_conv(features, hidden, 1), nn.Conv2d(hidden, pafs, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.heatmaps(x), self.pafs(x)


class LightweightOpenPose(nn.Module):
    """A network that returns 19 heatmaps (background last) and 38 PAFs at stride 8.

    Batch normalisation and ReLU follow every convolution except the last of each head. The paper has ELU or no normalisation
    in some places. This network differs, because batch norm and ReLU can be fused and INT8 kernels need the ReLU.

    Args:
        stages: number of stages, 2 to 7: one initial stage and the refining stages.
        width: factor of all channel counts, which are rounded to multiples of 8.

    Raises:
        ValueError: stages or width are out of range.
    """

    spec = NetworkSpec(
        input=InputSpec("image", order="RGB", range=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), multiple=8),
        fields=(OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)),
        labels=OPENPOSE_18,
    )

    def __init__(
        self, stages: Annotated[int, Interval(ge=2, le=7)] = 2, width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0
    ) -> None:
        super().__init__()
        if not 2 <= stages <= 7:
            raise ValueError(f"model.stages={stages}: lightweight_openpose has 2 to 7 stages")
        if not 0.1 <= width <= 4:
            raise ValueError(f"model.width={width}: choose 0.1 to 4")

        def scaled(channels: int) -> int:
            return max(8, int(channels * width + 4) // 8 * 8)

        heatmaps, pafs = (field.channels for field in self.spec.fields)
        layers: list[nn.Module] = [_conv(3, scaled(32), stride=2)]
        channels = scaled(32)
        for outputs, stride, dilation in _BACKBONE:
            layers.append(_separable(channels, scaled(outputs), stride, dilation))
            channels = scaled(outputs)
        features = scaled(128)
        trunk = nn.Sequential(*(_separable(features, features) for _ in range(3)))
        self.backbone = nn.Sequential(*layers)
        self.features = nn.Sequential(_Residual(_conv(channels, features, 1), trunk), _conv(features, features))
        self.initial = nn.Sequential(*(_conv(features, features) for _ in range(3)))
        self.initial_heads = _Heads(features, scaled(512), heatmaps, pafs)
        refining, heads = [], []
        for _ in range(stages - 1):
            blocks = []
            for block in range(5):
                inputs = features + heatmaps + pafs if block == 0 else features
                pair = nn.Sequential(_conv(features, features), _conv(features, features, dilation=2))
                blocks.append(_Residual(_conv(inputs, features, 1), pair))
            refining.append(nn.Sequential(*blocks))
            heads.append(_Heads(features, features, heatmaps, pafs))
        self.refining, self.refining_heads = nn.ModuleList(refining), nn.ModuleList(heads)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for head in self.ignored_layers:
            nn.init.normal_(head.weight, std=0.01)
            assert head.bias is not None
            nn.init.zeros_(head.bias)

    @property
    def ignored_layers(self) -> Sequence[nn.Conv2d]:
        """The convolutions that compute the fields."""
        groups = [self.initial_heads, *self.refining_heads]
        return [head[-1] for group in groups for head in (group.heatmaps, group.pafs)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the fields of images [B, 3, H, W], and in training also those of earlier stages, as "heatmaps.0"."""
        features = self.features(self.backbone(images))
        heatmaps, pafs = self.initial_heads(self.initial(features))
        fields: dict[str, Tensor] = {}
        for stage, (refine, heads) in enumerate(zip(self.refining, self.refining_heads, strict=True)):
            if self.training:
                fields |= {f"heatmaps.{stage}": heatmaps, f"pafs.{stage}": pafs}
            heatmaps, pafs = heads(refine(torch.cat((features, heatmaps, pafs), dim=1)))
        return {"heatmaps": heatmaps, "pafs": pafs, **fields}
