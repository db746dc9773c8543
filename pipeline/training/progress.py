"""What a training says of itself: a bar on a terminal, and lines that stay."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Told:
    """How far, how fast and how well a training goes.

    Args:
        shown: False says nothing, as on all devices but the first.
        steps: of the whole training.
        batch_size: images a step.
    """

    def __init__(self, shown: bool, steps: int, batch_size: int) -> None:
        self.steps, self.batch_size = steps, batch_size
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True, soft_wrap=True)
        self.bar = Progress(*columns, TextColumn("{task.fields[losses]}"), console=console, disable=not shown)
        self.losses = ""

    def __enter__(self) -> Self:
        """Show the bar."""
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.steps, losses="")
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self.bar.disable:
            self.bar.console.print(f"           {text}", highlight=False)

    def begin(self, step: int) -> None:
        """Rates count from here, after so many steps."""
        self.begun = self.last = step, time.perf_counter()
        self.at(step)

    def at(self, step: int) -> None:
        """So many steps are done."""
        self.bar.update(self.task, completed=step)

    def look(self, step: int, losses: Mapping[str, float], start: int) -> None:
        """The losses after so many steps; about every tenth of the way a line of a log.

        Args:
            step: how many are done; the device is done with them too.
            losses: by name.
            start: rates leave out so many steps from where it began.
        """
        self.losses = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.bar.update(self.task, losses=self.losses)
        tenths = step * 10 // self.steps > self.last[0] * 10 // self.steps and step < self.steps
        if step <= self.begun[0] + start < self.steps:
            self.last = step, time.perf_counter()  # how it starts says nothing of how fast it goes
        elif tenths and not self.bar.console.is_terminal:  # a log shows no bar
            self.tell(step)

    def tell(self, step: int) -> None:
        """Say how far and how fast it goes."""
        before, then = self.last if self.last[0] < step else self.begun
        rate = (step - before) * self.batch_size / (time.perf_counter() - then)
        self.say(f"step {step} of {self.steps}, {rate:.0f} images/s, {self.losses}")
        self.last = step, time.perf_counter()
