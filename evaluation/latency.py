"""How long things take: repeats in blocks, engines in turns, intervals from the blocks."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Interval

F64 = NDArray[np.float64]

NARROW = 0.02  # width of the median's interval over the median, at which timing ends
LEAST_CALLS = 200  # of each engine before timing may end early: two of them lie above the 99th percentile
_BLOCK = 0.08  # seconds of one engine before it is the other's turn, at most
_TURNS = 8  # of each engine, at least
_WARM_UP = 3.0  # seconds, at most
_RESAMPLES = 400

Steps = Sequence[Callable[[Any], Any]]  # each takes what the one before it returned


@dataclass(frozen=True)
class Timing:
    """Seconds of every step of every call, block by block.

    Attributes:
        blocks: one array [calls, steps] a block.
        warm_up: calls before the first block.
    """

    blocks: tuple[F64, ...]
    warm_up: int = 0

    @property
    def calls(self) -> int:
        """How many calls were timed."""
        return sum(len(block) for block in self.blocks)

    def percentiles(self, qs: Sequence[float], step: int = 0) -> list[Interval]:
        """Milliseconds below which q per cent of a step's times lie, of each q; 95 % bootstrap intervals over the blocks."""
        blocks = [block[:, step] * 1e3 for block in self.blocks]
        draw = np.random.default_rng(0)
        draws = [
            np.percentile(np.concatenate([blocks[b] for b in draw.integers(0, len(blocks), len(blocks))]), qs)
            for _ in range(_RESAMPLES)
        ]
        bounds = np.percentile(draws, (2.5, 97.5), axis=0)
        values = np.percentile(np.concatenate(blocks), qs)
        return [Interval(float(value), float(low), float(high)) for value, low, high in zip(values, *bounds, strict=True)]

    def percentile(self, q: float, step: int = 0) -> Interval:
        """Milliseconds below which q per cent of a step's times lie, as `percentiles` gives them."""
        return self.percentiles([q], step)[0]

    def width(self, step: int = 0) -> float:
        """Width of the median's interval over the median."""
        median = self.percentile(50, step)
        return (median.high - median.low) / max(median.value, 1e-12)


def once(steps: Steps) -> list[float]:
    """Run steps one after the other; the seconds of each."""
    value: Any = None
    seconds = []
    for step in steps:
        started = time.perf_counter()
        value = step(value)
        seconds.append(time.perf_counter() - started)
    return seconds


def warm_up(steps: Steps, least: int = 5, seconds: float = _WARM_UP) -> int:
    """Call until the last third of the calls is no faster than the third before it; how many calls that took.

    Args:
        steps: of a call.
        least: calls at least.
        seconds: at most, unless `least` takes longer.
    """
    started, times = time.perf_counter(), list[float]()
    while True:
        times.append(sum(once(steps)))
        third = len(times) // 3
        if len(times) < least:
            continue
        if third and np.median(times[-third:]) > 0.98 * np.median(times[-2 * third : -third]):
            return len(times)
        if time.perf_counter() - started > seconds:
            return len(times)


def in_turns(calls: Sequence[Steps], seconds: float, watched: int = 0) -> list[Timing]:
    """Time several engines in alternating blocks, so that what disturbs the machine disturbs them all.

    Args:
        calls: the steps of one call of each.
        seconds: for all of them together, at most, unless eight blocks of one call take longer. It ends as soon as every
            engine's median is known to `NARROW` and it was called `LEAST_CALLS` times. The warm-up of each comes before and
            takes as long at most.
        watched: the step whose median decides.
    """
    block = min(_BLOCK, seconds / (_TURNS * len(calls)))
    warm = [warm_up(steps, seconds=min(_WARM_UP, seconds)) for steps in calls]
    blocks: list[list[F64]] = [[] for _ in calls]
    started, turns = time.perf_counter(), 0
    while True:
        for steps, found in zip(calls, blocks, strict=True):
            times: list[list[float]] = []
            begin = time.perf_counter()
            while not times or time.perf_counter() - begin < block:
                times.append(once(steps))
            found.append(np.array(times))
        turns += 1
        timings = [Timing(tuple(found), n) for found, n in zip(blocks, warm, strict=True)]
        if turns < _TURNS:
            continue
        narrow = turns % _TURNS == 0 and all(t.calls >= LEAST_CALLS and t.width(watched) < NARROW for t in timings)
        if narrow or time.perf_counter() - started > seconds:
            return timings


def speedup(ours: Timing, theirs: Timing, step: int = 0, resamples: int = 1000, seed: int = 0) -> Interval:
    """How many times faster a step of ours is than the same of theirs: the median over turns, with its bootstrap interval."""
    ratios = np.array([np.median(b[:, step]) / np.median(a[:, step]) for a, b in zip(ours.blocks, theirs.blocks, strict=True)])
    draw = np.random.default_rng(seed)
    draws = np.median(ratios[draw.integers(0, len(ratios), (resamples, len(ratios)))], axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(np.median(ratios)), float(low), float(high))


def peak_rss_mb() -> float:
    """The greatest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent had when it forked
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
