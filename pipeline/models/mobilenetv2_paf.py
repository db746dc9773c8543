"""MobileNetV2 (arXiv:1801.04381) with OpenPose's two-branch stages of separable convolutions. Batch norms are folded.

`MobileNetV2Paf.public_names` maps the names of the public checkpoints (mobilenet_v2 of tf-pose-estimation) to this module's,
so that their state files can be loaded directly.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch import Tensor, nn
from torch.nn import functional as F

from posepress.skeletons import OPENPOSE_18
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

_BLOCKS = (  # output channels before width, stride, expansion
    (16, 1, 1), (24, 2, 6), (24, 1, 6), (32, 2, 6), (32, 1, 6), (32, 1, 6), (64, 2, 6), (64, 1, 6), (64, 1, 6), (64, 1, 6),
    (96, 1, 6), (96, 1, 6), (96, 1, 6),
)  # fmt: skip
_SHALLOW = 5  # index of a block at stride 8; its output is concatenated with the last block's
_STAGES = 6


class _SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's padding SAME, which for stride 2 and an even size pads below and on the right only."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.stride == (2, 2) else x)


class _Inverted(nn.Module):
    """MobileNetV2's inverted residual. Its parts have the names of the public checkpoints."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Conv2d(inputs, hidden, 1) if expansion > 1 else None
        self.depthwise = _SameConv2d(hidden, hidden, 3, stride, hidden)
        self.project = nn.Conv2d(hidden, outputs, 1)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return torch.add(x, y) if self.residual else y


class _Separable(nn.Module):
    """A separable convolution of a stage. A ReLU follows it, but no layer is between its two parts."""

    def __init__(self, inputs: int, outputs: int, kernel: int, last: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(self.depthwise(x))
        return x if self.last else F.relu(x)


def _twice(x: Tensor) -> Tensor:
    """Double the size like TensorFlow's resize without aligned corners, where output sample k is at input position k / 2."""
    height, width = x.shape[2] * 2 + 1, x.shape[3] * 2 + 1
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)[:, :, :-1, :-1]


class MobileNetV2Paf(nn.Module):
    """A network that returns 19 heatmaps (background last) and 38 PAFs at stride 8. Its input is BGR, 0 to 255.

    Args:
        width: width factor of the MobileNetV2 part; the public checkpoints have 1.0 and 1.4.
    """

    spec = NetworkSpec(
        input=InputSpec("image", order="BGR", range=255.0, multiple=16),
        fields=(OutputSpec("heatmaps", 8, 19), OutputSpec("pafs", 8, 38)),
        labels=OPENPOSE_18,
    )

    def __init__(self, width: Annotated[float, Interval(ge=0.1, le=4)] = 1.4) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            rounded = max(8, int(channels * width + 4) // 8 * 8)
            return rounded + 8 if rounded < 0.9 * channels * width else rounded

        channels = scaled(32)
        self.stem = _SameConv2d(3, channels, 3, 2)
        blocks = []
        for outputs, stride, expansion in _BLOCKS:
            blocks.append(_Inverted(channels, scaled(outputs), stride, expansion))
            channels = scaled(outputs)
        self.blocks = nn.ModuleList(blocks)
        features = scaled(_BLOCKS[_SHALLOW][0]) + channels
        heatmaps, pafs = (field.channels for field in self.spec.fields)
        stages = []
        for stage in range(_STAGES):
            inputs = features if stage == 0 else features + heatmaps + pafs
            branches = {"L1": pafs, "L2": heatmaps}
            stages.append(nn.ModuleDict({name: self._branch(inputs, out, stage == 0) for name, out in branches.items()}))
        self.stages = nn.ModuleList(stages)

    @staticmethod
    def _branch(inputs: int, outputs: int, first: bool) -> nn.Sequential:
        channels = (inputs, 128, 128, 128, 512 if first else 128, outputs)
        kernels = (3, 3, 3, 1, 1)
        return nn.Sequential(*(_Separable(channels[n], channels[n + 1], kernel, n == 4) for n, kernel in enumerate(kernels)))

    @property
    def ignored_layers(self) -> Sequence[nn.Module]:
        """The convolutions that compute the fields."""
        return [stage[name][-1].pointwise for stage in self.stages for name in ("L1", "L2")]  # type: ignore[index]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the fields of images [B, 3, H, W], and in training also those of earlier stages, as "heatmaps.0"."""
        x = F.relu6(self.stem(images))
        shallow = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == _SHALLOW:
                shallow = x
        features = torch.cat((shallow, _twice(x)), dim=1)
        fields: dict[str, Tensor] = {}
        joined = features
        for index, stage in enumerate(self.stages):
            pafs, heatmaps = stage["L1"](joined), stage["L2"](joined)  # type: ignore[index]
            if self.training and index < _STAGES - 1:
                fields |= {f"heatmaps.{index}": heatmaps, f"pafs.{index}": pafs}
            joined = torch.cat((pafs, heatmaps, features), dim=1)
        return {"heatmaps": heatmaps, "pafs": pafs, **fields}

    @staticmethod
    def public_names(state: Mapping[str, Any]) -> dict[str, Any]:
        """Rename the tensors of a public checkpoint to this module's parameters. Other names are not changed."""
        renamed = {}
        for key, value in state.items():
            head, _, rest = key.partition(".")
            new = key
            if head == "MobilenetV2":
                part, _, tail = rest.partition(".")
                if part == "Conv":
                    new = f"stem.{tail}"
                elif part.startswith("expanded_conv"):
                    new = f"blocks.{part.removeprefix('expanded_conv').lstrip('_') or 0}.{tail}"
            elif head == "Openpose" and rest.startswith("MConv_Stage"):
                layer, _, tail = rest.removeprefix("MConv_Stage").partition(".")
                stage, branch, place, kind = layer.split("_")
                tail = tail.removeprefix("depthwise.")
                new = f"stages.{int(stage) - 1}.{branch}.{int(place) - 1}.{kind}.{tail}"
            renamed[new] = value
        return renamed
