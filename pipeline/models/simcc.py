"""SimCC (arXiv:2107.03332): keypoints as two classifications, over columns and over rows. One person in each view."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from annotated_types import Interval
from torch import Tensor, nn

from pipeline.models.resnet import Depth, ResNet, Stem, conv, initialise, scaled
from posepress.resolution import Resolution
from posepress.skeletons import skeleton_of
from posepress.spec import InputSpec, NetworkSpec, OutputSpec


class SimCC(nn.Module):
    """A ResNet and a linear head: for each keypoint, a line over the columns and one over the rows, at half a pixel a cell.

    The linear layers read every cell of the features, so the input has one size.

    Args:
        resolution: the input's size, HEIGHTxWIDTH in pixels, multiples of 32.
        depth: layers of the ResNet: 18, 50 or 101.
        width: factor of all channel counts; no layer has fewer than 16 channels.
        stem: "7x7" is one convolution and a max pooling; "3x3" is two convolutions, with which INT8 gains more.
        skeleton: the keypoints: a name (coco_17), or the content of a skeleton file (docs/guides/top-down.md).

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        resolution: str = "256x192",
        depth: Depth = 18,
        width: Annotated[float, Interval(ge=0.1, le=4)] = 1.0,
        stem: Stem = "7x7",
        skeleton: str | Mapping[str, object] = "coco_17",
    ) -> None:
        super().__init__()
        labels, size = skeleton_of(skeleton), Resolution.parse(resolution)
        K = len(labels.names)
        self.spec = NetworkSpec(
            InputSpec("image", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), multiple=32, size=size),
            (OutputSpec("simcc_x", 0.5, K, axes="CX"), OutputSpec("simcc_y", 0.5, K, axes="CY")),
            labels,
        )
        self.backbone = ResNet(depth, width, stem)
        cells, hidden = size.height // 32 * (size.width // 32), scaled(256, width)
        self.neck = nn.Sequential(
            nn.ConvTranspose2d(self.backbone.channels, hidden, 4, 2, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            conv(hidden, hidden),
        )
        self.keypoints = nn.Conv2d(hidden, K, 1)
        self.columns, self.rows = nn.Linear(4 * cells, 2 * size.width), nn.Linear(4 * cells, 2 * size.height)
        initialise(self)

    @property
    def ignored_layers(self) -> Sequence[nn.Module]:
        """The layers that compute the lines."""
        return [self.keypoints, self.columns, self.rows]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits "simcc_x" [B, K, 2 W] and "simcc_y" [B, K, 2 H] of images [B, 3, H, W]."""
        maps = self.keypoints(self.neck(self.backbone(images))).flatten(2)
        return {"simcc_x": self.columns(maps), "simcc_y": self.rows(maps)}
