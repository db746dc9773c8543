"""package: write a folder that can build, evaluate, time and audit an engine on a device without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from pipeline.contracts import Splits
from pipeline.datasets.packaged import pack
from pipeline.deploy.package import bytes_of, write_package
from pipeline.launch import command_line
from pipeline.progress import say
from pipeline.results.job import Job

_ELSEWHERE = ("stage", "data", "outputs", "tracking", "force", "weights", "target", "backend", "detector", "hydra", "debug")


@dataclass(frozen=True)
class Package:
    """Package the input "network" with the images and code for its evaluation.

    Attributes:
        data: the data set. Its validation and agreement images are included.
        target: backend of the device.
        outputs: folder of the results.
        name: name of the sweep that the results belong to.
        as_here: options with defaults from this machine, which the package fixes so that the device does not change them.
    """

    data: Splits
    target: Literal["tensorrt", "onnxruntime"]
    outputs: str
    name: str
    as_here: Mapping[str, str]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network", and "reference" and "tuned" if they exist.

        Returns:
            The numbers of images, and the size.
        """
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
