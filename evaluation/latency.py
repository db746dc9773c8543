"""Latency: calls are timed in blocks, engines take turns, and intervals are computed over the blocks."""

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

NARROW = 0.02  # timing ends when the median's interval is narrower than this share of the median
LEAST_CALLS = 200  # least number of calls of each engine, so that two lie above the 99th percentile
_BLOCK = 0.08  # longest block of one engine, in seconds, before the next engine's turn
_TURNS = 8  # least number of blocks of each engine
_WARM_UP = 3.0  # longest warm-up of an engine, in seconds
_RESAMPLES = 400

Steps = Sequence[Callable[[Any], Any]]  # each step takes the value that the step before it returned


@dataclass(frozen=True)
class Timing:
    """Seconds of every step of every call, block by block.

    Attributes:
        blocks: one array [calls, steps] for each block.
        warm_up: number of calls before the first block.
    """

    blocks: tuple[F64, ...]
    warm_up: int = 0

    @property
    def calls(self) -> int:
        """How many calls were timed."""
        return sum(len(block) for block in self.blocks)

    def percentiles(self, qs: Sequence[float], step: int = 0) -> list[Interval]:
        """Percentiles of a step's times in milliseconds, with 95 % bootstrap intervals over the blocks."""
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
        """A percentile of a step's times in milliseconds, with the interval of `percentiles`."""
        return self.percentiles([q], step)[0]

    def width(self, step: int = 0) -> float:
        """Width of the median's interval, divided by the median."""
        median = self.percentile(50, step)
        return (median.high - median.low) / max(median.value, 1e-12)


def once(steps: Steps) -> list[float]:
    """Run steps one after the other, and return the seconds of each."""
    value: Any = None
    seconds = []
    for step in steps:
        started = time.perf_counter()
        value = step(value)
        seconds.append(time.perf_counter() - started)
    return seconds


def warm_up(steps: Steps, least: int = 5, seconds: float = _WARM_UP) -> int:
    """Call until the last third of the calls is no faster than the third before it, and return the number of calls.

    Args:
        steps: steps of one call.
        least: least number of calls.
        seconds: longest duration in seconds, unless `least` calls take longer.
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
        calls: for each engine, the steps of one call.
        seconds: longest duration in seconds for all engines together, unless eight blocks of one call take longer. Timing
            ends early when every engine was called `LEAST_CALLS` times and its median is known to `NARROW`. The warm-up of
            each engine comes first, and takes at most `seconds`.
        watched: index of the step whose median decides.
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
    """How many times faster a step is in `ours` than in `theirs`: the median over turns, with its bootstrap interval."""
    ratios = np.array([np.median(b[:, step]) / np.median(a[:, step]) for a, b in zip(ours.blocks, theirs.blocks, strict=True)])
    draw = np.random.default_rng(seed)
    draws = np.median(ratios[draw.integers(0, len(ratios), (resamples, len(ratios)))], axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return Interval(float(np.median(ratios)), float(low), float(high))


def peak_rss_mb() -> float:
    """The greatest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage includes the parent's memory at the time of the fork
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
