"""Logging to MLflow. The run of a sweep is the parent of its cells' runs, and a cell's run the parent of its stages' runs.

The client gets explicit ids, so that nothing depends on MLflow's current run.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from filelock import FileLock

from pipeline.launch.cell import Cell, plain
from pipeline.results.manifest import by_double
from posepress.errors import UserError, nearest

if TYPE_CHECKING:
    from mlflow import MlflowClient

_SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SQLITE = re.compile(r"sqlite(?:\+\w+)?://(.*)", re.DOTALL)
_LIBRARIES = ("mlflow", "sqlalchemy", "alembic", "sqlite3", "requests", "urllib3")
_SECONDS = 10  # longest time that a database or server may take to answer
# With MLflow's defaults, requests to a server that is down are repeated for four minutes.
_PATIENCE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_SECONDS),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}


def check(uri: str, experiment: str) -> None:
    """Check before any work that figures can be logged.

    Args:
        uri: MLflow's tracking URI.
        experiment: name of MLflow's experiment.

    Raises:
        UserError: MLflow does not support the URI, or its database or server cannot be reached, read or written.
    """
    scheme = uri.partition("://")[0].partition("+")[0]
    if scheme not in _SCHEMES:
        hint = "; MLflow no longer logs into folders, but into tracking.uri=sqlite:///FILE" if scheme == "file" else ""
        known = f"{', '.join(_SCHEMES[:-1])}://... or databricks"
        raise UserError(
            f"tracking.uri={_shown(uri)}: choose one of {known}, or tracking=none{hint or nearest(scheme, _SCHEMES)}"
        )
    with _explained(uri):
        if scheme == "sqlite":
            _check_database(_database(uri), uri, experiment)
        elif scheme == "databricks":
            _client(uri).get_experiment_by_name(experiment)
        else:
            where = urlsplit(uri)
            if not where.hostname:
                raise ValueError("it names no host")
            if scheme in ("http", "https"):
                _client(uri).get_experiment_by_name(experiment)
            else:
                _check_server(uri, where.hostname, where.port or _PORTS[scheme])


def _check_server(uri: str, host: str, port: int) -> None:
    """Check that the driver of a database is installed and that its server answers. MLflow itself would try for minutes."""
    from sqlalchemy import create_engine

    try:
        create_engine(uri).dispose()  # imports the driver
    except ModuleNotFoundError as error:
        raise UserError(
            f"tracking.uri={_shown(uri)}: the Python package '{error.name}' is not installed here; install it, or choose "
            "tracking=none"
        ) from error
    socket.create_connection((host, port), _SECONDS).close()


def _shown(uri: str) -> str:
    """A URI without its password."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


