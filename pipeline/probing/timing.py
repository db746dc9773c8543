"""Measure memory, time and energy of an engine with its pre- and post-processing, in a separate process."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation import latency, power
from pipeline.contracts import Backend
from pipeline.probing import processes
from pipeline.progress import Progress
from posepress.contracts import Decoder, Framing, Runner
from posepress.errors import UserError
from posepress.geometry import View
from posepress.pixels import frame
from posepress.resolution import Resolution
from posepress.results import Boxes

STEPS = ("framing", "upload", "network", "download", "decoding")
_NETWORK = STEPS.index("network")
_ENERGY_SECONDS = 1.0
PEOPLE = (1, 5, 20)  # numbers of people in an image whose times are measured
_LEAST, _SECONDS = 5, 0.5  # least number of calls, and the seconds that they take unless these calls take longer


@dataclass(frozen=True)
class Work:
    """What an engine is timed at.

    Attributes:
        backend: backend that runs the engine.
        images: RGB images, uint8 [H, W, 3], with the boxes of their instances if known. Images without a view are skipped.
        framing: framing that makes an image an input; its first view is used.
        decoder: function that makes the decoder from the network's description.
        resolution: size of the input.
        batch: number of copies of a view in one call.
        threads: number of CPU threads.
        detector: makes a call that finds the boxes in an image, from the image and the number of threads. Its time is measured
            beside the network's; None: there is no detector.
    """

    backend: Backend
    images: Sequence[tuple[NDArray[np.uint8], Boxes | None]]
    framing: Framing
    decoder: Callable[..., Decoder[Any]]
    resolution: Resolution
    batch: int
    threads: int
    detector: Callable[[NDArray[np.uint8], int], Callable[[], None]] | None = None

    def steps(self, runner: Runner) -> list[Callable[[Any], Any]]:
        """The steps of a call, in the order of `STEPS`; each call takes the next image."""
        spec, decode = runner.spec.input, self.decoder(runner.spec)
        seen = [
            (image, view)
            for image, boxes in self.images
            for view in self.framing.views(Resolution(*image.shape[:2]), self.resolution, spec, boxes)[:1]
        ]
        if not seen:
            raise UserError(
                "none of the first validation images has a person to cut out: the network cannot be timed on them; "
                "correct data.splits"
            )
        order, at = cycle(range(len(seen))), 0

        def framed(_: Any) -> Any:
            nonlocal at
            at = next(order)
            return np.stack([frame(seen[at][0], seen[at][1], spec) for _ in range(self.batch)])

        def decoded(fields: Any) -> Any:
            return decode.decode(fields, [seen[at][1]] * self.batch)

        def downloaded(fields: Any) -> Any:
            host = runner.download(fields)
            return fields if self.backend.on_gpu else host  # decoding begins on the device of the fields, as in evaluation

        return [framed, runner.upload, runner, downloaded, decoded]


def apart(what: str, function: Any, *values: Any) -> dict[str, Any]:
    """Call a function in a fresh process, with unused memory and threads. The text `what` is shown meanwhile."""
    with processes.pool(1) as pool, Progress(what, unit="s"):
        result: dict[str, Any] = pool.submit(function, *values).result()
        return result


def measure(work: Work, engine: Path, reference: Path | None, seconds: float) -> dict[str, Any]:
    """Memory and times of an engine, measured in a fresh process.

    Memory comes first, because its peak is that of the whole process.
    """
    import cv2

    cv2.setNumThreads(1)
    return {**memory_of(work, engine), **time_of(work, engine, reference, seconds), **times_of_people(work, engine)}


def times_of_people(work: Work, engine: Path) -> dict[str, float]:
    """Medians in ms of whole images with 1, 5 and 20 people, for networks that see one person at a time; else empty.

    "image_5_ms" covers framing, network and decoding of five people in batches. "detector_ms" is the detector's time for an
    image, and "chain_5_ms" that of both.
    """
    figures: dict[str, float] = {}
    image, boxes = next(((image, boxes) for image, boxes in work.images if boxes is not None and len(boxes.xywh)), (None, None))
    if image is None or boxes is None:
        return {}
    size = Resolution(*image.shape[:2])
    with work.backend.load(engine, work.threads) as runner:
        decoder = work.decoder(runner.spec)
        for count in PEOPLE:
            scores = None if boxes.scores is None else np.resize(boxes.scores, count)
            several = Boxes(np.resize(boxes.xywh, (count, 4)), scores)
            views = work.framing.views(size, work.resolution, runner.spec.input, several)
            if len(views) != count:
                return {}  # the network sees the whole image

            def whole(views: Sequence[View] = views) -> None:
                parts: list[Any] = []
                for start in range(0, len(views), work.batch):
                    some = views[start : start + work.batch]
                    pixels = np.stack([frame(image, view, runner.spec.input) for view in some])
                    parts += decoder.decode(runner(runner.upload(pixels)), some)
                decoder.merge(parts, views)

            figures[f"image_{count}_ms"] = _median(whole)
    if len(figures) == len(PEOPLE) and work.detector is not None:
        figures["detector_ms"] = _median(work.detector(image, work.threads))
        figures |= {f"chain_{n}_ms": figures["detector_ms"] + figures[f"image_{n}_ms"] for n in PEOPLE}
    return figures


def in_words(figures: Mapping[str, Any]) -> str:
    """The times of images with people as the end of a line; empty if they were not measured."""
    kinds = {"image": "an image with 1, 5, 20 people", "chain": "with the detector"}
    parts = [
        f"{name}: {', '.join(format(figures[f'{kind}_{n}_ms'], '.2f') for n in PEOPLE)} ms"
        for kind, name in kinds.items()
        if f"{kind}_{PEOPLE[0]}_ms" in figures
    ]
    return "".join(f"; {part}" for part in parts)


def _median(call: Callable[[], None]) -> float:
    """The median in ms of some calls after a warm-up."""
    times: list[float] = []
    call()
    began = time.perf_counter()
    while len(times) < _LEAST or time.perf_counter() - began < _SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)


def time_of(work: Work, engine: Path, reference: Path | None, seconds: float) -> dict[str, Any]:
    """Percentiles of every step in ms, with intervals, and the engine's speed-up over the reference engine.

    A percentile is left out if fewer than one call is expected above it. "gpu" is the GPU's state at the end. Both engines
    run all steps, in turns, so that neither has warmer caches. Without a reference engine there is no comparison.
    """
    with ExitStack() as stack:
        ours, *others = (stack.enter_context(work.backend.load(e, work.threads)) for e in (engine, reference) if e is not None)
        steps = work.steps(ours)
        mine, *other = latency.in_turns([steps, *(work.steps(runner) for runner in others)], seconds, _NETWORK)
        inputs = ours.upload(steps[0](None))
        calls = max(int(_ENERGY_SECONDS * 1e3 / max(mine.percentile(50, _NETWORK).value, 0.1)), 1)
        with power.EnergyMeter(work.backend.on_gpu) as meter:
            for _ in range(calls if meter.measures else 0):
                ours(inputs)
        state = power.gpu_state() if work.backend.on_gpu else {}  # read it before the GPU cools down
    figures: dict[str, Any] = {}
    if other:
        faster = latency.speedup(mine, other[0], _NETWORK)
        figures = {"speedup": faster.value, "speedup_lo": faster.low, "speedup_hi": faster.high}
        figures["fp32_p50_ms"] = other[0].percentile(50, _NETWORK).value
    for step, name in enumerate(STEPS):
        prefix = "latency" if step == _NETWORK else name
        known = [q for q in (50, 95, 99) if mine.calls * (100 - q) >= 100]  # at least one call is expected above the percentile
        for q, found in zip(known, mine.percentiles(known, step), strict=True):
            figures |= {f"{prefix}_p{q}_ms": found.value, f"{prefix}_p{q}_ms_lo": found.low, f"{prefix}_p{q}_ms_hi": found.high}
    if meter.joules is not None:
        figures |= {"joules_per_image": meter.joules / calls / work.batch, "energy_by": meter.source}
    return {
        **figures,
        "latency_width": mine.width(_NETWORK),
        "calls": mine.calls,
        "warm_up_calls": mine.warm_up,
        "gpu": state,
    }


def memory_of(work: Work, engine: Path) -> dict[str, Any]:
    """Memory in MiB: the process's peak, the part that the engine added, and GPU memory if NVML is available."""
    before, on_gpu = latency.peak_rss_mb(), power.gpu_state().get("gpu_memory_mb")
    with work.backend.load(engine, work.threads) as runner:
        steps = work.steps(runner)
        for _ in range(3):
            runner(runner.upload(steps[0](None)))
        used = power.gpu_state().get("gpu_memory_mb") if work.backend.on_gpu else None
    grown = {"device_mb": used - on_gpu} if used is not None and on_gpu is not None else {}
    return {"peak_rss_mb": latency.peak_rss_mb(), "engine_rss_mb": latency.peak_rss_mb() - before, **grown}
