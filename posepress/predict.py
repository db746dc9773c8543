"""The loop that runs a network over images; calibration, evaluation and prediction use it."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Decoder, Framing, Result, Runner, Samples
from posepress.errors import UserError
from posepress.geometry import View
from posepress.pixels import frame
from posepress.resolution import Resolution
from posepress.results import Sample
from posepress.spec import Fields, InputSpec

Item = TypeVar("Item")
Given = TypeVar("Given")

_READ_AHEAD = 16  # largest number of images being read or waiting, to bound the memory

# More threads only wait for Python's GIL: on 16 cores and a GPU, 16 readers and 4 decoders were a tenth slower.
_MOST_READERS, _MOST_DECODERS = 8, 2


@dataclass(frozen=True)
class Batch:
    """Network inputs of one size.

    Attributes:
        images: uint8 [B, H, W, 3], RGB; `Runner.upload` gives them the network's input form.
        views: B views.
        samples: the image of each view.
        last: whether a view is the last of its image.
    """

    images: NDArray[np.uint8]
    views: Sequence[View]
    samples: Sequence[Sample[Any]]
    last: Sequence[bool]


@dataclass
class Watch:
    """The time that each step of a loop takes, to find the bottleneck.

    Attributes:
        workers: number of threads of each step.
        busy: seconds of work in each step, summed over its threads.
    """

    workers: dict[str, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time spent in the `with` block to a step."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.busy[name] = self.busy.get(name, 0.0) + time.perf_counter() - started

    @property
    def bottleneck(self) -> str:
        """The step whose threads were busiest."""
        return max(self.busy, key=lambda name: self.busy[name] / self.workers.get(name, 1), default="")


class Selection(Samples[Any]):
    """Some images of a data set.

    Args:
        data: the images.
        indices: their indices, in the order of the selection.
    """

    def __init__(self, data: Samples[Any], indices: Sequence[int]) -> None:
        self._data, self._indices = data, indices

    @classmethod
    def spread(cls, data: Samples[Any], most: int) -> "Selection":
        """At most `most` images, at even distances in the data set's order."""
        return cls(data, sorted({round(k) for k in np.linspace(0, len(data) - 1, min(most, len(data)))}))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Sample[Any]:
        return self._data[self._indices[index]]


@dataclass(frozen=True)
class _Framed:
    """One view of an image, as a network input uint8 [H, W, 3]; `last` if it is the last of its image."""

    sample: Sample[Any]
    view: View
    pixels: NDArray[np.uint8]
    last: bool


def batches(
    data: Samples[Any] | Iterable[Sample[Any]],
    framing: Framing,
    spec: InputSpec,
    resolution: Resolution,
    batch: int = 1,
    watch: Watch | None = None,
) -> Iterator[Batch]:
    """Read and frame images ahead of the network, in order.

    Args:
        data: the images. Those of a data set are read by several threads; an iterable is read as it comes.
        framing: how an image becomes views.
        spec: the network's input.
        resolution: the network's input size.
        batch: largest number of views in a batch; views of different sizes never share a batch.
        watch: counts the time of the steps "reading" and "framing".

    Raises:
        UserError: an image has no boxes although the framing needs them, or a box is not finite.
    """
    watch = watch or Watch()

    def prepare(fetch: Callable[[], Sample[Any]]) -> tuple[Sample[Any], list[_Framed]]:
        with watch.step("reading"):
            sample = fetch()
            image = sample.read()
        with watch.step("framing"):
            try:
                views = framing.views(sample.size, resolution, spec, sample.boxes)
            except ValueError as error:  # the image has no boxes, or a box is not finite
                raise UserError(f"image {sample.id}: {error}") from error
            return sample, [_Framed(sample, v, frame(image, v, spec), n == len(views)) for n, v in enumerate(views, 1)]

    waiting: list[_Framed] = []
    for sample, framed in _ahead(prepare, _fetches(data), max(_READ_AHEAD, 2 * batch), watch):
        if not framed:  # a top-down image without people needs no network
            if waiting:
                yield _batch(waiting)
            yield Batch(np.zeros((0, 1, 1, 3), np.uint8), (), (sample,), ())
        for one in framed:
            if waiting and (len(waiting) == batch or waiting[0].view.size != one.view.size):
                yield _batch(waiting)
            waiting.append(one)
    if waiting:
        yield _batch(waiting)


