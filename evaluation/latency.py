"""How long a network takes: repeats in blocks, two engines in turns, intervals from the blocks."""

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Interval

F64 = NDArray[np.float64]

_BLOCK = 0.08  # seconds of one engine before it is the other's turn


@dataclass(frozen=True)
class Timing:
    """Seconds of every call, block by block.

    Attributes:
        blocks: one array a block.
    """

    blocks: tuple[F64, ...]

    @property
    def calls(self) -> int:
        """How many calls were timed."""
        return sum(len(block) for block in self.blocks)

    def percentile(self, q: float) -> float:
        """Milliseconds below which q per cent of the calls lie."""
        return float(np.percentile(np.concatenate(self.blocks), q) * 1e3)


def warm_up(call: Callable[[], object], least: int = 3, seconds: float = 0.5) -> None:
    """Call until the last call is no faster than the best before it, at least `least` times and at most `seconds`."""
    best, started, calls = np.inf, time.perf_counter(), 0
    while True:
        begin = time.perf_counter()
        call()
        now = time.perf_counter()
        calls += 1
        settled = now - begin > 0.98 * best
        best = min(best, now - begin)
        if calls >= least and (settled or now - started > seconds):
            return


def in_turns(calls: Sequence[Callable[[], object]], seconds: float) -> list[Timing]:
    """Time several engines in alternating blocks, so that what disturbs the machine disturbs them all.

    Args:
        calls: one call each.
        seconds: for all of them together; each gets at least four blocks.
    """
    for call in calls:
        warm_up(call)
    blocks: list[list[F64]] = [[] for _ in calls]
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(blocks[0]) < 4:
        for call, found in zip(calls, blocks, strict=True):
            times: list[float] = []
            begin = time.perf_counter()
            while not times or time.perf_counter() - begin < _BLOCK:
                before = time.perf_counter()
                call()
                times.append(time.perf_counter() - before)
            found.append(np.array(times))
    return [Timing(tuple(found)) for found in blocks]


def speedup(ours: Timing, theirs: Timing, resamples: int = 1000, seed: int = 0) -> Interval:
    """How many times faster ours is: the median over turns of theirs / ours, with its bootstrap interval."""
    ratios = np.array([np.median(b) / np.median(a) for a, b in zip(ours.blocks, theirs.blocks, strict=True)])
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
