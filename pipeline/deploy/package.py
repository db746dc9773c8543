"""Packages: a package is a folder with all files that a device needs to build, evaluate and time an engine."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.edge import CONFIG, PACKAGE, STAGES
from pipeline.launch import wiring
from pipeline.launch.cell import resolved
from pipeline.results.fingerprint import ROOT, closure
from pipeline.results.manifest import MANIFEST, read_manifest
from pipeline.results.stage import targets
from posepress.errors import UserError

LOCK = "requirements-edge.lock"
_WHOLE = ("posepress", "evaluation")  # Python packages that are copied completely
_INSTALL = """#!/bin/sh
# Needs Python 3.10 to 3.12 (set PYTHON=... to choose one) and TensorRT. JetPack includes TensorRT; on other devices install it
# with .venv/bin/pip install tensorrt.
set -e
cd "$(dirname "$0")"
"${PYTHON:-python3}" -m venv --system-site-packages .venv
.venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -r requirements-edge.lock
cuda=$(sed -n 's/.*"version" *: *"\\([0-9]*\\)\\..*/\\1/p' /usr/local/cuda/version.json 2>/dev/null | head -n 1)
if [ -n "$cuda" ]; then .venv/bin/python -m pip install -q --no-compile --disable-pip-version-check "cuda-python==$cuda.*"; fi
"""
_README = """Builds, evaluates, times and audits an engine on this device, in two commands:

    sh install.sh
    .venv/bin/python -m pipeline.edge

The second command writes results.zip. Copy it to the machine that made this package, and run there:

    python -m pipeline stage=import results=results.zip name={name}

To pass further options of the backend, append them to the command, for example: .venv/bin/python -m pipeline.edge {option}
The first evaluation compiles the decoder for this processor, which takes up to a minute.
"""


def write_package(out: Path, root: Path, folders: Sequence[Path], config: DictConfig, about: Mapping[str, Any]) -> None:
    """Write all files of a package except the images.

    Args:
        out: folder of the package; its folder "data" holds the images.
        root: the folder outputs/<name>.
        folders: finished results that are copied completely.
        config: configuration of the command on the device.
        about: description of the package.

    Raises:
        UserError: the file requirements-edge.lock is missing.
    """
    lock = ROOT / LOCK
    if not lock.is_file():
        raise UserError(f"{lock}: not there; package from a checkout of the project")
    for file in code(config):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)
    OmegaConf.save(config, out / CONFIG)
    shutil.copyfile(lock, out / LOCK)
    (out / "install.sh").write_text(_INSTALL)
    option = {"tensorrt": "backend.mem_pool_size_mb=1024"}.get(str(about["backend"]), "threads=4")
    (out / "README.txt").write_text(_README.format(name=root.name, option=option))
    shutil.copyfile(ROOT / "docker" / "Dockerfile.jetson", out / "Dockerfile")
    (out / ".dockerignore").write_text(".venv\nresults.zip\n")
    there = out / "outputs" / root.name
    for folder in folders:
        shutil.copytree(folder, there / folder.relative_to(root))
    for folder in _above(folders, root):
        (there / folder.relative_to(root)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / MANIFEST, there / folder.relative_to(root) / MANIFEST)
    made_of = {str(folder.relative_to(root)): (read_manifest(folder) or {})["digest"] for folder in folders}
    content = {**about, "name": root.name, "made_of": made_of}
    (out / PACKAGE).write_text(json.dumps(content, indent=1))


def _above(folders: Sequence[Path], root: Path) -> Iterator[Path]:
    """Yield the folders of all results from which the given ones were made. Their manifests show that results are current."""
    waiting, seen = list(folders), set(folders)
    while waiting:
        manifest = read_manifest(waiting.pop()) or {"inputs": {}}
        for entry in (entry for inputs in manifest["inputs"].values() for entry in inputs):
            folder = root / entry["stage"] / entry["address"]
            if folder not in seen:
                seen.add(folder)
                waiting.append(folder)
                yield folder


def code(config: DictConfig) -> list[Path]:
    """Return the source files that a device needs, relative to the project.

    They are the packages in `_WHOLE`, and the import closure of the device's stages.
    """
    config = deepcopy(config)
    wiring.wire(config, STAGES)
    modules = ["pipeline.edge"]
    for name in STAGES:
        modules += [target.rpartition(".")[0] for target in targets(resolved(config.stages[name]))]
    files = {*closure(modules), *(file for package in _WHOLE for file in (ROOT / package).rglob("*.py"))}
    return sorted(file.relative_to(ROOT) for file in files if file.is_relative_to(ROOT))


def bytes_of(folder: Path) -> int:
    """Return the size of a folder, in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
