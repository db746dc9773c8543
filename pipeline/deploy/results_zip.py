"""Reading of results.zip, which is not trusted because a device wrote it.

Sizes are checked before anything is unpacked. Then names, digests, and the type and range of every figure in a table or page
are checked. A digest reveals damage, but it does not prove the origin of a file.
"""

import hashlib
import json
import math
import re
import shutil
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from evaluation.contracts import MetricInfo
from evaluation.statistics import Draws
from pipeline.edge import PACKAGE, STAGES
from pipeline.report.collect import AXES, TEXTS, columns, evaluated
from pipeline.report.page import picture, web_address
from pipeline.results.content import MOST_JSON, parse_json
from pipeline.results.manifest import MANIFEST, checked_manifest, plain, read_manifest
from pipeline.results.store import Results
from posepress.errors import UserError
from posepress.results import DAMAGED

_MOST_MEMBERS = 10_000
_MOST_BYTES = 8 << 30  # largest unpacked size of all members together, in bytes
_MOST_MEMBER = 4 << 30  # largest unpacked size of one member, in bytes
_MOST_RATIO, _FREE = 200, 1 << 20  # largest ratio of unpacked to packed size, for members above the second number of bytes
_MOST_DIRECTORY = 4 << 20  # largest list of members, in bytes; zipfile reads it into memory
_MOST_ARRAYS = 256 << 20  # largest unpacked size of a .npz file, in bytes
_MOST_ITEMS = 1 << 22  # most items of one array
_MOST_TEXT = 500  # longest text, in characters
_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file, APPNOTE.TXT 4.3.16
# Sizes in bytes: the record at the end with its longest comment, the locator of ZIP64, the shortest entry of the list.
_LONGEST_END, _LOCATOR, _ENTRY = _END.size + 0xFFFF, 20, 46
_KEY = re.compile(r"[\w.:/ -]{1,120}")
_COUNTS = ("agreement_people", "dropped_peaks", "images_not_finite")  # an evaluation's other figures are at most 1
_SPEEDUP = ("speedup", "speedup_lo", "speedup_hi")
# Keys of an evaluation's summary beside the figures of its metric. The report computes all other columns.
_EVALUATED = {
    "agreement_people",
    "images",
    "category",
    "dropped_peaks",
    "images_not_finite",
    "data_digest",
    "doubts",
    "backend",
    "primary",
    "metric",
}
_TIMED = frozenset(key for key in columns([]) if re.search(r"_p\d\d_ms|^latency_width$", key)) | {
    *_SPEEDUP, "ran", "backend", "device", "threads", "batch", "joules_per_image", "calls", "engine_mb", "peak_rss_mb",
}  # fmt: skip


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
    _check_directory(file)
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
            _check_owner(manifest["summary"], Path(place), columns(infos), _TIMED)
    return Brought(about["name"], about["device"], folder, manifests), about["made_of"]


def _check_directory(file: Path) -> None:
    """Check the size of the list of members at the end of a zip file, before zipfile reads the list.

    The check must use the same record at the end as zipfile, so that another record cannot mislead it.
    """
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise zipfile.BadZipFile(f"{size} bytes, more than {_MOST_BYTES}")
    with file.open("rb") as stream:
        start = max(size - _LONGEST_END - _LOCATOR, 0)
        stream.seek(start)
        tail = stream.read()
    at = len(tail) - _END.size
    if at < 0 or not (tail.startswith(b"PK\5\6", at) and tail.endswith(b"\0\0")):
        at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("not a whole zip file")
    _, disk, first, here, members, listed, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise zipfile.BadZipFile("something lies behind its end")
    most = listed > _MOST_DIRECTORY or members > _MOST_MEMBERS
    if most or tail[max(at - _LOCATOR, 0) : at].startswith(b"PK\6\7"):
        raise zipfile.BadZipFile("it lists more members than results have")
    if disk or first or here != members or listed < _ENTRY * members or offset + listed != start + at:
        raise zipfile.BadZipFile("the size or place of its list of members is wrong")


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
    if (total := sum(member.file_size for member in members.values())) > _MOST_BYTES:
        raise ValueError(f"it would be unpacked to {total} bytes, more than {_MOST_BYTES}")
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


