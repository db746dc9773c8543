"""quantize: write a precision into the network, for both runtimes."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
from annotated_types import Interval

from pipeline.backends.macs import macs
from pipeline.calibration.feed import calibration_feed
from pipeline.contracts import Backend, Quantizer, Splits
from pipeline.onnx_files.files import read_spec
from pipeline.probing.judge import Judge, Scoring
from pipeline.probing.probe import Probe
from pipeline.progress import say
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.predict import Selection
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Quantize:
    """Quantize the input "network" with the images of the input "calibration", if there is one.

    Attributes:
        data: the data set. Calibration images come from it or from `image_dir`; candidates are measured on its tune images.
        framing: framing of the engines.
        resolution: size of the input.
        quantizer: quantizer that writes the files.
        backend: backend that measures candidates. None: nothing is measured.
        judged_by: decoder and metrics for measuring candidates, and the threads for timing them. None: only the errors of the
            fields are measured.
        probe_images: largest number of tune images for measuring candidates.
        image_dir: folder that the calibration images were sampled from.
    """

    data: Splits
    framing: Framing
    resolution: str
    quantizer: Quantizer
    backend: Backend | None
    judged_by: Judge | None
    probe_images: Annotated[int, Interval(ge=1, le=10**6)]
    image_dir: str | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network", and "calibration" and "tuned" if the precision needs them.

        Raises:
            UserError: a calibration image is missing or changed, or the quantizer's options do not fit.
        """
        model = job.inputs["network"] / "model.onnx"
        spec, size = read_spec(model), Resolution.parse(self.resolution)
        feed = None
        if "calibration" in job.inputs:
            chosen = job.inputs["calibration"] / "calibration.json"
            feed = calibration_feed(chosen, self.data, self.image_dir, self.framing, spec.input, size, job.cache)
        try:
            report = dict(self.quantizer.quantize(model, feed, self._probe(job, model, size), job.out))
        except ValueError as error:
            raise UserError(str(error)) from error
        for note in _notes(report):
            say(note)
        report.pop("scales_from", None)  # a path does not belong in the manifest
        return {**report, "macs": sum(macs(onnx.load(model), size, read_spec(model).input).values())}

    def _probe(self, job: Job, model: Path, size: Resolution) -> Probe | None:
        if self.backend is None or "tune" not in self.data:
            return None
        images, judge = self.data.open("tune"), self.judged_by
        scoring = Scoring(threads=0 if judge is None else judge.threads)
        if judge is not None and getattr(self.quantizer, "judged", False):  # others compare candidates by fields and time alone
            scoring = judge.on(images.labels, job.inputs.get("tuned"))
        some = Selection.spread(images, self.probe_images)
        return Probe(some, self.framing, size, self.backend, model, scoring, job.scratch)


def _notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Notes on parts that were left out and limits that were not reached, one line each."""
    if source := report.get("scales_from"):
        yield f"scales from {source}"
    if reason := report.get("half_pass_left_out"):
        yield f"FP16 was decided only by the ranges of the calibration images, without the pass in torch: {reason}"
    if left_out := report.get("equalization_left_out"):
        causes = Counter(re.sub(r" '.*", "", words.partition(", ")[2]) for words in left_out.values())
        listed = ", ".join(f"{count} {cause}" for cause, count in causes.most_common(3))
        yield (
            f"equalization leaves out {len(left_out)} of {report['int8_layers']} INT8 layers, in whole or in part: {listed} "
            "(equalization_left_out in manifest.json)"
        )
    if "tune_error" in report and "tune_agreement" not in report:
        yield "agreement was not used: the FP32 network predicts nothing above its threshold in the tune images"
    yield from report.get("missed", ())
