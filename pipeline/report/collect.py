"""The report as data: one table of all cells, the loss at each step, and a model card."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import latency
from evaluation.contracts import MetricInfo
from evaluation.statistics import Draws, Interval, paired, spearman
from pipeline.results.manifest import current, made_here
from posepress.spec import NetworkSpec

_CELL = (
    "data", "network", "pruning", "params", "macs", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "ran",
    "backend", "device",
    "threads", "batch", "rebuild", "address", "images", "category",
)  # fmt: skip
_RUN = ("backend", "device", "threads", "batch", "ran")  # columns that a benchmark fills in better than an evaluation
_MEASURED = (
    "latency_p50_ms",
    "latency_p50_ms_lo", "latency_p50_ms_hi", "latency_p95_ms", "latency_p99_ms", "framing_p50_ms", "upload_p50_ms",
    "download_p50_ms", "decoding_p50_ms", "joules_per_image",
    "latency_width", "calls", "speedup_vs_fp32", "speedup_vs_fp32_lo", "speedup_vs_fp32_hi", "engine_mb", "peak_rss_mb",
    "data_digest", "doubts", "imported",
)  # fmt: skip
TEXTS = (
    "data", "network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "ran", "backend",
    "device", "data_digest", "imported", "category",
)  # fmt: skip
AXES = (
    "data", "network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "backend",
    "batch", "rebuild", "seed",
)  # fmt: skip


def evaluated(metrics: Iterable[MetricInfo]) -> list[str]:
    """Columns of results.csv that hold figures of evaluations under their own names."""

    def each(*patterns: str) -> list[str]:
        ends = ("", "_lo", "_hi")
        return [f"{pattern.format(info.primary)}{end}" for info in infos for pattern in patterns for end in ends]

    infos = list(dict.fromkeys(metrics))
    return [
        *each("{}"),
        *(column for info in infos for column in info.columns),
        *each("as_found_{}", "agreement_{}"),
        "agreement_people",
        "agreement_with_dense",
        "dropped_peaks",
        "images_not_finite",
        *each("{}_vs_fp32", "{}_vs_dense"),
    ]


def columns(metrics: Iterable[MetricInfo]) -> list[str]:
    """The columns of results.csv for engines that were measured by these metrics."""
    return [*_CELL, *evaluated(metrics), *_MEASURED]


@dataclass(frozen=True)
class Result:
    """An evaluated engine.

    Attributes:
        folder: folder of the evaluation.
        axes: the options that distinguish its cell from others.
        figures: figures of the evaluation, and of the benchmark if there is one.
        made_of: folders of the stages that the engine comes from, by stage.
    """

    folder: Path
    axes: Mapping[str, Any]
    figures: Mapping[str, Any]
    made_of: Mapping[str, Path] = field(default_factory=dict)

    @property
    def metric(self) -> MetricInfo:
        """The names of its figures."""
        return MetricInfo.of(self.figures)

    @property
    def figure(self) -> float:
        """The primary figure."""
        return float(self.figures[self.metric.primary])


@dataclass(frozen=True)
class Table:
    """All results of one name.

    Attributes:
        rows: one row for each engine, in the form of results.csv. "metric" holds the names of its figures.
        results: the evaluation behind each row.
        left_out: results that are not in the table, with the reason.
        stale: number of results left out because their inputs have changed since.
    """

    rows: list[dict[str, Any]]
    results: list[Result]
    left_out: list[str]
    stale: int = 0

    @cached_property
    def doubts(self) -> list[str]:
        """Each reason to doubt figures, once, after the names of the engines concerned."""
        engines: dict[str, dict[str, None]] = {}
        for row, result in zip(self.rows, self.results, strict=True):
            for doubt in result.figures.get("doubts", ()):
                engines.setdefault(doubt, {})[named(row)] = None
        return [f"{', '.join([*names][:3])}{' ...' if len(names) > 3 else ''}: {text}" for text, names in engines.items()]


def named(row: Mapping[str, Any]) -> str:
    """The name of an engine for readers: network, pruning, input, precision."""
    return f"{row['network']} {row['pruning']} {row['resolution']} {row['precision']}"


def _manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return manifest


def _engine(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """The path and the digest of the engine of an evaluation or benchmark."""
    (entry,) = manifest["inputs"]["engine"]
    return entry["address"], entry["digest"]


def collect(evaluations: Sequence[Path], benchmarks: Sequence[Path], root: Path) -> Table:
    """Join evaluations with benchmarks of the same engine, and compare each engine with its FP32 and dense baselines.

    Args:
        evaluations: finished folders of the stage "evaluate".
        benchmarks: finished folders of the stage "benchmark".
        root: the folder outputs/<name>.
    """
    results, left_out = [], []
    times: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Path]]]] = {}
    for folder in benchmarks:
        manifest = _manifest(folder)
        if current(manifest, root):
            times.setdefault(_engine(manifest), []).append((manifest["summary"], {"benchmark": folder}))
    doubles = stale = 0
    for folder in evaluations:
        manifest = _manifest(folder)
        if str(manifest["summary"]["backend"]).endswith("-double"):
            doubles += 1
            continue
        if not current(manifest, root):
            stale += 1
            left_out.append(f"{folder.name}: stale: its inputs have changed since; run its cell again")
            continue
        axes = manifest["config"]["axes"]
        origin = {"imported": "no" if made_here(manifest, folder) else "yes"}
        for timed, measured in times.get(_engine(manifest), [({}, {})]):
            counted, folders = _chain(folder, root)
            figures = {**timed, **manifest["summary"], **{k: timed[k] for k in _RUN if k in timed}, **counted, **origin}
            results.append(Result(folder, axes, figures, {**folders, **measured}))
    if doubles:
        left_out.append(f"{doubles} evaluated with the TensorRT test double, so they are not figures of TensorRT")
    results.sort(
        key=lambda r: (
            r.axes["data"],
            r.axes["network"],
            r.axes["pruning"] != "dense",
            r.axes["pruning"],
            r.axes["resolution"],
            r.axes["precision"] != "fp32",
            r.axes["precision"],
        )
    )
    rows = [_row(result, results) for result in results]
    return Table(rows, results, left_out, stale)


def _chain(folder: Path, root: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Parameters and MACs, and the folders of all stages that an evaluation depends on; for each stage, the nearest result."""
    found: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    waiting = [_manifest(folder)]
    while waiting:
        manifest = waiting.pop(0)
        if manifest["stage"] in ("quantize", "export"):
            found = {key: manifest["summary"][key] for key in ("params", "macs") if key in manifest["summary"]} | found
        for entry in (e for inputs in manifest["inputs"].values() for e in inputs):
            if entry["stage"] not in folders:
                folders[entry["stage"]] = root / entry["stage"] / entry["address"]
                waiting.append(_manifest(folders[entry["stage"]]))
    return found, folders


