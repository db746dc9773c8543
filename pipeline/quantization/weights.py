"""Scales of weights: one for each output channel."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

WeightScale = Literal["max", "mse", "least_squares"]
WEIGHT_SCALES: tuple[str, ...] = get_args(WeightScale)

LEAST_SCALE = 2.0**-100  # far from the least normal float32 number


def quantized(
    weights: NDArray[np.float32], axis: int, method: WeightScale = "max", most: int = 127, least: float = LEAST_SCALE
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights as integers, with a scale for each output channel.

    Args:
        weights: of a convolution.
        axis: of the output channels.
        method: "max" the greatest weight becomes the greatest integer; "mse" the scale of 32 between .5 and 1 times that
            with the least squared error; "least_squares" the integers of "max" with the scale that fits them best.
        most: the greatest integer, 127, or 63 for kernels that add two products in 16 bits.
        least: the least scale there may be.

    Returns:
        int8 of the weights' shape, and float32 [O]; 1 for a channel of zeros.
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
