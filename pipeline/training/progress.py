"""What a training says of itself: a bar on a terminal, and lines that stay."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """How far, how fast and how well a training goes.

    Args:
        shown: False says nothing, as on all devices but the first.
        steps: of the whole training.
        batch_size: images a step.
        step: how many steps are done.
    """

    def __init__(self, shown: bool, steps: int, batch_size: int, step: int) -> None:
        self._steps, self._batch_size = steps, batch_size
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True, soft_wrap=True)
        self._bar = Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=not shown)
        self._task = self._bar.add_task("training", total=steps, completed=step, losses="")
        self._losses = ""
        self._begun = self._last = step, time.perf_counter()

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._bar.disable:
            self._bar.console.print(f"           {text}", highlight=False)

    def begin(self, step: int) -> None:
        """Rates count from here, after so many steps."""
        self._begun = self._last = step, time.perf_counter()
        self.update(step)

    def update(self, step: int) -> None:
        """So many steps are done."""
        self._bar.update(self._task, completed=step)

    def show_losses(self, step: int, losses: Mapping[str, float], start: int) -> None:
        """Show the losses, and about every tenth of the way say them in a log.

        Args:
            step: how many are done; the device is done with them too.
            losses: by name.
            start: rates leave out so many steps from where it began.
        """
        self._losses = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self._bar.update(self._task, losses=self._losses)
        tenths = step * 10 // self._steps > self._last[0] * 10 // self._steps and step < self._steps
        if step <= self._begun[0] + start < self._steps:
            self._last = step, time.perf_counter()  # how it starts says nothing of how fast it goes
        elif tenths and not self._bar.console.is_terminal:  # a log shows no bar
            self.say_rate(step)

    def say_rate(self, step: int) -> None:
        """Say how far and how fast it goes."""
        before, then = self._last if self._last[0] < step else self._begun
        rate = (step - before) * self._batch_size / (time.perf_counter() - then)
        self.say(f"step {step} of {self._steps}, {rate:.0f} images/s, {self._losses}")
        self._last = step, time.perf_counter()
