"""The report as a self-contained HTML page."""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.report import engines as engine_page
from pipeline.report import pruning as pruning_page
from pipeline.report import quantization as quantization_page
from pipeline.report.card import MORE_STEPS
from pipeline.report.choice import choices, said
from pipeline.report.collect import Result, Table, averaged, comparable
from pipeline.report.tables import devices, differences, latency_notes, of_people, shorts, tabulated
from pipeline.report.waterfall import front, rank_correlation, waterfalls
from pipeline.results.manifest import plain

_MOST_PICTURE = 16 << 20  # largest size of a picture, in bytes


def write_html(table: Table, name: str, file: Path, comparisons: Sequence[Path] = ()) -> None:
    """Write a self-contained page.

    Args:
        table: the table to show.
        name: name of the sweep.
        file: path of the page.
        comparisons: finished folders of the stage "compare".
    """
    groups = comparable(table.rows)
    best = {n for group in groups for n in front(table.rows, group)}
    plots = ""
    for group in groups:
        row = table.rows[group[0]]
        if not row["device"]:
            continue
        images = f"{row['data']}, {row['images']} images{_boxes(row)}"
        title = f"{images}; {row['device']}, {row['threads']} thread(s), batch {row['batch']}"
        plots += f"<h2>{html.escape(title)}</h2>{_plot(table, group, not plots)}"
    pruning = pruning_page.section(table.results, table.rows, _Drawn(first=not plots))
    shown = tabulated(table.rows)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in shown[0])
    body = "".join(
        f"<tr{' class=front' if n in best else ''}>"
        + "".join(f"<td>{html.escape(value)}</td>" for value in row.values())
        + "</tr>"
        for n, row in enumerate(shown)
    )
    sections = []
    for n in sorted(best) or [0]:
        words = (shown[n]["network"], shown[n]["precision"], shown[n]["input"] + _boxes(table.rows[n]))
        title = html.escape(" · ".join(words))
        sections.append(f"<h2>What {title} finds</h2>{_pictures(table.results[n])}{_details_html(table.results[n])}")
    notes = [*_notes(table), *(html.escape(line) for line in table.left_out)]
    doubts = "".join(f'<p class="doubt">{html.escape(line)}</p>' for line in table.doubts)
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)} · Posepress</title>
<style>{_STYLE}</style></head><body><h1>{html.escape(name)}: accuracy against latency</h1>
<p>{html.escape(said(list(choices(table))))}</p>{doubts}{plots}
<h2>Engines</h2><p class="note">Green rows are on the Pareto front.</p><div class="wide">
<table><thead><tr>{head}</tr></thead>
<tbody>{body}</tbody></table></div>
{"".join(f'<p class="note">{note}</p>' for note in notes)}{_people_html(table)}{_waterfall_html(table)}
{pruning}{engine_page.sections(table.results)}{quantization_page.sections(table.results)}{_comparisons_html(comparisons)}
{"".join(sections)}</body></html>"""
    file.write_text(page, encoding="utf-8")


def _notes(table: Table) -> list[str]:
    """The notes below the table, as HTML."""
    machines, short = devices(table.rows), shorts(table.rows)
    notes = [f"Latency: on {html.escape('; '.join(machines) or 'no machine yet')}. {' '.join(latency_notes(table.rows))}"]
    images = sorted({f"{row['images']} validation images, data {row['data_digest'][:12]}" for row in table.rows})
    notes.append(
        f"{html.escape(short)}: {html.escape('; '.join(images))}; intervals are 95 % bootstraps over images, differences "
        "are paired."
    )
    correlation = rank_correlation(table.rows)
    notes.append(
        "as found: without completed poses and fitted scores. agreement: the metric with the FP32 network's predictions on "
        f"unlabelled images as ground truth; its rank correlation with {html.escape(short)}, both relative to FP32: "
        + ("fewer than four engines, or all alike" if correlation is None else f"{correlation:.2f}")
        + "."
    )
    if any(averaged(row) for row in table.rows):
        notes.append("Inputs with -x… or -flip average the fields of several views. This is a setting for research only.")
    if any(row["pruning"] != "dense" for row in table.rows):
        notes.append(MORE_STEPS)
    return notes


def _boxes(row: Mapping[str, Any]) -> str:
    return f", boxes by {row['boxes']}" if row["boxes"] else ""


def _people_html(table: Table) -> str:
    """The times of images with people; empty if no engine has them."""
    shown = of_people(table.rows)
    if not shown:
        return ""
    machines = devices([row for row in table.rows if row["image_1_ms"] != ""])
    note = (
        f"In ms, on {html.escape('; '.join(machines))}. A view is the crop of one person: its time is the p50 of the network "
        "alone, for one batch. The time of an image covers framing, network and decoding of all its people. The detector's "
        "time covers the same steps for one image. It runs in ONNX Runtime on the processor, with as many threads. Together "
        "is the sum of the two medians, which were measured apart. All times but that of a view are medians of at least 5 "
        "calls, and their spread is not known. –: not measured, because there is no detector."
    )
    grid = _table(list(shown[0]), [list(row.values()) for row in shown])
    return f'<h2>Time of an image with 1, 5 and 20 people</h2><p class="note">{note}</p>{grid}'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class _Drawn:
    """Plotly figures as HTML. The first figure of a page includes the library."""

    def __init__(self, first: bool) -> None:
        self.first = first

    def __call__(self, figure: Any) -> str:
        figure.update_layout(template="plotly_white")
        text: str = figure.to_html(full_html=False, include_plotlyjs=self.first, config={"displaylogo": False})
        self.first = False
        return text


def _waterfall_html(table: Table) -> str:
    text, short = "", html.escape(shorts(table.rows))
    for name, rows in waterfalls(table.results).items():
        body = "".join(
            f"<tr><td>{html.escape(step)}</td><td>{html.escape(value)}</td><td>{html.escape(lost)}</td></tr>"
            for step, value, lost in rows
        )
        text += (
            f"<h2>Where {short} goes: {html.escape(name)}</h2><table><thead><tr><th>step</th><th>{short} [95 %]</th>"
            f"<th>difference, paired</th></tr></thead><tbody>{body}</tbody></table>"
        )
    return text


_DETAILS = {"keypoints": "by keypoint", "strata": "by stratum", "errors": "kinds of error"}
_LEGEND = (
    "By stratum: images by their number of people, people by the share of their labelled keypoints that are hidden. "
    "error_*: share of the labelled keypoints of matched people; gain_*: what the metric gains without that kind; "
    "background: share of the predictions that match no person; missed: share of the people that no prediction matches."
)


def _details_html(result: Result) -> str:
    """The breakdown of one engine's figure by keypoint and stratum, and the kinds of error."""
    tables = json.loads((result.folder / "details.json").read_text())
    text = ""
    for name, table in tables.items():
        shown = {key: "–" if value == -1 else f"{value:.3f}" for key, value in table.items()}
        lines = "".join(f"<tr><td>{html.escape(key)}</td><td>{value}</td></tr>" for key, value in shown.items())
        text += f"<div><h3>{html.escape(_DETAILS.get(name, name))}</h3><table><tbody>{lines}</tbody></table></div>"
    return f'<div class="details">{text}</div><p class="note">{_LEGEND}</p>'


