"""build: an engine from a typed network."""

from typing import Any

from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.specs import Backend, Framing, ModelFiles, Shapes, read_spec


def run(job: Job, backend: Backend, framing: Framing, resolution: str, batch: int) -> dict[str, Any]:
    """Build the input "network" for a resolution and batches up to `batch`.

    Returns:
        The backend that built it and the engine's size.

    Raises:
        UserError: the backend cannot build it.
    """
    files = ModelFiles.in_folder(job.inputs["network"], job.inputs.get("checkpoint"))
    size = Resolution.parse(resolution)
    shapes = Shapes.of(framing, size, read_spec(files.onnx["tensorrt"]).input, batch)
    engine = backend.build(files, shapes, job.out)
    bytes_ = sum(file.stat().st_size for file in job.out.iterdir())
    return {"backend": backend.name, "engine_mb": bytes_ / 2**20, "engine": engine.name}
