"""tune: choose the decoder's thresholds and person score on tune images, and store FP32's predictions on agreement images."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from evaluation.contracts import checked
from evaluation.metrics import score_fit as scores
from pipeline.contracts import Backend, Splits
from pipeline.decoder_options import FITTED, candidates
from pipeline.predictions import shown
from pipeline.progress import say
from pipeline.results.job import Job
from posepress.contracts import Decoder, Framing
from posepress.decoders.several import Together
from posepress.errors import UserError
from posepress.predict import Watch, predict
from posepress.resolution import Resolution
from posepress.results import save_results

_FEW = 4  # below this number of tune images, a warning says that the thresholds are unreliable


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Any],
    resolution: str,
) -> dict[str, Any]:
    """Tune decoding on the input "network" in FP32. All its engines share the result.

    Args:
        job: the job. Its inputs hold "network", an exported network.
        data: the data set. Its tune images are used, and its agreement images if there are any.
        backend: backend that runs the ONNX file.
        framing: framing of the engines.
        decoder: decoder to tune. A list as value of an option means candidates; `score_weights=tuned` is fitted.
        metric: metric with the primary figure that decides.
        resolution: size of the input.

    Returns:
        The chosen options, and the primary figure on the tune images before and after the scores were fitted, if they were.
    """
    options: Mapping[str, Any] = decoder.keywords  # type: ignore[attr-defined]
    tried = candidates(options)
    fitted = options.get("score_weights") == FITTED
    plain = {"score_weights": None} if fitted else {}
    labels = data.open("tune").labels
    size = Resolution.parse(resolution)

    def passed(split: str, decode: Any) -> Any:
        watch = Watch()
        images = data.open(split)
        read = framing.reader(decode, runner.spec)
        return shown(predict(images, runner, framing, read, size, 1, None, watch), watch, f"{split} images", len(images))

    with backend.load(job.inputs["network"] / "model.onnx") as runner:
        try:
            decoders = [decoder(runner.spec, **plain, **chosen) for chosen in tried]
            measures = [metric(labels=labels, found_labels=runner.spec.labels) for _ in tried]
        except ValueError as error:
            raise UserError(str(error)) from error
        results: list[list[Any]] = [[] for _ in tried]
        for sample, found in passed("tune", Together(decoders)):
            for measure, kept, poses in zip(measures, results, found, strict=True):
                measure.process(sample.id, sample.truth, poses)
                kept.append((sample.id, sample.truth, poses))
        try:
            figures = [checked(measure)[measure.info.primary] for measure in measures]
        except ValueError as error:
            raise UserError(str(error)) from error
        best = max(range(len(tried)), key=lambda n: figures[n])
        chosen = {**tried[best], **plain}
        summary: dict[str, Any] = {**tried[best], "tune_images": len(results[best])}
        weights = None
        info = measures[best].info
        if figures[best] != info.nothing:
            summary[f"tune_{info.primary}"] = figures[best]
            if fitted:
                weights = scores.fit(measures[best], [(truth, poses) for _, truth, poses in results[best]])
        if weights is not None:
            fitted_figure = _refitted(measures[best], results[best], weights)
            summary[f"tune_{info.primary}_fitted"] = fitted_figure
            if fitted_figure >= figures[best]:
                chosen["score_weights"] = weights
        reference = decoder(runner.spec, **chosen)
        if "agreement" in data:
            found = passed("agreement", reference)
            people = [(sample.id, reference.plain(poses)) for sample, poses in found]
            save_results(job.out / "reference.npz", people)
    known = [None if figure == info.nothing else figure for figure in figures]
    table = [{**options, "figure": figure} for options, figure in zip(tried, known, strict=True)]
    (job.out / "decoder.json").write_text(json.dumps({"options": chosen, "tried": table}, indent=1))
    words = ", ".join(f"{name} {value:.4g}" for name, value in summary.items())
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]tune[/]       {words}", soft_wrap=True)
    for doubt in measures[best].doubts():
        say(doubt, "yellow")
    if (count := len(results[best])) < _FEW:
        console.print(
            f"[yellow]           thresholds chosen on {count} tune image{'s'[: count - 1]} may not fit other images; name "
            "more in data.splits, or give more train images[/]",
            soft_wrap=True,
        )
    return summary


def _refitted(measure: Any, results: list[Any], weights: list[float]) -> float:
    """The primary figure with the fitted scores, on the images they were fitted to."""
    from dataclasses import replace

    measure.reset()
    for image, truth, poses in results:
        measure.process(image, truth, replace(poses, scores=poses.notes["features"] @ weights))
    return float(measure.evaluate()[measure.info.primary])
