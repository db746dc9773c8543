"""benchmark: latency, memory and the precision that really ran, on this machine."""

import json
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from evaluation import audit, device, latency
from evaluation.types import Resolution
from pipeline.artifacts import Job, read_manifest
from pipeline.specs import Backend, Framing, ModelFiles, Shapes


def run(
    job: Job,
    backend: Backend,
    framing: Framing,  # noqa: ARG001 - part of what an engine is built for
    resolution: str,
    batch: int,
    threads: int,
    seconds: float,
    axes: Mapping[str, Any],
) -> dict[str, Any]:
    """Time the input "engine" in turns with the exported network in FP32 (the input "reference") on the same backend.

    Args:
        job: inputs hold "engine" and "reference".
        backend: runs the engines.
        framing: of the cell.
        resolution: of the input.
        batch: images at once.
        threads: of the processor.
        seconds: of timing, for both engines.
        axes: what tells this cell from others, for tables.

    Returns:
        Latencies in ms, the speed-up over FP32 with its interval, memory in MiB, MACs and what ran; only "timed": 0 for a
        backend whose times mean nothing.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    engine, size = job.inputs["engine"] / built["summary"]["engine"], Resolution.parse(resolution)
    machine = device.describe()
    if not backend.timeable:
        summary: dict[str, Any] = {"timed": 0, "backend": backend.name}
    else:
        layers = backend.audit(engine, size)
        (job.out / "audit.json").write_text(json.dumps(list(layers), indent=1))
        ran = audit.shares(layers)
        with (
            tempfile.TemporaryDirectory() as folder,
            FileLock(Path(tempfile.gettempdir()) / "posepress-benchmark.lock"),
        ):
            reference = _reference(backend, job.inputs["reference"] / "model.onnx", size, batch, Path(folder))
            timed = _apart(_time, backend, engine, reference, size, batch, threads, seconds)
            memory = _apart(_memory, backend, engine, size, batch, threads)
        summary = {
            "timed": 1,
            **timed,
            **memory,
            "engine_mb": built["summary"]["engine_mb"],
            **{f"ran_{name}": share for name, share in ran.items()},
            "ran": audit.label(ran),
            "backend": backend.name,
            "device": device.name(machine, backend.on_gpu),
            "threads": threads,
            "batch": batch,
        }
    (job.out / "latency.json").write_text(json.dumps({**summary, "machine": machine, "axes": dict(axes)}, indent=1))
    return summary


def _reference(backend: Backend, model: Path, size: Resolution, batch: int, folder: Path) -> Path:
    files = ModelFiles({"tensorrt": model, "onnxruntime": model})
    return backend.build(files, Shapes((size, size, size), (1, batch, batch)), folder)


def _apart(function: Any, *values: Any) -> dict[str, Any]:
    """Call in a fresh process, whose memory and threads nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result: dict[str, Any] = pool.submit(function, *values).result()
        return result


def _images(spec: Any, size: Resolution, batch: int) -> Any:
    noise = np.random.default_rng(0).random((batch, 3, size.height, size.width), np.float32)
    return noise * np.float32(spec.input.range)


def _time(
    backend: Backend, engine: Path, reference: Path, size: Resolution, batch: int, threads: int, seconds: float
) -> dict[str, Any]:
    with backend.load(engine, threads) as ours, backend.load(reference, threads) as theirs:
        images = _images(ours.spec, size, batch)
        mine, other = latency.in_turns([lambda: ours(images), lambda: theirs(images)], seconds)
    faster = latency.speedup(mine, other)
    return {
        "latency_p50_ms": mine.percentile(50),
        "latency_p95_ms": mine.percentile(95),
        "fp32_p50_ms": other.percentile(50),
        "speedup": faster.value,
        "speedup_lo": faster.low,
        "speedup_hi": faster.high,
        "calls": mine.calls,
    }


def _memory(backend: Backend, engine: Path, size: Resolution, batch: int, threads: int) -> dict[str, Any]:
    before = latency.peak_rss_mb()
    with backend.load(engine, threads) as runner:
        images = _images(runner.spec, size, batch)
        for _ in range(3):
            runner(images)
    return {"peak_rss_mb": latency.peak_rss_mb(), "engine_rss_mb": latency.peak_rss_mb() - before}
