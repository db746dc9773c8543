"""Random views of an image for training."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaluation.types import People, Resolution, View
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

    def view(self, draw: np.random.Generator, size: Resolution, resolution: Resolution, truth: People) -> View:
        """A random view; if it is enlarged it stays on a person where there is one."""
        fit = min(resolution.height / size.height, resolution.width / size.width)
        zoom = float(np.exp(draw.uniform(*np.log(self.scale))))
        middle = np.array([size.width - 1, size.height - 1]) / 2
        labelled = np.flatnonzero(truth.keypoints[..., 2].any(axis=1))
        if zoom > 1 and labelled.size:
            box = truth.boxes[draw.choice(labelled)]
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

    def pixels(self, draw: np.random.Generator, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Change gain and offset of a view's pixels [H, W, 3]."""
        import cv2

        gain, offset = (
            1 + draw.uniform(-self.brightness, self.brightness),
            255 * draw.uniform(-1, 1) * self.brightness / 2,
        )
        table = np.clip(np.arange(256) * gain + offset, 0, 255).astype(np.uint8)
        return np.asarray(cv2.LUT(image, table), np.uint8)
