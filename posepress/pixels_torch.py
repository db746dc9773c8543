"""Conversion to the network's input form on the device, to which only a quarter of the bytes must be copied."""

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posepress.pixels import grey
from posepress.spec import InputSpec


@cache
def _on(device: torch.device, spec: InputSpec) -> tuple[Tensor, Tensor]:
    _, factor, offset = spec.form()
    return tuple(torch.from_numpy(values).to(device)[:, None, None] for values in (factor, offset))  # type: ignore[return-value]


def normalise(images: NDArray[np.uint8], spec: InputSpec, device: torch.device) -> Tensor:
    """Convert RGB pixels [B, H, W, 3] to the network's input form on the device.

    The memory format of [B, C, H, W] is channels last.

    The formula is that of `posepress.pixels.normalise`.
    On a GPU the current stream does the work, and the host does not wait for it.
    """
    if spec.channels == 1:
        images = grey(images)
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    there = pixels.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else pixels
    ordered = (there if spec.order == "RGB" else there.flip(-1)).permute(0, 3, 1, 2)
    if spec.dtype != "uint8":
        factor, offset = _on(device, spec)
        ordered = (ordered.float() * factor - offset).to(getattr(torch, spec.dtype))
    return ordered.permute(0, 2, 3, 1).contiguous() if spec.layout == "NHWC" else ordered
