"""Prediction of whole sources: reading, the network, drawing and encoding overlap, with bounded queues between them."""

import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any

from posepress.errors import UserError
from posepress.model import Model
from posepress.predict import Watch
from posepress.results import Poses, Sample
from posepress.sources import Shot, Source, distinct, open_source
from posepress.writers import Writer, writers

_QUEUE = 8  # images that wait between two steps
_PATIENCE = 1.0  # seconds
_EVERY = 1.0  # seconds between two lines of progress


@dataclass(frozen=True)
class Options:
    """How the results of sources are made and kept.

    Attributes:
        out: folder of the files.
        save: some of "overlay", "coco" and "csv".
        jsonl: also print one line of JSON for each image.
        threshold: least score of a result; None takes the decoder's default.
        track: give people in videos numbers that stay the same.
        smooth: smooth the keypoints of tracked people (One Euro filter).
        every: the detector finds boxes in each `every`-th image.
        strict: whether a file that is no image is an error; else it is skipped and counted.
        live: whether cameras give their newest frame and drop others.
    """

    out: Path = Path("predictions")
    save: Sequence[str] = ("overlay", "coco")
    jsonl: bool = False
    threshold: float | None = None
    track: bool = False
    smooth: bool = False
    every: int = 1
    strict: bool = True
    live: bool = False


def run(model: Model, given: Sequence[str | int | Path], options: Options, quiet: bool = False) -> dict[str, Any]:
    """Predict the results of some sources, and write them to files.

    Args:
        model: the loaded model.
        given: the sources, as `posepress.sources.open_source`.
        options: how results are made and kept.
        quiet: print no progress.

    Returns:
        "images", "instances", "seconds", "images_per_second", "held_up_by", "busy" with the seconds of each step, and counts of
        problems.

    Raises:
        UserError: a source cannot be read, or a file cannot be written. What was written until then can be read.
    """
    if options.smooth and not options.track:
        raise UserError("smooth=true: smooths tracked people alone; add track=true")
    if options.every < 1 or (options.every > 1 and model.detector is None):
        raise UserError(f"every={options.every}: is for a model with a detector, and at least 1; leave it out")
    with ExitStack() as stack:
        sources = []
        for one in given:
            sources.append(open_source(one, options.strict, options.live))
            stack.callback(sources[-1].close)
        distinct(sources)
        watch, started = Watch(), time.perf_counter()
        shown = _Progress(sources, watch, quiet)
        stop = Event()
        with ThreadPoolExecutor(len(sources)) as pool:
            futures = [pool.submit(_one, model, source, options, watch, shown, stop) for source in sources]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:  # also Ctrl-C: the other sources end, and their files are finished
                stop.set()
                raise
        seconds = time.perf_counter() - started
        shown.finish()
    counts: dict[str, int] = {}
    for source in sources:
        for name, count in source.counts.items():
            counts[name] = counts.get(name, 0) + count
    rate = shown.images / seconds if seconds else 0.0
    return {
        "images": shown.images, "instances": shown.instances, "seconds": seconds, "images_per_second": rate,
        "held_up_by": watch.bottleneck, "busy": dict(watch.busy), **counts,
    }  # fmt: skip


def _one(model: Model, source: Source, options: Options, watch: Watch, shown: "_Progress", stop: Event) -> None:
    """Predict one source, until it ends or `stop` is set."""
    tracker = _tracker(model, options) if options.track and source.frame_rate is not None else None
    sinks = writers(source, options.out, options.save, options.jsonl)
    with _Sink(sinks, watch) as sink, _Feed(source, watch, stop) as feed:
        waiting: deque[Shot] = deque()

        def samples() -> Iterator[Sample[Any]]:
            for shot in feed:
                waiting.append(shot)
                yield shot.sample

        for _, found in model.predict(samples(), options.threshold, watch, options.every):
            shot = waiting.popleft()
            if tracker is not None and isinstance(found, Poses):
                with watch.step("tracking"):
                    found = replace(tracker.update(found, shot.seconds), labels=found.labels)  # noqa: PLW2901
            sink.put(shot, found)
            shown.add(len(found))


