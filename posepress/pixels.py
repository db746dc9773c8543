"""Pixels: cutting a view from an image, and the form in which a network takes it."""

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled
from posepress.geometry import View, mirrored
from posepress.spec import InputSpec, Resolution

F32 = NDArray[np.float32]


def frame(image: NDArray[np.uint8], view: View, spec: InputSpec) -> NDArray[np.uint8]:
    """Cut a view [H, W, 3] from an image; outside is the network's padding."""
    import cv2

    height, width = view.size.height, view.size.width
    if view.flipped:
        image = np.ascontiguousarray(image[:, ::-1])
        view = mirrored(view, Resolution(*image.shape[:2]))
    (sx, skew_y, x), (skew_x, sy, y) = view.matrix
    whole = skew_x == skew_y == 0 and abs(x - (0.5 * sx - 0.5)) < 1e-9 and abs(y - (0.5 * sy - 0.5)) < 1e-9
    if not whole:
        pad = (spec.pad,) * 3
        warped = cv2.warpAffine(image, view.matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=pad)
        return np.asarray(warped, np.uint8)
    # A resize keeps its coefficients in more bits than a warp does.
    inside = (round(image.shape[1] * sx), round(image.shape[0] * sy))
    resized = cv2.resize(image, inside, interpolation=cv2.INTER_LINEAR)
    if inside == (width, height):
        return np.asarray(resized, np.uint8)
    out = np.full((height, width, 3), spec.pad, np.uint8)
    out[: inside[1], : inside[0]] = resized[:height, :width]
    return out


@compiled
def _planes(images: NDArray[np.uint8], order: NDArray[np.int64], factor: F32, offset: F32, out: F32) -> None:
    N, P, C = images.shape
    for n in range(N):
        for c in range(C):
            source, f, o = order[c], factor[c], offset[c]
            for p in range(P):
                out[n, c, p] = np.float32(images[n, p, source]) * f - o


def normalise(images: NDArray[np.uint8], spec: InputSpec, out: F32 | None = None) -> F32:
    """RGB pixels [..., H, W, 3] to the network's input form [..., 3, H, W], in `out`, a contiguous array, if it is given.

    Raises:
        ValueError: the images have other channels, or `out` another size.
    """
    *before, height, width, channels = images.shape
    if channels != len(spec.mean) or (out is not None and out.size != images.size):
        raise ValueError(f"images {list(images.shape)} are not RGB, or do not fit the array that takes them")
    flat = np.ascontiguousarray(images).reshape(-1, height * width, channels)
    made = np.empty((*before, channels, height, width), np.float32) if out is None else out
    _planes(flat, *spec.form(), made.reshape(-1, channels, height * width))
    return made
