"""predict: run an engine on images, videos or cameras, and write pictures, COCO results and CSV."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from pipeline.datasets.detector import Detector
from pipeline.progress import say
from pipeline.results.job import Job
from posepress.description import describe
from posepress.model import Model
from posepress.run import Options
from posepress.run import run as predicted


@dataclass(frozen=True)
class Predict:
    """Predict with the input "engine", as the input "evaluation" evaluated it.

    Attributes:
        source: images, folders, patterns, videos, cameras or addresses of streams: one, or a list.
        save: files to write: overlay, coco, csv.
        threshold: least score of a result; None takes the decoder's default.
        track: give people in videos numbers that stay the same.
        smooth: smooth the keypoints of tracked people.
        every: the detector finds boxes in each `every`-th image.
        live: cameras give their newest frame, and others are dropped and counted.
        strict: whether a file that is no image is an error; else it is skipped and counted.
        threads: number of CPU threads for one batch; 0 runs a batch on each core.
        detector: finds people's boxes.
    """

    source: str | Annotated[int, Ge(0)] | Sequence[str | Annotated[int, Ge(0)]] | None
    save: Sequence[Literal["overlay", "coco", "csv"]]
    threshold: Annotated[float, Interval(ge=0, le=1)] | None
    track: bool
    smooth: bool
    every: Annotated[int, Ge(1)]
    live: bool
    strict: bool
    threads: Annotated[int, Ge(0)]
    detector: Detector | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "engine" and "evaluation".

        Returns:
            Numbers of images and instances, the rate, what held it up, and counts of problems.

        Raises:
            UserError: a source cannot be read.
        """
        assert self.source is not None  # checked before any work
        given = [self.source] if isinstance(self.source, (str, int)) else list(self.source)
        options = Options(
            job.out, tuple(self.save), False, self.threshold, self.track, self.smooth, self.every, self.strict, self.live
        )
        finder = None if self.detector is None else Model(self.detector.description(job.cache), threads=self.threads)
        with Model(describe(job.inputs["engine"]), finder, self.threads) as model:
            done = predicted(model, given, options)
        say(f"{done['images']} images, {done['instances']} found, {done['images_per_second']:.1f} a second")
        return {name: value for name, value in done.items() if name != "busy"}
