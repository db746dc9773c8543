"""MLflow: a sweep holds its cells, a cell its stages. By client with explicit ids, so that nothing depends on a current run."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.errors import UserError


class Tracker:
    """Logs the cells of one launch."""

    def __init__(self, uri: str, experiment: str, run: Path) -> None:
        """Open the experiment, and the sweep's run, which the first cell of a launch makes.

        Args:
            uri: MLflow's tracking URI; sqlite files are made with their folder.
            experiment: its name.
            run: the launch's folder, shared by its processes.

        Raises:
            UserError: MLflow cannot reach the URI.
        """
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        logging.getLogger("alembic").setLevel(logging.ERROR)
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise UserError(
                "tracking=mlflow: MLflow is not installed here; install posepress[full] or choose tracking=none"
            ) from error

        folder = run.parent.parent
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            # A new sqlite file is migrated by whoever opens it first; two at once would corrupt it.
            with FileLock(folder / "runs" / "mlflow.lock"):
                self.client = MlflowClient(uri)
                found = self.client.get_experiment_by_name(experiment)
                location = (folder / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:///") else None
                self.experiment = found.experiment_id if found else self.client.create_experiment(experiment, location)
                self.sweep = self._sweep(run)
        except MlflowException as error:
            first = str(error).splitlines()[0]
            raise UserError(f"tracking.uri={uri}: {first}; mend the URI or choose tracking=none") from error

    def _sweep(self, run: Path) -> str:
        file = run / "mlflow.json"
        if file.exists():
            return str(json.loads(file.read_text())["sweep"])
        sweep = self._start(run.name, {"kind": "sweep"}, None)
        self.client.set_terminated(sweep)
        file.write_text(json.dumps({"sweep": sweep}))
        return sweep

    def _start(self, name: str, tags: Mapping[str, str], parent: str | None, started: float | None = None) -> str:
        every = {**tags, "mlflow.runName": name, **({"mlflow.parentRunId": parent} if parent else {})}
        start = None if started is None else int(started * 1000)
        run = self.client.create_run(self.experiment, start_time=start, tags=every, run_name=name)
        return str(run.info.run_id)

    def _fill(self, run: str, params: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param

        now = 0
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        words = {k: v for k, v in metrics.items() if isinstance(v, str)}
        self.client.log_batch(
            run,
            metrics=[Metric(k, v, now, 0) for k, v in numbers.items()],
            params=[Param(k, str(v)) for k, v in {**words, **params}.items()],
        )

    def log_cell(
        self,
        axes: Mapping[str, Any],
        figures: Mapping[str, Any],
        stages: Sequence[Mapping[str, Any]],
        error: str | None,
    ) -> None:
        """Log a cell and the stages that ran in it.

        Args:
            axes: what tells the cell from others.
            figures: of the cell as far as it is finished; those of the TensorRT double are left out.
            stages: "stage", "address", "started", "ended" (seconds), "summary" of each that ran.
            error: why the cell failed, or None.
        """
        if str(figures.get("backend", "")).endswith("-double"):
            figures = {"backend": figures["backend"]}
            stages = [{**stage, "summary": {}} for stage in stages]
        name = " ".join(str(axes[key]) for key in ("network", "pruning", "resolution", "precision", "backend") if key in axes)
        cell = self._start(name, {"kind": "cell"}, self.sweep, stages[0]["started"])
        self._fill(cell, axes, figures)
        for stage in stages:
            run = self._start(stage["stage"], {"kind": "stage"}, cell, stage["started"])
            self._fill(run, {"address": stage["address"]}, stage["summary"])
            self.client.set_terminated(run, "FINISHED", int(stage["ended"] * 1000))
        if error is not None:
            self.client.set_tag(cell, "error", error[:5000])
        self.client.set_terminated(cell, "FINISHED" if error is None else "FAILED")
