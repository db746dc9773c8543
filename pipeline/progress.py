"""How far a long step is: a bar on a terminal; in a pipe or a log, a line every ten seconds and never an empty one."""

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
P = TypeVar("P", bound="Progress")  # typing.Self is not in the Python 3.10 of the edge

EVERY = 10.0  # seconds between lines
INDENT = " " * 11  # below the names of stages


@dataclass
class Lines:
    """Where lines go, and when the last one did: many short steps after another share one pace.

    Attributes:
        stream: None is standard error, as it is when a line is written.
        clock: seconds that only grow.
        last: the time of the last line; None before the first step.
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
_bars: list[Bar] = []  # a terminal has room for one


class Progress:
    """How far one long step is, said while it runs.

    Args:
        what: the step does, "calibrating".
        total: how many things it does it to; None is not known.
        unit: those things, "images"; "s" of one thing that takes seconds.
        shown: False says nothing.
        stays: whether its last line stays also if it was short.
        done: how many are done before.
        lines: the pace of a log; None is that of the process.
        words: are shown until the first thing is done.
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
        words: str = "",
    ) -> None:
        self._what, self._total, self._unit, self._stays = what, total, unit, stays
        self._lines = _LINES if lines is None else lines
        self._shown = shown
        self._said: int | None = None  # how many were done at the last line
        self._from = self._done = done
        self._words = words
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
        self._task = self._bar.add_task(what, total=total, completed=done, words=words)
        self._ended = threading.Event()

    def __enter__(self: P) -> P:  # noqa: PYI019
        """Begin to count and to show."""
        self._started = self._lines.clock()
        if not self._bar.disable:
            _bars.append(self._bar)
            self._bar.start()
        elif self._shown and not self._interactive:
            _ = self._lines.due  # the first step of a process begins the pace
            if self._lines.clock is time.monotonic:  # a thing that takes minutes must not silence a log
                threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away; a step that said something says where it ended."""
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
        """Say how far it is, where there is no bar and the last line is ten seconds old."""
        if not self._shown or self._interactive:
            return
        with self._lines.lock:
            if self._lines.due <= 0 and not self._ended.is_set():
                self._lines.write(self.line())
                self._said = self._done

    def update(self, done: int, words: str = "") -> None:
        """So many are done.

        Args:
            done: in all.
            words: what else there is to say.
        """
        self._done, self._words = done, words
        self._bar.update(self._task, completed=done, words=self._tail())
        self.tick()

    def advance(self) -> None:
        """One more is done."""
        self.update(self._done + 1, self._words)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._shown:
            return
        bar = self._bar if not self._bar.disable else _bars[-1] if _bars and self._interactive else None
        if bar is None:
            with self._lines.lock:
                self._lines.write(text)
        else:
            bar.console.print(f"{INDENT}{text}", markup=False)

    def line(self) -> str:
        """How far it is, in words: what, how many of how many, how fast."""
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
    """A rate with as many digits as are worth reading."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def track(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "", lines: Lines | None = None
) -> Iterator[Item]:
    """Pass things on and show how many there were.

    Args:
        items: anything.
        what: is done with them.
        total: how many; None asks them.
        unit: what they are.
        lines: the pace of a log; None is that of the process.
    """
    count = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(what, count, unit, lines=lines) as progress:
        for item in items:
            yield item
            progress.advance()


class TrainingProgress(Progress):
    """How far, how fast and how well a training goes; each line's rate is of the steps since the line before.

    Args:
        shown: False says nothing, as on all devices but the first.
        steps: of the whole training.
        batch_size: images a step.
        step: how many steps are done.
        lines: the pace of a log; None is that of the process.
    """

    def __init__(self, shown: bool, steps: int, batch_size: int, step: int, lines: Lines | None = None) -> None:
        super().__init__("training", steps, "steps", shown, done=step, lines=lines)
        self._steps, self._batch_size, self._losses = steps, batch_size, ""
        self._begun = self._last = step, self._lines.clock()

    def begin(self, step: int) -> None:
        """Rates count from here, after so many steps."""
        self._begun = self._last = step, self._lines.clock()
        self.update(step)

    def update(self, done: int, words: str = "") -> None:
        """So many steps are done."""
        super().update(done, words or self._losses)

    def show_losses(self, step: int, losses: Mapping[str, float], start: int) -> None:
        """Show the losses.

        Args:
            step: how many are done; the device is done with them too.
            losses: by name.
            start: rates leave out so many steps from where it began.
        """
        self._losses = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        if step <= self._begun[0] + start < self._steps:
            self._last = step, self._lines.clock()  # how it starts says nothing of how fast it goes
        self.update(step)

    def say_rate(self, step: int) -> None:
        """Say how far and how fast it went."""
        self._done = self._said = step
        self.say(self.line())

    def line(self) -> str:
        """The step, the rate since the last line, and the losses."""
        step, now = self._done, self._lines.clock()
        before, then = self._last if self._last[0] < step else self._begun
        self._last = step, now
        images = f", {(step - before) * self._batch_size / (now - then):.0f} images/s" if step > before and now > then else ""
        return f"step {step} of {self._steps}{images}" + (f", {self._losses}" if self._losses else "")
