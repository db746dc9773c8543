"""package: write a folder for a device: a network to build and measure there, or a bundle that runs a finished engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from pipeline.contracts import Detector, Splits
from pipeline.datasets.packaged import pack
from pipeline.deploy.bundle import Sources, write_bundle
from pipeline.deploy.package import bytes_of, write_package
from pipeline.launch import command_line
from pipeline.progress import say
from pipeline.results.job import Job

_ELSEWHERE = ("stage", "data", "outputs", "tracking", "force", "weights", "target", "backend", "detector", "hydra", "debug")


@dataclass(frozen=True)
class Package:
    """Package the input "network" with the images and code for its evaluation, or write a bundle of an engine.

    Attributes:
        data: the data set. A package includes its validation and agreement images, and a bundle one image if it is generated.
        detector: finds people's boxes. A bundle includes it; in a package, the boxes that it found are included.
        target: backend of the device; "bundle" for a folder that runs the evaluated engine.
        outputs: folder of the results.
        name: name of the sweep that the results belong to.
        as_here: options with defaults from this machine, which the package fixes so that the device does not change them.
    """

    data: Splits
    detector: Detector | None
    target: Literal["tensorrt", "onnxruntime", "bundle"]
    outputs: str
    name: str
    as_here: Mapping[str, str]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network", and "reference" and "tuned" if they exist; for a bundle, "evaluation".

        Returns:
            The size, and the numbers of images in a package or of results in a bundle's example.
        """
        return self._bundle(job) if self.target == "bundle" else self._package(job)

    def _bundle(self, job: Job) -> dict[str, Any]:
        made = job.inputs
        report = Path(self.outputs) / self.name / "report"
        sources = Sources(made["evaluation"], made["network"], made["reference"], report, job.cache)
        count = write_bundle(job.out / "bundle", self.name, sources, self.detector, self.data)
        size = bytes_of(job.out / "bundle") / 2**20
        say(f"{size:.0f} MiB in the folder bundle, and the same in bundle.zip; see README.md in it")
        return {"target": self.target, "mb": size, "results_in_example": count}

    def _package(self, job: Job) -> dict[str, Any]:
        images = pack(self.data, job.out / "data")
        kept = [word for word in job.overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in _ELSEWHERE]
        if f"backend={self.target}" in job.overrides:
            kept += [word for word in job.overrides if word.lstrip("+~").startswith("backend.")]
        words = [*kept, "data=packaged", "data.folder=data", "tracking=none", f"backend={self.target}"]
        config = command_line.compose(words, job.config_dir)
        for option, value in self.as_here.items():
            OmegaConf.update(config, option, value, force_add=True)
        OmegaConf.update(config, "precision.about.measured_on", None, force_add=True)  # the device quantizes nothing
        about = {"backend": self.target, "options": words}
        write_package(job.out, Path(self.outputs) / self.name, list(job.inputs.values()), config, about)
        size = bytes_of(job.out) / 2**20
        say(f"{size:.0f} MiB, {images}; see README.txt in it")
        return {"target": self.target, "mb": size, **{f"{split}_images": count for split, count in images.items()}}