@contextmanager
def _explained(uri: str, fix: str = "correct the URI or choose tracking=none") -> Iterator[None]:
    """Convert exceptions of MLflow, its database and its server, which have no common base class, into one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _LIBRARIES and not isinstance(
            error, (OSError, ValueError, ImportError)
        ):
            raise
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if "Max retries exceeded" in text:
            text = f"no answer from this server ({_innermost(error)})"
        raise UserError(f"tracking.uri={_shown(uri)}: {_shown(text)[:300]}; {fix}") from error


def _innermost(error: BaseException) -> str:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _database(uri: str) -> Path:
    """Return the file of an sqlite URI.

    Raises:
        ValueError: the URI names no file.
    """
    found = _SQLITE.fullmatch(uri)
    path = found[1] if found else ""
    if "?" in path:
        raise ValueError("a '?' ends the path in such an address; choose a folder without one (outputs=DIR)")
    if not path.startswith("/") or path[1:] in ("", ":memory:"):
        raise ValueError("it names no file; give sqlite:///FILE, or sqlite:////FILE from the root")
    return Path(path[1:])


def _check_database(file: Path, uri: str, experiment: str) -> None:
    """Check that a database can be written. An existing one must be MLflow's, and its experiment must not be deleted.

    Raises:
        UserError: the database cannot be written or is not MLflow's, or the experiment was deleted.
        OSError: the folder of the database cannot be made.
    """
    import sqlite3  # some devices' Python lacks sqlite3

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise UserError(
            f"tracking.uri={uri}: cannot write in {file.parent} ({error.strerror}); choose another folder, or tracking=none"
        ) from error
    if file.is_file() and file.stat().st_size:
        name = f"file:{quote(str(file.resolve()))}?mode=rw"
        try:
            with closing(sqlite3.connect(name, timeout=_SECONDS, uri=True)) as database:
                database.execute("SELECT version_num FROM alembic_version").fetchone()
                query = "SELECT lifecycle_stage FROM experiments WHERE name = ?"
                stages = [stage for (stage,) in database.execute(query, (experiment,))]
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
        except sqlite3.Error as error:
            lost = "no such table" in str(error) or "not a database" in str(error)
            fix = "move it away" if lost else "make it writable"
            raise UserError(
                f"tracking.uri={uri}: {file} is not MLflow's, or cannot be used ({error}); "
                f"{fix}, choose another, or tracking=none"
            ) from error
        if "deleted" in stages:
            raise UserError(
                f"tracking.uri={uri}: the experiment {experiment} was deleted there; restore it (mlflow experiments restore), "
                "give another name=NAME, or choose tracking=none"
            )
    elif file.exists() and not file.is_file():
        raise UserError(f"tracking.uri={uri}: {file} is no file; choose another, or tracking=none")


def _client(uri: str) -> "MlflowClient":
    """Return MLflow's client, with few log messages and short timeouts.

    Raises:
        UserError: MLflow is not installed.
    """
    for name, value in {**_PATIENCE, "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_DISABLE_TELEMETRY": "true"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise UserError(
            "tracking=mlflow: MLflow is not installed here; install posepress[full] or choose tracking=none"
        ) from error
    return MlflowClient(uri)


class Log:
    """The list of results that an MLflow store has, kept in outputs/runs/logged. The next run logs the missing ones."""

    def __init__(self, outputs: Path, uri: str, name: str) -> None:
        """Open the list for results of `name` under `outputs` in the store `uri`."""
        known = _SQLITE.fullmatch(uri)
        self._file = Path(known[1].removeprefix("/")) if known else None
        store = _shown(uri)
        if self._file is not None:  # relative, because the folder outputs may be moved with its database
            here, file = outputs.resolve(), self._file.resolve()
            store = str(file.relative_to(here) if file.is_relative_to(here) else file)
        self._folder = outputs / "runs" / "logged" / hashlib.sha256(store.encode()).hexdigest()[:16]
        self._name = name

    def _entry(self, stage: str, address: str) -> Path:
        return self._folder / self._name / f"{stage}@{address}"

    def has(self, stage: str, address: str, fingerprint: str) -> bool:
        """Whether the store has this result."""
        entry = self._entry(stage, address)
        return (self._file is None or self._file.exists()) and entry.is_file() and entry.read_bytes() == fingerprint.encode()

    def note(self, stage: str, address: str, fingerprint: str) -> None:
        """Record that the store has this result."""
        entry = self._entry(stage, address)
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.write_text(fingerprint)

    def forget(self) -> None:
        """Clear the list, because the store is new and has no results."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Cells:
    """The logbook of a cell.

    Attributes:
        log: list of the logged results; None if tracking is off or the folder cannot be written.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    @cached_property
    def log(self) -> "Log | None":
        """The list of the logged results, which is opened at the first use."""
        config, results = self.cell.config, self.cell.results
        if not config.tracking.enabled or not results.writable:
            return None
        return Log(results.outputs, str(config.tracking.uri), str(config.name))

    def check(self) -> None:
        """Check before any work that figures can be logged.

        Raises:
            UserError: figures cannot be logged.
        """
        if self.log is not None:
            check(str(self.cell.config.tracking.uri), str(self.cell.config.name))

    def has(self, stage: str, address: str, fingerprint: str) -> bool:
        """Whether a result was logged. True also if nothing is logged."""
        return self.log is None or self.log.has(stage, address, fingerprint)

    def write(self, error: str | None) -> None:
        """Log the stages that the cell ran, and its error if it failed."""
        cell, config = self.cell, self.cell.config
        if not cell.ran or self.log is None:
            return
        figures: dict[str, Any] = {}
        for name, wanted in (("export", {"params"}), ("quantize", {"macs"}), ("evaluate", None), ("benchmark", None)):
            summary = cell.summaries.get(name, {})
            figures |= {key: value for key, value in summary.items() if wanted is None or key in wanted}
        tracker = Tracker(str(config.tracking.uri), str(config.name), cell.results.run)
        brought = [(ran, imported) for ran in cell.ran for imported in ran["summary"].get("cells", [])]
        for ran, imported in brought:  # cells imported from a device
            times = {"started": ran["started"], "ended": ran["ended"]}
            stages = [{**stage, **times} for stage in imported["stages"]]
            tracker.log_cell(imported["axes"], imported["figures"], stages, None)
        if not brought:
            tracker.log_cell(plain(config.axes), figures, cell.ran, error)


class Tracker:
    """Logs the cells of one launch."""

    def __init__(self, uri: str, experiment: str, run: Path) -> None:
        """Open the experiment and the run of the sweep. The first cell of a launch creates that run.

        Args:
            uri: MLflow's tracking URI; an sqlite file and its folder are created if missing.
            experiment: name of the experiment, which equals the name of the results.
            run: folder of the launch, which its processes share.

        Raises:
            UserError: MLflow cannot reach the URI.
        """
        folder = run.parent.parent
        self.uri, self.log = uri, Log(folder, uri, experiment)
        location = None
        with _explained(uri):
            if _SQLITE.fullmatch(uri):
                file = _database(uri)
                file.parent.mkdir(parents=True, exist_ok=True)
                location = (folder / "mlartifacts").resolve().as_uri()
                ours = file.resolve().is_relative_to(folder.resolve())
                lock = folder / "runs" / "mlflow.lock" if ours else file.with_name(f".{file.name}.lock")
                uri = f"sqlite:///{file.resolve()}"
            else:
                file, lock = None, folder / "runs" / "mlflow.lock"
            with FileLock(lock):
                if file is not None and not (file.exists() and file.stat().st_size):
                    _make_database(file)
                    self.log.forget()
                self.client = _client(uri)
                found = self.client.get_experiment_by_name(experiment)
                self.experiment = found.experiment_id if found else self.client.create_experiment(experiment, location)
                self.sweep = self._sweep(run)

    def _sweep(self, run: Path) -> str:
        file = run / "mlflow.json"
        if file.exists():
            return str(json.loads(file.read_text())["sweep"])
        sweep = self._start(run.name, {"kind": "sweep"}, None)
        self.client.set_terminated(sweep)
        file.parent.mkdir(parents=True, exist_ok=True)
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
        """Log a cell and its new stages, and record that the store has them.

        Args:
            axes: choices that distinguish the cell from others.
            figures: figures of the finished stages; those of the TensorRT double are left out.
            stages: "stage", "address", "started" and "ended" (in seconds) and "summary" of each stage, and "fingerprint" if
                the result was made on this machine.
            error: error message of the cell; None if it succeeded.

        Raises:
            UserError: the store refuses the run; the next command logs it again.
        """
        with _explained(self.uri, "the results are whole, and the next run logs them"):
            self._log_cell(axes, figures, stages, error)
        for stage in stages:
            if "fingerprint" in stage:
                self.log.note(stage["stage"], stage["address"], stage["fingerprint"])

    def _log_cell(
        self, axes: Mapping[str, Any], figures: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], error: str | None
    ) -> None:
        if by_double(figures):
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


def _make_database(file: Path) -> None:
    """Create MLflow's database under a temporary name and rename it, so that an interrupted creation leaves no database."""
    for leftover in file.parent.glob(f".{file.name}.new-*"):  # the pattern includes sqlite's journal
        leftover.unlink()
    new = file.with_name(f".{file.name}.new-{time.time_ns()}")  # unique, since MLflow caches databases by name
    _client(f"sqlite:///{new.resolve()}")  # opening makes the tables
    new.replace(file)
