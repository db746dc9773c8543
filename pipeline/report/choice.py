"""Recommends an engine: the fastest one whose loss of the metric is shown to be at most MOST_LOST."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.statistics import Draws, Interval, paired
from pipeline.report.collect import Result, Table, averaged, comparable, named, primary
from pipeline.report.tables import between, digits
from pipeline.results.manifest import read_manifest

MOST_LOST = 0.01  # largest accepted loss of the metric, at the worse end of the paired interval


def choices(table: Table) -> Iterator[str]:
    """A recommendation for each set of rows that share images, machine, threads and batch.

    The reference is the engine with the highest figure. An engine qualifies if the lower end of its paired 95 % interval to
    the reference is above -`MOST_LOST`. The fastest engine that qualifies is chosen. Engines that are shown to be slower than
    their own FP32 are left out if any other was timed.
    """
    for group in comparable(table.rows):
        timed = [n for n in group if table.rows[n]["latency_p50_ms"] != "" and not averaged(table.rows[n])]
        if not timed:
            continue
        every, timed = timed, [n for n in timed if not _slower(table.rows[n])] or timed
        figures = {n: float(table.rows[n][primary(table.rows[n])]) for n in timed}
        best = max(timed, key=lambda n: figures[n])
        if figures[best] <= MOST_LOST:
            row = table.rows[best]
            highest = f"{figures[best]:.{digits(row)}f}, of {named(row)}"
            yield (
                f"No engine is recommended: the highest {row['metric'].short} is {highest}, which is nearly 0; "
                "train longer, or compare order, range, mean and std of a given network."
            )
            continue
        lost = {n: _difference(table.results[n], table.results[best]) for n in timed if n != best}
        fit = [best, *(n for n, interval in lost.items() if interval is not None and interval.low >= -MOST_LOST)]
        chosen = min(fit, key=lambda n: float(table.rows[n]["latency_p50_ms"]))
        fastest = [] if len(every) == 1 else _fastest(table, chosen, {n: x for n, x in lost.items() if n not in fit})
        yield _sentence(table, chosen, best, lost.get(chosen), fastest)


def _fastest(table: Table, chosen: int, unfit: Mapping[int, Interval | None]) -> list[str]:
    """What the chosen engine is the fastest of, and the faster engine that would be chosen if fewer losses were possible."""
    row = table.rows[chosen]
    said = [
        f"It is the fastest, by p50 on {row['device']}, of the engines whose loss is at most {MOST_LOST:g} "
        f"{row['metric'].short} with 95 % confidence."
    ]
    ms = {n: float(table.rows[n]["latency_p50_ms"]) for n in (*unfit, chosen)}
    near = [n for n, x in unfit.items() if x is not None and x.value >= -MOST_LOST and ms[n] < ms[chosen]]
    if near and (interval := unfit[nearest := min(near, key=ms.__getitem__)]) is not None:
        said.append(
            f"{named(table.rows[nearest])} takes {ms[nearest]:.2f} ms. It differs by {interval.value:+.4f}, but may lose up to "
            f"{-interval.low:.4f}: more validation images would decide."
        )
    return said


def _slower(row: Mapping[str, Any]) -> bool:
    """Whether an engine is shown to be slower than its own FP32."""
    return row["speedup_vs_fp32"] != "" and row["speedup_vs_fp32_hi"] != "" and float(row["speedup_vs_fp32_hi"]) < 1


def _difference(result: Result, reference: Result) -> Interval | None:
    try:
        return paired(Draws.load(result.folder / "draws.npz"), Draws.load(reference.folder / "draws.npz"))
    except ValueError:  # the images differ, although a device reported equal ones
        return None


def _engine(result: Result) -> Path | None:
    folder = result.made_of.get("build")
    manifest = read_manifest(folder) if folder is not None else None
    return folder / manifest["summary"]["engine"] if folder is not None and manifest is not None else None


def _sentence(table: Table, chosen: int, best: int, lost: Interval | None, fastest: Sequence[str]) -> str:
    row, result, reference = table.rows[chosen], table.results[chosen], table.rows[best]
    file, name, places, short = _engine(result), primary(row), digits(row), row["metric"].short
    where = f" ({file})" if file is not None else ""
    loss = "the highest here"
    if lost is not None:
        interval = f"[{lost.low:+.{places}f}, {lost.high:+.{places}f}]"
        loss = f"{lost.value:+.{places}f} {interval} to {named(reference)}, which has the highest"
    said = [f"Ship {named(row)}{where}: {row['latency_p50_ms']:.2f} ms, {short} {row[name]:.{places}f}, {loss}."]
    same = ("data", "network", "pruning", "resolution", "keep_aspect_ratio_mode")
    if row[f"{name}_vs_fp32"] != "" and (reference["precision"] != "fp32" or any(row[key] != reference[key] for key in same)):
        said.append(f"The {short}'s difference to its FP32 is {between(row, f'{name}_vs_fp32', places, '+')}.")
    if row["speedup_vs_fp32"] != "":
        said.append(f"It is {between(row, 'speedup_vs_fp32', 2)} times as fast as its FP32.")
    said += fastest
    if (tuned := result.made_of.get("tune")) is not None:
        said.append(f"The decoder's thresholds are in {tuned / 'decoder.json'}.")
    return " ".join(said)


def said(sentences: Sequence[str]) -> str:
    """The sentences as one text. Without sentences, the text says that nothing was timed."""
    return "\n".join(sentences) or "No engine is recommended: none was timed. Run stage=benchmark, then stage=report."
