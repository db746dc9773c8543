"""Evaluate candidate networks on the tune images: errors of their fields, metrics, agreement and latency."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
from numpy.typing import NDArray

from evaluation import latency
from evaluation.statistics import Draws, bootstrap, paired
from pipeline.contracts import Backend
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import Shapes, read_spec
from pipeline.probing.candidate import Candidate
from pipeline.probing.judge import Scoring
from posepress.contracts import Framing, Runner, Samples
from posepress.resolution import Resolution


def field_errors(found: Iterable[Mapping[str, Any]], expected: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The relative root mean square error of each field, over images in the same order.

    For class indices it is the root of the share that differs.
    """
    wrong: dict[str, float] = {}
    power: dict[str, float] = {}
    for made, wanted in zip(found, expected, strict=True):
        for name, values in wanted.items():
            if np.asarray(values).dtype.kind == "f":
                wrong[name] = wrong.get(name, 0.0) + float(((made[name] - values) ** 2).sum())
                power[name] = power.get(name, 0.0) + float((values**2).sum())
            else:  # class indices have no distance: an index is right or wrong
                wrong[name] = wrong.get(name, 0.0) + float(np.sum(made[name] != values))
                power[name] = power.get(name, 0.0) + float(np.size(values))
    return {name: float(np.sqrt(wrong[name] / max(power[name], 1e-30))) for name in wrong}


def of_all_fields(errors: Mapping[str, float]) -> float:
    """The errors of all fields as one number, in which every field has equal weight."""
    return float(np.sqrt(np.mean([value**2 for value in errors.values()])))


