"""The loop that runs a network over images; calibration, evaluation and prediction use it."""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.contracts import Decoder, Framing, Result, Runner, Samples
from posepress.errors import UserError
from posepress.geometry import View
from posepress.pixels import frame
from posepress.resolution import Resolution
from posepress.results import Sample
from posepress.spec import InputSpec

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


def batches(
    data: Samples[Any],
    framing: Framing,
    spec: InputSpec,
    resolution: Resolution,
    batch: int = 1,
    indices: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[Batch]:
    """Read and frame images ahead of the network, in order.

    Args:
        data: the images.
        framing: how an image becomes views.
        spec: the network's input.
        resolution: the network's input size.
        batch: largest number of views in a batch; views of different sizes never share a batch.
        indices: which images; None is all.
        watch: counts the time of the steps "reading" and "framing".
    """
    import cv2

    cv2.setNumThreads(1)  # the readers already run in parallel
    watch = watch or Watch()
    readers = min(os.cpu_count() or 1, _MOST_READERS)
    watch.workers |= {"reading": readers, "framing": readers}

    def prepare(index: int) -> tuple[Sample[Any], list[View], list[NDArray[np.uint8]]]:
        with watch.step("reading"):
            sample = data[index]
            image = sample.read()
        with watch.step("framing"):
            try:
                views = framing.views(sample.size, resolution, spec, sample.boxes)
            except ValueError as error:  # the image has no boxes, or a box is not finite
                raise UserError(f"image {sample.id}: {error}") from error
            return sample, views, [frame(image, view, spec) for view in views]

    waiting: list[tuple[Sample[Any], View, NDArray[np.uint8], bool]] = []

    def flush() -> Batch:
        samples, views, inputs, last = zip(*waiting, strict=True)
        waiting.clear()
        images = inputs[0][None] if len(inputs) == 1 else np.stack(inputs)
        return Batch(images, views, samples, last)

    order = range(len(data)) if indices is None else indices
    pool = ThreadPoolExecutor(readers)
    try:
        pending: deque[Future[tuple[Sample[Any], list[View], list[NDArray[np.uint8]]]]] = deque()
        todo = iter(order)
        while True:
            while len(pending) < max(_READ_AHEAD, 2 * batch) and (index := next(todo, None)) is not None:
                pending.append(pool.submit(prepare, index))
            if not pending:
                break
            sample, views, inputs = pending.popleft().result()
            if not views:  # a top-down image without people needs no network
                if waiting:
                    yield flush()
                yield Batch(np.zeros((0, 1, 1, 3), np.uint8), (), (sample,), ())
            for n, (view, made) in enumerate(zip(views, inputs, strict=True)):
                if waiting and (len(waiting) == batch or waiting[0][1].size != view.size):
                    yield flush()
                waiting.append((sample, view, made, n == len(views) - 1))
        if waiting:
            yield flush()
    finally:
        pool.shutdown(cancel_futures=True)


def predict(
    data: Samples[Any],
    runner: Runner,
    framing: Framing,
    decoder: Decoder[Result],
    resolution: Resolution,
    batch: int = 1,
    indices: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[Sample[Any], Result]]:
    """Predict the result of each image, in order.

    Reading, the network and decoding run in parallel, with only a few batches waiting between them. The network runs
    `runner.workers` batches at the same time.

    Args:
        data: the images.
        runner: a loaded engine.
        framing: how an image becomes views.
        decoder: turns the engine's fields into results.
        resolution: the network's input size.
        batch: largest number of views in a batch.
        indices: which images; None is all.
        watch: counts the time of the steps "reading", "framing", "network" and "decoding".
    """
    watch = watch or Watch()
    decoding = min(max((os.cpu_count() or 1) // 4, 1), _MOST_DECODERS)
    watch.workers |= {"network": runner.workers, "decoding": decoding}
    parts: list[Result] = []
    views: list[View] = []

    def run(ready: Batch) -> Any:
        if not ready.views:
            return {}
        with watch.step("network"):
            return runner(runner.upload(ready.images))

    def decode(fields: Future[Any], ready: Batch) -> list[Result]:
        returned = fields.result()
        with watch.step("decoding"):
            try:
                return decoder.decode(returned, ready.views) if ready.views else []
            except ValueError as error:  # the fields differ from their description
                raise UserError(str(error)) from error

    def finished(done: Batch, found: list[Result]) -> Iterator[tuple[Sample[Any], Result]]:
        if not done.views:
            yield done.samples[0], decoder.merge([], [])
            return
        for sample, view, part, last in zip(done.samples, done.views, found, done.last, strict=True):
            parts.append(part)
            views.append(view)
            if last:
                yield sample, decoder.merge(parts, views)
                parts.clear()
                views.clear()

    networks, decoders = ThreadPoolExecutor(runner.workers), ThreadPoolExecutor(decoding)
    try:
        pending: deque[tuple[Batch, Future[list[Result]]]] = deque()
        for ready in batches(data, framing, runner.spec.input, resolution, batch, indices, watch):
            pending.append((ready, decoders.submit(decode, networks.submit(run, ready), ready)))
            if len(pending) > runner.workers + decoding:
                done, future = pending.popleft()
                yield from finished(done, future.result())
        while pending:
            done, future = pending.popleft()
            yield from finished(done, future.result())
    finally:
        networks.shutdown(cancel_futures=True)
        decoders.shutdown(cancel_futures=True)