def _fetches(data: Samples[Any] | Iterable[Sample[Any]]) -> Iterator[Callable[[], Sample[Any]]]:
    """A call for each image that returns it."""
    if isinstance(data, Iterable):
        for sample in data:
            yield partial(_same, sample)
    else:
        for index in range(len(data)):
            yield partial(data.__getitem__, index)


def _same(sample: Sample[Any]) -> Sample[Any]:
    return sample


def _batch(waiting: list[_Framed]) -> Batch:
    """The batch of the waiting views; afterwards none waits."""
    pixels = [one.pixels for one in waiting]
    images = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
    batch = Batch(images, [w.view for w in waiting], [w.sample for w in waiting], [w.last for w in waiting])
    waiting.clear()
    return batch


def _ahead(prepare: Callable[[Given], Item], given: Iterable[Given], most: int, watch: Watch) -> Iterator[Item]:
    """Prepare images in threads, at most `most` ahead, and yield them in order."""
    import cv2

    cv2.setNumThreads(1)  # the readers already run in parallel
    readers = min(os.cpu_count() or 1, _MOST_READERS)
    watch.workers |= {"reading": readers, "framing": readers}
    pool, pending, todo = ThreadPoolExecutor(readers), deque[Future[Item]](), iter(given)
    try:
        while True:
            while len(pending) < most and (one := next(todo, None)) is not None:
                pending.append(pool.submit(prepare, one))
            if not pending:
                return
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def predict(
    data: Samples[Any] | Iterable[Sample[Any]],
    runner: Runner,
    framing: Framing,
    decoder: Decoder[Result],
    resolution: Resolution,
    batch: int = 1,
    watch: Watch | None = None,
) -> Iterator[tuple[Sample[Any], Result]]:
    """Predict the result of each image, in order.

    Reading, the network and decoding run in parallel, with only a few batches waiting between them. The network runs
    `runner.workers` batches at the same time.

    Args:
        data: the images, as `batches`.
        runner: a loaded engine.
        framing: how an image becomes views.
        decoder: turns the engine's fields into results.
        resolution: the network's input size.
        batch: largest number of views in a batch.
        watch: counts the time of the steps "reading", "framing", "network" and "decoding".

    Raises:
        UserError: an image cannot be framed, or the engine's outputs differ from their description.
    """
    watch = watch or Watch()
    decoding = min(max((os.cpu_count() or 1) // 4, 1), _MOST_DECODERS)
    watch.workers |= {"network": runner.workers, "decoding": decoding}
    merge = _Merge(decoder)

    def run(ready: Batch) -> Fields:
        if not ready.views:
            return {}
        with watch.step("network"):
            return runner(runner.upload(ready.images))

    def decode(fields: Future[Fields], ready: Batch) -> list[Result]:
        returned = fields.result()
        with watch.step("decoding"):
            try:
                return decoder.decode(returned, ready.views) if ready.views else []
            except ValueError as error:  # the fields differ from their description
                raise UserError(str(error)) from error

    networks, decoders = ThreadPoolExecutor(runner.workers), ThreadPoolExecutor(decoding)
    try:
        pending: deque[tuple[Batch, Future[list[Result]]]] = deque()
        for ready in batches(data, framing, runner.spec.input, resolution, batch, watch):
            pending.append((ready, decoders.submit(decode, networks.submit(run, ready), ready)))
            if len(pending) > runner.workers + decoding:
                done, future = pending.popleft()
                yield from merge.finished(done, future.result())
        while pending:
            done, future = pending.popleft()
            yield from merge.finished(done, future.result())
    finally:
        networks.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)


class _Merge(Generic[Result]):
    """Joins the results of an image's views, which may lie in several batches."""

    def __init__(self, decoder: Decoder[Result]) -> None:
        self._decoder = decoder
        self._parts: list[Result] = []
        self._views: list[View] = []

    def finished(self, batch: Batch, results: Sequence[Result]) -> Iterator[tuple[Sample[Any], Result]]:
        """Yield the images whose last view is in the batch."""
        if not batch.views:
            yield batch.samples[0], self._decoder.merge([], [])
            return
        for sample, view, result, last in zip(batch.samples, batch.views, results, batch.last, strict=True):
            self._parts.append(result)
            self._views.append(view)
            if last:
                yield sample, self._decoder.merge(self._parts, self._views)
                self._parts, self._views = [], []