def _tracker(model: Model, options: Options) -> Any:
    from posepress.track import OneEuro, Tracker

    return Tracker(model.spec.skeleton.oks_sigmas, smoothing=OneEuro() if options.smooth else None)


class _Feed:
    """Reads a source in a thread of its own, some images ahead."""

    def __init__(self, source: Source, watch: Watch, stop: Event) -> None:
        self._source, self._watch, self._stop, self._all = source, watch, Event(), stop
        self._queue: Queue[Any] = Queue(1 if source.live else _QUEUE)
        self._thread = Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_Feed":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_PATIENCE)  # it may wait for a camera's frame, or for a line of the standard input

    def _read(self) -> None:
        last: Any = None
        try:
            shots = iter(self._source.shots)
            while not self._stop.is_set():
                with self._watch.step("source"):
                    shot = next(shots, None)
                if shot is None:
                    break
                self._put(shot)
        except BaseException as error:  # noqa: BLE001 - raised again where the images are used
            last = error
        self._put(last)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            with suppress(Full):
                self._queue.put(item, timeout=0.2)
                return

    def __iter__(self) -> Iterator[Shot]:
        while not self._all.is_set():
            try:
                item = self._queue.get(timeout=0.2)
            except Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item


class _Sink:
    """Draws and writes results in a thread of its own; its files are finished whatever happens."""

    def __init__(self, sinks: Sequence[Writer], watch: Watch) -> None:
        self._sinks, self._watch = sinks, watch
        self._queue: Queue[tuple[Shot, Any] | None] = Queue(_QUEUE)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._write, daemon=True)

    def __enter__(self) -> "_Sink":
        self._thread.start()
        return self

    def put(self, shot: Shot, found: Any) -> None:
        """Hand over a result; waits while too many wait.

        Raises:
            UserError: an earlier result could not be written.
        """
        while True:
            if self._error is not None:
                raise self._error
            with suppress(Full):
                self._queue.put((shot, found), timeout=0.2)
                return

    def _write(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                for sink in self._sinks if self._error is None else ():
                    with self._watch.step("drawing and encoding"):
                        sink.write(*item)
            except BaseException as error:  # noqa: BLE001 - raised again in the main thread
                self._error = error

    def __exit__(self, kind: object, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:  # noqa: BLE001 - the other files are finished first
                self._error = self._error or error
        if self._error is not None and kind is None:
            raise self._error


class _Progress:
    """A line on the standard error: images, rate, and the step that is busiest."""

    def __init__(self, sources: Sequence[Source], watch: Watch, quiet: bool) -> None:
        totals = [source.total for source in sources]
        self._total = sum(total for total in totals if total is not None) if None not in totals else None
        self._watch, self._quiet, self._terminal = watch, quiet, sys.stderr.isatty()
        self._started = self._last = time.perf_counter()
        self.images = self.instances = 0

    def add(self, instances: int) -> None:
        """Count an image."""
        self.images, self.instances = self.images + 1, self.instances + instances
        now = time.perf_counter()
        if now - self._last > (_EVERY if self._terminal else 10 * _EVERY):
            self._last = now
            self._print("\r" if self._terminal else "", "" if self._terminal else "\n")

    def finish(self) -> None:
        """Print the last line."""
        self._print("\r" if self._terminal else "", "\n")

    def _print(self, before: str, after: str) -> None:
        if not self._quiet:
            rate = self.images / max(time.perf_counter() - self._started, 1e-9)
            of = "" if self._total is None else f" of {self._total}"
            text = f"{self.images}{of} images, {rate:.1f} a second, held up by {self._watch.bottleneck or 'nothing'}"
            print(f"{before}{text:<79}", end=after, file=sys.stderr, flush=True)
