"""The report's section on pruning: steps to a target, norms, sensitivity, and baselines of the retrained network."""

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.contracts import FIRST
from pipeline.report.collect import Result, primary
from pipeline.report.tables import between, digits, shorts

_CONTROL = re.compile(r"-(pruned|scratch\d+)$")
_ONE_CURVE = ("data_digest", "data", "network", "resolution", "keep_aspect_ratio_mode", "backend")


def _read(folder: Path | None, name: str) -> Any:
    file = None if folder is None else folder / name
    return json.loads(file.read_text()) if file is not None and file.exists() else None


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def base(pruning: str) -> str:
    """The pruner's label without the suffix that marks a baseline."""
    return _CONTROL.sub("", pruning)


def controls(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[list[str]]]]:
    """Dense, pruned, retrained and scratch side by side, for every pruning.

    Returns:
        A title and rows: kind of network, GMACs, the figure with its interval, its paired difference to the dense network, and
        the agreement with the dense network's predictions.
    """
    same = (
        "data",
        "network",
        "resolution",
        "keep_aspect_ratio_mode",
        "precision",
        "calibration",
        "backend",
        "threads",
        "batch",
        "boxes",
    )
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["pruning"] != "dense":
            groups.setdefault((base(row["pruning"]), *(row[key] for key in same)), []).append(row)
    found = []
    for key, own in groups.items():
        dense = [row for row in rows if row["pruning"] == "dense" and tuple(row[k] for k in same) == key[1:]]
        shown = []
        for row in [*dense, *sorted(own, key=_place)]:
            kind = _CONTROL.search(row["pruning"])
            what = "dense" if row["pruning"] == "dense" else kind[1] if kind else "pruned and retrained"
            lost = "" if row["pruning"] == "dense" else between(row, f"{primary(row)}_vs_dense", digits(row), "+")
            macs = f"{row['macs'] * 1e-9:.3f}" if row["macs"] != "" else "–"
            agreed = "" if row["agreement_with_dense"] == "" else f"{row['agreement_with_dense']:.3f}"
            shown.append(
                [what.replace("scratch", "from scratch, seed "), macs, between(row, primary(row), digits(row)), lost, agreed]
            )
        found.append((" · ".join(str(part) for part in key if part not in ("", None)), shown))
    return found


def _place(row: Mapping[str, Any]) -> tuple[int, str]:
    kind = _CONTROL.search(row["pruning"])
    return (1, "") if kind is None else (0, "") if kind[1] == "pruned" else (2, kind[1])