def _texts(found: Any, what: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{what} are no texts by name")
    return found


def _package(about: Any) -> dict[str, Any]:
    """Check the package's description and return it: "name", "device", "files" and "made_of"."""
    if not isinstance(about, dict) or not plain(about.get("name")) or not re.fullmatch(r"[a-z0-9.]+", str(about.get("device"))):
        raise ValueError(f"{PACKAGE} names no results and device")
    made_of = _texts(about.get("made_of"), f"made_of of {PACKAGE}")
    wrong = [place for place in made_of if len(parts := place.split("/")) != 2 or not all(map(plain, parts))]
    if wrong:
        raise ValueError(f"{PACKAGE} is made of {wrong[0][:200]!r}, which is no result")
    return {**{k: str(about[k]) for k in ("name", "device")}, "files": _texts(about.get("files"), "files"), "made_of": made_of}


def _manifest(folder: Path, place: str, files: Mapping[str, str], device: str) -> dict[str, Any]:
    """Return the manifest of one result, after a check of the result's files and figures."""
    stage, address = place.split("/")
    manifest = checked_manifest(_json(folder / place / MANIFEST))
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
        {"evaluate": _check_evaluation, "benchmark": _check_benchmark}[stage](folder / place, manifest)
    return manifest


def _check_engine(place: str, manifest: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that the engine of an evaluation or benchmark was built on the device."""
    engines = manifest["inputs"].get("engine", [])
    there = [manifests.get(f"{entry['stage']}/{entry['address']}", {}).get("digest") for entry in engines]
    if len(engines) != 1 or engines[0]["stage"] != "build" or there != [engines[0]["digest"]]:
        raise ValueError(f"{place} belongs to an engine that is not among the results")


def _shown(value: Any) -> bool:
    """Whether a value is a text for a table: short and without control characters."""
    return isinstance(value, str) and len(value) <= _MOST_TEXT and value.isprintable()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e18 and math.isfinite(value)


def check_figures(summary: Mapping[str, Any], place: str) -> None:
    """Check the type and range of every figure of a result.

    Raises:
        ValueError: a figure has the wrong type or is out of range.
    """
    info = metric_of(summary)
    own, numbers = {*evaluated(info)}, {*columns(info), *_SPEEDUP}
    for key, value in summary.items():
        if key == "metric":
            continue  # `metric_of` has checked it
        texts = isinstance(value, list) and all(map(_shown, value))
        kind = value is None or _shown(value) or _number(value) or texts
        if key == "doubts":
            kind = texts
        elif key in TEXTS:
            kind = _shown(value)
        elif key in numbers:
            kind = _number(value)
        if not _KEY.fullmatch(key) or not kind:
            raise ValueError(f"{place}: {key[:120]!r} is {str(value)[:120]!r}, which is no value of this figure")
        least, most = -1.0, 1.0 if key in own and key not in _COUNTS else math.inf
        if _number(value) and not least <= value <= most:
            raise ValueError(f"{place}: {key}={value}, which is impossible: it must be within {least:g} and {most:g}")
    for name in (*(each.primary for each in info), "latency_p50_ms", "speedup"):
        bounded = [f"{name}{end}" in summary for end in ("", "_lo", "_hi")]
        if any(bounded) and not all(bounded):
            raise ValueError(f"{place}: {name}, {name}_lo and {name}_hi come together, and one is missing")


def metric_of(summary: Mapping[str, Any]) -> list[MetricInfo]:
    """Return the metric of an evaluation's figures, in a list that is empty for a benchmark.

    Raises:
        ValueError: the summary describes no metric.
    """
    return [MetricInfo.of(summary)] if {"metric", "primary"} & summary.keys() else []


def _check_owner(summary: Iterable[str], place: Path, known: Iterable[str], owned: Iterable[str]) -> None:
    """Check that a result has only figures of its own stage, because a table's row joins the figures of several stages."""
    strange = [key for key in summary if key in (*known, *_SPEEDUP, "primary", "metric") and key not in owned]
    if strange:
        raise ValueError(f"{place.name}: {strange[0]} is no figure of its stage")


def _require(found: Mapping[str, Any], place: Path, texts: Iterable[str], numbers: Iterable[str]) -> None:
    for key in texts:
        if not _shown(found.get(key)):
            raise ValueError(f"{place.name}: {key} is missing, or no text")
    for key in numbers:
        if not _number(found.get(key)):
            raise ValueError(f"{place.name}: {key} is missing, or no number")


def _json(file: Path) -> Any:
    if not file.is_file() or file.stat().st_size > MOST_JSON:
        raise ValueError(f"{file.parent.name}: {file.name} is missing or too large")
    return parse_json(file.read_bytes())


def _check_axes(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    axes = manifest["config"].get("axes")
    if not isinstance(axes, dict):
        raise ValueError(f"{folder.name}: no axes")  # noqa: TRY004
    strange = sorted(axes.keys() - set(AXES))
    if strange:
        raise ValueError(f"{folder.name}: {strange[0][:120]!r} is no axis")
    numbers = [key for key in AXES if key not in TEXTS]
    _require(axes, folder, [key for key in AXES if key in TEXTS], numbers)
    if not isinstance(axes["rebuild"], int):
        raise ValueError(f"{folder.name}: rebuild={axes['rebuild']} is no whole number")  # noqa: TRY004
    return axes


def _check_evaluation(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check the parts of an evaluation that reports, pages and comparisons read."""
    summary, axes = manifest["summary"], _check_axes(folder, manifest)
    if not (info := metric_of(summary)):
        raise ValueError(f"{folder.name}: primary is missing, or no text")
    owned = _EVALUATED | {key for key in evaluated(info) if "_vs_" not in key and key != "agreement_with_dense"}
    _check_owner(summary, folder, columns(info), owned)
    figure = info[0].primary
    _require(summary, folder, ("backend", "primary", "data_digest"), (figure, f"{figure}_lo", f"{figure}_hi", "images"))
    if not re.fullmatch(r"[0-9a-f]{16,128}", summary["data_digest"]) or summary["primary"] != figure:
        raise ValueError(f"{folder.name}: data_digest or primary is none")
    if _json(folder / "metrics.json") != {**summary, "axes": axes}:
        raise ValueError(f"{folder.name}: metrics.json has other figures than {MANIFEST}")
    details = _json(folder / "details.json")
    tables = details.items() if isinstance(details, dict) else [(None, None)]
    for title, table in tables:
        rows = table.items() if isinstance(table, dict) else [(None, None)]
        if not _shown(title) or not all(_shown(key) and _number(value) for key, value in rows):
            raise ValueError(f"{folder.name}: details.json holds no tables of numbers")
    captions = _texts(_json(folder / "pictures" / "captions.json"), "captions")
    for name, link in captions.items():
        if not plain(name) or not (link == "" or web_address(link)):
            raise ValueError(f"{folder.name}: the picture {name[:120]!r} or its link {link[:120]!r} is none")
        picture(folder / "pictures", name)
    draws = {file.name: _draws(file) for file in folder.glob("draws*.npz")}
    if "draws.npz" not in draws:
        raise ValueError(f"{folder.name}: draws.npz is missing")


def _check_benchmark(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check the parts of a benchmark that reports and pages read."""
    summary = manifest["summary"]
    _check_axes(folder, manifest)
    _require(summary, folder, ("backend",), ("timed",))
    if summary["timed"]:
        bounds = [f"latency_p50_ms{end}" for end in ("", "_lo", "_hi")]
        _require(summary, folder, ("device", "ran"), (*bounds, "decoding_p50_ms", "threads", "batch"))
        if not all(summary[key] >= 0 for key in bounds):
            raise ValueError(f"{folder.name}: a latency is negative")
    if (names := summary.get("not_in_int8")) is not None and not isinstance(names, list):
        raise ValueError(f"{folder.name}: not_in_int8 is no list")
    layers = _json(folder / "audit.json") if (folder / "audit.json").exists() else []
    for layer in layers if isinstance(layers, list) else [None]:
        if not isinstance(layer, dict) or not all(_KEY.fullmatch(key) for key in layer):
            raise ValueError(f"{folder.name}: audit.json holds no layers")
        _require(layer, folder, ("op", "precision"), ("macs",))
        amounts = [layer.get(key, 0) for key in ("macs", "us", "nodes")]
        if not all(_number(n) and n >= 0 for n in amounts) or not isinstance(layer.get("reason", ""), str):
            raise ValueError(f"{folder.name}: a layer of audit.json has no figures")
        if not isinstance(layer.get("name"), str):
            raise ValueError(f"{folder.name}: a layer of audit.json has no name")  # noqa: TRY004


def _draws(file: Path) -> Draws:
    """Read the draws of a bootstrap, which are a zip file of arrays.

    Raises:
        ValueError: the file holds no such draws.
    """
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        plainly = all(member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members)
        if not plainly or sum(member.file_size for member in members) > _MOST_ARRAYS:
            raise ValueError(f"{file.name} would be unpacked to too much")
        for member in members:
            with archive.open(member) as stream:
                _check_array(stream, member.file_size)
    draws = Draws.load(file)
    values = draws.values
    numbers = values.dtype.kind == "f" and values.ndim == 1
    inside = numbers and bool((np.isnan(values) | (np.abs(values) <= 1)).all())
    if not inside or not math.isfinite(draws.value) or abs(draws.value) > 1 or not all(map(_shown, draws.images)):
        raise ValueError(f"{file.name} holds no draws of a figure")
    return draws


def _check_array(stream: IO[bytes], size: int) -> None:
    """Check that an array of a .npz file has the size in its header, before memory is allocated for it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    items = math.prod(shape)
    if min(shape, default=0) < 0 or items > _MOST_ITEMS or items * dtype.itemsize > size:
        raise ValueError(f"an array of {items} items, which is larger than its file or than draws are")


def describe(brought: Brought) -> str:
    """Return the description that is kept beside the import: name, device, and the digest of each result."""
    results = {place: manifest["digest"] for place, manifest in sorted(brought.manifests.items())}
    return json.dumps({"name": brought.name, "device": brought.device, "results": results}, indent=1)
