"""The one loop that runs a network over images: calibration and evaluation are both made of it."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.types import InputSpec, Resolution, Sample, View
from pipeline.specs import Dataset, Decoder, Framing, Runner

Found = TypeVar("Found")

_READ_AHEAD = 16  # images being read or waiting: bounds the memory


@dataclass(frozen=True)
class Batch:
    """Network inputs of one size.

    Attributes:
        images: float32 [B, 3, H, W], in the network's input form.
        views: B views.
        samples: the image each view is of.
        last: whether a view is the last of its image.
    """

    images: NDArray[np.float32]
    views: Sequence[View]
    samples: Sequence[Sample[Any]]
    last: Sequence[bool]


def frame(image: NDArray[np.uint8], view: View, spec: InputSpec) -> NDArray[np.uint8]:
    """Cut a view [H, W, 3] from an image; outside is the network's padding."""
    import cv2

    height, width = view.size.height, view.size.width
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


def normalise(images: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """RGB pixels [..., H, W, 3] to the network's input form [..., 3, H, W]."""
    ordered = images if spec.order == "RGB" else images[..., ::-1]
    factor = np.float32(spec.range / 255) / np.asarray(spec.std, np.float32)
    offset = np.asarray(spec.mean, np.float32) / np.asarray(spec.std, np.float32)
    out = np.empty((*images.shape[:-3], 3, *images.shape[-3:-1]), np.float32)
    for channel in range(3):
        np.multiply(ordered[..., channel], factor[channel], out=out[..., channel, :, :])
        if offset[channel]:
            out[..., channel, :, :] -= offset[channel]
    return out


def batches(
    data: Dataset[Any],
    framing: Framing,
    spec: InputSpec,
    resolution: Resolution,
    batch: int = 1,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Read and frame images ahead of the network, in order.

    Args:
        data: the images.
        framing: how an image becomes views.
        spec: the network's input.
        resolution: the network's input size.
        batch: most views at once; views of different sizes never share a batch.
        indices: which images; None is all.
    """

    def prepare(index: int) -> tuple[Sample[Any], list[View], list[NDArray[np.uint8]]]:
        sample = data[index]
        views = framing.views(sample.size, resolution, spec)
        image = sample.read()
        return sample, views, [frame(image, view, spec) for view in views]

    waiting: list[tuple[Sample[Any], View, NDArray[np.uint8], bool]] = []

    def flush() -> Batch:
        samples, views, pixels, last = zip(*waiting, strict=True)
        waiting.clear()
        return Batch(normalise(np.stack(pixels), spec), views, samples, last)

    order = range(len(data)) if indices is None else indices
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending: deque[Future[tuple[Sample[Any], list[View], list[NDArray[np.uint8]]]]] = deque()
        todo = iter(order)
        while True:
            while len(pending) < _READ_AHEAD and (index := next(todo, None)) is not None:
                pending.append(pool.submit(prepare, index))
            if not pending:
                break
            try:
                sample, views, pixels = pending.popleft().result()
            except BaseException:
                for future in pending:
                    future.cancel()
                raise
            for n, (view, cut) in enumerate(zip(views, pixels, strict=True)):
                if waiting and (len(waiting) == batch or waiting[0][1].size != view.size):
                    yield flush()
                waiting.append((sample, view, cut, n == len(views) - 1))
        if waiting:
            yield flush()


def predict(
    data: Dataset[Any],
    runner: Runner,
    framing: Framing,
    decoder: Decoder[Found],
    resolution: Resolution,
    batch: int = 1,
) -> Iterator[tuple[Sample[Any], Found]]:
    """Find what is in each image, in order; decoding runs beside the network."""
    parts: list[Found] = []
    views: list[View] = []
    decoding: deque[tuple[Batch, Future[list[Found]]]] = deque()

    def finished(done: Batch, found: list[Found]) -> Iterator[tuple[Sample[Any], Found]]:
        for sample, view, part, last in zip(done.samples, done.views, found, done.last, strict=True):
            parts.append(part)
            views.append(view)
            if last:
                yield sample, decoder.merge(parts, views)
                parts.clear()
                views.clear()

    with ThreadPoolExecutor(max_workers=1) as pool:
        for ready in batches(data, framing, runner.spec.input, resolution, batch):
            fields = runner(ready.images)
            decoding.append((ready, pool.submit(decoder.decode, fields, ready.views)))
            if len(decoding) > 2:
                done, future = decoding.popleft()
                yield from finished(done, future.result())
        for done, future in decoding:
            yield from finished(done, future.result())
