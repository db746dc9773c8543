"""Random views of images for training, in batches. The host draws them, and the network's device cuts them out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Interval, Len
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.spec import InputSpec

DRAWS = 9  # number of random numbers for each view


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Augmentation:
    """Flip, scale, rotate and crop; the identity is a letterboxed view.

    Attributes:
        flip: share of mirrored views.
        scale: smallest and largest scale, relative to the whole image fitted into the input.
        rotate: largest angle in either direction, in degrees.
        shift: largest displacement in either direction, as a fraction of the input's size.
        brightness: largest change of gain and offset of pixel values, as a fraction of full scale.
        half_body: share of the crops of a person that show its upper or its lower half alone.
    """

    flip: Annotated[float, Interval(ge=0, le=1)] = 0.5
    scale: Annotated[Sequence[Annotated[float, Interval(gt=0, le=100)]], Len(2, 2)] = (0.6, 1.4)
    rotate: Annotated[float, Interval(ge=0, le=180)] = 25.0
    shift: Annotated[float, Interval(ge=0, le=10)] = 0.25
    brightness: Annotated[float, Interval(ge=0, le=10)] = 0.2
    half_body: Annotated[float, Interval(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a number is out of range, or the scales are in the wrong order.
        """
        for option in ("flip", "half_body"):
            if not _number(share := getattr(self, option)) or not 0 <= share <= 1:
                raise UserError(f"augment.{option}={share}: not a share of the views; choose 0 to 1")
        for option in ("rotate", "shift", "brightness"):
            if not _number(getattr(self, option)) or getattr(self, option) < 0:
                raise UserError(f"augment.{option}={getattr(self, option)}: choose 0 or more")
        scale: Any = self.scale
        pair = isinstance(scale, Sequence) and len(scale) == 2 and all(_number(size) for size in scale)
        if not pair or not 0 < scale[0] <= scale[1]:
            raise UserError(f"augment.scale={scale}: give the least and the greatest size, above 0, like [0.6, 1.4]")

    def views(
        self,
        draws: NDArray[np.float64],
        bases: NDArray[np.float64],
        anchors: NDArray[np.float32],
        resolution: Resolution,
        halves: NDArray[np.float64] | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
        """Random views around some base views. A view that enlarges its image stays on one of the anchors, if there are some.

        Args:
            draws: uniform random numbers in [0, 1), [B, DRAWS].
            bases: from image to base view, [B, 2, 3], in pixels; each scales both axes alike and does not turn.
            anchors: boxes that are worth a close look [B, P, 4]: x, y, width and height; width 0 where there are fewer.
            resolution: size of the views.
            halves: from image to base views of the two halves of a person, [B, 2, 2, 3]; NaN where there are none.

        Returns:
            Matrices from image to view [B, 2, 3], in pixels; which views are mirrored [B]; and gain and offset of pixel values,
            0 to 255, [B, 2].
        """
        zoomed, chosen, pull, angle, mirrored, right, down, gain, level = draws.T
        if halves is not None and self.half_body:  # a cropped view has no anchors, so that these numbers are free
            half = halves[np.arange(len(halves)), (pull < 0.5).astype(int)]
            taken = (chosen < self.half_body) & np.isfinite(half).all(axis=(1, 2))
            bases = np.where(taken[:, None, None], half, bases)
        least, most = np.log(self.scale)
        zoom = np.exp(least + (most - least) * zoomed)
        extent = np.array([resolution.width, resolution.height])
        fit = bases[:, 0, 0]
        centre = ((extent - 1) / 2 - bases[:, :, 2]) / fit[:, None]

        anchors = np.pad(anchors, ((0, 0), (0, 1), (0, 0)))  # a data set without anchors has an empty axis
        there = anchors[:, :, 2] > 0
        count = there.sum(axis=1)
        place = (there & (there.cumsum(axis=1) == 1 + (chosen * count).astype(int)[:, None])).argmax(axis=1)
        box = anchors[np.arange(len(anchors)), place]
        pull = np.where((zoom > 1) & (count > 0), pull, 0)[:, None]
        middle = centre * (1 - pull) + (box[:, :2] + box[:, 2:] / 2) * pull

        angle = np.deg2rad(self.rotate) * (2 * angle - 1)
        cos, sin = np.cos(angle), np.sin(angle)
        flipped = mirrored < self.flip
        linear = np.stack((np.stack((cos, -sin), axis=-1), np.stack((sin, cos), axis=-1)), axis=1) * (fit * zoom)[:, None, None]
        linear[flipped, 0] *= -1
        target = (extent - 1) / 2 + self.shift * (2 * np.stack((right, down), axis=-1) - 1) * extent
        offset = target - (linear @ middle[:, :, None])[:, :, 0]
        tones = self.brightness * np.stack((2 * gain - 1, 255 * (level - 0.5)), axis=-1) + [1.0, 0.0]
        return np.concatenate((linear, offset[:, :, None]), axis=2), flipped, tones


NONE = Augmentation(flip=0.0, scale=(1.0, 1.0), rotate=0.0, shift=0.0, brightness=0.0)


def sampling_grid(
    matrices: Tensor, size: Resolution, source: tuple[int, int], stride: float = 1.0, shift: float = 0.0
) -> Tensor:
    """The positions of the views' cells in their images, in the form of `grid_sample(align_corners=False)`.

    Args:
        matrices: matrices from image to view in pixels, float [B, 2, 3].
        size: size of the views, in cells.
        source: height and width of the images.
        stride: size of a cell, in pixels of the view.
        shift: displacement of a cell's sample, as `OutputSpec.shift`.

    Returns:
        The positions x and y from -1 to 1, float [B, h, w, 2].
    """
    at = matrices.device
    ys, xs = torch.meshgrid(
        (torch.arange(size.height, device=at) + shift + 0.5) * stride - 0.5,
        (torch.arange(size.width, device=at) + shift + 0.5) * stride - 0.5,
        indexing="ij",
    )
    back = torch.linalg.inv(matrices[:, :, :2].double()).float()
    points = torch.stack((xs, ys), dim=-1).reshape(1, -1, 2) - matrices[:, None, :, 2]
    points = (points @ back.transpose(1, 2)).reshape(len(matrices), size.height, size.width, 2)
    grid: Tensor = (points + 0.5) * 2 / torch.tensor([source[1], source[0]], device=at) - 1
    return grid


def layout(device: torch.device) -> torch.memory_format:
    """The memory format of images for training. Channels last is used on GPUs only: an AMD EPYC took 1.4 times as long."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def cut(images: Tensor, matrices: Tensor, tones: Tensor, size: Resolution, spec: InputSpec) -> Tensor:
    """Views of images in the network's input form.

    Args:
        images: uint8 [B, H, W, 3], RGB.
        matrices: matrices from image to view, float [B, 2, 3].
        tones: gain and offset, float [B, 2].
        size: size of the views.
        spec: description of the network's input.

    Returns:
        The views, float [B, channels, size.height, size.width]. Grey is .299 R + .587 G + .114 B.
    """
    pixels = images.permute(0, 3, 1, 2).float() - spec.pad  # the zeros beyond the edge then become padding
    grid = sampling_grid(matrices, size, (images.shape[1], images.shape[2]))
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + spec.pad
    gain, offset = tones[:, 0, None, None, None], tones[:, 1, None, None, None]
    seen = (seen * gain + offset).clamp(0, 255)
    if spec.channels == 1:
        seen = (seen * torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]).sum(1, keepdim=True)
    _, factor, shift = (torch.as_tensor(values, device=images.device)[:, None, None] for values in spec.form())
    ordered = seen if spec.order == "RGB" else seen.flip(1)
    return (ordered * factor - shift).contiguous(memory_format=layout(images.device))
