"""FastPose (AlphaPose, arXiv:2211.03375): a ResNet with squeeze-and-excitation, and pixel shuffles. One person in each view."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Interval
from torch import Tensor, nn

from pipeline.models.deformable import DeformConv, deformable
from pipeline.models.resnet import Depth, ResNet, conv, initialise
from pipeline.models.top_down import described, last


class FastPose(nn.Module):
    """A network that returns a heatmap for each keypoint at stride 4.

    Dense upsampling convolutions (DUC) enlarge the features: a convolution computes the four pixels of each cell as channels.

    Args:
        depth: layers of the ResNet: 18, 50 or 101.
        width: factor of all channel counts; no layer has fewer than 16 channels.
        dcn: whether the 3x3 convolutions of the last three stages are deformable; a depth of 18 has no such bottlenecks.
        skeleton: the keypoints: a name (coco_17), or the content of a skeleton file.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        depth: Depth = 50,
        width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0,
        dcn: bool = False,
        skeleton: str | Mapping[str, object] = "coco_17",
    ) -> None:
        super().__init__()
        self.spec = described(skeleton)
        if dcn and depth == 18:
            raise ValueError("model.dcn=true: a ResNet-18 has no bottlenecks to deform; choose model.depth=50 or 101")
        self.backbone = ResNet(depth, width, excitation=True, deformable=deformable if dcn else None)
        channels = self.backbone.channels // 16 * 16
        inner = channels // 4
        self.up = nn.Sequential(
            conv(self.backbone.channels, channels, 1) if self.backbone.channels % 16 else nn.Identity(),
            nn.PixelShuffle(2),
            conv(inner, 2 * inner),
            nn.PixelShuffle(2),
            conv(inner // 2, inner),
            nn.PixelShuffle(2),
        )
        initialise(self)
        for module in self.modules():
            if isinstance(module, DeformConv):
                module.start()
        self.head = last(inner // 4, self.spec, 3)

    @property
    def ignored_layers(self) -> Sequence[nn.Module]:
        """The convolution that computes the heatmaps, and those that compute where deformable convolutions read."""
        return [self.head, *(module.taps for module in self.modules() if isinstance(module, DeformConv))]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Heatmaps [B, K, H / 4, W / 4] of images [B, 3, H, W]."""
        return {"heatmaps": self.head(self.up(self.backbone(images)))}
