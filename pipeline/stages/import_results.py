"""import: results of a package, verified, beside those of this machine: in the next report, and in MLflow."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.deploy import results_zip
from pipeline.edge import PACKAGE
from pipeline.progress import say
from pipeline.results.job import Job
from pipeline.results.manifest import MANIFEST, write_manifest
from pipeline.results.stage import Stage
from pipeline.results.store import Results
from posepress.errors import UserError


def run(job: Job, results: str | None, outputs: str, name: str) -> dict[str, Any]:
    """Take in results.zip.

    Args:
        job: its folder takes what the package says of itself.
        results: the file.
        outputs: where results lie.
        name: that they belong to.

    Returns:
        The device, and for the tracker each cell with its axes, figures and stages.

    Raises:
        UserError: no file is given, it is not whole, or it would replace what was made here.
    """
    if results is None:
        raise UserError("results has no value, and stage=import needs it; give it as results=results.zip")
    there, file = Results(Path(outputs), name, "import"), Path(results)
    try:
        brought = results_zip.unpack(file, there, job.scratch / "unpacked")
        for place, manifest in brought.manifests.items():
            kind, _, address = place.partition("/")
            stage = Stage(kind, address, {})
            with there.lock(stage), there.writing(stage) as new:
                results_zip.check_place(file, there.folder(stage))
                shutil.copytree(brought.folder / place, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
                write_manifest(new, {**manifest, "imported": brought.device})
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)
    (job.out / PACKAGE).write_text(results_zip.describe(brought))
    evaluated = [m for place, m in brought.manifests.items() if place.startswith("evaluate/")]
    cells = [_cell(manifest, brought) for manifest in evaluated]
    for cell in cells:
        say(f"{brought.device}: {cell['stages'][0]['address']}")
    return {"device": brought.device, "cells": cells}


def _cell(evaluated: Mapping[str, Any], brought: results_zip.Brought) -> dict[str, Any]:
    """What the tracker logs of an evaluated engine."""
    engine = evaluated["inputs"]["engine"]
    of = [m for m in brought.manifests.values() if m["inputs"].get("engine") == engine]
    figures = {key: value for manifest in of for key, value in manifest["summary"].items()}
    stages = [{"stage": m["stage"], "address": m["address"], "summary": m["summary"]} for m in of]
    return {"axes": {**evaluated["config"]["axes"], "imported": brought.device}, "figures": figures, "stages": stages}
