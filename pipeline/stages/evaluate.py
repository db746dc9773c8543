"""evaluate: what an engine finds on the validation images."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import cv2
from rich.progress import track

from evaluation import pictures as drawing
from evaluation.statistics import bootstrap
from evaluation.types import NetworkSpec, Resolution
from pipeline.artifacts import Job, read_manifest
from pipeline.errors import UserError
from pipeline.inference import predict
from pipeline.specs import Backend, Decoder, Framing, Splits


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Any],
    resolution: str,
    batch: int,
    axes: Mapping[str, Any],
    pictures: int,
    resamples: int,
) -> dict[str, Any]:
    """Evaluate the input "engine".

    Args:
        job: inputs hold "engine".
        data: its validation images are used.
        backend: runs the engine.
        framing: how images become inputs.
        decoder: made with the network's description.
        metric: made with the labels of the data and of the network.
        resolution: of the input.
        batch: images at once.
        axes: what tells this cell from others, for tables.
        pictures: how many images to draw.
        resamples: of the bootstrap.

    Returns:
        The metric's figures with the interval of the primary one, the number of images, and the backend that ran.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    images: Any = data.open("validation")
    size = Resolution.parse(resolution)
    (job.out / "pictures").mkdir()
    shown = {round(n * (len(images) - 1) / max(pictures - 1, 1)) for n in range(min(pictures, len(images)))}
    captions = {}
    with backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
        spec: NetworkSpec = runner.spec
        try:
            measure, decode = metric(labels=images.labels, found_labels=spec.labels), decoder(spec)
        except ValueError as error:
            raise UserError(str(error)) from error
        measure.reset()
        results = predict(images, runner, framing, decode, size, batch)
        for place, (sample, found) in enumerate(track(results, "evaluating", len(images), transient=True)):
            measure.process(sample.id, sample.truth, found)
            if place in shown:
                picture = drawing.draw(sample.read(), found, spec.skeleton)
                jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
                (job.out / "pictures" / f"{sample.id}.jpg").write_bytes(jpeg.tobytes())
                captions[f"{sample.id}.jpg"] = images.records[place].get("flickr_url", "")
    (job.out / "pictures" / "captions.json").write_text(json.dumps(captions))
    figures = dict(measure.evaluate())
    interval = bootstrap(measure.matches(), measure.primary, resamples)
    measure.matches().save(job.out / "matches.npz")
    (job.out / "predictions.json").write_text(json.dumps(measure.results()))
    summary = {
        **figures,
        f"{measure.primary}_lo": interval.low,
        f"{measure.primary}_hi": interval.high,
        "images": len(images),
        "backend": backend.name,
        "data_digest": data.digest(["validation"]),
    }
    (job.out / "metrics.json").write_text(json.dumps({**summary, "axes": dict(axes)}, indent=1))
    return summary
