"""The command for a device: it builds, evaluates and times the engine of a package, and writes results.zip.

Run `sh install.sh`, then `.venv/bin/python -m pipeline.edge`. On the main machine, `stage=import` reads results.zip. Options
of the device follow the command, for example backend.mem_pool_size_mb=1024.
"""

import json
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch.cell import Cell
from pipeline.launch.messages import message_of
from pipeline.results.content import parse_json
from pipeline.results.manifest import MANIFEST
from posepress.errors import UserError, nearest

STAGES = ("build", "evaluate", "benchmark")
PACKAGE, RESULTS, CONFIG = "package.json", "results.zip", "config.yaml"


def run(package: Path, words: Sequence[str]) -> Path:
    """Build, evaluate and benchmark the engine on this device, collect the results and return the path of results.zip.

    Raises:
        UserError: the folder is no package, an option is unknown, or a stage failed.
    """
    try:
        about = parse_json((package / PACKAGE).read_bytes())
        lost = {"name", "backend", "made_of"} - set(about)
    except (OSError, ValueError, TypeError) as error:
        lost, about = {str(error)}, {}
    if lost:
        raise UserError(
            f"{package / PACKAGE}: not a package ({', '.join(sorted(lost))}); run this in the folder that stage=package wrote"
        )
    device = _device(str(about["backend"]))
    config = _configuration(package / CONFIG, words)
    OmegaConf.update(config, "backend.about.label", f"{about['backend']}-{device}", force_add=True)
    OmegaConf.update(config, "stage", list(STAGES))
    Cell(config, words, sweep=False, program=".venv/bin/python -m pipeline.edge").run()
    root = package / "outputs" / about["name"]
    made = [manifest.parent for stage in STAGES for manifest in (root / stage).glob(f"*-{device}-*/{MANIFEST}")]
    files = {str(f.relative_to(root)): f for folder in made for f in sorted(folder.rglob("*")) if f.is_file()}
    listed = {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    with zipfile.ZipFile(package / RESULTS, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files.items():
            archive.write(file, name)
        archive.writestr(PACKAGE, json.dumps({**about, "device": device, "files": listed}, indent=1))
    return package / RESULTS


def _configuration(file: Path, words: Sequence[str]) -> DictConfig:
    """Return the package's configuration, with the options of this device.

    Raises:
        UserError: an argument is no option, or its value cannot be read.
    """
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    known = list(_paths(OmegaConf.to_container(config), ""))
    for word in words:
        option, equals, value = word.partition("=")
        if not equals or option not in known:
            raise UserError(f"{word}: no such option{nearest(option, known)}; give OPTION=VALUE, for example backend.device=1")
        try:
            given = OmegaConf.from_dotlist([f"value={value}"])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{word}: its value cannot be read; give a plain value, for example backend.device=1") from error
        OmegaConf.update(config, option, given["value"])
    OmegaConf.set_struct(config, value=True)
    return config


def _paths(value: Any, prefix: str) -> Iterator[str]:
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        yield f"{prefix}{key}"
        yield from _paths(inner, f"{prefix}{key}.")


def _device(backend: str) -> str:
    """Return a short name of the GPU or processor on which engines run."""
    from evaluation import device

    if backend == "tensorrt":
        from posepress.runners.device_memory import DeviceMemory

        name = DeviceMemory().gpu["name"]
    else:
        name = str(device.describe()["cpu"])
    return re.sub(r"[^a-z0-9]+", ".", name.lower()).strip(".") or "device"


def main() -> None:
    """Run on the device and exit with code 0 if done or 2 for bad input."""
    try:
        made = run(Path(), sys.argv[1:])
        name = json.loads(Path(PACKAGE).read_text())["name"]
        print(f"{made}: copy it to the main machine and run: python -m pipeline stage=import results={RESULTS} name={name}")
    except (UserError, OmegaConfBaseException, OSError) as error:
        print(f"error: {message_of(error, Path('outputs'))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
