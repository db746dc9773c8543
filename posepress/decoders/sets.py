"""Reading of sets: their entries, and boxes in image pixels."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posepress.geometry import View, cells_to_input
from posepress.spec import Fields, OutputSpec

F32 = NDArray[np.float32]
Form = Literal["xyxy", "cxcywh"]


def entries(fields: Fields, spec: OutputSpec, views: int) -> F32:
    """A set output in host memory, float32 [B, N, channels].

    Args:
        fields: the outputs.
        spec: description of the set.
        views: B.

    Raises:
        ValueError: the output has another shape.
    """
    values: Any = fields[spec.name]
    if hasattr(values, "is_cuda"):
        values = values.float().cpu().numpy()
    at = 1 if spec.axes == "CN" else 2
    if values.ndim != 3 or values.shape[0] != views or values.shape[at] != spec.channels:
        raise ValueError(f"'{spec.name}' is {list(values.shape)}, not a set {spec.form}; correct model.spec")
    ordered: F32 = np.asarray(values.transpose(0, 2, 1) if spec.axes == "CN" else values, np.float32)
    return ordered


def to_image(boxes: F32, field: OutputSpec, view: View) -> NDArray[np.float64]:
    """Corners [N, 4] in the network's pixels as x, y, width and height in pixels of the image, cut at the view's edges."""
    most = (view.size.width - 0.5, view.size.height - 0.5)
    ends = np.clip(cells_to_input(boxes.reshape(-1, 2, 2).astype(np.float64), field, view.size), -0.5, most)
    low, high = np.sort(view.to_image(ends), axis=1).transpose(1, 0, 2)  # a mirrored view exchanges left and right
    return np.concatenate((low + 0.5, high - low), axis=1)  # COCO counts from the corner of the first pixel
