"""The model card."""

from pathlib import Path

from pipeline.report.collect import Table
from pipeline.report.tables import devices, in_markdown, latency_notes, tabulated

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
