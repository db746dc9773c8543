"""import: results of a package, verified, beside those of this machine: in the next report, and in MLflow."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from rich.console import Console

from pipeline import edge
from pipeline.artifacts import MANIFEST, Job, Results, Stage
from pipeline.errors import UserError


def run(job: Job, results: str | None, outputs: str, name: str) -> dict[str, Any]:
    """Take in results.zip.

    Args:
        job: its folder takes a copy of what the package says of itself.
        results: the file.
        outputs: where results lie.
        name: that they belong to.

    Returns:
        The device, and for the tracker each cell with its axes, figures and stages.

    Raises:
        UserError: no file is given, or it is not whole.
    """
    if results is None:
        raise UserError("results has no value, and stage=import needs it; give it as results=results.zip")
    there = Results(Path(outputs), name, "import")
    about, files = edge.read_results(Path(results), there)
    folders = sorted(PurePosixPath(file).parent for file in files if file.endswith(f"/{MANIFEST}"))
    for folder in folders:
        stage = Stage(folder.parts[0], folder.parts[1], {})
        with there.lock(stage), there.writing(stage) as new:
            for file, blob in files.items():
                if PurePosixPath(file).is_relative_to(folder):
                    target = new / PurePosixPath(file).relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(blob)
    (job.out / edge.PACKAGE).write_text(json.dumps(about, indent=1))
    manifests = {str(folder): json.loads(files[f"{folder}/{MANIFEST}"]) for folder in folders}
    cells = [_cell(manifest, manifests) for place, manifest in manifests.items() if place.startswith("evaluate/")]
    console = Console(stderr=True, highlight=False)
    for cell in cells:
        console.print(f"           {about['device']}: {cell['stages'][0]['address']}", soft_wrap=True, markup=False)
    return {"device": about["device"], "cells": cells}


def _cell(evaluated: dict[str, Any], manifests: dict[str, Any]) -> dict[str, Any]:
    """What the tracker logs of an evaluated engine."""
    engine = evaluated["inputs"]["engine"]
    of = [m for m in manifests.values() if m["inputs"].get("engine") == engine]
    figures = {key: value for manifest in of for key, value in manifest["summary"].items()}
    stages = [{"stage": m["stage"], "address": m["address"], "summary": m["summary"]} for m in of]
    return {"axes": evaluated["config"]["axes"], "figures": figures, "stages": stages}
