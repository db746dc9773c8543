"""package: a folder that builds, evaluates, times and audits an engine on a device without torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from pipeline.contracts import Splits
from pipeline.datasets.packaged import pack
from pipeline.deploy.package import bytes_of, write_package
from pipeline.launch import command_line
from pipeline.progress import say
from pipeline.results.job import Job

_ELSEWHERE = ("stage", "data", "outputs", "tracking", "force", "weights", "target", "backend", "hydra", "debug")


def run(
    job: Job,
    data: Splits,
    target: Literal["tensorrt", "onnxruntime"],
    outputs: str,
    name: str,
    as_here: Mapping[str, str],
) -> dict[str, Any]:
    """Package the input "network" with what it is evaluated by.

    Args:
        job: inputs hold "network", and "reference" and "tuned" where there are such.
        data: its validation and agreement images go along.
        target: the backend of the device.
        outputs: where results lie.
        name: that they belong to.
        as_here: options that follow from this machine, and must not follow from the device.

    Returns:
        The images and the size.
    """
    images = pack(data, job.out / "data")
    kept = [word for word in job.overrides if word.lstrip("+~").partition("=")[0].partition(".")[0] not in _ELSEWHERE]
    if f"backend={target}" in job.overrides:
        kept += [word for word in job.overrides if word.lstrip("+~").startswith("backend.")]
    words = [*kept, "data=packaged", "data.folder=data", "tracking=none", f"backend={target}"]
    config = command_line.compose(words, job.config_dir)
    for option, value in as_here.items():
        OmegaConf.update(config, option, value, force_add=True)
    OmegaConf.update(config, "precision.about.measured_on", None, force_add=True)  # nothing is quantized there
    about = {"backend": target, "options": words}
    write_package(job.out, Path(outputs) / name, list(job.inputs.values()), config, about)
    size = bytes_of(job.out) / 2**20
    say(f"{size:.0f} MiB, {images}; see README.txt in it")
    return {"target": target, "mb": size, **{f"{split}_images": count for split, count in images.items()}}
