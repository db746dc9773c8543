"""benchmark: measure the latency of every step, memory, energy, and the precision that really ran, on this machine."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Interval

from evaluation import audit, device, power
from pipeline.contracts import Backend, Detector, Splits
from pipeline.decoder_options import decoder_options
from pipeline.onnx_files.files import FLAVOURS, ModelFiles, Shapes
from pipeline.probing.processes import alone
from pipeline.probing.timing import Work, apart, in_words, measure
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError
from posepress.resolution import Resolution

_IMAGES = 8  # number of validation images, used in turns


@dataclass(frozen=True)
class Benchmark:
    """Time the input "engine" in turns with the exported network in FP32 (the input "reference") on the same backend.

    Attributes:
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
        detector: finds the boxes of `data`; it is timed, too.
    """

    data: Splits
    backend: Backend
    framing: Framing
    decoder: Callable[..., Decoder[Any]]
    resolution: str
    batch: Annotated[int, Ge(1)]
    threads: Annotated[int, Ge(0)]
    seconds: Annotated[float, Interval(gt=0, le=86400)]
    min_int8_share: Annotated[float, Interval(ge=0, le=1)] | None
    axes: Mapping[str, Any]
    detector: Detector | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "engine" and "reference", and "tuned" if the decoder has options to tune.

        Returns:
            Latencies in ms with intervals, the speed-up over FP32, memory in MiB, and the precisions that ran. Energy for each
            image in J is added if it can be measured. For a backend without meaningful times, only "timed": 0.

        Raises:
            UserError: too little of the engine runs in INT8.
        """
        built = read_manifest(job.inputs["engine"])
        assert built is not None
        engine, machine = job.inputs["engine"] / built["summary"]["engine"], device.describe()
        summary: dict[str, Any] = {"timed": 0, "backend": self.backend.name}
        job.scratch.mkdir(parents=True, exist_ok=True)
        if not self.framing.averaged:  # averaging several views is a research setting, so it is not timed
            layers = self._audited(job, engine)
            if self.backend.timeable:
                timed = self._timed(job, engine)
                machine |= timed.pop("gpu")
                _say(timed, audit.unmet(layers))
                summary = {
                    "timed": 1,
                    **timed,
                    "engine_mb": built["summary"]["engine_mb"],
                    **_ran(layers),
                    "backend": self.backend.name,
                    "device": device.name(machine, self.backend.on_gpu),
                    "threads": self.threads,
                    "batch": self.batch,
                }
        machine |= {"nvpmodel": mode} if (mode := power.nvpmodel()) else {}
        latency = {**summary, "machine": machine, "axes": dict(self.axes)}
        (job.out / "latency.json").write_text(json.dumps(latency, indent=1))
        return summary

    def _audited(self, job: Job, engine: Path) -> Sequence[Mapping[str, Any]]:
        """One record for each layer of the engine; they are also written."""
        with alone():
            layers = self.backend.audit(engine, Resolution.parse(self.resolution), job.scratch)
        (job.out / "audit.json").write_text(json.dumps(list(layers), indent=1))
        share = audit.shares(layers).get("int8", 0.0)
        if self.min_int8_share is not None and share < self.min_int8_share:
            slow = "; ".join(f"{x['name']} ({x['precision']}: {x.get('reason', '')})" for x in audit.fallen(layers)[:5])
            raise UserError(
                f"min_int8_share={self.min_int8_share}: only {share:.3f} of the MACs of {engine} run in INT8"
                + (f"; not in INT8: {slow}" if slow else "; build it with precision=int8")
            )
        return layers

    def _timed(self, job: Job, engine: Path) -> dict[str, Any]:
        """The engine's memory and times beside those of the reference, measured in a process of its own."""
        images, size = self.data.open("validation"), Resolution.parse(self.resolution)
        some = [(one.read(), one.boxes) for one in (images[n] for n in range(min(_IMAGES, len(images))))]
        decoder = partial(self.decoder, **decoder_options(job.inputs.get("tuned"), self.decoder))
        detector = None if self.detector is None else partial(self.detector.timed, cache=job.cache)
        work = Work(self.backend, some, self.framing, decoder, size, self.batch, self.threads, detector)
        with tempfile.TemporaryDirectory(dir=job.scratch) as folder, alone():
            reference = self._reference(job, size, Path(folder)) if "reference" in job.inputs else None
            return apart("measuring", measure, work, engine, reference, self.seconds)

    def _reference(self, job: Job, size: Resolution, folder: Path) -> Path:
        """The engine of the exported network, which is built into the folder."""
        files = ModelFiles(dict.fromkeys(FLAVOURS, job.inputs["reference"] / "model.onnx"), checkpoint=job.inputs["engine"])
        return self.backend.in_fp32().build(files, Shapes((size, size, size), (1, self.batch, self.batch)), folder)


def _ran(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The shares of the precisions that ran, the numbers of layers, and the quantized layers that did not run in INT8."""
    lost = audit.unmet(layers)
    return {
        **{f"ran_{kind}_{name}": x for kind in audit.KINDS for name, x in audit.shares(layers, kind).items()},
        **{f"engine_{name}": count for name, count in audit.counts(layers).items()},
        "ran": audit.label(audit.shares(layers)),
        "not_in_int8": None if lost is None else [f"{x['name']} ({x.get('reason') or x['op']})" for x in lost],
    }


def _say(timed: Mapping[str, Any], lost: Sequence[Mapping[str, Any]] | None) -> None:
    warm, people = f"{timed['warm_up_calls']} to warm up", in_words(timed)
    say(
        f"p50 {timed['latency_p50_ms']:.2f} ms, interval {timed['latency_width']:.1%} wide, "
        f"{timed['calls']} calls after {warm}; decoding {timed['decoding_p50_ms']:.2f} ms{people}"
    )
    if lost:
        say(
            f"quantized, but not run in INT8: {', '.join(x['name'] for x in lost[:5])}"
            f"{f' and {len(lost) - 5} more' if len(lost) > 5 else ''} (why: audit.json)"
        )
