"""A one-stage pose network: boxes, scores and keypoints at three strides, without anchors and without post-processing."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from pipeline.models.resnet import conv, initialise, scaled
from posepress.skeletons import skeleton_of
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

STRIDES = (8, 16, 32)
_STAGES = ((64, 1), (128, 2), (256, 2), (512, 1))  # channels before width, and blocks, of the stages at strides 4 to 32
_GREATEST = 6.0  # greatest logarithm of a side of a box, in strides


class _Csp(nn.Module):
    """A cross-stage partial block (arXiv:1911.11929): residual blocks on half of the channels, at least 16, beside as many."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        half = max(16, outputs // 2)
        self.one, self.other = conv(inputs, half, 1), conv(inputs, half, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(half, half), conv(half, half)) for _ in range(blocks))
        self.join = conv(2 * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        for block in self.blocks:
            y = torch.add(y, block(y))
        joined: Tensor = self.join(torch.cat((y, self.other(x)), dim=1))
        return joined


class OneStagePose(nn.Module):
    """A network that returns the sets "boxes", "scores" and "keypoints", one entry for each cell at strides 8, 16 and 32.

    Every convolution but the last of each head has batch norm and ReLU, so that INT8 kernels fuse them. A box is given by the
    distances of its sides from the cell's middle, a keypoint by its displacement from there.

    Args:
        width: factor of all channel counts; no layer has fewer than 16 channels.
        skeleton: the keypoints: a name (coco_17), or the content of a skeleton file.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0,
        skeleton: str | Mapping[str, object] = "coco_17",
    ) -> None:
        super().__init__()
        labels = skeleton_of(skeleton)
        K = len(labels.names)
        self.spec = NetworkSpec(
            InputSpec("image", mean=(0.5,) * 3, std=(0.5,) * 3, pad=114, multiple=32),
            (
                OutputSpec("boxes", 1, 4, axes="NC"),
                OutputSpec("scores", 1, 1, axes="NC"),
                OutputSpec("keypoints", 1, 3 * K, axes="NC"),
            ),
            labels,
        )
        channels = [scaled(count, width) for count, _ in _STAGES]
        self.stem = conv(3, scaled(32, width), 3, 2)
        inputs, stages = scaled(32, width), []
        for outputs, (_, blocks) in zip(channels, _STAGES, strict=True):
            stages.append(nn.Sequential(conv(inputs, outputs, 3, 2), _Csp(outputs, outputs, blocks)))
            inputs = outputs
        self.stages = nn.ModuleList(stages)
        small, middle, large = channels[1:]
        self.up = nn.Upsample(scale_factor=2.0, mode="nearest")
        self.down_middle, self.down_small = _Csp(large + middle, middle, 1), _Csp(middle + small, small, 1)
        self.to_middle, self.to_large = conv(small, small, 3, 2), conv(middle, middle, 3, 2)
        self.up_middle, self.up_large = _Csp(small + middle, middle, 1), _Csp(middle + large, large, 1)
        features = (small, middle, large)
        hidden = scaled(64, width)
        self.scores = nn.ModuleList(_head(count, hidden, 1) for count in features)
        self.boxes = nn.ModuleList(_head(count, hidden, 4) for count in features)
        most = max(scaled(128, width), (3 * K + 7) // 8 * 8)
        self.keypoints = nn.ModuleList(_head(count, most, 3 * K) for count in features)
        initialise(self)
        for last in self.ignored_layers:
            nn.init.normal_(last.weight, std=0.01)
        for biases, value in ((self.scores, -4.6), (self.boxes, 1.0)):  # a person in one of 100 cells, boxes of 5 cells
            for head in biases:
                nn.init.constant_(list(head.children())[-1].bias, value)  # type: ignore[arg-type]

    @property
    def ignored_layers(self) -> Sequence[nn.Conv2d]:
        """The convolutions that compute the outputs."""
        heads = [head for heads in (self.scores, self.boxes, self.keypoints) for head in heads]
        return [layer for head in heads for layer in head.children() if isinstance(layer, nn.Conv2d)]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The sets of images [B, 3, H, W]; N is the number of cells of all strides.

        Returns:
            "boxes" [B, N, 4], corners in pixels; "scores" [B, N, 1], 0 to 1; "keypoints" [B, N, 3 K], x, y and a score of 0 to
            1 each. In training also "scores.0", the logits of the scores.
        """
        x = self.stem(images)
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        small, middle, large = levels[1:]
        middle = self.down_middle(torch.cat((self.up(large), middle), dim=1))
        small = self.down_small(torch.cat((self.up(middle), small), dim=1))
        middle = self.up_middle(torch.cat((self.to_middle(small), middle), dim=1))
        large = self.up_large(torch.cat((self.to_large(middle), large), dim=1))
        boxes, scores, parts = [], [], []
        for level, features in enumerate((small, middle, large)):
            stride, score = float(STRIDES[level]), self.scores[level](features)
            at = _middles(score) * stride - 0.5  # [1, 2, h, w]
            sides = self.boxes[level](features).clamp(max=_GREATEST).exp() * stride
            boxes.append(torch.cat((at - sides[:, :2], at + sides[:, 2:]), dim=1).flatten(2))
            scores.append(score.flatten(2))
            parts.append(self._points(self.keypoints[level](features), at, stride))
        logits = torch.cat(scores, dim=2).transpose(1, 2)
        columns, rows, seen = (torch.cat([part[n] for part in parts], dim=2) for n in range(3))  # [B, K, N]
        made = {
            "boxes": torch.cat(boxes, dim=2).transpose(1, 2),
            "scores": logits.sigmoid(),
            "keypoints": torch.stack((columns, rows, seen), dim=3).transpose(1, 2).flatten(2),
        }
        return {**made, "scores.0": logits} if self.training else made

    def _points(self, raw: Tensor, at: Tensor, stride: float) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and scores of the keypoints, [B, K, h w] each, from a head's output [B, 3 K, h, w]."""
        K = len(self.spec.skeleton.names)
        columns, rows, seen = (raw[:, start : start + K] for start in (0, K, 2 * K))
        x, y = columns * (4 * stride) + at[:, :1], rows * (4 * stride) + at[:, 1:]
        return x.flatten(2), y.flatten(2), seen.sigmoid().flatten(2)


def _head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv(inputs, hidden), conv(hidden, hidden), nn.Conv2d(hidden, outputs, 1))


def _middles(scores: Tensor) -> Tensor:
    """X and y of the cells' middles in cells, [1, 2, h, w]: sums of ones, which a graph has at every size.

    The ones come from the scores [B, 1, h, w], the end of the network, so that INT8 keeps no further layer in float for them.
    """
    ones = scores[:1].clamp(1.0, 1.0)
    return torch.cat((ones.cumsum(3), ones.cumsum(2)), dim=1) - 0.5
