"""SimpleBaseline (arXiv:1804.06208): a ResNet and three transposed convolutions. One person in each view."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Interval
from torch import Tensor, nn

from pipeline.models.resnet import Depth, ResNet, Stem, initialise, scaled
from pipeline.models.top_down import described, last


class SimpleBaseline(nn.Module):
    """A network that returns a heatmap for each keypoint at stride 4.

    Args:
        depth: layers of the ResNet: 18, 50 or 101.
        width: factor of all channel counts; no layer has fewer than 16 channels.
        stem: "7x7" is one convolution and a max pooling; "3x3" is two convolutions, with which INT8 gains more.
        deconvolution: channels of the transposed convolutions before `width`; the paper has 256.
        skeleton: the keypoints: a name (coco_17), or the content of a skeleton file (docs/guides/top-down.md).

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        depth: Depth = 50,
        width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0,
        stem: Stem = "7x7",
        deconvolution: Annotated[int, Interval(ge=16, le=1024)] = 256,
        skeleton: str | Mapping[str, object] = "coco_17",
    ) -> None:
        super().__init__()
        self.spec = described(skeleton)
        self.backbone = ResNet(depth, width, stem)
        inputs, outputs = self.backbone.channels, scaled(deconvolution, width)
        layers: list[nn.Module] = []
        for _ in range(3):
            up = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False)
            layers += [up, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        self.deconvolution = nn.Sequential(*layers)
        initialise(self)
        self.head = last(inputs, self.spec)

    @property
    def ignored_layers(self) -> Sequence[nn.Module]:
        """The convolution that computes the heatmaps."""
        return [self.head]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Heatmaps [B, K, H / 4, W / 4] of images [B, 3, H, W]."""
        return {"heatmaps": self.head(self.deconvolution(self.backbone(images)))}
