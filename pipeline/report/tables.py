"""The tables of a report: results.csv, the table of engines, and the rows of comparisons."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation import latency
from pipeline.report.collect import PEOPLE, Table, columns, primary


def write_csv(table: Table, file: Path) -> None:
    """Write one row for each engine. Texts are escaped, so that spreadsheet programs do not read them as formulas."""
    fields = [*columns(row["metric"] for row in table.rows), *PEOPLE]
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in table.rows)


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@")) else value


def in_markdown(text: str) -> str:
    """Escape a text for Markdown, so that it cannot become HTML, a link, a picture, a heading or a table column."""
    return re.sub(r"[\\`*<>|#!~]|\](?=[(\[:])", r"\\\g<0>", " ".join(text.split())).replace("&", "&amp;")


def _number(value: Any, digits: int, scale: float = 1.0) -> str:
    return f"{value * scale:.{digits}f}" if isinstance(value, (int, float)) else "–"


def _p50(row: Mapping[str, Any]) -> str:
    wide = row["latency_width"] != "" and row["latency_width"] > latency.NARROW
    return _number(row["latency_p50_ms"], 2) + ("*" if wide else "")


def latency_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on reading the latency columns; empty if nothing was timed."""
    if not any(row["latency_p50_ms"] != "" for row in rows):
        return []
    notes = [
        "p50: latency of the network alone, from a separate run of each engine. × FP32: speed-up with both engines timed in "
        "turns in one run, which is more reliable."
    ]
    if any(_p50(row).endswith("*") for row in rows):
        notes.append(
            f"*: the interval of this p50 is wider than {latency.NARROW:.0%}. Time again on an idle machine: add "
            "'stage=[benchmark,report]' force=true, or raise stages.benchmark.seconds."
        )
    return notes


