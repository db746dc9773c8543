"""compare: two engines, two sweeps or two files of COCO results, side by side on the same images."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.statistics import Draws, Interval, bootstrap, paired
from pipeline.artifacts import Job, read_manifest
from pipeline.datasets.results import load_results
from pipeline.errors import UserError, nearest
from pipeline.specs import Splits


@dataclass(frozen=True)
class Side:
    """One of the two: its figures, the draws of each kind ("" is the primary figure's), and its benchmark if it has one."""

    figures: Mapping[str, Any]
    draws: Mapping[str, Draws]
    timed: Mapping[str, Any]


def run(
    job: Job, data: Splits, metric: Callable[..., Any], engines: Sequence[str], outputs: str, name: str, resamples: int
) -> dict[str, Any]:
    """Print and write the figures of both and their paired differences; the next report shows them too.

    Args:
        job: where comparison.json goes.
        data: the validation images that results in COCO's format are scored on.
        metric: scores them.
        engines: two of: an address under outputs/<name>/evaluate, or NAME/ADDRESS; a file of COCO results; or two names of
            sweeps, of which all addresses that both have are compared.
        outputs: where results lie.
        name: the name that addresses without one belong to.
        resamples: of the bootstrap, for files of results.

    Raises:
        UserError: not two, one is not there, or they were evaluated on different images.
    """
    if len(engines) != 2:
        raise UserError(
            f"engines={list(engines)}: give two, like 'engines=[ADDRESS,ADDRESS]', 'engines=[a.json,b.json]' or two sweeps"
        )
    root = Path(outputs)
    sweeps = [root / entry / "evaluate" for entry in engines]
    if all(folder.is_dir() for folder in sweeps):
        ours, theirs = ({f.parent.name for f in folder.glob("[!.]*/manifest.json")} for folder in sweeps)
        if not ours & theirs:
            raise UserError(f"engines={list(engines)}: the two sweeps share no address, so there is nothing to compare")
        sides = {at: tuple(_evaluated(folder / at) for folder in sweeps) for at in sorted(ours & theirs)}
        alone = sorted(ours ^ theirs)
    else:
        both = tuple(
            _scored(Path(entry), data, metric, resamples) if entry.endswith(".json") else _evaluated(_found(root, name, entry))
            for entry in engines
        )
        sides, alone = {"": both}, []
    pairs = [{"name": at, "figures": _rows(first, second, engines)} for at, (first, second) in sides.items()]
    (job.out / "comparison.json").write_text(json.dumps({"engines": list(engines), "pairs": pairs, "alone": alone}, indent=1))
    _print(engines, pairs, alone)
    return {"pairs": len(pairs), "alone": len(alone)}


def _found(root: Path, name: str, entry: str) -> Path:
    folder, _, address = entry.rpartition("/")
    at = root / (folder or name) / "evaluate"
    if read_manifest(at / address) is None or not address:
        known = {f.parent.name for f in at.glob("[!.]*/manifest.json")}
        raise UserError(f"engines: no evaluation {at / address}{nearest(address, known)}; there are {len(known)} in {at}")
    return at / address


def _evaluated(folder: Path) -> Side:
    manifest = read_manifest(folder) or {}
    draws = {file.stem.partition(".")[2]: Draws.load(file) for file in folder.glob("draws*.npz")}
    (engine,) = manifest["inputs"]["engine"]
    timed: Mapping[str, Any] = {}
    for file in (folder.parent.parent / "benchmark").glob("[!.]*/manifest.json"):
        other = read_manifest(file.parent) or {}
        if other["inputs"]["engine"] == [engine] and other["summary"].get("timed"):
            timed = other["summary"]
    return Side(manifest["summary"], draws, timed)


def _scored(file: Path, data: Splits, metric: Callable[..., Any], resamples: int) -> Side:
    images: Any = data.open("validation")
    found = load_results(file, images.labels, {str(record["id"]) for record in images.records})
    measure = metric(labels=images.labels, found_labels=images.labels)
    for n in range(len(images)):
        sample = images[n]
        measure.process(sample.id, sample.truth, found[sample.id])
    return Side(dict(measure.evaluate()), {"": bootstrap(measure.matches(), resamples)}, {})


def _rows(first: Side, second: Side, engines: Sequence[str]) -> list[dict[str, Any]]:
    """Every figure that both have; differences are second - first, paired where there are draws of both."""
    labels = {side.figures["data_digest"] for side in (first, second) if "data_digest" in side.figures}
    if len(labels) > 1:
        raise UserError(
            f"{engines[0]} and {engines[1]}: evaluated on different images or labels; evaluate both on the same data"
        )
    differences: dict[str, Interval] = {}
    for kind in sorted(set(first.draws) & set(second.draws)):
        try:
            differences[f"{kind}_ap" if kind else "ap"] = paired(second.draws[kind], first.draws[kind])
        except ValueError as error:
            if not kind:
                raise UserError(f"{engines[0]} and {engines[1]}: {error}") from error
    rows = []
    for key, value in first.figures.items():
        other = second.figures.get(key)
        if isinstance(value, float) and isinstance(other, float) and not key.endswith(("_lo", "_hi")):
            interval = differences.get(key)
            known = {"low": interval.low, "high": interval.high} if interval else {}
            rows.append({"figure": key, "first": value, "second": other, "difference": other - value, **known})
    where = [[side.timed.get(key) for key in ("device", "threads", "batch")] for side in (first, second)]
    for key in ("latency_p50_ms", "decoding_p50_ms", "engine_mb") if first.timed and second.timed else ():
        row = {"figure": key, "first": first.timed[key], "second": second.timed[key]}
        if where[0] == where[1] or key == "engine_mb":
            rows.append({**row, "difference": row["second"] - row["first"]})
        else:
            rows.append({**row, "apart": " / ".join(f"{device}, {t} thread(s), batch {b}" for device, t, b in where)})
    return rows


def _print(engines: Sequence[str], pairs: Sequence[dict[str, Any]], alone: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.report import differences

    console = Console(width=None if Console().is_terminal else 180)
    for title, columns, rows in differences(engines, pairs):
        table = Table(title=title, header_style="bold")
        for n, column in enumerate(columns):
            table.add_column(column, justify="right" if n else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for address in alone:
        console.print(f"in one sweep only: {address}", soft_wrap=True)