def curve(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A plot of the figure against MACs, of pruned and retrained networks and of equal structures trained from scratch.

    Networks that were not retrained are hidden at first: their figure is often 0, which would squeeze the others. A click on
    the legend shows them. The result is None for fewer than three trained networks, including the dense one.
    """
    import plotly.graph_objects as go

    plain = [row for row in rows if row["precision"] == "fp32" and row["macs"] != ""]
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in plain:
        kind = _CONTROL.search(row["pruning"])
        name = "dense and retrained" if kind is None else "from scratch" if kind[1].startswith("scratch") else "not retrained"
        if row["pruning"].startswith("torch_pruning"):
            name = f"Torch-Pruning as it comes, {'retrained' if kind is None else name}"
        kinds.setdefault(name, []).append(row)
    if sum(len(own) for name, own in kinds.items() if "not retrained" not in name) < 3:
        return None
    figure = go.Figure()
    colours = iter(("#2e6f95", "#d1603d", "#8a8d91", "#5b8c5a", "#b07aa1", "#c9a227"))
    for name, own in sorted(kinds.items(), key=lambda kind: ("not retrained" in kind[0], kind[0].startswith("Torch"), kind[0])):
        points = sorted(own, key=lambda row: row["macs"])
        figure.add_scatter(
            x=[row["macs"] * 1e-9 for row in points],
            y=[row[primary(row)] for row in points],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row[f"{primary(row)}_hi"] - row[primary(row)] for row in points],
                "arrayminus": [row[primary(row)] - row[f"{primary(row)}_lo"] for row in points],
            },
            mode="markers+lines" if name == "dense and retrained" else "markers",
            marker={"color": next(colours), "size": 9},
            text=[html.escape(f"{row['network']} {row['pruning']}") for row in points],
            name=name,
            visible="legendonly" if "not retrained" in name else True,
        )
    figure.update_layout(xaxis_title="GMACs an image", yaxis_title=html.escape(shorts(rows)), height=420, margin={"t": 20})
    return figure


def heat_map(content: Mapping[str, Any]) -> Any:
    """A heat map of the fields' error by group and ratio, measured by the stage "sensitivity"."""
    import plotly.graph_objects as go

    errors = content["error"]
    ratios = list(next(iter(errors.values())))
    figure = go.Figure(
        go.Heatmap(
            x=[f"{float(ratio):.0%}" for ratio in ratios],
            y=list(errors),
            z=[[np.log10(max(curve[ratio], 1e-4)) for ratio in ratios] for curve in errors.values()],
            text=[[f"{curve[ratio]:.3f}" for ratio in ratios] for curve in errors.values()],
            hovertemplate="%{y}: %{x} masked, error %{text}<extra></extra>",
            colorscale="Viridis",
            colorbar={"title": "error", "tickvals": [-4, -3, -2, -1, 0], "ticktext": ["1e-4", "1e-3", ".01", ".1", "1"]},
        )
    )
    figure.update_layout(
        xaxis_title="share of the group's channels masked", height=120 + 16 * len(errors), margin={"t": 20, "l": 260},
        yaxis={"autorange": "reversed"},
    )  # fmt: skip
    return figure


def _cuts_by_norm(groups: Mapping[str, Any] | None) -> bool:
    return groups is not None and groups["criterion"] == "group_l1"


def norm_plot(norms: Mapping[str, Any], groups: Mapping[str, Any] | None) -> Any:
    """A plot of channel norms before and after training, sorted in each group. With the pruner's values it shows the cut.

    Args:
        norms: "after" training and, if measured, "before", each with a list for every group.
        groups: the pruner's values and the number of kept channels of each group; None if nothing was pruned.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    colours = {"before": "#9bb3c9", "after": "#2e6f95"}
    for name in [name for name in colours if name in norms]:
        xs: list[float | None] = []
        ys: list[float | None] = []
        for n, values in enumerate(norms[name].values()):
            order = np.sort(values)[::-1]
            xs += [*(n + (np.arange(len(order)) + 0.5) / len(order)).tolist(), None]
            ys += [*np.maximum(order, 1e-6).tolist(), None]
        figure.add_scattergl(x=xs, y=ys, mode="lines", line={"color": colours[name]}, name=f"{name} training")
    if groups is not None and _cuts_by_norm(groups):
        own = {group["name"]: group for group in groups["groups"]}
        xs, ys = [], []
        for n, name in enumerate(norms["after"]):
            group = own.get(name)
            if group is None or group["importance"] is None or group["kept"] >= group["size"]:
                continue
            least = np.sort(group["importance"])[::-1][group["kept"] - 1]
            xs += [n, n + 1, None]
            ys += [max(float(least), 1e-6)] * 2 + [None]
        figure.add_scattergl(
            x=xs, y=ys, mode="lines", line={"color": "#d1603d", "dash": "dot"}, name="threshold: channels below it are removed"
        )
    names = list(norms["after"])
    figure.update_layout(
        xaxis={"tickvals": [n + 0.5 for n in range(len(names))], "ticktext": names, "tickangle": -60},
        yaxis={"type": "log", "title": "L1 norm of a channel's group"},
        height=480,
        margin={"t": 20},
    )
    return figure


def _steps(content: Mapping[str, Any]) -> str:
    dense, primary = content["steps"][0], content.get("primary", FIRST)
    rows = []
    for row in content["steps"]:
        cells = [row["step"], f"{row['params'] / 1e6:.3f}", f"{row['macs'] / 1e9:.3f} ({row['macs'] / dense['macs']:.3f}x)"]
        cells.append(f"{row['latency_ms']:.2f} ({row['latency_ratio']:.3f}x)" if "latency_ms" in row else "–")
        figure = row.get(primary)
        cells.append("–" if figure is None else f"{figure:.3f}")
        cells.append(f"{row['agreement']:.3f}" if "agreement" in row else "–")
        rows.append(cells)
    made = _table(["step", "M parameters", "GMACs", "p50 ms", "metric on tune images", "agreement with dense"], rows)
    if not any({primary, "latency_ms"} & row.keys() for row in content["steps"]):
        made += "<p>–: not measured. To measure it, set a target or several steps, and stages.prune.backend.</p>"
    flatters = "; removing them makes any pruner look good" if content["near_dead"] else ""
    made += (
        f"<p>{content['near_dead']} of the dense network's {content['channels']} channels are near dead (their norm is at most "
        f"a hundredth of their group's greatest){flatters}.</p>"
    )
    for reason, layers in content.get("left_out", {}).items():
        made += f"<p>Left out of pruning: {html.escape(', '.join(layers))} ({html.escape(reason)}).</p>"
    if content["divisors"]:
        divisors = [[str(r["round_to"]), f"{r['macs'] / 1e9:.3f}", f"{r['latency_ms']:.3g}"] for r in content["divisors"]]
        made += "<p>Channel counts as multiples of</p>" + _table(["divisor", "GMACs", "p50 ms"], divisors)
    return made


def section(results: Sequence[Result], rows: Sequence[Mapping[str, Any]], plot: Any) -> str:
    """The report's section on pruning; empty if nothing was pruned and no measurement for pruning exists.

    Args:
        results: all engines.
        rows: rows of the table, one for each engine.
        plot: function that makes HTML of a plotly figure.
    """
    parts, short = [], shorts(rows)
    for title, lines in controls(rows):
        parts.append(
            f"<h3>{html.escape(title)}</h3>"
            + _table(
                ["network", "GMACs", f"{short} [95 %]", f"{short} − dense FP32, paired", "agreement of both in FP32"], lines
            )
        )
    if any("-scratch" in row["pruning"] for row in rows):
        parts.append(
            "<p>From scratch: the pruned structure with random weights, trained for as many multiply-accumulates as the dense "
            "network, its pruning and its retraining took together.</p>"
        )
    groups_of_rows: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups_of_rows.setdefault(tuple(str(row[key]) for key in _ONE_CURVE), []).append(row)
    several = len({digest for digest, *_ in groups_of_rows}) > 1
    for (digest, *of), own in groups_of_rows.items():
        if (drawn := curve(own)) is not None:
            words = [*of, *([f"images {digest[:12]}"] if several else [])]
            parts.append(f"<h3>{html.escape(f'{short} against MACs: ' + ' · '.join(words))}</h3>{plot(drawn)}")
    seen: set[tuple[Path, str]] = set()
    for result in results:
        pruned = result.made_of.get("prune")
        if pruned is None:
            continue
        for stage, name, what in (
            ("prune", "steps.json", "steps"),
            ("sensitivity", "curves.json", "sensitivity"),
            ("train", "norms.json", "norms of the dense network"),
        ):
            folder = result.made_of.get(stage)
            groups = _read(pruned, "groups.json") if stage == "train" else None
            about = pruned if _cuts_by_norm(groups) else folder  # if the pruner used the norms, the plot shows its cut
            content = _read(folder, name) or (_read(pruned, name) if stage == "train" else None)
            if content is None or about is None or (about, what) in seen:
                continue
            seen.add((about, what))
            if stage == "prune":
                shown = _steps(content)
            else:
                sorted_by = "<p>The channels of each group, sorted by the norm that pruner.criterion=group_l1 uses.</p>"
                shown = plot(heat_map(content)) if stage == "sensitivity" else sorted_by + plot(norm_plot(content, groups))
            parts.append(f"<h3>{html.escape(about.name)}: {what}</h3>{shown}")
    return f"<h2>Pruning</h2>{''.join(parts)}" if parts else ""
