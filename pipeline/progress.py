"""Progress of a long step: a bar on a terminal, or a line every ten seconds in a pipe or log, without empty lines."""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Item = TypeVar("Item")
P = TypeVar("P", bound="Progress")  # typing.Self is missing in Python 3.10, which edge devices use

EVERY = 10.0  # time between two lines, in seconds
INDENT = " " * 11  # aligns lines with the text after a stage's name


@dataclass
class Lines:
    """The output of progress lines and the time of the last line. Short steps that follow each other share one interval.

    Attributes:
        stream: output of the lines; None uses the value of sys.stderr when a line is written.
        clock: a monotonic clock, in seconds.
        last: the time of the last line, in seconds; None before the first step.
    """

    stream: TextIO | None = None
    clock: Callable[[], float] = time.monotonic
    last: float | None = None
    lock: Any = field(default_factory=threading.Lock)

    def write(self, text: str) -> None:
        """Write one line."""
        self.last = self.clock()
        print(f"{INDENT}{text}", file=self.stream or sys.stderr, flush=True)

    @property
    def due(self) -> float:
        """Seconds until the next line."""
        if self.last is None:
            self.last = self.clock()
        return self.last + EVERY - self.clock()


_LINES = Lines()
_bars: list[Bar] = []  # at most one, because bars on a terminal overwrite each other


class Progress:
    """The progress of one long step, shown while it runs.

    Args:
        what: name of the step, for example "calibrating".
        total: number of items; None if unknown.
        unit: name of the items, for example "images"; "s" shows the elapsed seconds instead of a count.
        shown: False prints nothing.
        stays: whether the last line is also printed after a short step.
        done: number of items that were done before.
        lines: output and interval of the lines; None uses those of the process.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        shown: bool = True,
        stays: bool = False,
        done: int = 0,
        lines: Lines | None = None,
    ) -> None:
        self._what, self._total, self._unit, self._stays = what, total, unit, stays
        self._lines = _LINES if lines is None else lines
        self._shown = shown
        self._said: int | None = None  # number of items done at the last line
        self._from = self._done = done
        self._words = ""
        console = Console(file=self._lines.stream or sys.stderr, soft_wrap=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (shown and console.is_interactive) or bool(_bars),
        )
        self._interactive = console.is_interactive
        self._task = self._bar.add_task(what, total=total, completed=done, words="")
        self._ended = threading.Event()

    def __enter__(self: P) -> P:  # noqa: PYI019
        """Start the clock and the display."""
        self._started = self._lines.clock()
        if not self._bar.disable:
            _bars.append(self._bar)
            self._bar.start()
        elif self._shown and not self._interactive:
            _ = self._lines.due  # reading it starts the interval at the first step of a process
            if self._lines.clock is time.monotonic:  # a log must show lines also during an item of minutes
                threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar, and print a last line if the step printed lines before."""
        self._ended.set()
        if not self._bar.disable:
            self._bar.stop()
            _bars.remove(self._bar)
        unsaid = self._said not in (None, self._done) or (self._stays and self._said is None)
        if unsaid and self._done > self._from:
            self.say(self.line())

    def _tick(self) -> None:
        while not self._ended.wait(max(self._lines.due, 0.1)):
            self.tick()

    def tick(self) -> None:
        """Print a line if there is no bar and the last line is ten seconds old."""
        if not self._shown or self._interactive:
            return
        with self._lines.lock:
            if self._lines.due <= 0 and not self._ended.is_set():
                self._lines.write(self.line())
                self._said = self._done

    def update(self, done: int, words: str = "") -> None:
        """Set the number of items that are done.

        Args:
            done: number of items in total.
            words: text to show after the rate.
        """
        self._done, self._words = done, words
        self._bar.update(self._task, completed=done, words=self._tail())
        self.tick()

    def advance(self) -> None:
        """Count one more item as done."""
        self.update(self._done + 1, self._words)

    def say(self, text: str) -> None:
        """Print a line that stays visible beside the bar."""
        if not self._shown:
            return
        bar = self._bar if not self._bar.disable else _bars[-1] if _bars and self._interactive else None
        if bar is None:
            with self._lines.lock:
                self._lines.write(text)
        else:
            bar.console.print(f"{INDENT}{text}", markup=False)

    def line(self) -> str:
        """Return a line with the name of the step, the number of items done and the rate."""
        of = "" if self._total is None else f" of {self._total}"
        if self._unit == "s":
            return f"{self._what}: {self._lines.clock() - self._started:.0f} s"
        return f"{self._what}: {self._done}{of}{self._tail(', ')}"

    def _tail(self, start: str = "") -> str:
        seconds = self._lines.clock() - self._started
        done = self._done - self._from
        parts = []
        if done and seconds > 0:
            parts.append(f"{rate(done / seconds)} {self._unit}/s" if self._unit else f"{rate(done / seconds)} a second")
        parts += [self._words] if self._words else []
        return start + ", ".join(parts) if parts else ""


def say(text: str, style: str | None = None) -> None:
    """Print a line below the name of the running stage, on standard error."""
    Console(stderr=True, highlight=False).print(f"{INDENT}{text}", style=style, soft_wrap=True, markup=False)


def rate(value: float) -> str:
    """Format a rate with two or three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def track(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "", lines: Lines | None = None
) -> Iterator[Item]:
    """Pass items on and show how many have passed.

    Args:
        items: any iterable.
        what: name of the step, for example "calibrating".
        total: number of items; None uses their length, if they have one.
        unit: name of the items, for example "images".
        lines: output and interval of the lines; None uses those of the process.
    """
    count = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(what, count, unit, lines=lines) as progress:
        for item in items:
            yield item
            progress.advance()


class TrainingProgress(Progress):
    """Steps, rate and losses of a training. Each line shows the rate since the previous line.

    Args:
        shown: False prints nothing, as on all devices but the first.
        steps: number of steps of the whole training.
        batch_size: number of images of a step.
        step: number of steps that are done.
        lines: output and interval of the lines; None uses those of the process.
    """

    def __init__(self, shown: bool, steps: int, batch_size: int, step: int, lines: Lines | None = None) -> None:
        super().__init__("training", steps, "steps", shown, done=step, lines=lines)
        self._steps, self._batch_size, self._losses = steps, batch_size, ""
        self._begun = self._last = step, self._lines.clock()

    def begin(self, step: int) -> None:
        """Measure rates from now on, with `step` steps done."""
        self._begun = self._last = step, self._lines.clock()
        self.update(step)

    def update(self, done: int, words: str = "") -> None:
        """Set the number of steps that are done."""
        super().update(done, words or self._losses)

    def show_losses(self, step: int, losses: Mapping[str, float], start: int) -> None:
        """Show the losses.

        Args:
            step: number of steps that the device has completed.
            losses: losses by name.
            start: number of first steps that rates leave out.
        """
        self._losses = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if step <= self._begun[0] + start < self._steps:
            self._last = step, self._lines.clock()  # the first steps are slower than the rest
        self.update(step)

    def say_rate(self, step: int) -> None:
        """Print a line with the step and the rate."""
        self._done = self._said = step
        self.say(self.line())

    def line(self) -> str:
        """Return a line with the step, the rate since the previous line and the losses."""
        step, now = self._done, self._lines.clock()
        before, then = self._last if self._last[0] < step else self._begun
        self._last = step, now
        images = f", {(step - before) * self._batch_size / (now - then):.0f} images/s" if step > before and now > then else ""
        return f"step {step} of {self._steps}{images}" + (f", {self._losses}" if self._losses else "")
