"""Framings: they choose which part of an image becomes a network input."""

from typing import Any

from posepress.contracts import Framing, Samples
from posepress.resolution import Resolution


def unframed(data: Samples[Any], framing: Framing, size: Resolution) -> str:
    """Why the first image of a data set cannot be framed; empty if it can.

    Args:
        data: the images.
        framing: how an image becomes views.
        size: the network's input size.
    """
    sample = data[0]
    try:
        framing.bases(sample.size, size, sample.boxes)
    except ValueError as error:
        return str(error)
    return ""
