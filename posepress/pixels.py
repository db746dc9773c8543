"""Cutting of a view from an image, and its conversion to the network's input form."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled
from posepress.geometry import View, mirrored
from posepress.resolution import Resolution
from posepress.spec import InputSpec

F32 = NDArray[np.float32]


def frame(image: NDArray[np.uint8], view: View, spec: InputSpec) -> NDArray[np.uint8]:
    """Cut a view [H, W, 3] from an image; pixels outside the image get the network's grey level of padding."""
    import cv2

    height, width = view.size.height, view.size.width
    if view.flipped:
        image = np.ascontiguousarray(image[:, ::-1])
        view = mirrored(view, Resolution(*image.shape[:2]))
    (sx, skew_y, x), (skew_x, sy, y) = view.matrix
    whole = skew_x == skew_y == 0 and abs(x - (0.5 * sx - 0.5)) < 1e-9 and abs(y - (0.5 * sy - 0.5)) < 1e-9
    how = cv2.INTER_CUBIC if view.interpolation == "cubic" else cv2.INTER_LINEAR
    if not whole:
        pad = (spec.pad,) * 3
        warped = cv2.warpAffine(image, view.matrix, (width, height), flags=how, borderValue=pad)
        return np.asarray(warped, np.uint8)
    # A resize has more precise coefficients than a warp.
    inside = (round(image.shape[1] * sx), round(image.shape[0] * sy))
    resized = cv2.resize(image, inside, interpolation=how)
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


def normalise(images: NDArray[np.uint8], spec: InputSpec, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Convert RGB pixels to the layout, type and channels of the network's input.

    Args:
        images: RGB [..., H, W, 3].
        spec: the network's input; grey values follow OpenCV: 0.299 R + 0.587 G + 0.114 B.
        out: a contiguous array for the result, of the input's shape and type; None allocates one.

    Raises:
        ValueError: the images do not have three channels, or `out` has another shape or type.
    """
    if images.ndim < 3 or images.shape[-1] != 3:
        raise ValueError(f"images {list(images.shape)} are not RGB, [..., H, W, 3]")
    *before, height, width, _ = images.shape
    batch, size, kind = math.prod(before), Resolution(height, width), np.dtype(spec.dtype)
    shape = (*before, *spec.shape(batch, size)[1:])
    if out is not None and (out.shape != shape or out.dtype != kind):
        raise ValueError(f"an array {list(out.shape)} of {out.dtype} does not take an input {list(shape)} of {kind}")
    pixels = np.ascontiguousarray(images).reshape(batch, height, width, 3)
    if spec.channels == 1:
        pixels = grey(pixels)
    order, factor, offset = spec.form()
    if kind == np.uint8:
        planes: NDArray[Any] = pixels[..., order].transpose(0, 3, 1, 2)
    else:
        plain = out is not None and spec.layout == "NCHW" and kind == np.float32
        planes = out if plain and out is not None else np.empty((batch, spec.channels, height, width), np.float32)
        flat = pixels.reshape(batch, height * width, spec.channels)
        _planes(flat, order, factor, offset, planes.reshape(batch, spec.channels, height * width))
    ordered = planes if spec.layout == "NCHW" or planes is out else planes.transpose(0, 2, 3, 1)
    if out is None:
        return np.ascontiguousarray(ordered, kind).reshape(shape)
    if ordered is not out:
        out[...] = ordered.reshape(shape)
    return out


def grey(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert RGB images [B, H, W, 3] to grey images [B, H, W, 1]."""
    import cv2

    if not len(images):
        return np.zeros((*images.shape[:3], 1), np.uint8)
    return np.stack([cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in images])[..., None].astype(np.uint8, copy=False)
