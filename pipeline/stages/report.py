"""report: all cells in one page, one table and one card."""

from typing import Any

from pipeline import page, report
from pipeline.artifacts import Job


def run(job: Job, name: str) -> dict[str, Any]:
    """Write report.html, results.csv and model_card.md from every evaluation and benchmark, and print the table."""
    evaluations, benchmarks = job.collected["evaluations"], job.collected["benchmarks"]
    table = report.collect(evaluations, benchmarks, evaluations[0].parent.parent)
    if table.rows:
        report.write_csv(table, job.out / "results.csv")
        page.write_html(table, name, job.out / "report.html", job.collected["comparisons"])
        report.write_card(table, name, job.out / "model_card.md")
    (job.out / "left_out.txt").write_text("\n".join(table.left_out))
    _print(table, name)
    return {"engines": len(table.rows), "left_out": len(table.left_out)}


def _print(table: report.Table, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = report.tabulated(table.rows)
    console = Console(width=None if Console().is_terminal else 240)
    if shown:
        grid = Table(title=name, header_style="bold")
        for n, column in enumerate(shown[0]):
            grid.add_column(column, justify="left" if n < 4 else "right")
        for row in shown:
            grid.add_row(*row.values())
        console.print(grid)
    for title, steps in report.waterfalls(table.results).items():
        falls = Table(title=f"where AP goes: {title}", header_style="bold")
        for column in ("step", "AP [95 %]", "difference, paired"):
            falls.add_column(column)
        for step in steps:
            falls.add_row(*step)
        console.print(falls)
    for line in table.left_out:
        console.print(f"left out: {line}")
