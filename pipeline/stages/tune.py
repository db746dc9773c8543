"""tune: choose the decoder's thresholds and person score on tune images, and store FP32's predictions on agreement images."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from rich.console import Console

from evaluation.contracts import Metric, checked
from evaluation.metrics import score_fit as scores
from evaluation.metrics.coco_keypoints import CocoKeypoints
from pipeline.contracts import Backend, Splits
from pipeline.decoder_options import FITTED, candidates
from pipeline.predictions import shown
from pipeline.progress import say
from pipeline.results.job import Job
from posepress.contracts import Decoder, Framing, Runner
from posepress.decoders.several import Together
from posepress.errors import UserError
from posepress.framing import unframed
from posepress.predict import Watch, predict
from posepress.resolution import Resolution
from posepress.results import save_results

_FEW = 4  # below this number of tune images, a warning says that the thresholds are unreliable


@dataclass(frozen=True)
class Tune:
    """Tune decoding on the input "network" in FP32. All its engines share the result.

    Attributes:
        data: the data set. Its tune images are used, and its agreement images if there are any.
        backend: backend that runs the ONNX file.
        framing: framing of the engines.
        decoder: decoder to tune. A list as value of an option means candidates; `score_weights=tuned` is fitted.
        metric: metric with the primary figure that decides.
        agreement: metric that uses FP32's predictions as ground truth. None: they are not needed.
        resolution: size of the input.
    """

    data: Splits
    backend: Backend
    framing: Framing
    decoder: Callable[..., Decoder[Any]]
    metric: Callable[..., Metric[Any, Any]]
    agreement: Callable[..., Metric[Any, Any]] | None
    resolution: str

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network", an exported network.

        Returns:
            The chosen options, and the primary figure on the tune images before and after the scores were fitted, if they were.
        """
        options: Mapping[str, Any] = self.decoder.keywords  # type: ignore[attr-defined]
        fitted = options.get("score_weights") == FITTED
        plain = {"score_weights": None} if fitted else {}
        with self.backend.load(job.inputs["network"] / "model.onnx") as runner:
            trials = self._tried(runner, candidates(options), plain)
            best = max(trials, key=lambda trial: trial.figure)
            summary: dict[str, Any] = {**best.options, "tune_images": len(best.results)}
            chosen, info = {**best.options, **plain}, best.measure.info
            if best.figure != info.nothing:
                summary[f"tune_{info.primary}"] = best.figure
                weights = best.fit() if fitted else None
                if weights is not None:
                    refitted = best.refitted(weights)
                    summary[f"tune_{info.primary}_fitted"] = refitted
                    chosen |= {"score_weights": weights} if refitted >= best.figure else {}
            if self.agreement is not None and self._framed("agreement"):
                reference = self.decoder(runner.spec, **chosen)
                found = [(sample.id, reference.plain(poses)) for sample, poses in self._passed("agreement", runner, reference)]
                save_results(job.out / "reference.npz", found)
        tried = [{**t.options, "figure": None if t.figure == info.nothing else t.figure} for t in trials]
        (job.out / "decoder.json").write_text(json.dumps({"options": chosen, "tried": tried}, indent=1))
        _say(summary, best.measure.doubts())
        return summary

    def _framed(self, split: str) -> bool:
        """Whether there are such images, and the framing has what it needs; if it has not, the reason is said."""
        if split not in self.data:
            return False
        if why := unframed(self.data.open(split), self.framing, Resolution.parse(self.resolution)):
            say(f"agreement is not measured: {why}")
        return not why

    def _tried(self, runner: Runner, tried: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> list["_Trial"]:
        """Every candidate with its figure on the tune images; one pass of the network serves all."""
        labels = self.data.open("tune").labels
        try:
            decoders = [self.decoder(runner.spec, **more, **options) for options in tried]
            trials = [_Trial(options, self.metric(labels=labels, found_labels=runner.spec.labels)) for options in tried]
        except ValueError as error:
            raise UserError(str(error)) from error
        for sample, found in self._passed("tune", runner, Together(decoders)):
            for trial, poses in zip(trials, found, strict=True):
                trial.add(sample.id, sample.truth, poses)
        for trial in trials:
            trial.figure = checked(trial.measure)[trial.measure.info.primary]
        return trials

    def _passed(self, split: str, runner: Runner, decode: Decoder[Any]) -> Iterator[tuple[Any, Any]]:
        """Sample and predictions of every image of a split."""
        watch, images, read = Watch(), self.data.open(split), self.framing.reader(decode, runner.spec)
        found = predict(images, runner, self.framing, read, Resolution.parse(self.resolution), watch=watch)
        return shown(found, watch, f"{split} images", len(images))


@dataclass
class _Trial:
    """One candidate of the decoder's options, and what it predicted."""

    options: Mapping[str, Any]
    measure: Metric[Any, Any]
    results: list[tuple[str, Any, Any]] = field(default_factory=list)
    figure: float = 0.0

    def add(self, image: str, truth: Any, poses: Any) -> None:
        self.measure.process(image, truth, poses)
        self.results.append((image, truth, poses))

    def fit(self) -> list[float] | None:
        """Weights of the persons' score, fitted to the results; None if they are too few."""
        return scores.fit(cast("CocoKeypoints", self.measure), [(truth, poses) for _, truth, poses in self.results])

    def refitted(self, weights: Sequence[float]) -> float:
        """The primary figure with the fitted scores, on the images that they were fitted to."""
        self.measure.reset()
        for image, truth, poses in self.results:
            self.measure.process(image, truth, replace(poses, scores=poses.notes["features"] @ weights))
        return float(self.measure.evaluate()[self.measure.info.primary])


def _say(summary: Mapping[str, Any], doubts: Iterable[str]) -> None:
    words = ", ".join(f"{name} {value:.4g}" for name, value in summary.items())
    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]tune[/]       {words}", soft_wrap=True)
    for doubt in doubts:
        say(doubt, "yellow")
    if (count := summary["tune_images"]) < _FEW:
        console.print(
            f"[yellow]           thresholds chosen on {count} tune image{'s'[: count - 1]} may not fit other images; name "
            "more in data.splits, or give more train images[/]",
            soft_wrap=True,
        )