def _kin(result: Result, others: Sequence[Result], **changed: Any) -> Result | None:
    """The baseline result: its axes are those of `result`, except for the `changed` ones."""
    wanted = {**result.axes, **changed}
    return next((other for other in others if dict(other.axes) == wanted and other is not result), None)


def _difference(result: Result, other: Result | None) -> Interval | None:
    if other is None or result.figures["data_digest"] != other.figures["data_digest"]:
        return None
    try:
        return paired(Draws.load(result.folder / "draws.npz"), Draws.load(other.folder / "draws.npz"))
    except ValueError:  # the images differ, although a device reported equal ones
        return None


def _agreement(dense: Result, pruned: Result) -> float | None:
    """The agreement of a pruned FP32 network with the dense network's predictions on images without labels."""
    from evaluation.metrics.agreement import PoseAgreement
    from posepress.results import Poses, kind_of, load_results

    files = [result.made_of.get("tune", Path()) / "reference.npz" for result in (dense, pruned)]
    architecture = pruned.made_of.get("prune", Path()) / "architecture.json"
    if not all(file.is_file() for file in (*files, architecture)):
        return None
    if not all(kind_of(file) == Poses.__name__ for file in files):
        return None
    spec = NetworkSpec.from_dict(json.loads(architecture.read_text())["spec"])
    expected, found = (load_results(file) for file in files)
    if expected.keys() != found.keys():
        return None
    measure = PoseAgreement(spec.skeleton)
    for image, people in expected.items():
        measure.process(image, people, found[image])
    value = measure.evaluate()[measure.info.primary]
    return None if value == measure.info.nothing else value


