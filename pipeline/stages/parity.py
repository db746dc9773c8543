"""parity: compare torch, ONNX Runtime and the engine on the same images, tensor by tensor, and find the first difference."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from annotated_types import Gt, Interval
from numpy.typing import NDArray
from onnx import TensorProto
from rich.console import Console
from rich.table import Table

from evaluation.parity import compare, first_apart
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.torch import Torch
from pipeline.contracts import Backend, Splits
from pipeline.onnx_files.cut import cut, tensors_of
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import FLAVOURS, ModelFiles, Shapes, read_spec
from pipeline.quantization.graph import Graph
from pipeline.results.job import Job
from pipeline.results.manifest import read_manifest
from posepress.contracts import Framing, Runner
from posepress.pixels import normalise
from posepress.predict import batches
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec


def run(
    job: Job,
    data: Splits,
    backend: Backend,
    framing: Framing,
    resolution: str,
    images: Annotated[int, Interval(ge=1, le=10**6)],
    tolerance: Annotated[float, Gt(0)],
) -> dict[str, Any]:
    """Compare the input "engine" with the typed file it was built from (in "network"), and that with FP32 ("reference").

    Args:
        job: the job. Its inputs hold "engine", "network", "reference" and possibly "checkpoint".
        data: the data set. Its first validation images are used.
        backend: backend that runs the engine and, after a difference, engines of parts of the network.
        framing: framing that makes images inputs.
        resolution: size of the input.
        images: number of images.
        tolerance: largest relative RMS difference of tensors that count as equal.

    Returns:
        The greatest relative RMS difference between neighbours of the chain, and the first tensor in which engine and file
        differ.
    """
    built = read_manifest(job.inputs["engine"])
    assert built is not None
    size = Resolution.parse(resolution)
    exported = job.inputs["reference"] / "model.onnx"
    spec = read_spec(exported)
    some = range(min(images, len(data.open("validation"))))
    frames = [batch.images for batch in batches(data.open("validation"), framing, spec.input, size, 1, some) if batch.views]
    typed = _typed(job.inputs["network"], backend.kind == "onnxruntime")
    names, shapes = [field.name for field in spec.fields], Shapes.of(framing, size, spec.input, 1)
    job.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.scratch) as scratch:
        fp32 = ModelFiles(dict.fromkeys(FLAVOURS, exported), job.inputs.get("checkpoint"))
        chain = {
            "torch, FP32": _fields(Torch(cuda_graph=False), fp32, shapes, frames, Path(scratch) / "torch"),
            "ONNX Runtime, FP32": _fields(OnnxRuntime(), fp32, shapes, frames, Path(scratch) / "fp32"),
            "ONNX Runtime, typed file": [dict(made) for made in _as_written(typed, names, frames, spec)],
        }
        with backend.load(job.inputs["engine"] / built["summary"]["engine"]) as runner:
            chain[backend.name] = _computed(runner, frames)
        links = list(zip(list(chain), list(chain)[1:], strict=False))
        rows: list[dict[str, Any]] = [
            {"reference": first, "other": second, "tensor": name, **figures}
            for first, second in links
            for name, figures in compare(list(zip(chain[first], chain[second], strict=True))).items()
        ]
        parted, where = None, "nowhere"
        worst = max(rows[-len(names) :], key=lambda row: float(row["relative"]))
        if worst["relative"] > tolerance and (reason := _undivided(job.inputs["network"])):
            where = f"not looked for: {reason}"
        elif worst["relative"] > tolerance:

            def apart(tensor: str) -> bool:
                files = cut(typed, tensor, spec, Path(scratch))
                found = _fields(backend, files, shapes, frames, Path(scratch) / "part")
                expected = _as_written(onnx.load(files.onnx["tensorrt"]), [tensor], frames, spec)
                return compare(list(zip(expected, found, strict=True)))[tensor]["relative"] > tolerance

            parted = first_apart(tensors_of(typed, worst["tensor"]), apart)
            node = Graph(typed).producer.get(parted or "")
            where = f"first in '{parted}', of {node and node.name} ({node and node.op_type})"
            where = where if parted else f"in {worst['tensor']}, but no part of the network differs when it is built alone"
    most = [max(row["relative"] for row in rows if row["other"] == other) for _, other in links]
    summary = dict(zip(("relative_export", "relative_precision", "relative_engine"), most, strict=True))
    found = {"first_apart": parted, "where": where, "images": len(frames)}
    (job.out / "parity.json").write_text(json.dumps({"rows": rows, **found}, indent=1))
    _print(rows, found, tolerance)
    return {**summary, **found}


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


def _as_written(
    model: onnx.ModelProto, names: Sequence[str], frames: Sequence[NDArray[np.uint8]], spec: NetworkSpec
) -> Iterator[Mapping[str, NDArray[Any]]]:
    """The tensors of a file, computed node by node without any optimisation."""
    inputs = (normalise(frame, spec.input) for frame in frames)
    for made in computed_over(model, names, inputs, optimise=False):
        yield {name: np.array(values) for name, values in made.items()}


def _fields(backend: Backend, files: ModelFiles, shapes: Shapes, frames: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    with backend.load(backend.build(files, shapes, folder)) as runner:
        return _computed(runner, frames)


def _computed(runner: Runner, frames: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
    return [{k: np.array(v) for k, v in runner.download(runner(runner.upload(frame))).items()} for frame in frames]


def _print(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Any], tolerance: float) -> None:
    columns = ("reference", "other", "tensor", "cosine", "max", "mean", "relative")
    table = Table(*columns, title=f"{found['images']} images", header_style="bold")
    for row in rows:
        table.add_row(*(f"{row[c]:.6g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(f"engine and typed file are more than {tolerance:g} apart: {found['where']}", markup=False)
