"""Random views of images for training: drawn one by one, cut from a whole batch where the network trains."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluation.types import InputSpec, Resolution, View
from evaluation.views import resized


@dataclass(frozen=True)
class Augmentation:
    """Flip, scale, rotate and crop; the identity is a letterboxed view.

    Attributes:
        flip: share of mirrored views.
        scale: least and most size, relative to the whole image fitted into the input.
        rotate: greatest angle either way, in degrees.
        shift: greatest displacement either way, as a part of the input's size.
        brightness: greatest gain and offset of pixel values, as a part of full scale.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.6, 1.4)
    rotate: float = 25.0
    shift: float = 0.25
    brightness: float = 0.2

    def view(self, draw: np.random.Generator, size: Resolution, resolution: Resolution, boxes: NDArray[np.floating]) -> View:
        """A random view of an image; if it is enlarged it stays on one of the people [P, 4] where there are some."""
        fit = min(resolution.height / size.height, resolution.width / size.width)
        zoom = float(np.exp(draw.uniform(*np.log(self.scale))))
        middle = np.array([size.width - 1, size.height - 1]) / 2
        if zoom > 1 and len(boxes):
            box = boxes[draw.choice(len(boxes))]
            pull = draw.uniform(0, 1)
            middle = middle * (1 - pull) + (box[:2] + box[2:] / 2) * pull
        base = resized(size, (size.height * fit * zoom, size.width * fit * zoom))
        angle = np.deg2rad(draw.uniform(-self.rotate, self.rotate))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        flipped = bool(draw.random() < self.flip)
        linear = turn @ base[:, :2]
        if flipped:
            linear = np.diag([-1.0, 1.0]) @ linear
        extent = np.array([resolution.width, resolution.height])
        target = (extent - 1) / 2 + draw.uniform(-self.shift, self.shift, 2) * extent
        offset = target - linear @ middle
        return View(np.concatenate((linear, offset[:, None]), axis=1), resolution, None, flipped)

    def tone(self, draw: np.random.Generator) -> tuple[float, float]:
        """A random gain and offset of pixel values, 0 to 255."""
        gain = 1 + draw.uniform(-self.brightness, self.brightness)
        return gain, 255 * draw.uniform(-1, 1) * self.brightness / 2


NONE = Augmentation(flip=0.0, scale=(1.0, 1.0), rotate=0.0, shift=0.0, brightness=0.0)


def sampling_grid(
    matrices: Tensor, size: Resolution, source: tuple[int, int], stride: float = 1.0, shift: float = 0.0
) -> Tensor:
    """Where the cells of views lie in their images, as `grid_sample(align_corners=False)` wants it.

    Args:
        matrices: from image to view, float [B, 2, 3], in pixels.
        size: of the views, in cells.
        source: height and width of the images.
        stride: pixels of the view a cell.
        shift: of a cell's sample, as `FieldSpec.shift`.

    Returns:
        float [B, h, w, 2], x and y in -1 to 1.
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


def cut(images: Tensor, matrices: Tensor, tones: Tensor, size: Resolution, spec: InputSpec) -> Tensor:
    """Views of images in the network's input form.

    Args:
        images: uint8 [B, H, W, 3], RGB.
        matrices: float [B, 2, 3], from image to view.
        tones: gain and offset, float [B, 2].
        size: of the views.
        spec: the input's form.

    Returns:
        float [B, 3, size.height, size.width], channels last in memory.
    """
    pixels = images.permute(0, 3, 1, 2).float() - spec.pad  # so that zeros beyond the edge are padding
    grid = sampling_grid(matrices, size, (images.shape[1], images.shape[2]))
    seen = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + spec.pad
    gain, offset = tones[:, 0, None, None, None], tones[:, 1, None, None, None]
    seen = (seen * gain + offset).clamp(0, 255)
    _, factor, shift = (torch.as_tensor(values, device=images.device)[:, None, None] for values in spec.form())
    ordered = seen if spec.order == "RGB" else seen.flip(1)
    return (ordered * factor - shift).contiguous(memory_format=torch.channels_last)