def _row(result: Result, results: Sequence[Result]) -> dict[str, Any]:
    info = result.metric
    # Labels of axes replace the names of the components that ran, since they may say more. Other figures are kept.
    row = {**result.figures, **{name: result.axes[name] for name in AXES if name in result.axes}}
    network = result.axes["network"].removesuffix("-qat")
    plain: dict[str, Any] = {"precision": "fp32", "calibration": "", "network": network, "rebuild": 0}
    fp32 = None
    if result.axes["precision"] != "fp32":  # FP32 figures of any backend serve, since a device may have evaluated only INT8
        fp32 = _kin(result, results, **plain) or _kin(result, results, **plain, backend="onnxruntime")
    dense = _kin(result, results, **plain, pruning="dense") if result.axes["pruning"] != "dense" else None
    if dense is not None and (agreed := _agreement(dense, result)) is not None:
        row["agreement_with_dense"] = agreed
    for name, other in (("fp32", fp32), ("dense", dense)):
        found = _difference(result, other)
        if found is not None:
            key = f"{info.primary}_vs_{name}"
            row |= {key: found.value, f"{key}_lo": found.low, f"{key}_hi": found.high}
    if "speedup" in row and result.axes["precision"] != "fp32":
        row |= {
            "speedup_vs_fp32": row["speedup"],
            "speedup_vs_fp32_lo": row["speedup_lo"],
            "speedup_vs_fp32_hi": row["speedup_hi"],
        }
    row["address"] = result.folder.name
    row["doubts"] = "; ".join(row.get("doubts", ()))
    cells = {column: "" if _unmeasured(column, row, info) else row[column] for column in columns([info])}
    return {**cells, "metric": info}


def _unmeasured(column: str, row: Mapping[str, Any], info: MetricInfo) -> bool:
    """Whether a figure is missing. Results of earlier versions have -1 in its place."""
    always = column in (info.primary, f"{info.primary}_lo", f"{info.primary}_hi") or "_vs_" in column
    return column not in row or (row[column] == info.nothing and not always)


def write_csv(table: Table, file: Path) -> None:
    """Write one row for each engine. Texts are escaped, so that spreadsheet programs do not read them as formulas."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns(row["metric"] for row in table.rows), restval="", extrasaction="ignore")
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
    shown = []
    for row in rows:
        cells = list(_cells(row, shorts(rows)).items())
        cells[4:4] = [(name, str(row[column]) or "–") for name, column in varied.items()]
        shown.append(dict(cells))
    return shown


def narrow(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The cells for a terminal of 100 columns: intervals stand below their figures, and only axes that differ are shown."""

    def stacked(row: Mapping[str, Any], name: str, digits: int, sign: str = "") -> str:
        return re.sub(r"\b0\.", ".", between(row, name, digits, sign)).replace(" [", "\n[")

    short = shorts(rows)
    axes = {"input": "resolution", "backend": "backend", "batch": "batch", "threads": "threads"}
    varied = {title: column for title, column in axes.items() if len({row[column] for row in rows}) > 1}
    return [
        {
            "network": f"{row['network']}\n{row['pruning']}",
            "precision": str(row["precision"]),
            **{title: str(row[column]) for title, column in varied.items()},
            "GMACs": _number(row["macs"], 3, 1e-9),
            f"{short} [95 %]": stacked(row, primary(row), digits(row)),
            f"{short} − FP32": stacked(row, f"{primary(row)}_vs_fp32", digits(row), "+"),
            f"{short} − dense": stacked(row, f"{primary(row)}_vs_dense", digits(row), "+"),
            "p50 ms": _p50(row),
            "× FP32": stacked(row, "speedup_vs_fp32", 2),
        }
        for row in rows
    ]


