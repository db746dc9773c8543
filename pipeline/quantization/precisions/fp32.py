"""precision=fp32: the network unchanged."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contracts import CalibrationFeed
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe


@dataclass(frozen=True)
class Fp32:
    """FP32: the exported network without changes."""

    @staticmethod
    def label_of(_options: Mapping[str, Any], _setting: Mapping[str, str]) -> str:
        """The label suffix, which is empty because there are no options."""
        return ""

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:  # noqa: ARG002
        """Write both runtime variants, which are equal."""
        Candidate.of_file(onnx_file).write(out)
        return {"precision": "fp32"}
