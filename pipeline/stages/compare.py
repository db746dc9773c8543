"""compare: compare two engines, two sweeps or two files of COCO results on the same images."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Interval

from evaluation.contracts import Metric
from pipeline.contracts import Splits
from pipeline.report.comparison import evaluated, find, rows_of, scored
from pipeline.results.job import Job
from posepress.errors import UserError


@dataclass(frozen=True)
class Compare:
    """Print and write the figures of both sides and their paired differences. The next report also shows them.

    Attributes:
        data: the data set. Results in COCO's format are scored on its validation images.
        metric: metric that scores results in COCO's format.
        engines: two of: an address under outputs/<name>/evaluate, NAME/ADDRESS, or a file of COCO results. The names of two
            sweeps compare them at all addresses that both have.
        outputs: folder of the results.
        name: sweep of addresses that do not name one.
        resamples: number of bootstrap resamples, for files of results.
    """

    data: Splits
    metric: Callable[..., Metric[Any, Any]]
    engines: Sequence[str]
    outputs: str
    name: str
    resamples: Annotated[int, Interval(ge=1, le=10**6)]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its folder gets comparison.json.

        Raises:
            UserError: a side is invalid, or the two were evaluated on different images. `comparison.check` has already refused
                other mistakes.
        """
        root = Path(self.outputs)
        sweeps = [root / entry / "evaluate" for entry in self.engines]
        if all(folder.is_dir() for folder in sweeps):
            ours, theirs = ({f.parent.name for f in folder.glob("[!.]*/manifest.json")} for folder in sweeps)
            if not ours & theirs:
                raise UserError(
                    f"engines={list(self.engines)}: the two sweeps share no address, so there is nothing to compare"
                )
            sides = {at: tuple(evaluated(folder / at) for folder in sweeps) for at in sorted(ours & theirs)}
            alone = sorted(ours ^ theirs)
        else:
            both = tuple(
                scored(Path(entry), self.data, self.metric, self.resamples)
                if entry.endswith(".json")
                else evaluated(find(root, self.name, entry))
                for entry in self.engines
            )
            sides, alone = {"": both}, []
        pairs = [{"name": at, "figures": rows_of(first, second, self.engines)} for at, (first, second) in sides.items()]
        (job.out / "comparison.json").write_text(
            json.dumps({"engines": list(self.engines), "pairs": pairs, "alone": alone}, indent=1)
        )
        _print(self.engines, pairs, alone)
        return {"pairs": len(pairs), "alone": len(alone)}


def _print(engines: Sequence[str], pairs: Sequence[dict[str, Any]], alone: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    from pipeline.report.tables import differences

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