def primary(row: Mapping[str, Any]) -> str:
    """The key of the primary figure of a row."""
    return str(row["metric"].primary)


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
        "ran": str(row["ran"]),
        "GMACs": _number(row["macs"], 3, 1e-9),
        f"{short} [95 %]": between(row, name, places),
        "as found": _number(row[f"as_found_{name}"], places),
        "agreement (people)": f"{agreed:.{places}f} ({row['agreement_people']})" if agreed != "" else "–",
        f"{short} − FP32": between(row, f"{name}_vs_fp32", places, "+"),
        f"{short} − dense FP32": between(row, f"{name}_vs_dense", places, "+"),
        "p50 ms": _p50(row),
        "p95 ms": _number(row["latency_p95_ms"], 2),
        "decoding ms": _number(row["decoding_p50_ms"], 3),
        "× FP32": between(row, "speedup_vs_fp32", 2),
        "MiB": _number(row["engine_mb"], 2),
    }


_ENGINE = ("network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "backend")


def rank_correlation(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Spearman's correlation of agreement with the metric, over engines evaluated on the same images; None below four engines.

    Both are relative to the same network in FP32: agreement is by definition, and for the metric the difference is taken. An
    engine that was timed in several ways counts once. Research settings, which no engine uses, do not count.
    """
    groups: dict[Any, dict[Any, tuple[float, float]]] = {}
    for row in rows:
        lost = 0.0 if row["precision"] == "fp32" else row[f"{primary(row)}_vs_fp32"]
        agreed = row[f"agreement_{primary(row)}"]
        if "" not in (agreed, lost) and not averaged(row):
            engine = tuple(row[key] for key in _ENGINE)
            groups.setdefault((row["data"], row["data_digest"], primary(row)), {})[engine] = (float(agreed), float(lost))
    group = list(max(groups.values(), key=len, default={}).values())
    if len(group) < 4:
        return None
    ours, theirs = (np.array(values, np.float64) for values in zip(*group, strict=True))
    return spearman(ours, theirs)


_STEPS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("several scales, torch", lambda a: _torch_fp32(a) and "-x" in a["keep_aspect_ratio_mode"]),
    ("one scale, torch", lambda a: _torch_fp32(a) and a["keep_aspect_ratio_mode"] in ("adjust", "stretch")),
    ("strict letterbox, torch", lambda a: _torch_fp32(a) and a["keep_aspect_ratio_mode"] == "pad"),
    ("ONNX", lambda a: _onnxruntime(a, "fp32")),
    ("FP16", lambda a: a["backend"] == "torch" and a["keep_aspect_ratio_mode"] == "pad" and a["precision"] == "fp16"),
    ("INT8", lambda a: _onnxruntime(a, "int8")),
)


def _onnxruntime(axes: Mapping[str, Any], precision: str) -> bool:
    runs = str(axes["backend"]).startswith("onnxruntime")
    return bool(runs and axes["keep_aspect_ratio_mode"] == "pad" and axes["precision"] == precision)


def averaged(axes: Mapping[str, Any]) -> bool:
    """Whether an engine averages the fields of several views, a research setting."""
    return "-x" in axes["keep_aspect_ratio_mode"] or axes["keep_aspect_ratio_mode"].endswith("-flip")


def _torch_fp32(axes: Mapping[str, Any]) -> bool:
    return bool(axes["backend"] == "torch" and axes["precision"] == "fp32")


def waterfalls(results: Sequence[Result]) -> dict[str, list[tuple[str, str, str]]]:
    """From research settings to the deployed engine: for each network, (step, figure, paired difference to the step before).

    A network with fewer than three measured steps is skipped, since two steps would only repeat the difference to FP32.
    """
    found = {}
    for key in sorted({(r.axes["data"], r.axes["network"], r.axes["pruning"], r.axes["resolution"]) for r in results}):
        kin = [r for r in results if (r.axes["data"], r.axes["network"], r.axes["pruning"], r.axes["resolution"]) == key]
        rows: list[tuple[str, str, str]] = []
        before: Result | None = None
        last = ""
        for name, wanted in _STEPS:
            # Several recipes may match. The one with the highest figure counts, since it would be shipped.
            result = max((r for r in kin if wanted(r.axes)), key=lambda r: r.figure, default=None)
            if result is None:
                continue
            draws = Draws.load(result.folder / "draws.npz")
            difference = _difference(result, before) if before else None
            shown = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}] to {last}" if difference else ""
            recipe = " ".join(str(result.axes[key]) for key in ("keep_aspect_ratio_mode", "calibration") if result.axes[key])
            rows.append((f"{name}: {recipe}", str(draws.interval), shown))
            before, last = result, name
        if len(rows) > 2:
            found[" · ".join(key)] = rows
    return found


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of rows in groups that may share a plot: the same images, metric, machine, threads and batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for n, row in enumerate(rows):
        key = tuple(row[name] for name in ("data", "data_digest", "device", "threads", "batch"))
        groups.setdefault((*key, primary(row)), []).append(n)
    return list(groups.values())


def front(rows: Sequence[Mapping[str, Any]], group: Sequence[int]) -> list[int]:
    """The Pareto front of a group: rows that no other row beats in both figure and latency, the fastest first."""
    timed = [n for n in group if rows[n]["latency_p50_ms"] != ""]
    best, kept = -math.inf, []
    for n in sorted(timed, key=lambda n: (rows[n]["latency_p50_ms"], -rows[n][primary(rows[n])])):
        if rows[n][primary(rows[n])] > best:
            best = rows[n][primary(rows[n])]
            kept.append(n)
    return kept


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
    return sorted({f"{row['device']}, {row['threads']} thread(s), batch {row['batch']}" for row in rows if row["device"]})


MORE_STEPS = (
    "A pruned network was trained longer than its dense one: the difference to dense is not the effect of pruning alone."
)


def write_card(table: Table, name: str, file: Path) -> None:
    """Write a model card in Markdown: the engines, how they were measured, and what is not known."""
    lines = [f"# {in_markdown(name)}", "", "Engines made and measured by Posepress.", "", "## Engines", ""]
    shown = tabulated(table.rows)
    lines += ["| " + " | ".join(shown[0]) + " |", "|" + " --- |" * len(shown[0])]
    lines += ["| " + " | ".join(map(in_markdown, row.values())) + " |" for row in shown]
    first = table.rows[0]
    digest = in_markdown(first["data_digest"])
    lines += [
        "",
        "## How the figures were made",
        "",
        *(
            f"- {in_markdown(info.short)}: {in_markdown(info.title)} on {first['images']} validation images, digest "
            f"`{digest}`; 95 % bootstrap intervals over images."
            for info in dict.fromkeys(row["metric"] for row in table.rows)
        ),
        "- Differences: paired bootstrap over the same images.",
        f"- Latency: the network alone, on {in_markdown('; '.join(devices(table.rows))) or 'no machine yet'}.",
        *[f"- {in_markdown(note)}" for note in latency_notes(table.rows)],
        "- ran: share of multiply-accumulates in each precision, read from the graph as the runtime optimised it.",
        "",
        "## Limits",
        "",
        "- People in images unlike the validation images, and latency on other machines, were not measured.",
        *([f"- {MORE_STEPS}"] if any(row["pruning"] != "dense" for row in table.rows) else []),
        *[f"- {in_markdown(line)}" for line in (*table.doubts, *table.left_out)],
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
