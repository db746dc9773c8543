"""HRNet (arXiv:1902.09212): branches of several resolutions side by side, which exchange features. One person in each view."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from pipeline.models.resnet import Residual, conv, initialise, scaled
from pipeline.models.top_down import described, last

_STAGES = ((1, 2), (4, 3), (3, 4))  # modules and branches of the stages 2 to 4
_BLOCKS = 4  # residual blocks of a branch in a module


class _Exchange(nn.Module):
    """Residual blocks on each branch, then sums of all branches at each resolution.

    Args:
        channels: of the branches, finest first.
        outputs: number of branches that are returned.
    """

    def __init__(self, channels: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(Residual(c, c) for _ in range(_BLOCKS))) for c in channels)
        rows = []
        for to in range(outputs):
            row: list[nn.Module] = []
            for at, inputs in enumerate(channels):
                if at == to:
                    row.append(nn.Identity())
                elif at > to:
                    up = nn.Upsample(scale_factor=float(2 ** (at - to)), mode="nearest")
                    row.append(nn.Sequential(conv(inputs, channels[to], 1, relu=False), up))
                else:
                    steps = [conv(inputs, inputs, 3, 2) for _ in range(to - at - 1)]
                    row.append(nn.Sequential(*steps, conv(inputs, channels[to], 3, 2, relu=False)))
            rows.append(nn.ModuleList(row))
        self.rows = nn.ModuleList(rows)

    def forward(self, branches: Sequence[Tensor]) -> list[Tensor]:
        features = [blocks(x) for blocks, x in zip(self.branches, branches, strict=True)]
        made = []
        for row in self.rows:
            total: Tensor | None = None
            for part, x in zip(row, features, strict=True):  # type: ignore[call-overload]
                total = part(x) if total is None else torch.add(total, part(x))
            assert total is not None
            made.append(torch.relu(total))
        return made


class HRNet(nn.Module):
    """A network that returns a heatmap for each keypoint at stride 4.

    Args:
        width: factor of the branches' channels, which are multiples of 8 and at least 16. 1 is HRNet-W32. 0.5625 gives 16, 40,
            72 and 144 channels, which is near W18 (18, 36, 72 and 144).
        skeleton: the keypoints: a name (coco_17), or the content of a skeleton file.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self, width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0, skeleton: str | Mapping[str, object] = "coco_17"
    ) -> None:
        super().__init__()
        self.spec = described(skeleton)
        stem = scaled(64, min(width, 1.0))
        self.stem = nn.Sequential(conv(3, stem, 3, 2), conv(stem, stem, 3, 2))
        self.first = nn.Sequential(
            Residual(stem, 4 * stem, 1, stem), *(Residual(4 * stem, 4 * stem, 1, stem) for _ in range(3))
        )
        channels = [scaled(32 * 2**n, width) for n in range(4)]
        self.begin = nn.ModuleList([conv(4 * stem, channels[0]), conv(4 * stem, channels[1], 3, 2)])
        self.down = nn.ModuleList(conv(channels[n], channels[n + 1], 3, 2) for n in (1, 2))
        stages: list[nn.ModuleList] = []
        for place, (modules, branches) in enumerate(_STAGES):
            final = place == len(_STAGES) - 1
            own = channels[:branches]
            outputs = [branches] * (modules - 1) + [1 if final else branches]
            stages.append(nn.ModuleList(_Exchange(own, count) for count in outputs))
        self.stages = nn.ModuleList(stages)
        initialise(self)
        self.head = last(channels[0], self.spec)

    @property
    def ignored_layers(self) -> Sequence[nn.Module]:
        """The convolution that computes the heatmaps."""
        return [self.head]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Heatmaps [B, K, H / 4, W / 4] of images [B, 3, H, W]."""
        x = self.first(self.stem(images))
        branches = [part(x) for part in self.begin]
        for place, modules in enumerate(self.stages):
            if place:
                branches.append(self.down[place - 1](branches[-1]))
            for exchange in modules.children():
                branches = exchange(branches)
        return {"heatmaps": self.head(branches[0])}
