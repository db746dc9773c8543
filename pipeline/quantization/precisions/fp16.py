"""precision=fp16: half precision by casts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import FLAVOURS
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe
from pipeline.quantization import half
from pipeline.quantization.graph import load, matching


@dataclass(frozen=True)
class Fp16:
    """Half-precision weights and activations by casts. Inputs and outputs stay float32.

    A node stays in float32 if its values come near half precision's greatest number on the calibration images. It also does if
    its values overflow in a pass of four images in half precision. ONNX Runtime's CPU kernels compute such a file entirely in
    float32. If torch cannot run the network, only the ranges decide, and the error is not measured.

    Attributes:
        nodes_to_exclude: name patterns of nodes that stay in float32.
    """

    nodes_to_exclude: tuple[str, ...] = ()

    @staticmethod
    def label_of(_: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the calibration images."""
        return setting["sampler"]

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:
        """Write both runtime variants, which are equal.

        Raises:
            UserError: a pattern matches no node, or the float network returns NaN or infinity.
        """
        assert feed is not None
        model = load(onnx_file)
        asked = matching(model, self.nodes_to_exclude, "precision.nodes_to_exclude")
        kept = half.kept_in_fp32(model, asked, lambda: feed.read(None))
        candidate = Candidate(dict.fromkeys(FLAVOURS, half.convert(model, {*asked, *kept.nodes})))
        candidate.write(out)
        measured = {} if kept.left_out else Probe.summary(probe, candidate)  # torch computes in FP16, so this is FP16's error
        return {"precision": "fp16", **kept.report(), "nodes": len(model.graph.node), **measured}