class Probe:
    """Measures candidates against the FP32 network, on one backend.

    Args:
        images: the images to measure on.
        framing: framing of the engines.
        size: size of the network's input.
        backend: backend that builds and runs the candidates.
        reference: the FP32 ONNX file.
        scoring: decoder and metrics, for these images. None: only the errors of the fields are measured.
        scratch: folder for engines, which are deleted with their candidates. None: the system's temporary folder.
    """

    def __init__(
        self,
        images: Samples[Any],
        framing: Framing,
        size: Resolution,
        backend: Backend,
        reference: Path,
        scoring: Scoring | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.scratch = None if scratch is None else scratch / "engines"
        if self.scratch is not None:  # a killed run may have left files here
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir(parents=True)
        self.images, self.framing, self.size, self.backend, self.reference = images, framing, size, backend, reference
        self.scoring = scoring or Scoring()
        self.spec = read_spec(reference)
        self.decoder = self.scoring.decoder(self.spec) if self.scoring.decoder is not None else None
        self._built: WeakKeyDictionary[Candidate, Path] = WeakKeyDictionary()

    @cached_property
    def frames(self) -> list[NDArray[np.uint8]]:
        """Framed images, uint8 [1, H, W, 3]."""
        from posepress.predict import batches

        made = batches(self.images, self.framing, self.spec.input, self.size)
        return [batch.images for batch in made if batch.views]

    @cached_property
    def fp32(self) -> Candidate:
        """The FP32 network."""
        return Candidate.of_file(self.reference)

    def engine(self, candidate: Candidate, threads: int = 0) -> Runner:
        """The loaded engine of a candidate. It is built at the first call and deleted together with the candidate."""
        if candidate not in self._built:
            folder = Path(tempfile.mkdtemp(dir=self.scratch))
            finalize(candidate, shutil.rmtree, folder, ignore_errors=True)
            out = folder / "engine"
            out.mkdir()
            shapes = Shapes.of(self.framing, self.size, self.spec.input, 1)
            self._built[candidate] = self.backend.build(candidate.write(folder), shapes, out)
        return self.backend.load(self._built[candidate], threads)

    def _fields(self, runner: Runner) -> Iterator[Mapping[str, NDArray[np.float32]]]:
        for frame in self.frames:
            yield runner.download(runner(runner.upload(frame)))

    @cached_property
    def _expected(self) -> list[Mapping[str, NDArray[np.float32]]]:
        with self.engine(self.fp32) as runner:
            return [{name: np.array(field) for name, field in fields.items()} for fields in self._fields(runner)]

    def errors(self, candidate: Candidate) -> dict[str, float]:
        """The relative root mean square error of each field, compared with FP32."""
        with self.engine(candidate) as runner:
            return field_errors(self._fields(runner), self._expected)

    def errors_in_tensorrt(self, candidate: Candidate) -> dict[str, float]:
        """The relative error of each field for the TensorRT variant. With another backend, the CPU computes that file."""
        names = [field.name for field in self.spec.fields]
        from posepress.pixels import normalise

        inputs = (normalise(frame, self.spec.input) for frame in self.frames)
        return field_errors(computed_over(candidate.models["tensorrt"], names, inputs, optimise=False), self._expected)

    @cached_property
    def people(self) -> dict[str, Any]:
        """The FP32 network's predictions in each image."""
        with self.engine(self.fp32) as runner:
            return {sample.id: found for sample, found in self._predictions(runner)}

    def _predictions(self, runner: Runner) -> Iterator[tuple[Any, Any]]:
        assert self.decoder is not None
        from posepress.predict import predict

        read = self.framing.reader(self.decoder, self.spec)
        return predict(self.images, runner, self.framing, read, self.size)

    @staticmethod
    def summary(probe: "Probe | None", candidate: Candidate) -> dict[str, float]:
        """The errors under the manifest's names; empty without a candidate evaluator."""
        return {} if probe is None else {f"error_{name}": value for name, value in probe.errors(candidate).items()}

    @property
    def primary(self) -> str:
        """The key of the primary metric; empty if no metric is measured."""
        made: Any = getattr(self.scoring.metric, "func", self.scoring.metric)  # a partial function holds the class in `func`
        return "" if made is None else str(made.info.primary)

    def figures(self, candidate: Candidate) -> dict[str, float]:
        """The metric, its drop from FP32 with a paired 95 % interval, and the agreement with FP32's predictions."""
        assert self.decoder is not None
        assert self.scoring.metric is not None
        metric = self.scoring.metric(found_labels=self.spec.labels)
        agree = self.scoring.agreement
        agreement = agree(labels=self.spec.labels) if agree is not None else None
        with self.engine(candidate) as runner:
            for sample, found in self._predictions(runner):
                metric.process(sample.id, sample.truth, found)
                if agreement is not None:
                    agreement.process(sample.id, self._plain(self.people[sample.id]), found)
        draws = bootstrap(metric.matches())
        drop = paired(self.baseline, draws)
        figures = {metric.info.primary: draws.value, "drop": drop.value, "drop_lo": drop.low, "drop_hi": drop.high}
        if agreement is not None and (agreed := agreement.evaluate()[agreement.info.primary]) != agreement.info.nothing:
            figures["agreement"] = agreed
        return figures

    def _plain(self, found: Any) -> Any:
        assert self.decoder is not None
        return self.decoder.plain(found)

    @cached_property
    def baseline(self) -> Draws:
        """Bootstrap samples of the FP32 network's primary metric."""
        assert self.scoring.metric is not None
        metric = self.scoring.metric(found_labels=self.spec.labels)
        for sample in map(self.images.__getitem__, range(len(self.images))):
            metric.process(sample.id, sample.truth, self.people[sample.id])
        return bootstrap(metric.matches())

    def latencies(self, candidates: Sequence[Candidate], seconds: float) -> list[float]:
        """The median latency of each candidate's network alone, in ms. The candidates are timed in turns."""
        with ExitStack() as stack:
            runners = [stack.enter_context(self.engine(candidate, self.scoring.threads)) for candidate in candidates]
            calls = [[partial(_call, runner, runner.upload(self.frames[0]))] for runner in runners]
            return [timing.percentile(50).value for timing in latency.in_turns(calls, seconds)]


def _call(runner: Runner, images: Any, _: Any) -> Any:
    return runner(images)
