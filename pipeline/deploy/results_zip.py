"""Reading of results.zip, which is not trusted because a device wrote it.

Sizes are checked before anything is unpacked. Then names, digests, and the type and range of every figure in a table or page
are checked. A digest reveals damage, but it does not prove the origin of a file.
"""

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.deploy.device_figures import (
    TIMED,
    check_benchmark,
    check_evaluation,
    check_figures,
    check_owner,
    json_of,
    metric_of,
    texts,
)
from pipeline.deploy.zip_limits import _MOST_MEMBERS, MOST_BYTES, check_directory
from pipeline.edge import PACKAGE, STAGES
from pipeline.report.collect import columns
from pipeline.results.content import MOST_JSON, parse_json
from pipeline.results.manifest import MANIFEST, checked_manifest, plain, read_manifest
from pipeline.results.store import Results
from posepress.errors import UserError
from posepress.results import DAMAGED

_MOST_MEMBER = 4 << 30  # largest unpacked size of one member, in bytes

_MOST_RATIO, _FREE = 200, 1 << 20  # largest ratio of unpacked to packed size, for members above the second number of bytes


@dataclass(frozen=True)
class Brought:
    """The checked results of a device.

    Attributes:
        name: name of the results from which the package was made.
        device: short name of the device, which is part of every address.
        folder: folder of the unpacked files, with the layout of outputs/<name>.
        manifests: manifest of each result, by "<stage>/<address>".
    """

    name: str
    device: str
    folder: Path
    manifests: Mapping[str, dict[str, Any]]


def unpack(file: Path, results: Results, folder: Path) -> Brought:
    """Check results.zip and unpack it.

    Args:
        file: results.zip.
        results: the results to which it belongs.
        folder: target folder; its earlier content is deleted.

    Raises:
        UserError: the file is damaged, changed or too large, belongs to networks that are not here, or would replace a
            result of this machine.
    """
    if not file.is_file():
        raise UserError(f"results={file}: no such file; give the path of results.zip")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        brought, made_of = _unpacked(file, folder)
    except DAMAGED as error:
        what = str(error) or type(error).__name__
        raise UserError(f"results={file}: no results of a package ({what[:300]}); copy it again") from error
    if brought.name != results.name:
        raise UserError(f"results={file}: of name={brought.name}, not {results.name}; add name={brought.name}")
    root = results.outputs / results.name
    for place, digest in made_of.items():
        here = read_manifest(root / place)
        if here is None or here["digest"] != digest:
            what = "is not here any more" if here is None else "was made again since"
            raise UserError(f"results={file}: {root / place}, which the package was made of, {what}; package it again")
    for place in brought.manifests:
        check_place(file, root / place)
    return brought


def check_place(file: Path, folder: Path) -> None:
    """Check that an imported result would not replace a result of this machine.

    Raises:
        UserError: the folder holds a result that is not marked as imported.
    """
    if not folder.exists():
        return
    manifest = read_manifest(folder)
    if manifest is None or "imported" not in manifest:
        what = "is damaged" if manifest is None else "was made here, or imported by an older version"
        raise UserError(
            f"results={file}: {folder} {what}, and is never replaced by what a device brings; remove the folder first"
        )


def _unpacked(file: Path, folder: Path) -> tuple[Brought, dict[str, str]]:
    """Unpack a zip file into a folder. Return the checked results, and digests of the results behind the package.

    Any exception means that the file is damaged.
    """
    check_directory(file)
    with zipfile.ZipFile(file) as archive:
        members = _members(archive.infolist())
        if (package := members.pop(PACKAGE, None)) is None:
            raise ValueError(f"it holds no {PACKAGE}")
        about = _package(parse_json(_read(archive, package)))
        lost = sorted(set(members) ^ set(about["files"]))
        if lost:
            raise ValueError(f"{lost[0]} was added or removed since the device wrote it")
        for name, member in members.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("xb") as sink:
                if _copied(source, sink) != about["files"][name]:
                    raise ValueError(f"{name} was changed since the device wrote it")
    manifests = {}
    for place in sorted({"/".join(name.split("/")[:2]) for name in members}):
        if f"{place}/{MANIFEST}" not in members:
            raise ValueError(f"{place}/{MANIFEST} was removed since the device wrote it")
        files = {name.removeprefix(f"{place}/"): about["files"][name] for name in members if name.startswith(f"{place}/")}
        manifests[place] = _manifest(folder, place, files, about["device"])
    if not manifests:
        raise ValueError("it holds no results")
    infos = [
        info for manifest in manifests.values() if manifest["stage"] == "evaluate" for info in metric_of(manifest["summary"])
    ]
    for place, manifest in manifests.items():
        if manifest["stage"] != "build":
            _check_engine(place, manifest, manifests)
        if manifest["stage"] == "benchmark":
            check_owner(manifest["summary"], Path(place), columns(infos), TIMED)
    return Brought(about["name"], about["device"], folder, manifests), about["made_of"]


