"""evaluate: score an engine's predictions on the validation images, and its agreement with FP32 on unlabelled images."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from annotated_types import Ge, Interval

from evaluation.contracts import Metric, checked
from evaluation.statistics import bootstrap
from pipeline.contracts import Backend, Split, Splits
from pipeline.decoder_options import decoder_options
from pipeline.predictions import Pictures, resumed
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Decoder, Framing, Runner
from posepress.errors import UserError
from posepress.predict import Selection, Watch, predict
from posepress.resolution import Resolution
from posepress.results import load_results


@dataclass(frozen=True)
class Evaluate:
    """Evaluate the input "engine".

    Attributes:
        data: the data set. Its validation images are used, and its agreement images if there are any.
        backend: backend that runs the engine.
        framing: framing that makes images inputs.
        decoder: function that makes the decoder from the network's description and the tuned options.
        metric: function that makes the metric from the labels of the data and of the network.
        agreement: metric that uses the FP32 network's predictions as ground truth. None: agreement is not measured.
        resolution: size of the input.
        batch: number of images at once.
        axes: options that distinguish this cell from others, for tables.
        pictures: number of images to draw.
        resamples: number of bootstrap resamples.
    """

    data: Splits
    backend: Backend
    framing: Framing
    decoder: Callable[..., Decoder[Any]]
    metric: Callable[..., Metric[Any, Any]]
    agreement: Callable[..., Metric[Any, Any]] | None
    resolution: str
    batch: Annotated[int, Ge(1)]
    axes: Mapping[str, Any]
    pictures: Annotated[int, Interval(ge=0, le=1000)]
    resamples: Annotated[int, Interval(ge=1, le=10**6)]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "engine", and "tuned" if the decoder has options to tune.

        Returns:
            The figures of the metric, of the decoder's variants and of the agreement, with intervals of the primary ones. The
            number of images and the backend that ran are added.
        """
        images = self.data.open("validation")
        measures = self._measured(job, images)
        summary = _figures(job, measures, self.resamples, images, self.data)
        (job.out / "details.json").write_text(json.dumps(measures[""].details(), indent=1))
        doubts = [*images.doubts(job.cache)]
        doubts += [doubt for name in ("", "agreement") if name in measures for doubt in measures[name].doubts()]
        summary |= {
            "primary": measures[""].info.primary,
            "metric": asdict(measures[""].info),
            "images": len(images),
            "category": images.subject,
            "backend": self.backend.name,
            "data_digest": self.data.digest(["validation"]),
            "doubts": doubts,
        }
        for doubt in doubts:
            say(doubt, "yellow")
        shutil.rmtree(job.scratch, ignore_errors=True)
        (job.out / "metrics.json").write_text(json.dumps({**summary, "axes": dict(self.axes)}, indent=1))
        return summary

    def _measured(self, job: Job, images: Split[Any]) -> dict[str, Metric[Any, Any]]:
        """The metric after all images: "" of the results, and by name of the decoder's readings and of the agreement."""
        built = read_manifest(job.inputs["engine"])
        assert built is not None
        tuned = job.inputs.get("tuned")
        with self.backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
            try:
                decode = self.decoder(runner.spec, **decoder_options(tuned, self.decoder))
                measures = {"": self.metric(labels=images.labels, found_labels=runner.spec.labels)}
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from error
            pictures = Pictures(job.out / "pictures", self.pictures, len(images))
            for place, sample, found in self._results(job, runner, decode, "validation"):
                measures[""].process(sample.id, sample.truth, found)
                for name, variant in decode.readings(found).items():
                    if name not in measures:
                        measures[name] = self.metric(labels=images.labels, found_labels=runner.spec.labels)
                    measures[name].process(sample.id, sample.truth, variant)
                if place in pictures:
                    pictures.add(place, decode.draw(sample.read(), found), images.images[place].credit)
            if self.agreement is not None and tuned is not None and (tuned / "reference.npz").exists():
                measures["agreement"] = self.agreement(labels=runner.spec.labels)
                reference = load_results(tuned / "reference.npz", decode.result)
                for _, sample, found in self._results(job, runner, decode, "agreement"):
                    measures["agreement"].process(sample.id, reference[sample.id], found)
        return measures

    def _results(self, job: Job, runner: Runner, decode: Decoder[Any], split: str) -> Iterator[tuple[int, Any, Any]]:
        """Index, sample and predictions of every image of a split."""
        part, read, watch = self.data.open(split), self.framing.reader(decode, runner.spec), Watch()
        size = Resolution.parse(self.resolution)

        def rest(start: int) -> Iterator[tuple[Any, Any]]:
            left = Selection(part, range(start, len(part)))
            return predict(left, runner, self.framing, read, size, self.batch, watch)

        return resumed(part, job.scratch / f"{split}.npz", rest, watch, f"{split} images", decode.result)


def _figures(
    job: Job, measures: Mapping[str, Metric[Any, Any]], resamples: int, images: Split[Any], data: Splits
) -> dict[str, Any]:
    """The figures of every metric, with the interval of the primary one. Bootstrap samples and predictions are written."""
    summary: dict[str, Any] = {}
    for name, measure in measures.items():
        draws = bootstrap(measure.matches(), resamples)
        draws.save(job.out / f"draws{name and '.'}{name}.npz")
        split = data.open("agreement") if name == "agreement" else images
        measure.write(job.out / f"predictions{name and '.'}{name}.json", split.named)
        figures = {
            **checked(measure),
            f"{measure.info.primary}_lo": draws.interval.low,
            f"{measure.info.primary}_hi": draws.interval.high,
        }
        kept = "" if name else measure.info.primary  # every reader of a summary expects the primary figure
        measured = {key: value for key, value in figures.items() if value != measure.info.nothing or key == kept}
        summary |= {f"{name}_{key}" if name else key: value for key, value in {**measured, **measure.counts()}.items()}
    return summary
