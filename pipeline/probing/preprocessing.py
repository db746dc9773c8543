"""Which preprocessing a given network was trained with: the usual ones are tried on a few images."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evaluation.contracts import Metric
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.contracts import Split
from pipeline.progress import track
from posepress.contracts import Decoder, Framing
from posepress.decoders.several import Together
from posepress.errors import UserError
from posepress.geometry import View
from posepress.predict import Selection, predict
from posepress.resolution import Resolution
from posepress.spec import Array, InputSpec, NetworkSpec

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


class _Exchanged:
    """A decoder that gets two outputs in place of each other.

    Args:
        decoder: the decoder.
        names: names of the two outputs.
    """

    def __init__(self, decoder: Decoder[Any], names: Sequence[str]) -> None:
        self.decoder, self.other = decoder, dict(zip(names, reversed(names), strict=True))

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Any]:
        """The decoder's results with the outputs exchanged."""
        return self.decoder.decode({name: fields[self.other.get(name, name)] for name in fields}, views)

    def __getattr__(self, name: str) -> Any:
        """All else is the decoder's."""
        return getattr(self.decoder, name)


def exchangeable(spec: NetworkSpec, size: Resolution) -> list[str]:
    """Names of a line over the columns and one over the rows that have equal shapes, so that only results tell them apart."""
    lines = {field.axes: field for field in spec.fields if field.axes in ("CX", "CY")}
    alike = len(lines) == 2 and len({field.shape(size) for field in lines.values()}) == 1
    return [field.name for field in lines.values()] if alike else []


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
    sources: Mapping[str, str],
) -> list[Tried]:
    """Every usual preprocessing with its figure, best first; beside each, one with exchanged lines if these have one shape.

    Args:
        file: the network in the form of our exports, with its description in the metadata.
        images: labelled images, of which at most `MOST` are used.
        framing: framing of the images.
        decoder: makes the decoder from the description.
        metric: makes the metric from the labels of the data and of the network.
        size: size of the input.
        sources: for each field, the name of its output in the given file.

    Raises:
        UserError: the decoder or the metric does not fit the network.
    """
    some = Selection.spread(images, MOST)
    found = []
    with OnnxRuntime().load(file) as runner:
        own = runner.spec
        pair = exchangeable(own, size)
        for name, words, given in track(list(usual(own.input)), "trying preprocessings", unit="forms"):
            runner.spec = replace(own, input=given)
            try:
                decode = decoder(runner.spec)
                ways: list[tuple[str, str, Any]] = [(words, name, decode)]
                if pair:
                    both = f"{pair[0]} and {pair[1]}"
                    exchanged = f"{{{pair[0]}: {sources[pair[1]]}, {pair[1]}: {sources[pair[0]]}}}"
                    other = f"{words} 'model.outputs={exchanged}'"
                    ways.append((other, f"{name}, {both} exchanged", _Exchanged(decode, pair)))
                measures = [metric(labels=images.labels, found_labels=own.labels) for _ in ways]
            except (ValueError, TypeError) as error:
                raise UserError(str(error)) from error
            reader = framing.reader(Together([way for _, _, way in ways]), runner.spec)
            for sample, results in predict(some, runner, framing, reader, size):
                for measure, result in zip(measures, results, strict=True):
                    measure.process(sample.id, sample.truth, result)
            figures = [float(measure.evaluate()[measure.info.primary]) for measure in measures]
            found += [Tried(words, name, figure) for (words, name, _), figure in zip(ways, figures, strict=True)]
    return sorted(found, key=lambda one: -one.figure)
