"""Scales of weights: one for each output channel."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

WeightScale = Literal["max", "mse", "least_squares"]
WEIGHT_SCALES: tuple[str, ...] = get_args(WeightScale)

LEAST_SCALE = 2.0**-100  # far above the least normal float32 number


def quantized(
    weights: NDArray[np.float32], axis: int, method: WeightScale = "max", most: int = 127, least: float = LEAST_SCALE
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize weights to integers, with a scale for each output channel.

    Args:
        weights: weights of a convolution.
        axis: axis of the output channels.
        method: how to choose the scale. "max" makes the greatest weight the greatest integer. "mse" tries 32 scales from .5
            to 1 times that of "max" and takes the least squared error. "least_squares" takes the integers of "max" and fits
            the scale to them.
        most: the greatest integer: 127, or 63 for kernels that add two products in 16 bits.
        least: the smallest allowed scale.

    Returns:
        The integers, int8 of the weights' shape, and the scales, float32 [O]. The scale of a channel of zeros is 1.
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    peak = np.abs(rows).max(axis=1)
    scale = np.where(peak > 0, np.maximum(peak / most, least), 1.0)
    if method == "mse":
        candidates = np.maximum(scale * np.linspace(0.5, 1.0, 32)[:, None], least)
        errors = [((np.clip(np.rint(rows / c[:, None]), -most, most) * c[:, None] - rows) ** 2).sum(axis=1) for c in candidates]
        scale = np.where(peak > 0, candidates[np.argmin(errors, axis=0), np.arange(len(rows))], 1.0)
    integers = np.clip(np.rint(rows / scale[:, None]), -most, most)
    if method == "least_squares":
        power = (integers**2).sum(axis=1)
        scale = np.where(power > 0, np.maximum((integers * rows).sum(axis=1) / np.maximum(power, 1), least), scale)
    shape = np.moveaxis(weights, axis, 0).shape
    return np.moveaxis(integers.reshape(shape), 0, axis).astype(np.int8), scale.astype(np.float32)
