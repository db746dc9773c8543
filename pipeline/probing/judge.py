"""How candidates are judged: by their decoded predictions, and by their latency."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from evaluation.contracts import Metric
from pipeline.decoder_options import decoder_options
from posepress.contracts import Decoder
from posepress.labels import Palette, Skeleton


@dataclass(frozen=True)
class Scoring:
    """What measures candidates beside the errors of their fields, on images with known labels.

    Attributes:
        decoder: function that makes the decoder from the network's description. None: predictions are not compared.
        metric: function that makes the metric from the network's labels (`found_labels`); None without a decoder.
        agreement: function that makes the agreement metric from the network's labels. None: agreement is not measured.
        threads: number of CPU threads while a candidate is timed.
    """

    decoder: Callable[..., Decoder[Any]] | None = None
    metric: Callable[..., Metric[Any, Any]] | None = None
    agreement: Callable[..., Metric[Any, Any]] | None = None
    threads: int = 0


@dataclass(frozen=True)
class Judge:
    """The family's decoder and metrics, for candidates.

    Attributes:
        decoder: function that makes the decoder from the network's description and options, which may be lists of candidates.
        metric: function that makes the metric from the labels of the data and of the network.
        agreement: function that makes the agreement metric from the network's labels. None: agreement is not measured.
        threads: number of CPU threads while a candidate is timed.
    """

    decoder: Callable[..., Decoder[Any]]
    metric: Callable[..., Metric[Any, Any]]
    agreement: Callable[..., Metric[Any, Any]] | None
    threads: Annotated[int, Ge(0)]

    def on(self, labels: Skeleton | Palette, tuned: Path | None) -> Scoring:
        """Return what measures candidates on images with these labels.

        Args:
            labels: labels of the data.
            tuned: result folder of the stage `tune`, which chose the decoder's options; None if it did not run.
        """
        decoder = partial(self.decoder, **decoder_options(tuned, self.decoder))
        return Scoring(decoder, partial(self.metric, labels=labels), self.agreement, self.threads)
