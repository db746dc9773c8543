"""The wheel of the package posepress alone, written without network, build tools or temporary folders."""

import base64
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import posepress
from pipeline.results.fingerprint import ROOT
from pipeline.version import VERSION

NAME = "posepress-engine"  # not the project's name, so that pip tells both apart; it is imported as posepress
BASE = ("annotated-types>=0.7", "numba>=0.60", "numpy>=1.26", "opencv-python-headless>=4.11")
RUNTIME = "onnxruntime>=1.20"
EXTRAS = {"video": ("av>=15.1,<19",), "serve": ("starlette>=0.45", "uvicorn>=0.34")}
PYTHON = ">=3.10"
_KINDS = (".py", ".pyi", ".typed", ".html")  # of the package's files
_SUMMARY = "Runs an engine that Posepress made"
_OLDEST = (1980, 1, 1, 0, 0, 0)  # least time that a zip file can hold; equal files make equal archives


def write_wheel(folder: Path, needs: Sequence[str]) -> Path:
    """Write the wheel into a folder and return its file.

    Args:
        folder: folder of the wheel.
        needs: requirements beside those of `BASE`, such as the runtime.
    """
    stem = f"{NAME.replace('-', '_')}-{VERSION}"
    info = f"{stem}.dist-info"
    source = Path(str(posepress.__file__)).parent
    own = sorted(file for file in source.rglob("*") if file.suffix in _KINDS and "__pycache__" not in file.parts)
    files = {f"posepress/{file.relative_to(source).as_posix()}": file.read_bytes() for file in own}
    if (licence := ROOT / "LICENSE").is_file():  # an installed project has it elsewhere
        files[f"{info}/licenses/LICENSE"] = licence.read_bytes()
    files[f"{info}/METADATA"] = _metadata([*BASE, *needs]).encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: posepress\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/entry_points.txt"] = b"[console_scripts]\nposepress = posepress.cli:main\n"
    record = "".join(f"{name},{_digest(content)},{len(content)}\n" for name, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            add(archive, name, content)
    return wheel


def add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a regular file to a zip file, without its time and owner."""
    entry = zipfile.ZipInfo(name, _OLDEST)
    entry.external_attr = 0o100644 << 16
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)


def _metadata(needs: Sequence[str]) -> str:
    """The wheel's description. Version 2.1 is read by the pip of Ubuntu 22.04, too."""
    lines = ["Metadata-Version: 2.1", f"Name: {NAME}", f"Version: {VERSION}", f"Summary: {_SUMMARY}", "License: Apache-2.0"]
    lines += [f"Requires-Python: {PYTHON}", *(f"Requires-Dist: {need}" for need in needs)]
    for extra, packages in EXTRAS.items():
        lines += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {need}; extra == "{extra}"' for need in packages)]
    return "\n".join(lines) + "\n"


def _digest(content: bytes) -> str:
    """A digest in the form of the file RECORD."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
