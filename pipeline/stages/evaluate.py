"""evaluate: what an engine finds on the validation images, and how far it agrees with FP32 on images without labels."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import cv2
from annotated_types import Ge, Interval

from evaluation.contracts import Metric
from evaluation.statistics import bootstrap
from pipeline.contracts import Backend, Splits
from pipeline.decoder_options import decoder_options
from pipeline.predictions import resumed
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Decoder, Framing
from posepress.decoders.averaged import AveragedFields
from posepress.errors import UserError
from posepress.predict import Watch, predict
from posepress.results import load_results
from posepress.spec import Resolution


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
        job: inputs hold "engine", and "tuned" where the decoder has options to tune.
        data: its validation images are used, and its agreement images where there are some.
        backend: runs the engine.
        framing: how images become inputs.
        decoder: made with the network's description and the tuned options.
        metric: made with the labels of the data and of the network.
        agreement: made with the network's labels, its truth is what FP32 found; None measures no agreement.
        resolution: of the input.
        batch: images at once.
        axes: what tells this cell from others, for tables.
        pictures: how many images to draw.
        resamples: of the bootstrap.

    Returns:
        The figures, the primary one's interval, the same of the decoder's variants and of the agreement, the number of images,
        and the backend that ran.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    tuned = job.inputs.get("tuned")
    options = decoder_options(tuned, decoder)
    images: Any = data.open("validation")
    size, watch = Resolution.parse(resolution), Watch()
    (job.out / "pictures").mkdir()
    shown_at = {round(n * (len(images) - 1) / max(pictures - 1, 1)) for n in range(min(pictures, len(images)))}
    captions = {}
    with backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
        try:
            decode: Any = decoder(runner.spec, **options)
            measures = {"": metric(labels=images.labels, found_labels=runner.spec.labels)}
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
        read = AveragedFields(decode, runner.spec) if framing.averaged else decode

        def results(split: str) -> Iterator[tuple[int, Any, Any]]:
            part = data.open(split)

            def rest(start: int) -> Iterator[tuple[Any, Any]]:
                return predict(part, runner, framing, read, size, batch, range(start, len(part)), watch)

            return resumed(part, job.scratch / f"{split}.npz", rest, watch, f"{split} images")

        for place, sample, found in results("validation"):
            measures[""].process(sample.id, sample.truth, found)
            for name, variant in decode.variants(found).items():
                if name not in measures:
                    measures[name] = metric(labels=images.labels, found_labels=runner.spec.labels)
                measures[name].process(sample.id, sample.truth, variant)
            if place in shown_at:
                picture = read.draw(sample.read(), found)
                jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
                name, source = f"{place + 1:06d}.jpg", str(images.records[place].get("flickr_url", ""))
                (job.out / "pictures" / name).write_bytes(jpeg.tobytes())
                captions[name] = source if re.fullmatch(r"https?://[^\s\"'<>\\]{1,2000}", source) else ""
        if agreement is not None and tuned is not None and (tuned / "reference.npz").exists():
            measures["agreement"] = agreement(labels=runner.spec.labels)
            reference = load_results(tuned / "reference.npz")
            for _, sample, found in results("agreement"):
                measures["agreement"].process(sample.id, reference[sample.id], found)
    (job.out / "pictures" / "captions.json").write_text(json.dumps(captions))
    summary = _figures(job, measures, resamples, images)
    (job.out / "details.json").write_text(json.dumps(measures[""].details(), indent=1))
    doubts = [*images.doubts(job.cache)]
    doubts += [doubt for name in ("", "agreement") if name in measures for doubt in measures[name].doubts()]
    summary |= {
        "primary": measures[""].info.primary,
        "metric": asdict(measures[""].info),
        "images": len(images),
        "category": str(images.truth.category),
        "backend": backend.name,
        "data_digest": data.digest(["validation"]),
        "doubts": doubts,
    }
    for doubt in doubts:
        say(doubt, "yellow")
    shutil.rmtree(job.scratch, ignore_errors=True)
    (job.out / "metrics.json").write_text(json.dumps({**summary, "axes": dict(axes)}, indent=1))
    return summary


def _figures(job: Job, measures: Mapping[str, Metric[Any, Any]], resamples: int, images: Any) -> dict[str, Any]:
    """The figures of every measure, with the primary one's interval; draws and predictions are written."""
    ids, category = {str(record["id"]): record["id"] for record in images.records}, images.truth.category.id
    summary: dict[str, Any] = {}

    def identified(image: str) -> dict[str, Any]:
        return {"image_id": ids.get(str(image), image), "category_id": 1 if category is None else category}

    for name, measure in measures.items():
        draws = bootstrap(measure.matches(), resamples)
        draws.save(job.out / f"draws{name and '.'}{name}.npz")
        (job.out / f"predictions{name and '.'}{name}.json").write_text(
            "[" + ",\n".join(json.dumps({**r, **identified(r["image_id"])}) for r in measure.results()) + "]"
        )
        figures = {
            **measure.evaluate(),
            f"{measure.info.primary}_lo": draws.interval.low,
            f"{measure.info.primary}_hi": draws.interval.high,
        }
        kept = "" if name else measure.info.primary  # which every reader of a summary expects
        measured = {key: value for key, value in figures.items() if value != measure.info.nothing or key == kept}
        summary |= {f"{name}_{key}" if name else key: value for key, value in {**measured, **measure.counts()}.items()}
    return summary
