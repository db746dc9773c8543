"""benchmark: measure the latency of every step, memory, energy, and the precision that really ran, on this machine."""

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval

from evaluation import audit, device, power
from pipeline.contracts import Backend, Splits
from pipeline.decoder_options import decoder_options
from pipeline.onnx_files.files import ModelFiles, Shapes
from pipeline.probing.processes import alone
from pipeline.probing.timing import Work, apart, measure
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError
from posepress.resolution import Resolution

_IMAGES = 8  # number of validation images, used in turns


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    resolution: str,
    batch: Annotated[int, Ge(1)],
    threads: Annotated[int, Ge(0)],
    seconds: Annotated[float, Interval(gt=0, le=86400)],
    min_int8_share: Annotated[float, Interval(ge=0, le=1)] | None,
    axes: Mapping[str, Any],
) -> dict[str, Any]:
    """Time the input "engine" in turns with the exported network in FP32 (the input "reference") on the same backend.

    Args:
        job: the job. Its inputs hold "engine" and "reference", and "tuned" if the decoder has options to tune.
        data: the data set. Some of its validation images are framed, computed and decoded.
        backend: backend that runs the engines.
        framing: framing that makes images inputs.
        decoder: decoder of the engine's fields.
        resolution: size of the input.
        batch: number of images at once.
        threads: number of CPU threads.
        seconds: longest time of timing both engines, in seconds.
        min_int8_share: smallest share of the MACs that must run in INT8, else the benchmark fails.
        axes: options that distinguish this cell from others, for tables.

    Returns:
        Latencies in ms with intervals, the speed-up over FP32, memory in MiB, and the precisions that ran. Energy for each
        image in J is added if it can be measured. For a backend without meaningful times, only "timed": 0.

    Raises:
        UserError: too little of the engine runs in INT8.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    engine, size = job.inputs["engine"] / built["summary"]["engine"], Resolution.parse(resolution)
    machine = device.describe()
    summary: dict[str, Any] = {"timed": 0, "backend": backend.name}
    job.scratch.mkdir(parents=True, exist_ok=True)
    if not framing.averaged:  # averaging several views is a research setting, so it is not timed
        with alone():
            layers = backend.audit(engine, size, job.scratch)
        (job.out / "audit.json").write_text(json.dumps(list(layers), indent=1))
        ran, lost = audit.shares(layers), audit.unmet(layers)
        if min_int8_share is not None and ran.get("int8", 0.0) < min_int8_share:
            slow = "; ".join(f"{x['name']} ({x['precision']}: {x.get('reason', '')})" for x in audit.fallen(layers)[:5])
            raise UserError(
                f"min_int8_share={min_int8_share}: only {ran.get('int8', 0.0):.3f} of the MACs of {engine} run in INT8"
                + (f"; not in INT8: {slow}" if slow else "; build it with precision=int8")
            )
    if backend.timeable and not framing.averaged:
        images = data.open("validation")
        some = [(sample.read(), sample.boxes) for sample in (images[n] for n in range(min(_IMAGES, len(images))))]
        options = decoder_options(job.inputs.get("tuned"), decoder)
        work = Work(backend, some, framing, decoder, options, size, batch, threads)
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder, alone():
            reference = _reference(backend, job, size, batch, Path(folder)) if "reference" in job.inputs else None
            timed = apart("measuring", measure, work, engine, reference, seconds)
        machine |= timed.pop("gpu")
        say(
            f"p50 {timed['latency_p50_ms']:.2f} ms, interval {timed['latency_width']:.1%} wide, "
            f"{timed['calls']} calls after {timed['warm_up_calls']} to warm up; decoding {timed['decoding_p50_ms']:.2f} ms"
        )
        if lost:
            say(
                f"quantized, but not run in INT8: {', '.join(x['name'] for x in lost[:5])}"
                f"{f' and {len(lost) - 5} more' if len(lost) > 5 else ''} (why: audit.json)"
            )
        summary = {
            "timed": 1,
            **timed,
            "engine_mb": built["summary"]["engine_mb"],
            **{f"ran_{kind}_{name}": x for kind in audit.KINDS for name, x in audit.shares(layers, kind).items()},
            **{f"engine_{name}": count for name, count in audit.counts(layers).items()},
            "ran": audit.label(ran),
            "not_in_int8": None if lost is None else [f"{x['name']} ({x.get('reason') or x['op']})" for x in lost],
            "backend": backend.name,
            "device": device.name(machine, backend.on_gpu),
            "threads": threads,
            "batch": batch,
        }
    machine |= {"nvpmodel": mode} if (mode := power.nvpmodel()) else {}
    (job.out / "latency.json").write_text(json.dumps({**summary, "machine": machine, "axes": dict(axes)}, indent=1))
    return summary


def _reference(backend: Backend, job: Job, size: Resolution, batch: int, folder: Path) -> Path:
    model = job.inputs["reference"] / "model.onnx"
    files = ModelFiles({"tensorrt": model, "onnxruntime": model}, checkpoint=job.inputs["engine"])
    return backend.in_fp32().build(files, Shapes((size, size, size), (1, batch, batch)), folder)
