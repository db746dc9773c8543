"""tune: the decoder's thresholds and the person score, chosen on tune images, and what FP32 finds on agreement images."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from evaluation.metrics import score_fit as scores
from pipeline.contracts import Backend, Splits
from pipeline.decoder_options import FITTED, candidates
from pipeline.predictions import shown
from pipeline.progress import say
from pipeline.results.job import Job
from posepress.contracts import Decoder, Framing
from posepress.decoders.averaged import AveragedFields
from posepress.decoders.several import Together
from posepress.errors import UserError
from posepress.predict import Watch, predict
from posepress.results import save_results
from posepress.spec import Resolution

_FEW = 4  # tune images below which chosen thresholds are in doubt


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Any],
    resolution: str,
) -> dict[str, Any]:
    """Tune decoding on the input "network" in FP32, which all its engines share.

    Args:
        job: inputs hold "network", an exported one.
        data: its tune images, and its agreement images where there are some.
        backend: runs the ONNX file.
        framing: of the engines.
        decoder: its options that are lists are candidates; `score_weights=tuned` is fitted.
        metric: its primary figure decides.
        resolution: of the input.

    Returns:
        What was chosen, and the primary figure on the tune images before and after the scores were fitted, where it is one.
    """
    options: Mapping[str, Any] = decoder.keywords  # type: ignore[attr-defined]
    tried = candidates(options)
    fitted = options.get("score_weights") == FITTED
    plain = {"score_weights": None} if fitted else {}
    labels: Any = data.open("tune").labels  # type: ignore[attr-defined] # which skeleton or palette is the data set's
    size = Resolution.parse(resolution)

    def passed(split: str, decode: Any) -> Any:
        watch = Watch()
        images = data.open(split)
        read = AveragedFields(decode, runner.spec) if framing.averaged else decode
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
        figures = [measure.evaluate()[measure.info.primary] for measure in measures]
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
            people = [(sample.id, reference.variants(poses).get("as_found", poses)) for sample, poses in found]
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
            f"[yellow]           thresholds chosen on {count} tune image{'s'[: count - 1]}: they may fit nothing else; name "
            "more in data.splits, or give more train images[/]",
            soft_wrap=True,
        )
    return summary


def _refitted(measure: Any, results: list[Any], weights: list[float]) -> float:
    """The primary figure with the fitted scores, on the images they were fitted to."""
    from dataclasses import replace

    measure.reset()
    for image, truth, poses in results:
        measure.process(image, truth, replace(poses, scores=poses.features @ weights))
    return float(measure.evaluate()[measure.info.primary])
