"""compare: two engines, or two sets of results in COCO's format, side by side on the same images."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evaluation.statistics import Draws, Interval, bootstrap, paired
from pipeline.artifacts import Job, read_manifest
from pipeline.datasets.results import load_results
from pipeline.errors import UserError, nearest
from pipeline.specs import Splits


def run(
    job: Job, data: Splits, metric: Callable[..., Any], engines: Sequence[str], outputs: str, name: str, resamples: int
) -> dict[str, Any]:
    """Print and write the figures of both and their paired differences.

    Args:
        job: where comparison.json goes.
        data: the validation images that results in COCO's format are scored on.
        metric: scores them.
        engines: two of: an address under outputs/<name>/evaluate or outputs/<another name>/evaluate written NAME/ADDRESS; a
            file of COCO results.
        outputs: where results lie.
        name: the name that addresses without one belong to.
        resamples: of the bootstrap, for files of results.

    Raises:
        UserError: not two, one is not there, or they were evaluated on different images.
    """
    if len(engines) != 2:
        raise UserError(f"engines={list(engines)}: give two, like 'engines=[ADDRESS,ADDRESS]' or 'engines=[a.json,b.json]'")
    sides = []
    for entry in engines:
        if entry.endswith(".json"):
            sides.append(_scored(Path(entry), data, metric, resamples))
            continue
        folder, _, address = entry.rpartition("/")
        at = Path(outputs) / (folder or name) / "evaluate"
        manifest = read_manifest(at / address)
        if manifest is None:
            known = {f.parent.name for f in at.glob("*/manifest.json") if not f.parent.name.startswith(".")}
            raise UserError(f"engines: no evaluation {at / address}{nearest(address, known)}; there are {len(known)} in {at}")
        draws = {f.stem.partition(".")[2]: Draws.load(f) for f in (at / address).glob("draws*.npz")}
        sides.append((manifest["summary"], draws))
    (first, ours), (second, theirs) = sides
    differences: dict[str, Interval] = {}
    for kind in sorted(set(ours) & set(theirs)):
        try:
            differences[f"{kind}_ap" if kind else "ap"] = paired(theirs[kind], ours[kind])
        except ValueError as error:
            if not kind:
                raise UserError(f"{engines[0]} and {engines[1]}: {error}") from error
    figures = [key for key, value in first.items() if isinstance(value, float) and isinstance(second.get(key), float)]
    rows = [
        {"figure": f, "first": first[f], "second": second[f], "difference": second[f] - first[f]}
        | ({"low": differences[f].low, "high": differences[f].high} if f in differences else {})
        for f in figures
        if not f.endswith(("_lo", "_hi"))
    ]
    (job.out / "comparison.json").write_text(json.dumps({"engines": list(engines), "figures": rows}, indent=1))
    _print(engines, rows)
    return {f"{name}_difference": interval.value for name, interval in differences.items()}


def _scored(file: Path, data: Splits, metric: Callable[..., Any], resamples: int) -> tuple[dict[str, Any], dict[str, Draws]]:
    images: Any = data.open("validation")
    found = load_results(file, images.labels, {str(record["id"]) for record in images.records})
    measure = metric(labels=images.labels, found_labels=images.labels)
    for n in range(len(images)):
        sample = images[n]
        measure.process(sample.id, sample.truth, found[sample.id])
    return dict(measure.evaluate()), {"": bootstrap(measure.matches(), resamples)}


def _print(engines: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{engines[0]} -> {engines[1]}", header_style="bold")
    for column in ("figure", "first", "second", "second - first [95 %, paired]"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for row in rows:
        interval = f" [{row['low']:+.4f}, {row['high']:+.4f}]" if "low" in row else ""
        table.add_row(row["figure"], f"{row['first']:.4f}", f"{row['second']:.4f}", f"{row['difference']:+.4f}{interval}")
    Console(width=None if Console().is_terminal else 160).print(table)
