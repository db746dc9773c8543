"""evaluate: score an engine's predictions on the validation images, and its agreement with FP32 on unlabelled images."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import cv2
from annotated_types import Ge, Interval

from evaluation.contracts import Metric, checked
from evaluation.statistics import bootstrap
from pipeline.contracts import Backend, Split, Splits
from pipeline.decoder_options import decoder_options
from pipeline.predictions import resumed
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError
from posepress.predict import Watch, predict
from posepress.resolution import Resolution
from posepress.results import load_results


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Metric[Any, Any]],
    agreement: Callable[..., Metric[Any, Any]] | None,
    resolution: str,
    batch: Annotated[int, Ge(1)],
    axes: Mapping[str, Any],
    pictures: Annotated[int, Interval(ge=0, le=1000)],
    resamples: Annotated[int, Interval(ge=1, le=10**6)],
) -> dict[str, Any]:
    """Evaluate the input "engine".

    Args:
        job: the job. Its inputs hold "engine", and "tuned" if the decoder has options to tune.
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

    Returns:
        The figures of the metric, of the decoder's variants and of the agreement, with intervals of the primary ones. The
        number of images and the backend that ran are added.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    tuned = job.inputs.get("tuned")
    options = decoder_options(tuned, decoder)
    images = data.open("validation")
    size, watch = Resolution.parse(resolution), Watch()
    (job.out / "pictures").mkdir()
    shown_at = {round(n * (len(images) - 1) / max(pictures - 1, 1)) for n in range(min(pictures, len(images)))}
    captions = {}
    with backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
        try:
            decode = decoder(runner.spec, **options)
            measures = {"": metric(labels=images.labels, found_labels=runner.spec.labels)}
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        read = framing.reader(decode, runner.spec)

        def results(split: str) -> Iterator[tuple[int, Any, Any]]:
            part = data.open(split)

            def rest(start: int) -> Iterator[tuple[Any, Any]]:
                return predict(part, runner, framing, read, size, batch, range(start, len(part)), watch)

            return resumed(part, job.scratch / f"{split}.npz", rest, watch, f"{split} images", decode.result)

        for place, sample, found in results("validation"):
            measures[""].process(sample.id, sample.truth, found)
            for name, variant in decode.readings(found).items():
                if name not in measures:
                    measures[name] = metric(labels=images.labels, found_labels=runner.spec.labels)
                measures[name].process(sample.id, sample.truth, variant)
            if place in shown_at:
                picture = read.draw(sample.read(), found)
                jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
                name, source = f"{place + 1:06d}.jpg", images.images[place].credit
                (job.out / "pictures" / name).write_bytes(jpeg.tobytes())
                captions[name] = source if re.fullmatch(r"https?://[^\s\"'<>\\]{1,2000}", source) else ""
        if agreement is not None and tuned is not None and (tuned / "reference.npz").exists():
            measures["agreement"] = agreement(labels=runner.spec.labels)
            reference = load_results(tuned / "reference.npz", decode.result)
            for _, sample, found in results("agreement"):
                measures["agreement"].process(sample.id, reference[sample.id], found)
    (job.out / "pictures" / "captions.json").write_text(json.dumps(captions))
    summary = _figures(job, measures, resamples, images, data)
    (job.out / "details.json").write_text(json.dumps(measures[""].details(), indent=1))
    doubts = [*images.doubts(job.cache)]
    doubts += [doubt for name in ("", "agreement") if name in measures for doubt in measures[name].doubts()]
    summary |= {
        "primary": measures[""].info.primary,
        "metric": asdict(measures[""].info),
        "images": len(images),
        "category": images.subject,
        "backend": backend.name,
        "data_digest": data.digest(["validation"]),
        "doubts": doubts,
    }
    for doubt in doubts:
        say(doubt, "yellow")
    shutil.rmtree(job.scratch, ignore_errors=True)
    (job.out / "metrics.json").write_text(json.dumps({**summary, "axes": dict(axes)}, indent=1))
    return summary


def _checked(measure: Metric[Any, Any]) -> Mapping[str, float]:
    try:
        return checked(measure)
    except ValueError as error:
        raise UserError(str(error)) from error


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
            **_checked(measure),
            f"{measure.info.primary}_lo": draws.interval.low,
            f"{measure.info.primary}_hi": draws.interval.high,
        }
        kept = "" if name else measure.info.primary  # every reader of a summary expects the primary figure
        measured = {key: value for key, value in figures.items() if value != measure.info.nothing or key == kept}
        summary |= {f"{name}_{key}" if name else key: value for key, value in {**measured, **measure.counts()}.items()}
    return summary
