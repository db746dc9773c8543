"""build: build an engine from a typed network, or adopt a given engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from pipeline.contracts import Backend
from pipeline.onnx_files.files import ModelFiles, Shapes, described, named, read_spec
from pipeline.progress import Progress
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Build:
    """Build the input "network" for a resolution and batches up to `batch`.

    Attributes:
        backend: backend that builds the engine.
        framing: framing of the images.
        resolution: size of the input.
        batch: largest number of images at once.
        profiles: further shapes "min", "opt" and "max" that the engine is also tuned for.
        plan: a given engine, which is used without changes.
        spec: description of the given engine.
        tensors: names of the given engine's tensors, if they differ from those of the input and fields.
    """

    backend: Backend
    framing: Framing
    resolution: str
    batch: Annotated[int, Ge(1)]
    profiles: Sequence[Mapping[Literal["min", "opt", "max"], str]]
    plan: str | None
    spec: Mapping[str, Any] | None
    tensors: Mapping[str, str] | None

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network" unless `plan` is given.

        Returns:
            The backend that built the engine, and the engine's size.

        Raises:
            UserError: the backend cannot build the engine, or a profile is invalid.
        """
        if self.plan is not None:
            assert self.spec is not None
            network, own = named(described(self.spec))
            engine = self.backend.adopt(Path(self.plan), network, {**own, **(self.tensors or {})}, job.out)
        else:
            files = ModelFiles.in_folder(job.inputs["network"], job.inputs.get("checkpoint"))
            size = Resolution.parse(self.resolution)
            more = tuple(Shapes.parse(one) for one in self.profiles)
            shapes = Shapes.of(self.framing, size, read_spec(files.onnx["tensorrt"]).input, self.batch, more)
            with Progress("building", unit="s"):
                engine = self.backend.build(files, shapes, job.out)
        bytes_ = sum(file.stat().st_size for file in job.out.iterdir())
        return {"backend": self.backend.name, "engine_mb": bytes_ / 2**20, "engine": engine.name}
