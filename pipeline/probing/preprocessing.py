"""Which preprocessing a given network was trained with: the usual ones are tried on a few images."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.contracts import Metric
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.contracts import Split
from pipeline.progress import track
from posepress.contracts import Decoder, Framing
from posepress.errors import UserError
from posepress.predict import Selection, predict
from posepress.resolution import Resolution
from posepress.spec import InputSpec

MOST = 20  # largest number of images
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_SCALES: Mapping[str, dict[str, Any]] = {
    "0..1": {"range": 1.0, "mean": 0.0, "std": 1.0},
    "0..255": {"range": 255.0, "mean": 0.0, "std": 1.0},
    "-1..1": {"range": 1.0, "mean": 0.5, "std": 0.5},
    "ImageNet's mean and std": {"range": 1.0, "mean": _IMAGENET[0], "std": _IMAGENET[1]},
}


@dataclass(frozen=True)
class Tried:
    """One preprocessing and what it found.

    Attributes:
        words: options that describe it.
        name: its name for a table.
        figure: the metric's primary figure.
    """

    words: str
    name: str
    figure: float


def usual(own: InputSpec) -> Iterator[tuple[str, str, InputSpec]]:
    """The usual forms of an input: name, options, and description. A network with uint8 input has two, its orders alone."""
    for order in ("RGB", "BGR") if own.channels == 3 else ("RGB",):
        for name, values in {"as it is": {}}.items() if own.dtype == "uint8" else _SCALES.items():
            given: dict[str, Any] = {"order": order, **values}
            if order == "BGR" and isinstance(values.get("mean"), tuple):
                given |= {key: values[key][::-1] for key in ("mean", "std")}
            if own.channels == 1:
                given |= {key: sum(values[key]) / 3 for key in ("mean", "std") if isinstance(values.get(key), tuple)}
            words = " ".join(f"model.spec.input.{key}={_word(value)}" for key, value in given.items())
            yield f"{order}, {name}", words, replace(own, **given)


def _word(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def tried(
    file: Path,
    images: Split[Any],
    framing: Framing,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Metric[Any, Any]],
    size: Resolution,
) -> list[Tried]:
    """Every usual preprocessing with its figure, best first.

    Args:
        file: the network in the form of our exports, with its description in the metadata.
        images: labelled images, of which at most `MOST` are used.
        framing: framing of the images.
        decoder: makes the decoder from the description.
        metric: makes the metric from the labels of the data and of the network.
        size: size of the input.

    Raises:
        UserError: the decoder or the metric does not fit the network.
    """
    some = Selection.spread(images, MOST)
    found = []
    with OnnxRuntime().load(file) as runner:
        own = runner.spec
        for name, words, given in track(list(usual(own.input)), "trying preprocessings", unit="forms"):
            runner.spec = replace(own, input=given)
            try:
                decode, measure = decoder(runner.spec), metric(labels=images.labels, found_labels=own.labels)
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from error
            reader = framing.reader(decode, runner.spec)
            for sample, result in predict(some, runner, framing, reader, size):
                measure.process(sample.id, sample.truth, result)
            found.append(Tried(words, name, float(measure.evaluate()[measure.info.primary])))
    return sorted(found, key=lambda one: -one.figure)
