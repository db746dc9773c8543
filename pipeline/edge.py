"""To a device and back: a folder that builds, evaluates and times an engine there, and the results it brings home.

On the device: `sh install.sh`, then `.venv/bin/python -m pipeline.edge`; results.zip goes home to `stage=import`.
"""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.results.content import parse_json
from pipeline.results.fingerprint import ROOT
from pipeline.results.manifest import MANIFEST, read_manifest
from posepress.errors import UserError

STAGES = ("build", "evaluate", "benchmark")
PACKAGE, RESULTS, LOCK = "package.json", "results.zip", "requirements-edge.lock"
_CODE = ("posepress", "evaluation", "calib_samplers", "pipeline", "conf")
_INSTALL = """#!/bin/sh
# Python 3.10 to 3.12 (PYTHON=...). TensorRT is the device's own: JetPack has it, elsewhere .venv/bin/pip install tensorrt.
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

The second leaves results.zip. On the machine that made this package:

    python -m pipeline stage=import results=results.zip name={name}

What the backend has to be told more takes options: .venv/bin/python -m pipeline.edge {option}
The first evaluation compiles its decoder for this processor, which takes up to a minute.
"""


def write_package(out: Path, root: Path, folders: Sequence[Path], options: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write everything but the images.

    Args:
        out: the package, whose folder "data" holds the images.
        root: outputs/<name>.
        folders: finished results that the device needs whole.
        options: of the command that runs there.
        about: what the package is of.

    Raises:
        UserError: the edge lock is not there.
    """
    lock = ROOT / LOCK
    if not lock.is_file():
        raise UserError(f"{lock}: not there; package from a checkout of the project")
    for name in _CODE:
        shutil.copytree(ROOT / name, out / name, ignore=shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc"))
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
    content = {**about, "name": root.name, "options": list(options), "made_of": made_of}
    (out / PACKAGE).write_text(json.dumps(content, indent=1))


def _above(folders: Sequence[Path], root: Path) -> Iterator[Path]:
    """Folders of the results that some were made from, whose manifests say that they are current."""
    waiting, seen = list(folders), set(folders)
    while waiting:
        manifest = read_manifest(waiting.pop()) or {"inputs": {}}
        for entry in (entry for inputs in manifest["inputs"].values() for entry in inputs):
            folder = root / entry["stage"] / entry["address"]
            if folder not in seen:
                seen.add(folder)
                waiting.append(folder)
                yield folder


def run(package: Path, words: Sequence[str]) -> Path:
    """Build, evaluate and benchmark on this device, and collect what came of it; returns results.zip.

    Raises:
        UserError: this is no package, or a stage failed.
    """
    try:
        about = parse_json((package / PACKAGE).read_bytes())
        lost = {"name", "backend", "options", "made_of"} - set(about)
    except (OSError, ValueError, TypeError) as error:
        lost, about = {str(error)}, {}
    if lost:
        raise UserError(
            f"{package / PACKAGE}: not a package ({', '.join(sorted(lost))}); run this in the folder that stage=package wrote"
        )
    device = _device(str(about["backend"]))
    words = [f"stage=[{','.join(STAGES)}]", *about["options"], f"backend.about.label={about['backend']}-{device}", *words]
    done = subprocess.run([sys.executable, "-m", "pipeline", *words], cwd=package, check=False)
    if done.returncode:
        raise UserError(f"python -m pipeline {' '.join(words)}: ended with {done.returncode}; see its message above")
    root = package / "outputs" / about["name"]
    made = [manifest.parent for stage in STAGES for manifest in (root / stage).glob(f"*-{device}-*/{MANIFEST}")]
    files = {str(f.relative_to(root)): f for folder in made for f in sorted(folder.rglob("*")) if f.is_file()}
    listed = {name: sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
    with zipfile.ZipFile(package / RESULTS, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in files.items():
            archive.write(file, name)
        archive.writestr(PACKAGE, json.dumps({**about, "device": device, "files": listed}, indent=1))
    return package / RESULTS


def _device(backend: str) -> str:
    """A word for the GPU, or the processor, that engines run on here."""
    from evaluation import device

    if backend == "tensorrt":
        from posepress.runners.device_memory import DeviceMemory

        name = DeviceMemory().gpu["name"]
    else:
        name = str(device.describe()["cpu"])
    return re.sub(r"[^a-z0-9]+", ".", name.lower()).strip(".") or "device"


def bytes_of(folder: Path) -> int:
    """How large a folder is."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> None:
    """Run on the device and exit: 0 done, 2 bad input."""
    try:
        made = run(Path(), sys.argv[1:])
        name = json.loads(Path(PACKAGE).read_text())["name"]
        print(f"{made}: take it home, to python -m pipeline stage=import results={RESULTS} name={name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