def _plot(table: Table, members: Sequence[int], first: bool) -> str:
    import plotly.graph_objects as go

    figure = go.Figure()
    timed = [table.rows[n] for n in members if table.rows[n]["latency_p50_ms"] != ""]
    info = table.rows[members[0]]["metric"]
    name = info.primary
    for group in sorted({(row["network"], row["pruning"]) for row in timed}):
        rows = [row for row in timed if (row["network"], row["pruning"]) == group]
        figure.add_trace(
            go.Scatter(
                x=[row["latency_p50_ms"] for row in rows],
                y=[row[name] for row in rows],
                error_y={
                    "array": [row[f"{name}_hi"] - row[name] for row in rows],
                    "arrayminus": [row[name] - row[f"{name}_lo"] for row in rows],
                    "thickness": 1,
                },
                mode="markers+text" if len(timed) < 7 else "markers",
                marker={"size": 11},
                text=[html.escape(str(row["precision"])) for row in rows],
                hovertext=[
                    html.escape(f"{row['resolution']} {row['keep_aspect_ratio_mode']} {row['backend']}") for row in rows
                ],
                textposition="top center",
                name=html.escape(" ".join(group)),
            )
        )
    best = [table.rows[n] for n in front(table.rows, members)]
    figure.add_trace(
        go.Scatter(
            x=[row["latency_p50_ms"] for row in best],
            y=[row[name] for row in best],
            mode="lines",
            line={"dash": "dot", "color": "grey"},
            name="Pareto front",
        )
    )
    figure.update_layout(
        xaxis_title="network latency, p50 (ms)",
        yaxis_title=html.escape(f"{info.title}, 95 % bootstrap interval"),
        template="plotly_white",
        height=520,
        legend={"orientation": "h", "y": -0.2},
        margin={"t": 20},
    )
    text: str = figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False})
    return text


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; white-space: nowrap; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr.front td { background: #eef7ee; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: .8rem; }
.pictures img { width: 100%; } figure { margin: 0; } figcaption { font-size: 12px; color: #666; overflow-wrap: anywhere; }
.details { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; } h3 { font-size: 1rem; }
.note { color: #666; font-size: 13px; } .doubt { background: #fff3d6; padding: .6rem .8rem; }
"""


def web_address(link: str) -> bool:
    """Whether a link is a web address, and not a script or a file of this machine."""
    return re.fullmatch(r"https?://[^\s\"'<>\\]{1,2000}", link) is not None


def picture(folder: Path, name: str) -> bytes:
    """A picture of an evaluation.

    Raises:
        ValueError: the picture is not in that folder, is no JPEG, or is too large.
    """
    file = folder / name
    if not plain(name) or file.is_symlink() or not file.is_file() or file.stat().st_size > _MOST_PICTURE:
        raise ValueError(f"the picture {name[:120]!r} is not there, or too large")
    content = file.read_bytes()
    if not content.startswith(b"\xff\xd8\xff"):
        raise ValueError(f"the picture {name[:120]!r} is no JPEG")
    return content


def _pictures(result: Result) -> str:
    folder = result.folder / "pictures"
    captions: dict[str, str] = json.loads((folder / "captions.json").read_text())
    figures = []
    for name, source in captions.items():
        try:
            data = base64.b64encode(picture(folder, name)).decode()
        except ValueError as error:
            figures.append(f"<figure><figcaption>{html.escape(str(error))}</figcaption></figure>")
            continue
        link = f' · <a href="{html.escape(source)}">source</a>' if web_address(source) else ""
        caption = html.escape(f"image {Path(name).stem}") + link
        figures.append(
            f'<figure><img src="data:image/jpeg;base64,{data}" alt="predictions"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<div class="pictures">{"".join(figures)}</div>'


def _comparisons_html(folders: Sequence[Path]) -> str:
    text = ""
    for folder in folders:
        content = json.loads((folder / "comparison.json").read_text())
        for title, columns, rows in differences(content["engines"], content["pairs"]):
            text += f"<h2>Comparison: {html.escape(title)}</h2>{_table(columns, rows)}"
    return text
