"""Checks of the figures that a device sends: their names, types and ranges, and that they belong to one evaluation."""

import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from evaluation.contracts import MetricInfo
from evaluation.statistics import Draws
from pipeline.deploy.zip_limits import check_directory
from pipeline.report.collect import AXES, OPTIONAL_AXES, TEXTS, columns, evaluated
from pipeline.report.page import picture, web_address
from pipeline.results.content import MOST_JSON, parse_json
from pipeline.results.manifest import MANIFEST, plain

_MOST_ARRAYS = 256 << 20  # largest unpacked size of a .npz file, in bytes

_MOST_ITEMS = 1 << 22  # most items of one array

_MOST_TEXT = 500  # longest text, in characters

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

TIMED = frozenset(key for key in columns([]) if re.search(r"_p\d\d_ms|^latency_width$", key)) | {
    *_SPEEDUP, "ran", "backend", "device", "threads", "batch", "joules_per_image", "calls", "engine_mb", "peak_rss_mb",
}  # fmt: skip


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


def check_owner(summary: Iterable[str], place: Path, known: Iterable[str], owned: Iterable[str]) -> None:
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


def _check_axes(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    axes = manifest["config"].get("axes")
    if not isinstance(axes, dict):
        raise ValueError(f"{folder.name}: no axes")  # noqa: TRY004
    strange = sorted(axes.keys() - {*AXES, *OPTIONAL_AXES})
    if strange:
        raise ValueError(f"{folder.name}: {strange[0][:120]!r} is no axis")
    numbers = [key for key in AXES if key not in TEXTS]
    texts = [key for key in AXES if key in TEXTS] + [key for key in OPTIONAL_AXES if key in axes]
    _require(axes, folder, texts, numbers)
    if not isinstance(axes["rebuild"], int):
        raise ValueError(f"{folder.name}: rebuild={axes['rebuild']} is no whole number")  # noqa: TRY004
    return axes


def check_evaluation(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Check the parts of an evaluation that reports, pages and comparisons read."""
    summary, axes = manifest["summary"], _check_axes(folder, manifest)
    if not (info := metric_of(summary)):
        raise ValueError(f"{folder.name}: primary is missing, or no text")
    owned = _EVALUATED | {key for key in evaluated(info) if "_vs_" not in key and key != "agreement_with_dense"}
    check_owner(summary, folder, columns(info), owned)
    figure = info[0].primary
    _require(summary, folder, ("backend", "primary", "data_digest"), (figure, f"{figure}_lo", f"{figure}_hi", "images"))
    if not re.fullmatch(r"[0-9a-f]{16,128}", summary["data_digest"]) or summary["primary"] != figure:
        raise ValueError(f"{folder.name}: data_digest or primary is none")
    if json_of(folder / "metrics.json") != {**summary, "axes": axes}:
        raise ValueError(f"{folder.name}: metrics.json has other figures than {MANIFEST}")
    details = json_of(folder / "details.json")
    tables = details.items() if isinstance(details, dict) else [(None, None)]
    for title, table in tables:
        rows = table.items() if isinstance(table, dict) else [(None, None)]
        if not _shown(title) or not all(_shown(key) and _number(value) for key, value in rows):
            raise ValueError(f"{folder.name}: details.json holds no tables of numbers")
    captions = texts(json_of(folder / "pictures" / "captions.json"), "captions")
    for name, link in captions.items():
        if not plain(name) or not (link == "" or web_address(link)):
            raise ValueError(f"{folder.name}: the picture {name[:120]!r} or its link {link[:120]!r} is none")
        picture(folder / "pictures", name)
    draws = {file.name: _draws(file) for file in folder.glob("draws*.npz")}
    if "draws.npz" not in draws:
        raise ValueError(f"{folder.name}: draws.npz is missing")


def check_benchmark(folder: Path, manifest: Mapping[str, Any]) -> None:
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
    layers = json_of(folder / "audit.json") if (folder / "audit.json").exists() else []
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
    check_directory(file)
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


def texts(found: Any, what: str) -> dict[str, str]:
    """Check that a value holds texts by name, and return it.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{what} are no texts by name")
    return found


def json_of(file: Path) -> Any:
    """The content of a JSON file of a bounded size.

    Raises:
        ValueError: it is missing, too large, or no JSON.
    """
    if not file.is_file() or file.stat().st_size > MOST_JSON:
        raise ValueError(f"{file.parent.name}: {file.name} is missing or too large")
    return parse_json(file.read_bytes())