def tabulated(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The cells of the tables. Columns like data, backend or threads appear only if the rows differ in them."""
    varied = {
        name: column
        for name, column in (
            ("data", "data"),
            ("calibration", "calibration"),
            ("backend", "backend"),
            ("device", "device"),
            ("threads", "threads"),
            ("batch", "batch"),
            ("rebuild", "rebuild"),
            ("images", "images"),
            ("imported", "imported"),
        )
        if len({row[column] for row in rows if row[column] != ""}) > 1
    }
    if len({row["boxes"] for row in rows}) > 1:  # empty for the boxes of annotations
        varied["boxes"] = "boxes"
    shown = []
    for row in rows:
        cells = list(_cells(row, shorts(rows)).items())
        cells[3:3] = [(name, str(row[column]) or "–") for name, column in varied.items()]
        shown.append(dict(cells))
    return shown


def narrow(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The cells for a terminal of 100 columns: intervals stand below their figures, and only axes that differ are shown."""

    def stacked(row: Mapping[str, Any], name: str, digits: int, sign: str = "") -> str:
        return re.sub(r"\b0\.", ".", between(row, name, digits, sign)).replace(" [", "\n[")

    short = shorts(rows)
    axes = {"input": "resolution", "boxes": "boxes", "backend": "backend", "batch": "batch", "threads": "threads"}
    varied = {title: column for title, column in axes.items() if len({row[column] for row in rows}) > 1}
    return [
        {
            "network": f"{row['network']}\n{row['pruning']}",
            "precision": str(row["precision"]),
            **{title: str(row[column]) or "–" for title, column in varied.items()},
            "GMACs": _number(row["macs"], 3, 1e-9),
            f"{short} [95 %]": stacked(row, primary(row), digits(row)),
            f"{short} − FP32": stacked(row, f"{primary(row)}_vs_fp32", digits(row), "+"),
            f"{short} − dense": stacked(row, f"{primary(row)}_vs_dense", digits(row), "+"),
            "p50 ms": _p50(row),
            "× FP32": stacked(row, "speedup_vs_fp32", 2),
        }
        for row in rows
    ]


def digits(row: Mapping[str, Any]) -> int:
    """Decimals of a row's figures."""
    return int(row["metric"].digits)


def shorts(rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of the primary figure of all rows in a table's head."""
    return " or ".join(dict.fromkeys(row["metric"].short for row in rows))


def between(row: Mapping[str, Any], name: str, digits: int, sign: str = "") -> str:
    """A figure of a row with its interval; a dash if it was not measured."""
    if row[name] == "":
        return "–"
    return f"{row[name]:{sign}.{digits}f} [{row[f'{name}_lo']:{sign}.{digits}f}, {row[f'{name}_hi']:{sign}.{digits}f}]"


def _cells(row: Mapping[str, Any], short: str) -> dict[str, str]:
    name, places = primary(row), digits(row)
    agreed = row[f"agreement_{name}"]
    return {
        "network": f"{row['network']} {row['pruning']}",
        "input": f"{row['resolution']} {row['keep_aspect_ratio_mode']}",
        "precision": str(row["precision"]),
        f"{short} [95 %]": between(row, name, places),
        f"{short} − FP32": between(row, f"{name}_vs_fp32", places, "+"),
        "p50 ms": _p50(row),
        "× FP32": between(row, "speedup_vs_fp32", 2),
        f"{short} − dense FP32": between(row, f"{name}_vs_dense", places, "+"),
        "GMACs": _number(row["macs"], 3, 1e-9),
        "MiB": _number(row["engine_mb"], 2),
        "ran": str(row["ran"]),
        "decoding ms": _number(row["decoding_p50_ms"], 3),
        "p95 ms": _number(row["latency_p95_ms"], 2),
        "as found": _number(row[f"as_found_{name}"], places),
        "agreement (people)": f"{agreed:.{places}f} ({row['agreement_people']})" if agreed != "" else "–",
    }


_TIMES = {
    "view": "latency_p50_ms",
    "image, 1 person": "image_1_ms",
    "image, 5 people": "image_5_ms",
    "image, 20 people": "image_20_ms",
    "detector": "detector_ms",
    "together, 1 person": "chain_1_ms",
    "together, 5 people": "chain_5_ms",
    "together, 20 people": "chain_20_ms",
}


def of_people(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The cells of the table of images with people, in ms; empty if no engine has such times."""
    timed = [row for row in rows if row["image_1_ms"] != ""]
    several = len(devices(timed)) > 1
    return [
        {
            "engine": " ".join(str(row[key]) for key in (*ENGINE, "boxes") if row[key]),
            **{title: _number(row[column], 2) for title, column in _TIMES.items()},
            **({"measured on": _machine(row)} if several else {}),
        }
        for row in timed
    ]


ENGINE = ("network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "backend")

_EARLIER = -1.0  # version 0.1 wrote this for figures that were not measured


def differences(engines: Sequence[str], pairs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """A comparison as tables, each with title, columns and rows.

    For two engines they hold every figure. For two sweeps they hold only the metrics and latency.
    """

    def shown(value: float | None) -> str:
        return "–" if value in (None, _EARLIER) else f"{value:.4f}"

    def change(row: Mapping[str, Any]) -> str:
        if "apart" in row:
            return f"not compared: {row['apart']}"
        if _EARLIER in (row["first"], row["second"]):
            return "–"
        interval = f" [{row['low']:+.4f}, {row['high']:+.4f}]" if "low" in row else ""
        return f"{row['difference']:+.4f}{interval}" + (f" ({row['where']})" if "where" in row else "")

    title = f"{engines[0]} -> {engines[1]}"
    if len(pairs) == 1 and not pairs[0]["name"]:
        rows = [[r["figure"], shown(r["first"]), shown(r["second"]), change(r)] for r in pairs[0]["figures"]]
        yield title, ["figure", "first", "second", "second - first [95 %, paired]"], rows
        return
    names = dict.fromkeys(pair["figures"][0]["figure"] for pair in pairs if pair["figures"])  # the metric comes first
    for figure in (*(f"{kind}{name}" for kind in ("", "agreement_") for name in names), "latency_p50_ms"):
        found = [(pair["name"], row) for pair in pairs for row in pair["figures"] if row["figure"] == figure]
        rows = [[name, shown(r["first"]), shown(r["second"]), change(r)] for name, r in found]
        if rows:
            yield f"{title}: {figure}", ["engine", "first", "second", "second - first [95 %, paired]"], rows


def devices(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The devices, threads and batches of all timed rows."""
    return sorted({_machine(row) for row in rows if row["device"]})


def _machine(row: Mapping[str, Any]) -> str:
    return f"{row['device']}, {row['threads']} thread(s), batch {row['batch']}"
