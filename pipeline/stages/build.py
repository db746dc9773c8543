"""build: build an engine from a typed network, or adopt a given engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from pipeline.contracts import Backend
from pipeline.onnx_files.files import ModelFiles, Shapes, described, named, read_spec
from pipeline.progress import Progress
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.resolution import Resolution


def run(
    job: Job,
    backend: Backend,
    framing: Framing,
    resolution: str,
    batch: Annotated[int, Ge(1)],
    profiles: Sequence[Mapping[Literal["min", "opt", "max"], str]],
    plan: str | None,
    spec: Mapping[str, Any] | None,
    tensors: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Build the input "network" for a resolution and batches up to `batch`.

    Args:
        job: the job. Its inputs hold "network" unless `plan` is given.
        backend: backend that builds the engine.
        framing: framing of the images.
        resolution: size of the input.
        batch: largest number of images at once.
        profiles: further shapes "min", "opt" and "max" that the engine is also tuned for.
        plan: a given engine, which is used without changes.
        spec: description of the given engine.
        tensors: names of the given engine's tensors, if they differ from those of the input and fields.

    Returns:
        The backend that built the engine, and the engine's size.

    Raises:
        UserError: the backend cannot build the engine, or a profile is invalid.
    """
    if plan is not None:
        assert spec is not None
        network, own = named(described(spec))
        engine = backend.adopt(Path(plan), network, {**own, **(tensors or {})}, job.out)
    else:
        files = ModelFiles.in_folder(job.inputs["network"], job.inputs.get("checkpoint"))
        size = Resolution.parse(resolution)
        more = tuple(Shapes.parse(one) for one in profiles)
        shapes = Shapes.of(framing, size, read_spec(files.onnx["tensorrt"]).input, batch, more)
        with Progress("building", unit="s"):
            engine = backend.build(files, shapes, job.out)
    bytes_ = sum(file.stat().st_size for file in job.out.iterdir())
    return {"backend": backend.name, "engine_mb": bytes_ / 2**20, "engine": engine.name}
