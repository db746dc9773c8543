"""The one loop that runs a network over images: calibration and evaluation are both made of it."""

import itertools
import json
import os
import struct
import time
import tokenize
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from evaluation.pixels import frame
from evaluation.types import InputSpec, Resolution, Sample, View
from pipeline.errors import UserError
from pipeline.specs import Dataset, Decoder, Framing, Runner

Found = TypeVar("Found")

DAMAGED = (  # what numpy and zipfile raise over bytes that are none of theirs
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, ArithmeticError,
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip
_SAVE_EVERY = 30.0  # seconds between partial results
_READ_AHEAD = 16  # images being read or waiting: bounds the memory
# More threads than these only wait for each other's turn in Python: on 16 cores and a GPU, 16 and 4 of them lost a tenth.
_MOST_READERS, _MOST_DECODERS = 8, 2


FITTED = "tuned"  # the value of an option of a decoder that the stage `tune` fits


def candidates(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a decoder's options that are lists of candidates, the first of each list first."""
    lists = {name: value for name, value in options.items() if isinstance(value, (list, tuple)) and name != "score_weights"}
    return [dict(zip(lists, chosen, strict=True)) for chosen in itertools.product(*lists.values())]


def decoder_options(tuned: Path | None, decoder: Any) -> dict[str, Any]:
    """What the stage `tune` chose; where it did not run, the first of each list of candidates.

    Args:
        tuned: its folder.
        decoder: a partial decoder, with options that may be lists.
    """
    if tuned is not None:
        chosen: dict[str, Any] = json.loads((tuned / "decoder.json").read_text())["options"]
        return chosen
    given: Mapping[str, Any] = decoder.keywords
    return candidates(given)[0] | ({"score_weights": None} if given.get("score_weights") == FITTED else {})


@dataclass(frozen=True)
class Batch:
    """Network inputs of one size.

    Attributes:
        images: uint8 [B, H, W, 3], RGB; `Runner.upload` gives them the network's input form.
        views: B views.
        samples: the image each view is of.
        last: whether a view is the last of its image.
    """

    images: NDArray[np.uint8]
    views: Sequence[View]
    samples: Sequence[Sample[Any]]
    last: Sequence[bool]


@dataclass
class Watch:
    """What the steps of a loop cost, to name the one that holds it up.

    Attributes:
        workers: how many threads share a step.
        busy: seconds of work of each step, of all its threads.
    """

    workers: dict[str, int] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the time inside as work of a step."""
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
    data: Dataset[Any],
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
        batch: most views at once; views of different sizes never share a batch.
        indices: which images; None is all.
        watch: counts the time of the steps "reading" and "framing".
    """
    import cv2

    cv2.setNumThreads(1)  # the readers are the threads
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
            except ValueError as error:  # the image has no boxes, or one that is not finite
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
            if not views:  # nobody to cut out: the image is done before any network sees it
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
    data: Dataset[Any],
    runner: Runner,
    framing: Framing,
    decoder: Decoder[Found],
    resolution: Resolution,
    batch: int = 1,
    indices: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[Sample[Any], Found]]:
    """Find what is in each image, in order.

    Reading and framing, the network, and decoding run side by side; between them wait a few batches at most. `runner.workers`
    batches are in the network at once.

    Args:
        data: the images.
        runner: a loaded engine.
        framing: how an image becomes views.
        decoder: of the engine's fields.
        resolution: the network's input size.
        batch: most views at once.
        indices: which images; None is all.
        watch: counts the time of the steps "reading", "framing", "network" and "decoding".
    """
    watch = watch or Watch()
    decoding = min(max((os.cpu_count() or 1) // 4, 1), _MOST_DECODERS)
    watch.workers |= {"network": runner.workers, "decoding": decoding}
    parts: list[Found] = []
    views: list[View] = []

    def run(ready: Batch) -> Any:
        if not ready.views:
            return {}
        with watch.step("network"):
            return runner(runner.upload(ready.images))

    def decode(fields: Future[Any], ready: Batch) -> list[Found]:
        returned = fields.result()
        with watch.step("decoding"):
            try:
                return decoder.decode(returned, ready.views) if ready.views else []
            except ValueError as error:  # the fields are not as described
                raise UserError(str(error)) from error

    def finished(done: Batch, found: list[Found]) -> Iterator[tuple[Sample[Any], Found]]:
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
        pending: deque[tuple[Batch, Future[list[Found]]]] = deque()
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


def shown(results: Iterator[Found], watch: Watch, what: str, total: int) -> Iterator[Found]:
    """Pass results on and show images/s and the name of the step that holds them up; both are left behind."""
    from pipeline.progress import Progress

    compiling = "before the first image, decoding is compiled or loaded"
    with Progress(what, total, "images", stays=True, words=compiling) as progress:
        for n, result in enumerate(results, 1):
            yield result
            progress.update(n, f"held up by {watch.bottleneck}")


def resumed(
    images: Any, file: Path, rest: Callable[[int], Iterator[tuple[Any, Any]]], watch: Watch, what: str
) -> Iterator[tuple[int, Any, Any]]:
    """Place, sample and what was found, of every image; an interrupted pass goes on where it was.

    Args:
        images: the data set.
        file: where what was found is kept meanwhile.
        rest: finds people from an image on.
        watch: of the time they take.
        what: the images are, for the progress bar.
    """
    try:
        kept = list((load_results(file) if file.exists() else {}).items())
    except UserError:  # an unfinished pass that cannot be read is begun again
        kept = []
    start, saved = len(kept), time.monotonic()
    for place, (image, found) in enumerate(kept):
        sample = images[place]
        assert sample.id == image
        yield place, sample, found
    try:
        for sample, found in shown(rest(start), watch, what, len(images) - start):
            kept.append((sample.id, found))
            yield len(kept) - 1, sample, found
            if time.monotonic() - saved > _SAVE_EVERY:
                save_results(file, kept)
                saved = time.monotonic()
    finally:
        if len(kept) > start:
            save_results(file, kept)


def save_results(file: Path, results: Sequence[tuple[str, Any]]) -> None:
    """Write what was found in images, (id, found), to an .npz file; what was found are dataclasses of `evaluation.types`."""
    arrays: dict[str, Any] = {"ids": np.array([i for i, _ in results], dtype=str)}
    kinds = {type(found).__name__ for _, found in results}
    arrays["kind"] = np.array(sorted(kinds), dtype=str)
    for n, (_, found) in enumerate(results):
        arrays |= {f"{n}.{f.name}": getattr(found, f.name) for f in fields(found) if getattr(found, f.name) is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    unfinished.replace(file)


def load_results(file: Path) -> dict[str, Any]:
    """What `save_results` wrote, by image id.

    Raises:
        UserError: the file is damaged.
    """
    from evaluation import types

    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, kinds = [str(name) for name in stored["ids"].tolist()], stored["kind"].tolist()
            values: list[dict[str, Any]] = [{} for _ in ids]
            for key in stored.files:
                number, _, name = key.partition(".")
                if name:
                    value = stored[key]
                    values[int(number)][name] = value if value.ndim else value.item()
        kind: Any = getattr(types, kinds[0]) if ids else None
        if ids and not is_dataclass(kind):
            raise ValueError(f"it holds {kinds[0]}, which is no kind of result")
        return {i: kind(**found) for i, found in zip(ids, values, strict=True)}
    except DAMAGED as error:
        raise UserError(f"{file}: damaged ({error}); delete it, or make it again with force=true") from error
