"""The report as data: one table of all cells, the loss at each step, and a model card."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.contracts import MetricInfo
from evaluation.statistics import Draws, Interval, paired
from pipeline.results.manifest import by_double, current, made_here
from posepress.spec import NetworkSpec

_CELL = (
    "data", "network", "pruning", "params", "macs", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "ran",
    "backend", "device",
    "threads", "batch", "rebuild", "address", "images", "category", "boxes",
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
    "device", "data_digest", "imported", "category", "boxes",
)  # fmt: skip

AXES = (
    "data", "network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "backend",
    "batch", "rebuild", "seed",
)  # fmt: skip

OPTIONAL_AXES = ("boxes",)  # axes that some cells have: boxes only if they come from a detector or a file

# Times of images with people, of networks that see one person at a time. Evaluations and other networks have none.
PEOPLE = ("image_1_ms", "image_5_ms", "image_20_ms", "detector_ms", "chain_1_ms", "chain_5_ms", "chain_20_ms")


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
    """The columns of results.csv for engines that were measured by these metrics, without those of `PEOPLE`."""
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
    """The name of an engine for readers: network, pruning, input, precision, and the boxes if annotations do not give them."""
    boxes = f" with boxes by {row['boxes']}" if row["boxes"] else ""
    return f"{row['network']} {row['pruning']} {row['resolution']} {row['precision']}{boxes}"


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
        if by_double(manifest["summary"]):
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


def difference(result: Result, other: Result | None) -> Interval | None:
    """The paired difference of two results' primary figures; None if they have other images, or there is no other."""
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
    row = {**result.figures, **{name: result.axes[name] for name in (*AXES, *OPTIONAL_AXES) if name in result.axes}}
    network = result.axes["network"].removesuffix("-qat")
    plain: dict[str, Any] = {"precision": "fp32", "calibration": "", "network": network, "rebuild": 0}
    fp32 = None
    if result.axes["precision"] != "fp32":  # FP32 figures of any backend serve, since a device may have evaluated only INT8
        fp32 = _kin(result, results, **plain) or _kin(result, results, **plain, backend="onnxruntime")
    dense = _kin(result, results, **plain, pruning="dense") if result.axes["pruning"] != "dense" else None
    if dense is not None and (agreed := _agreement(dense, result)) is not None:
        row["agreement_with_dense"] = agreed
    for name, other in (("fp32", fp32), ("dense", dense)):
        found = difference(result, other)
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
    people = {column: row[column] if isinstance(row.get(column), (int, float)) else "" for column in PEOPLE}
    return {**cells, **people, "metric": info}


def _unmeasured(column: str, row: Mapping[str, Any], info: MetricInfo) -> bool:
    """Whether a figure is missing. Results of earlier versions have -1 in its place."""
    always = column in (info.primary, f"{info.primary}_lo", f"{info.primary}_hi") or "_vs_" in column
    return column not in row or (row[column] == info.nothing and not always)


def primary(row: Mapping[str, Any]) -> str:
    """The key of the primary figure of a row."""
    return str(row["metric"].primary)


def averaged(axes: Mapping[str, Any]) -> bool:
    """Whether an engine averages the fields of several views, a research setting."""
    return "-x" in axes["keep_aspect_ratio_mode"] or axes["keep_aspect_ratio_mode"].endswith("-flip")


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Indices of rows in groups that may share a plot: the same images, metric, machine, threads and batch."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for n, row in enumerate(rows):
        key = tuple(row[name] for name in ("data", "data_digest", "device", "threads", "batch"))
        groups.setdefault((*key, primary(row)), []).append(n)
    return list(groups.values())
