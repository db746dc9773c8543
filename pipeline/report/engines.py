"""The report's section on engines: every layer that ran, drawn by its share of the time and coloured by precision."""

import html
import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from evaluation import audit
from pipeline.report.collect import Result

_COLOURS = {"int8": "#7fa66a", "fp8": "#4f9d9d", "fp16": "#e0a83a", "bf16": "#c98bb9", "tf32": "#b5651d", "fp32": "#d1603d"}
_OTHER = "#999999"
_MANY = 150  # from this number of layers on, no gaps are drawn between them
_MOST = 24  # largest number of drawn engines, since a study has hundreds
_NAMED = ("network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration", "backend", "boxes")


def sections(results: Sequence[Result]) -> str:
    """HTML of every engine with known layers, and of the differences between rebuilds."""
    return _rebuilds(results) + _drawn(results)


def rebuilds(results: Sequence[Result]) -> list[dict[str, Any]]:
    """For engines that were built more than once: the number of builds, and mean and deviation of figure and latency."""
    groups: dict[tuple[str, ...], dict[int, Result]] = {}
    for result in results:
        timed = [result.figures.get(name) for name in ("threads", "device")]
        key = tuple(str(value) for value in (*(v for name, v in result.axes.items() if name != "rebuild"), *timed))
        groups.setdefault(key, {})[int(result.axes.get("rebuild", 0))] = result
    rows = []
    for builds in groups.values():
        if len(builds) > 1:
            first = next(iter(builds.values()))
            row: dict[str, Any] = {**first.axes, "builds": len(builds), "metric": first.metric}
            for figure in (first.metric.primary, "latency_p50_ms"):
                values = [float(r.figures[figure]) for r in builds.values() if figure in r.figures]
                if len(values) == len(builds):
                    row |= {figure: fmean(values), f"{figure}_sd": stdev(values), f"{figure}_range": max(values) - min(values)}
            rows.append(row)
    return rows


def _rebuilds(results: Sequence[Result]) -> str:
    rows, repeated = "", rebuilds(results)
    for row in repeated:
        cells = [" ".join(str(row[key]) for key in _NAMED if row.get(key)), str(row["builds"])]
        for figure, digits in ((row["metric"].primary, row["metric"].digits + 1), ("latency_p50_ms", 3)):
            known = f"{row[figure]:.{digits}f} ± {row[f'{figure}_sd']:.{digits}f}" if figure in row else "–"
            cells += [known, f"{row[f'{figure}_range']:.{digits}f}" if figure in row else "–"]
        rows += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
    short = html.escape(" or ".join(dict.fromkeys(row["metric"].short for row in repeated)))
    head = "".join(
        f"<th>{name}</th>" for name in ("engine", "builds", f"{short} ± deviation", "range", "p50 ms ± deviation", "range")
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return f"<h2>The same engine, built again</h2>{table}" if rows else ""


def _drawn(results: Sequence[Result]) -> str:
    drawn = []
    for result in results:
        folder = result.made_of.get("benchmark")
        if folder is not None and (folder / "audit.json").exists():
            layers = json.loads((folder / "audit.json").read_text())
            name = " ".join(str(result.axes[key]) for key in _NAMED if result.axes.get(key))
            drawn.append(f"<h3>{html.escape(name)}</h3>{strip(layers)}")
    if not drawn:
        return ""
    legend = " ".join(
        f'<span style="background:{colour};color:white;padding:0 6px">{name}</span>' for name, colour in _COLOURS.items()
    )
    more = f'<p class="note">{len(drawn) - _MOST} more engines are not drawn.</p>' if len(drawn) > _MOST else ""
    return (
        '<h2>What ran in which precision</h2><p class="note">Each box is a layer. Its width is its share of the time (of the '
        f"MACs if nothing was timed); hover to see its name. {legend}</p>{''.join(drawn[:_MOST])}{more}"
    )


def strip(layers: Sequence[Mapping[str, Any]]) -> str:
    """Layers in order as boxes, and the shares of time, MACs and layers in each precision."""
    timed = any(layer.get("us") for layer in layers)
    widths = [float(layer.get("us", 0.0)) if timed else float(layer["macs"]) for layer in layers]
    total = max(sum(widths), 1e-12)
    quantized = any(layer["precision"] in ("int8", "fp8") for layer in layers)  # else no layer was meant to be INT8
    boxes = "".join(
        f'<div title="{html.escape(_words(layer, quantized))}" style="flex:{max(width / total, 0.0005):.5f} 0 0;height:28px;'
        f'background:{_COLOURS.get(layer["precision"], _OTHER)};{"opacity:.35" if layer.get("reformat") else ""}"></div>'
        for layer, width in zip(layers, widths, strict=True)
    )
    shares = [
        f"{kind}: {html.escape(audit.label(found))}" for kind in reversed(audit.KINDS) if (found := audit.shares(layers, kind))
    ]
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in audit.counts(layers).items())
    return (
        f'<div style="display:flex;gap:{int(len(layers) < _MANY)}px;max-width:900px;overflow:hidden">{boxes}</div>'
        f'<p class="note">{"; ".join(shares)}; {html.escape(counts)}</p>'
    )


def _words(layer: Mapping[str, Any], quantized: bool) -> str:
    parts = [f"{layer['name']} ({layer['op']}): {layer['precision']}"]
    parts += [f"{layer['us']:.1f} us"] if layer.get("us") else []
    parts += [f"{layer['macs'] / 1e6:.2f} MMACs"] if layer["macs"] else []
    return ", ".join(parts + ([layer["reason"]] if layer.get("reason") and quantized else []))
