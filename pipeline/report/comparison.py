"""Find two evaluations, and compare the figures that both have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.contracts import MetricInfo
from evaluation.statistics import Draws, Interval, bootstrap, paired
from pipeline.contracts import Splits
from pipeline.datasets.results import load_results
from pipeline.results.manifest import by_double, current, read_manifest
from posepress.errors import UserError, nearest

_SHOWN = 20  # largest number of addresses in an error message


@dataclass(frozen=True)
class Side:
    """One of the two evaluations.

    Attributes:
        figures: figures of the evaluation.
        draws: bootstrap samples of each kind; "" is the primary figure.
        timed: benchmarks of the engine, by (device, threads, batch).
    """

    figures: Mapping[str, Any]
    draws: Mapping[str, Draws]
    timed: Mapping[tuple[Any, ...], Mapping[str, Any]]


def check(root: Path, name: str, engines: Sequence[str]) -> None:
    """Check that two sides are named and exist.

    Args:
        root: the folder of outputs.
        name: the sweep of addresses that do not name one.
        engines: two of: ADDRESS, NAME/ADDRESS, a file of COCO results (.json), the name of a sweep.

    Raises:
        UserError: there are not two sides, or one does not exist.
    """
    if len(engines) != 2:
        raise UserError(
            f"engines={list(engines)}: give two, like 'engines=[ADDRESS,ADDRESS]', 'engines=[a.json,b.json]' or two sweeps"
            + _there(root, name)
        )
    sweeps = [entry for entry in engines if (root / entry / "evaluate").is_dir()]
    for entry in engines:
        if entry in sweeps:
            continue
        if sweeps:
            known = {folder.parent.name for folder in root.glob("*/evaluate")}
            raise UserError(
                f"engines={list(engines)}: {sweeps[0]} is a sweep and {entry} is none{nearest(entry, known)}; give two sweeps, "
                "or two engines or files"
            )
        if not entry.endswith(".json"):
            find(root, name, entry)
        elif not Path(entry).is_file():
            raise UserError(f"engines: {entry}: no such file; give the path of COCO results")


def _addresses(root: Path, name: str) -> list[str]:
    return sorted(file.parent.name for file in (root / name / "evaluate").glob("[!.]*/manifest.json"))


def _there(root: Path, name: str) -> str:
    """The end of an error message, which lists the existing evaluations."""
    known = _addresses(root, name)
    if known:
        more = f"\n  and {len(known) - _SHOWN} more in {root / name / 'evaluate'}" if len(known) > _SHOWN else ""
        return f"; name={name} has:" + "".join(f"\n  {address}" for address in known[:_SHOWN]) + more
    names = sorted({file.parent.parent.parent.name for file in root.glob("*/evaluate/[!.]*/manifest.json")})
    if names:
        return f"; name={name} has no evaluation; add name=NAME, one of {', '.join(names)}"
    return f"; there is no evaluation in {root}; run stage=evaluate first"


def find(root: Path, name: str, entry: str) -> Path:
    """The evaluation at ADDRESS, or NAME/ADDRESS.

    Raises:
        UserError: there is no such evaluation.
    """
    folder, _, address = entry.rpartition("/")
    at = root / (folder or name) / "evaluate"
    if read_manifest(at / address) is None or not address:
        known = _addresses(root, folder or name)
        if folder and not known:
            hint = nearest(folder, {file.parent.name for file in root.glob("*/evaluate")})
            raise UserError(f"engines: no evaluation {at / address}: {folder} has none{hint}")
        raise UserError(f"engines: no evaluation {at / address}{nearest(address, known) or _there(root, folder or name)}")
    return at / address


def evaluated(folder: Path) -> Side:
    """The side of a finished evaluation, with the benchmarks of the same engine.

    Raises:
        UserError: the evaluation is stale, or was made with the TensorRT test double.
    """
    manifest, root = read_manifest(folder) or {}, folder.parent.parent
    if not current(manifest, root):
        raise UserError(f"{folder}: stale: its inputs have changed since; run its cell again")
    if by_double(manifest["summary"]):
        raise UserError(f"{folder}: evaluated with the TensorRT test double, so its figures are invalid; choose another")
    draws = {file.stem.partition(".")[2]: Draws.load(file) for file in folder.glob("draws*.npz")}
    (engine,) = manifest["inputs"]["engine"]
    timed = {}
    for file in sorted((root / "benchmark").glob("[!.]*/manifest.json")):
        other = read_manifest(file.parent)
        if other is None:  # the manifest is damaged
            continue
        figures = other["summary"]
        if other["inputs"]["engine"] == [engine] and figures.get("timed") and current(other, root):
            timed[figures["device"], figures["threads"], figures["batch"]] = figures
    return Side(manifest["summary"], draws, timed)


def scored(file: Path, data: Splits, metric: Callable[..., Any], resamples: int) -> Side:
    """The side of a file of COCO results, scored on the validation images.

    Raises:
        UserError: the results or the labels are invalid.
    """
    images: Any = data.open("validation")
    found = load_results(file, images.labels, {str(record["id"]) for record in images.records}, images.truth.category)
    try:
        measure = metric(labels=images.labels, found_labels=images.labels)
    except ValueError as error:
        raise UserError(str(error)) from error
    for n in range(len(images)):
        sample = images[n]
        measure.process(sample.id, sample.truth, found[sample.id])
    figures = {
        **measure.evaluate(),
        "primary": measure.info.primary,
        "metric": asdict(measure.info),
        "data_digest": data.digest(["validation"]),
    }
    return Side(figures, {"": bootstrap(measure.matches(), resamples)}, {})


def rows_of(first: Side, second: Side, engines: Sequence[str]) -> list[dict[str, Any]]:
    """Every figure that both sides have. Differences are second - first, and paired if both have bootstrap samples.

    Times are subtracted only if both were measured on one machine with equal settings.

    Raises:
        UserError: the two were evaluated on different images.
    """
    labels = {side.figures["data_digest"] for side in (first, second) if "data_digest" in side.figures}
    if len(labels) > 1:
        raise UserError(
            f"{engines[0]} and {engines[1]}: evaluated on different images or labels; evaluate both on the same data"
        )
    differences: dict[str, Interval] = {}
    strange = set()  # kinds that the two sides measured on different images
    for kind in sorted(set(first.draws) & set(second.draws)):
        figure = f"{kind}_{first.figures['primary']}".lstrip("_")
        try:
            differences[figure] = paired(second.draws[kind], first.draws[kind])
        except ValueError as error:
            if not kind:
                raise UserError(f"{engines[0]} and {engines[1]}: {error}") from error
            strange.add(figure)
    rows: list[dict[str, Any]] = []
    info = MetricInfo.of(first.figures)
    nothing = info.nothing
    for key in dict.fromkeys((*first.figures, *second.figures)):
        value, other = (None if side.figures.get(key) == nothing else side.figures.get(key) for side in (first, second))
        if key == f"agreement_{info.primary}" and (value is None) != (other is None):
            alone = f"measured only for {engines[other is not None]}"
            rows.append({"figure": key, "first": value, "second": other, "apart": alone})
        if isinstance(value, float) and isinstance(other, float) and not key.endswith(("_lo", "_hi")):
            interval = differences.get(key)
            known = {"low": interval.low, "high": interval.high} if interval else {}
            row = {"figure": key, "first": value, "second": other, "difference": other - value, **known}
            rows.append({**row, "apart": "other images"} if key in strange else row)
    common = [where for where in first.timed if where in second.timed]
    pairs = [(where, where) for where in common] or list(zip(first.timed, second.timed, strict=False))[:1]
    for mine, other in pairs:
        places = [f"{device}, {threads} thread(s), batch {batch}" for device, threads, batch in (mine, other)]
        for key in ("latency_p50_ms", "decoding_p50_ms"):
            ours, theirs = first.timed[mine][key], second.timed[other][key]
            told: dict[str, Any] = {"apart": " / ".join(places)}
            if mine == other:
                told = {"difference": theirs - ours, "where": places[0]}
            rows.append({"figure": key, "first": ours, "second": theirs, **told})
    return rows
