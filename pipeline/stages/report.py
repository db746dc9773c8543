"""report: write all cells into one page, one table and one model card."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.report import collect as report
from pipeline.report import page, tables
from pipeline.report.card import write_card
from pipeline.report.choice import choices, said
from pipeline.report.waterfall import waterfalls
from pipeline.results.job import Job
from pipeline.results.manifest import SHOWN
from posepress.errors import UserError

_WIDTH = 100  # number of text columns if the output is a pipe


@dataclass(frozen=True)
class Report:
    """Write report.html, results.csv and model_card.md from every evaluation and benchmark, and print the table.

    Attributes:
        name: name of the sweep.
    """

    name: str

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Raises:
            UserError: every evaluation is stale.
        """
        evaluations, benchmarks = job.collected["evaluations"], job.collected["benchmarks"]
        table = report.collect(evaluations, benchmarks, evaluations[0].parent.parent)
        if table.stale and not table.rows:
            raise UserError(f"name={self.name}: every evaluation is stale, so the earlier report stays; run their cells again")
        if table.rows:
            tables.write_csv(table, job.out / "results.csv")
            page.write_html(table, self.name, job.out / "report.html", job.collected["comparisons"])
            write_card(table, self.name, job.out / "model_card.md")
        _print(table, self.name, job.out / SHOWN)
        return {"engines": len(table.rows), "left_out": len(table.left_out)}


def _print(table: report.Table, name: str, file: Path) -> None:
    """Print the table and the recommendation, and keep this text for later runs that find the report fresh."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else _WIDTH, highlight=False, record=True)
    rows = tables.narrow(table.rows)
    if rows:
        grid = Table(title=escape(name), header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        for n, column in enumerate(rows[0]):
            grid.add_column(escape(column), justify="left" if n < 2 else "right", overflow="fold")
        for row in rows:
            grid.add_row(*map(escape, row.values()))
        console.print(grid)
        for line in tables.latency_notes(table.rows):
            console.print(line, style="dim", markup=False)
    for title, steps in waterfalls(table.results).items():
        short = tables.shorts(table.rows)
        falls = Table(title=escape(f"where {short} goes: {title}"), header_style="bold", box=box.SIMPLE_HEAD)
        for column in ("step", f"{short} [95 %]", "difference, paired"):
            falls.add_column(column)
        for step in steps:
            falls.add_row(*map(escape, step))
        console.print(falls)
    for line in table.doubts:
        console.print(line, style="yellow", soft_wrap=True, markup=False)
    for line in table.left_out:
        console.print(f"left out: {line}", soft_wrap=True, markup=False)
    console.print(said(list(choices(table))), soft_wrap=True, markup=False)
    file.write_text(console.export_text())
