"""import: verify the results of a package, and add them to those of this machine for the next report and MLflow."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ImportResults:
    """Import results.zip.

    Attributes:
        results: the file results.zip of a package.
        outputs: folder of the results.
        name: name of the sweep that the results belong to.
    """

    results: str | None
    outputs: str
    name: str

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its folder gets the package's description of itself.

        Returns:
            The device, and for the tracker each cell with its axes, figures and stages.

        Raises:
            UserError: no file is given, the file is damaged, or it would replace results of this machine.
        """
        if self.results is None:
            raise UserError("results has no value, but stage=import needs it; give it as results=results.zip")
        there, file = Results(Path(self.outputs), self.name, "import"), Path(self.results)
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
    """The tracker's entry on an evaluated engine."""
    engine = evaluated["inputs"]["engine"]
    of = [m for m in brought.manifests.values() if m["inputs"].get("engine") == engine]
    figures = {key: value for manifest in of for key, value in manifest["summary"].items()}
    stages = [{"stage": m["stage"], "address": m["address"], "summary": m["summary"]} for m in of]
    return {"axes": {**evaluated["config"]["axes"], "imported": brought.device}, "figures": figures, "stages": stages}
