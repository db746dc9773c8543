"""What the top-down networks with heatmaps share: their description, and their last layer."""

from collections.abc import Mapping

from torch import nn

from posepress.skeletons import skeleton_of
from posepress.spec import InputSpec, NetworkSpec, OutputSpec


def described(skeleton: str | Mapping[str, object]) -> NetworkSpec:
    """The description of a network that returns a heatmap for each keypoint at stride 4.

    Args:
        skeleton: a name (coco_17), or the content of a skeleton file.

    Raises:
        ValueError: the skeleton is unknown or wrong.
    """
    labels = skeleton_of(skeleton)
    image = InputSpec("image", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), multiple=32)
    return NetworkSpec(image, (OutputSpec("heatmaps", 4, len(labels.names)),), labels)


def last(inputs: int, spec: NetworkSpec, kernel: int = 1) -> nn.Conv2d:
    """The convolution that computes the heatmaps, with small weights, so that training begins near zero."""
    layer = nn.Conv2d(inputs, spec.field("heatmaps").channels, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=0.001)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