def _members(listed: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """Return the members by name, after a check of their names and sizes."""
    if len(listed) > _MOST_MEMBERS:
        raise ValueError(f"{len(listed)} members, more than {_MOST_MEMBERS}")
    members: dict[str, zipfile.ZipInfo] = {}
    for member in listed:
        name, parts = member.filename, member.filename.split("/")
        if name != PACKAGE and not (len(parts) in (3, 4) and parts[0] in STAGES and all(map(plain, parts))):
            raise ValueError(f"{name[:200]!r} is no file of results: it was added since the device wrote it")
        if name in members:
            raise ValueError(f"{name} is there twice")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is encrypted, or packed in another way than results are")
        packed = max(member.compress_size, 1)
        if member.file_size > _MOST_MEMBER or member.file_size > max(_FREE, _MOST_RATIO * packed):
            raise ValueError(f"{name} would be unpacked to {member.file_size} bytes from {packed}, too many for results")
        members[name] = member
    if (total := sum(member.file_size for member in members.values())) > MOST_BYTES:
        raise ValueError(f"it would be unpacked to {total} bytes, more than {MOST_BYTES}")
    return members


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MOST_JSON:
        raise ValueError(f"{member.filename} has {member.file_size} bytes")
    return archive.read(member)


def _copied(source: Any, sink: BinaryIO) -> str:
    """Copy a stream and return the SHA-256 of its bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    while block := source.read(1 << 20):
        digest.update(block)
        sink.write(block)
    return digest.hexdigest()


def _package(about: Any) -> dict[str, Any]:
    """Check the package's description and return it: "name", "device", "files" and "made_of"."""
    if not isinstance(about, dict) or not plain(about.get("name")) or not re.fullmatch(r"[a-z0-9.]+", str(about.get("device"))):
        raise ValueError(f"{PACKAGE} names no results and device")
    made_of = texts(about.get("made_of"), f"made_of of {PACKAGE}")
    wrong = [place for place in made_of if len(parts := place.split("/")) != 2 or not all(map(plain, parts))]
    if wrong:
        raise ValueError(f"{PACKAGE} is made of {wrong[0][:200]!r}, which is no result")
    return {**{k: str(about[k]) for k in ("name", "device")}, "files": texts(about.get("files"), "files"), "made_of": made_of}


def _manifest(folder: Path, place: str, files: Mapping[str, str], device: str) -> dict[str, Any]:
    """Return the manifest of one result, after a check of the result's files and figures."""
    stage, address = place.split("/")
    manifest = checked_manifest(json_of(folder / place / MANIFEST))
    if (manifest["stage"], manifest["address"]) != (stage, address) or f"-{device}-" not in f"{address}-":
        raise ValueError(f"{place} is no result of {device}: its manifest is of {manifest['stage']}/{manifest['address']}")
    others = {name: digest for name, digest in files.items() if name != MANIFEST}
    changed = sorted(others.items() ^ manifest["files"].items())
    if changed:
        raise ValueError(f"{place}/{changed[0][0]} was changed, added or removed since the device wrote it")
    check_figures(manifest["summary"], place)
    if stage == "build" and manifest["summary"].get("engine") not in others:
        raise ValueError(f"{place} holds no engine")
    if stage != "build":
        {"evaluate": check_evaluation, "benchmark": check_benchmark}[stage](folder / place, manifest)
    return manifest


def _check_engine(place: str, manifest: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the engine of an evaluation or benchmark was built on the device."""
    engines = manifest["inputs"].get("engine", [])
    there = [manifests.get(f"{entry['stage']}/{entry['address']}", {}).get("digest") for entry in engines]
    if len(engines) != 1 or engines[0]["stage"] != "build" or there != [engines[0]["digest"]]:
        raise ValueError(f"{place} belongs to an engine that is not among the results")


def describe(brought: Brought) -> str:
    """Return the description that is kept beside the import: name, device, and the digest of each result."""
    results = {place: manifest["digest"] for place, manifest in sorted(brought.manifests.items())}
    return json.dumps({"name": brought.name, "device": brought.device, "results": results}, indent=1)
