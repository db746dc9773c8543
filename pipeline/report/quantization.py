"""The report's section on quantization: images, errors after each step, precision of layers, a calibration study."""

import base64
import html
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report.collect import Result


def sections(results: Sequence[Result]) -> str:
    """HTML of every quantized network, each once."""
    seen: set[Path] = set()
    text = study_html(list(study(results)))
    ran: dict[Path, dict[str, list[str] | None]] = {}
    for result in results:
        if (folder := result.made_of.get("quantize")) is not None and "not_in_int8" in result.figures:
            ran.setdefault(folder, {})[str(result.figures["backend"])] = result.figures["not_in_int8"]
    for result in results:
        folder = result.made_of.get("quantize")
        if folder is None or folder in seen or result.axes["precision"] == "fp32":
            continue
        seen.add(folder)
        summary = json.loads((folder / "manifest.json").read_text())["summary"]
        parts = [
            _steps(folder),
            _sensitivity(folder),
            _kept(summary),
            "" if result.axes["precision"] in ("fp16", "bf16") else _not_in_int8(ran.get(folder, {})),
            _sampled(result.made_of.get("sample")),
        ]
        if any(parts) and len(seen) <= _MOST:
            name = " ".join(str(result.axes[key]) for key in _NAMED)
            text += f"<h2>How {html.escape(name)} was quantized</h2>{''.join(parts)}"
    return text


_NAMED = ("network", "pruning", "resolution", "keep_aspect_ratio_mode", "precision", "calibration")
_MOST = 12  # largest number of networks shown, since a study has hundreds


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _steps(folder: Path) -> str:
    """The error after each step of INT8."""
    file = folder / "steps.json"
    steps = json.loads(file.read_text()) if file.exists() else []
    if not steps:
        return ""
    fields = [key for key in steps[0] if key != "step"]
    rows = [[step["step"].replace("_", " "), *(f"{step[name]:.4f}" for name in fields)] for step in steps]
    return "<p>Relative error of the fields on tune images, after each step:</p>" + _table(["step", *fields], rows)


def _kept(summary: Mapping[str, Any]) -> str:
    """The layers in float, and remarks on scales and weights."""
    notes = []
    if summary.get("float_layers"):
        notes.append(f"{len(summary['float_layers'])} layers in float: {', '.join(summary['float_layers'][:12])}")
    if "kept_fp32" in summary:
        kept = summary["kept_fp32"]
        notes.append(f"kept in FP32 for overflow: {', '.join(kept) if kept else 'none'}")
    if summary.get("constant"):
        notes.append(f"{len(summary['constant'])} activations were 0 in every calibration image (scale 1)")
    if summary.get("clamped_scales"):
        notes.append(f"{summary['clamped_scales']} scales raised to 2^-14")
    if summary.get("zero_weight_channels"):
        notes.append(f"{summary['zero_weight_channels']} channels of weights are all 0 (scale 1)")
    if summary.get("weight_bits") == 7:
        notes.append("weights of 7 bits, because this processor has no VNNI")
    return "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)


def _not_in_int8(backends: Mapping[str, Sequence[str] | None]) -> str:
    """The quantized layers that a backend did not run in INT8."""
    text = ""
    for backend, names in backends.items():
        more = f" and {len(names) - _MOST} more" if names and len(names) > _MOST else ""
        listed = "not checked" if names is None else f"{', '.join(names[:_MOST])}{more}" if names else "nothing"
        text += f'<p class="note">Quantized, but not run in INT8 on {html.escape(backend)}: {html.escape(listed)}</p>'
    return text


def _sampled(folder: Path | None) -> str:
    """The pictures of the strata and of the calibration images."""
    if folder is None:
        return ""
    text = ""
    for name, kind in (("strata.png", "png"), ("contact_sheet.jpg", "jpeg")):
        if (folder / name).exists():
            data = base64.b64encode((folder / name).read_bytes()).decode()
            text += f'<img style="max-width:48%" src="data:image/{kind};base64,{data}" alt="{name}">'
    return f"<details><summary>Calibration images: {html.escape(folder.name)}</summary>{text}</details>" if text else ""


