"""How candidates are judged: by their decoded predictions, and by their latency."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from evaluation.contracts import Metric
from pipeline.decoder_options import decoder_options
from posepress.contracts import Decoder
from posepress.labels import Palette, Skeleton


@dataclass(frozen=True)
class Judge:
    """What measures a candidate beside the errors of its fields.

    Attributes:
        decoder: function that makes the decoder from the network's description. None: only the errors of the fields are
            measured.
        metric: function that makes the metric from the labels of the data and of the network; None without a decoder.
        agreement: function that makes the agreement metric from the network's labels. None: agreement is not measured.
        threads: number of CPU threads while a candidate is timed.
    """

    decoder: Callable[..., Decoder[Any]] | None = None
    metric: Callable[..., Metric[Any, Any]] | None = None
    agreement: Callable[..., Metric[Any, Any]] | None = None
    threads: Annotated[int, Ge(0)] = 0

    def on(self, labels: Skeleton | Palette, tuned: Path | None) -> "Judge":
        """Return the judge for images with these labels.

        Args:
            labels: labels of the data.
            tuned: result folder of the stage `tune`, which chose the decoder's options; None if it did not run.
        """
        return replace(
            self,
            decoder=None if self.decoder is None else partial(self.decoder, **decoder_options(tuned, self.decoder)),
            metric=None if self.metric is None else partial(self.metric, labels=labels),
        )
