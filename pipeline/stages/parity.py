"""parity: compare torch, ONNX Runtime and the engine on the same images, tensor by tensor, and find the first difference."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import onnx
from annotated_types import Gt, Interval
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

from evaluation.parity import compare
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.torch import Torch
from pipeline.contracts import Backend, Splits
from pipeline.onnx_files.files import FLAVOURS, ModelFiles, Shapes, read_spec
from pipeline.probing.parity import Forms
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Framing
from posepress.predict import Selection, batches
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Parity:
    """Compare the input "engine" with the typed file it was built from (in "network"), and that with FP32 ("reference").

    Attributes:
        data: the data set. Its first validation images are used.
        backend: backend that runs the engine and, after a difference, engines of parts of the network.
        framing: framing that makes images inputs.
        resolution: size of the input.
        images: number of images.
        tolerance: largest relative RMS difference of tensors that count as equal.
    """

    data: Splits
    backend: Backend
    framing: Framing
    resolution: str
    images: Annotated[int, Interval(ge=1, le=10**6)]
    tolerance: Annotated[float, Gt(0)]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "engine", "network", "reference" and possibly "checkpoint".

        Returns:
            The greatest relative RMS difference between neighbours of the chain, and the first tensor in which engine and file
            differ.
        """
        spec = read_spec(job.inputs["reference"] / "model.onnx")
        size, images = Resolution.parse(self.resolution), self.data.open("validation")
        some = Selection(images, range(min(self.images, len(images))))
        frames = [batch.images for batch in batches(some, self.framing, spec.input, size) if batch.views]
        typed = _typed(job.inputs["network"], self.backend.kind == "onnxruntime")
        job.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=job.scratch) as scratch:
            forms = Forms(typed, spec, frames, Shapes.of(self.framing, size, spec.input, 1), Path(scratch))
            chain = self._chain(job, forms)
            links = list(zip(list(chain), list(chain)[1:], strict=False))
            rows: list[dict[str, Any]] = [
                {"reference": first, "other": second, "tensor": name, **figures}
                for first, second in links
                for name, figures in compare(list(zip(chain[first], chain[second], strict=True))).items()
            ]
            worst = max(rows[-len(spec.fields) :], key=lambda row: float(row["relative"]))
            parted, where = None, "nowhere"
            if worst["relative"] > self.tolerance and (reason := _undivided(job.inputs["network"])):
                where = f"not looked for: {reason}"
            elif worst["relative"] > self.tolerance:
                parted, where = forms.first_apart(self.backend, worst["tensor"], self.tolerance)
        most = [max(row["relative"] for row in rows if row["other"] == other) for _, other in links]
        summary = dict(zip(("relative_export", "relative_precision", "relative_engine"), most, strict=True))
        found = {"first_apart": parted, "where": where, "images": len(frames)}
        (job.out / "parity.json").write_text(json.dumps({"rows": rows, **found}, indent=1))
        _print(rows, found, self.tolerance)
        return {**summary, **found}

    def _chain(self, job: Job, forms: Forms) -> dict[str, list[dict[str, Any]]]:
        """The outputs for each image, by the form that computed them."""
        built = read_manifest(job.inputs["engine"])
        assert built is not None
        exported = job.inputs["reference"] / "model.onnx"
        fp32 = ModelFiles(dict.fromkeys(FLAVOURS, exported), job.inputs.get("checkpoint"))
        chain = {
            "torch, FP32": forms.built(Torch(cuda_graph=False), fp32, "torch"),
            "ONNX Runtime, FP32": forms.built(OnnxRuntime(), fp32, "fp32"),
            "ONNX Runtime, typed file": forms.written(),
        }
        with self.backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
            chain[self.backend.name] = forms.loaded(runner)
        return chain


def _undivided(folder: Path) -> str:
    """The reason for which parts of a network would not compute like the whole; empty if they do."""
    files = ModelFiles.in_folder(folder)
    if files.calibration is not None:
        return "TensorRT calibrated the whole engine, and would calibrate each part again"
    narrow = any(t.data_type == TensorProto.BFLOAT16 for t in onnx.load(files.onnx["tensorrt"]).graph.initializer)
    return "ONNX Runtime has no bfloat16 to compare parts with" if narrow else ""


def _typed(folder: Path, for_onnxruntime: bool) -> onnx.ModelProto:
    """The file that defines the computation of an engine. For bfloat16, which ONNX Runtime lacks, it is a simulation."""
    files = ModelFiles.in_folder(folder).onnx
    typed = onnx.load(files["tensorrt"])
    narrow = any(tensor.data_type == TensorProto.BFLOAT16 for tensor in typed.graph.initializer)
    return onnx.shape_inference.infer_shapes(onnx.load(files["onnxruntime"]) if narrow or for_onnxruntime else typed)


def _print(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], tolerance: float) -> None:
    columns = ("reference", "other", "tensor", "cosine", "max", "mean", "relative")
    table = Table(*columns, title=f"{found['images']} images", header_style="bold")
    for row in rows:
        table.add_row(*(f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(f"engine and typed file are more than {tolerance:g} apart: {found['where']}", markup=False)