def _sensitivity(folder: Path) -> str:
    """Charts of each unit's cost and gain in float, the finalists, and the precision of every layer."""
    file = folder / "sensitivity.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    finalists = found["finalists"]
    keys = [key for key in finalists[0] if not key.endswith(("_lo", "_hi"))]
    chosen = found["chosen"]
    rows = [
        [("→ " if n == chosen else "") + str(row["float_units"]), *(f"{row[k]:.4g}" for k in keys[1:])]
        for n, row in enumerate(finalists)
    ]
    words = ", ".join(f"with {name} {value:.2f}" for name, value in found["rank_correlation"].items() if value is not None)
    kept = set(found["order"][: finalists[chosen]["float_units"]])
    units = found["units"]
    most = max(*(unit["gain"] for unit in units), 1e-12)
    bars = "".join(
        f'<div title="{html.escape(", ".join(unit["nodes"]))}: gain {unit["gain"]:.2e}, {unit["cost"]:+.2f} ms" style="flex:1;'
        f'height:{4 + 76 * max(unit["gain"], 0) / most:.0f}px;background:{"#d1603d" if n in kept else "#7fa66a"}"></div>'
        for n, unit in enumerate(units)
    )
    cells = "".join(
        f'<div title="{html.escape(layer["name"])} ({layer["op"]}): {layer["precision"]}" style="flex:1;height:14px;'
        f'background:{"#7fa66a" if layer["precision"] == "int8" else "#d1603d"}"></div>'
        for layer in found["layers"]
    )
    solved = f"on {found['backend']}" + ("" if found["timed"] else " without timing")
    return (
        f"<p>Budget solved {html.escape(solved)}: {finalists[chosen]['float_units']} of {len(units)} units in float"
        f"{'' if 'agreement' in finalists[0] else '; agreement was not used: FP32 predicts no person there'}. "
        f"Rank correlation of the fields' error {html.escape(words) or 'not known'}.</p>"
        f'<div style="display:flex;align-items:flex-end;gap:2px;max-width:900px">{bars}</div>'
        '<p class="note">Height: squared error of the fields that is removed if only this unit is in float. '
        "Green INT8, red float; below, every layer in order.</p>"
        f'<div style="display:flex;gap:1px;max-width:900px">{cells}</div>' + _table(["units in float", *keys[1:]], rows)
    )


def study(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """The figure and agreement by number of calibration images, sampler and algorithm, if several seeds were drawn."""
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in results:
        folders = [result.made_of.get(stage) for stage in ("sample", "quantize")]
        if result.axes["precision"] != "int8" or None in folders:
            continue
        sample, quantize = (json.loads((folder / "manifest.json").read_text()) for folder in folders if folder)
        sampler, quantizer = dict(sample["config"]["sampler"]), dict(quantize["config"]["quantizer"])
        seed, count = int(sampler.pop("seed")), int(sampler.pop("num_images"))
        kind = "coverage" if "Coverage" in sampler["_target_"] else "stratified" if sampler["columns"] else "uniform"
        method = str(quantizer.get("calibration_method", result.axes["calibration"]))
        axes = ("data", "network", "pruning", "resolution", "keep_aspect_ratio_mode", "backend", "boxes")
        where = tuple(str(result.axes[key]) for key in axes if key in result.axes)
        rest = json.dumps([sampler, quantizer, sample["config"]["images"]], sort_keys=True)  # other differences split groups
        groups.setdefault((where, kind, method, count, rest), {})[seed] = result
    for (where, kind, method, count, _), seeds in sorted(groups.items(), key=lambda item: str(item[0])):
        if len(seeds) > 1:
            row: dict[str, Any] = {
                "where": " ".join(where),
                "sampler": kind,
                "method": method,
                "images": count,
                "seeds": len(seeds),
            }
            info = next(iter(seeds.values())).metric
            for figure, key in (("figure", info.primary), ("agreement", f"agreement_{info.primary}")):
                known = (r.figures.get(key, info.nothing) for r in seeds.values())
                values = np.array([float(value) for value in known if value != info.nothing])
                if len(values) == len(seeds):
                    row |= {figure: float(values.mean()), f"{figure}_sd": float(values.std(ddof=1))}
            yield row


def study_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """The study as a table and a plot against the number of images, of agreement or, if it is missing, of the figure."""
    if not rows:
        return ""
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = "agreement" if all("agreement" in row for row in rows) else "figure"
    for where, kind, method in sorted({(row["where"], row["sampler"], row["method"]) for row in rows}):
        line = sorted(
            (r for r in rows if (r["where"], r["sampler"], r["method"]) == (where, kind, method)), key=lambda r: r["images"]
        )
        figure.add_trace(
            go.Scatter(
                x=[row["images"] for row in line],
                y=[row[shown] for row in line],
                error_y={"array": [row[f"{shown}_sd"] for row in line], "thickness": 1},
                mode="lines+markers",
                name=html.escape(f"{kind}, {method}"),
                hovertext=html.escape(where),
            )
        )
    figure.update_layout(
        xaxis={"title": "calibration images", "type": "log"},
        yaxis_title=f"{shown}, mean and deviation over seeds",
        template="plotly_white",
        height=480,
        margin={"t": 20},
    )
    columns = ["sampler", "method", "images", "seeds", "figure", "figure_sd", "agreement", "agreement_sd", "where"]
    table = [[f"{row[c]:.4f}" if isinstance(row.get(c), float) else str(row.get(c, "–")) for c in columns] for row in rows]
    plot = figure.to_html(full_html=False, include_plotlyjs=True, config={"displaylogo": False})
    return f"<h2>Calibration study</h2>{plot}{_table(columns, table)}"
