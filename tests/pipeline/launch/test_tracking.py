"""MLflow: a sweep holds cells, a cell holds stages; several processes at once on a new database; stores that fail."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from pipeline.launch.tracking import Cells, Log, Tracker, check
from posepress.errors import UserError
from tests.conftest import ROOT


def runs(folder):
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    experiment = client.get_experiment_by_name("smoke")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return {kind: [r for r in found if r.data.tags.get("kind") == kind] for kind in ("sweep", "cell", "stage")}


def test_a_sweep_is_one_tree_whose_cells_compare(finished):
    found = runs(finished)
    (sweep,) = found["sweep"]
    assert len(found["cell"]) == 4
    parents = {r.info.run_id for r in found["cell"]}
    assert all(r.data.tags["mlflow.parentRunId"] == sweep.info.run_id for r in found["cell"])
    assert all(r.data.tags["mlflow.parentRunId"] in parents for r in found["stage"])
    for cell in found["cell"]:
        assert {"network", "pruning", "resolution", "precision", "backend", "device"} <= set(cell.data.params)
        assert {"ap", "latency_p50_ms", "params", "speedup"} <= set(cell.data.metrics)
    assert {(c.data.params["pruning"], c.data.params["precision"]) for c in found["cell"]} == {
        ("dense", "fp32"), ("dense", "int8"), ("l1-0.45-r16", "fp32"), ("l1-0.45-r16", "int8"),
    }  # fmt: skip
    names = [r.info.run_name for r in found["stage"]]
    assert names.count("train") == 1, "what is fresh is not logged again"
    assert names.count("evaluate") == 4


def test_processes_that_start_together_share_one_database(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pipeline.launch.tracking import Tracker\n"
        "t = Tracker('sqlite:///outputs/mlflow.db', 'race', Path('outputs/runs/one'))\n"
        "stage = {'stage': 'train', 'address': 'a', 'started': 1., 'ended': 2., 'summary': {}}\n"
        "t.log_cell({'network': sys.argv[1]}, {'ap': .5}, [stage], None)\n"
    )
    (tmp_path / "outputs/runs/one").mkdir(parents=True)
    words = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(
            [*words, str(n)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("race").experiment_id])
    kinds = [r.data.tags["kind"] for r in found]
    assert (kinds.count("sweep"), kinds.count("cell"), kinds.count("stage")) == (1, 2, 2)


def test_the_double_and_failures_are_marked(tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "x", tmp_path / "runs/one")
    stages = [{"stage": "evaluate", "address": "a", "started": 1.0, "ended": 2.0, "summary": {"ap": 0.5}}]
    tracker.log_cell({"network": "n"}, {"ap": 0.5, "backend": "tensorrt-double"}, stages, "it broke")
    found = tracker.client.search_runs([tracker.experiment])
    assert all("ap" not in run.data.metrics for run in found)
    (cell,) = (run for run in found if run.data.tags["kind"] == "cell")
    assert cell.info.status == "FAILED"
    assert cell.data.tags["error"] == "it broke"
    assert cell.data.params["backend"] == "tensorrt-double"


def test_an_address_that_is_none_is_refused(tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    with pytest.raises(UserError, match=r"tracking\.uri=nonsense://x.*tracking=none"):
        Tracker("nonsense://x", "x", tmp_path / "runs/one")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("nonsense://x", "choose one of sqlite, http"),
        ("sqllite:///x.db", "did you mean 'sqlite'"),
        ("file:///tmp/mlruns", "no longer logs into folders"),
        ("mlruns", "choose one of sqlite, http"),
        ("None", "choose one of sqlite, http"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///?x=1/mlflow.db", "a '.' ends the path"),
        ("sqlite:///{folder}", "is no file"),
        ("sqlite:///{folder}/text.db", "is not MLflow's.*move it away"),
        ("sqlite:///{folder}/half.db", "is not MLflow's.*no such table.*move it away"),
        ("sqlite:///{folder}/deleted.db", "the experiment x was deleted there; restore it"),
        ("sqlite:////proc/x/mlflow.db", "/proc"),
        ("postgresql://me:secret@127.0.0.1:1/x", "the Python package 'psycopg2?' is not installed here"),
        ("mysql+pymysql://me:secret@127.0.0.1/x", "the Python package 'pymysql' is not installed here"),
        ("postgresql+foo://me:secret@127.0.0.1/x", "Can't load plugin"),
        ("http://", "names no host"),
        ("http://me:secret@127.0.0.1:1", r"no answer from this server .Connection refused."),
    ],
)
def test_a_store_that_cannot_take_figures_is_refused_before_any_work(uri, message, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "text.db").write_text("no database" * 1000)
    with closing(sqlite3.connect(tmp_path / "half.db")) as database:
        database.execute("CREATE TABLE experiments (x)")
    with closing(sqlite3.connect(tmp_path / "deleted.db")) as database:
        database.execute("CREATE TABLE alembic_version AS SELECT '1' AS version_num")
        database.execute("CREATE TABLE experiments AS SELECT 'x' AS name, 'deleted' AS lifecycle_stage")
        database.commit()
    with pytest.raises(UserError, match=rf"(?s)^tracking\.uri=.*{message}") as found:
        check(uri.format(folder=tmp_path), "x")
    assert "tracking=none" in str(found.value)
    assert "secret" not in str(found.value)
    assert "\n" not in str(found.value)


def test_a_database_whose_server_is_not_there_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr("sqlalchemy.create_engine", lambda uri: SimpleNamespace(dispose=lambda: None))
    reached = []

    def connect(address, timeout):
        reached.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr("socket.create_connection", connect)
    for uri in ("postgresql://me:secret@127.0.0.1:1/x", "mysql+pymysql://me:secret@127.0.0.1/x"):
        with pytest.raises(UserError, match=r"Connection refused.*tracking=none"):
            check(uri, "x")
    assert reached == [("127.0.0.1", 1), ("127.0.0.1", 3306)]


def test_a_store_that_can_is_accepted(tmp_path):
    (tmp_path / "empty.db").touch()
    for name in ("new/mlflow.db", "empty.db"):
        check(f"sqlite:///{tmp_path}/{name}", "x")
    assert (tmp_path / "empty.db").stat().st_size == 0
    assert not (tmp_path / "new/mlflow.db").exists()


STAGE = {"stage": "train", "address": "a", "started": 1.0, "ended": 2.0, "summary": {"loss": 0.5}, "fingerprint": "f"}
KILLED = """
import os, signal, sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store
from pipeline.launch.tracking import Tracker

for delay in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        Tracker("sqlite:///outputs/mlflow.db", "x", Path("outputs/runs/one"))
        os._exit(0)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(os.path.exists("outputs/mlflow.db"), sorted(os.listdir("outputs")), flush=True)
    Path("outputs/mlflow.db").unlink(missing_ok=True)
"""


def test_a_database_that_was_killed_while_it_was_made_is_made_again(tmp_path):
    (tmp_path / "outputs/runs/one").mkdir(parents=True)
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    words = [sys.executable, "-c", KILLED, "0.02", "0.3", "0.9"]
    done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "False" in done.stdout, "some were killed before the database had its name"
    check(f"sqlite:///{tmp_path}/outputs/mlflow.db", "x")
    tracker = Tracker(f"sqlite:///{tmp_path}/outputs/mlflow.db", "x", tmp_path / "outputs/runs/one")
    tracker.log_cell({"network": "n"}, {"ap": 0.5}, [STAGE], None)
    assert not list((tmp_path / "outputs").glob(".*")), "nothing is left of the killed ones"


def test_what_a_store_did_not_take_is_known_and_logged_later(tmp_path, monkeypatch):
    (tmp_path / "runs/one").mkdir(parents=True)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    log = Log(tmp_path, uri, "x")
    tracker = Tracker(uri, "x", tmp_path / "runs/one")

    def lost(*_, **__):
        raise ConnectionError("the store is gone")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, "log_batch", lost)
        with pytest.raises(UserError, match=r"the store is gone; the results are whole, and the next run logs them"):
            tracker.log_cell({"network": "n"}, {}, [STAGE], None)
    assert not log.has("train", "a", "f")
    tracker.log_cell({"network": "n"}, {}, [STAGE], None)
    assert log.has("train", "a", "f")
    assert not log.has("train", "a", "g"), "made again since"
    assert not log.has("train", "b", "f")
    assert not Log(tmp_path, uri, "y").has("train", "a", "f")
    assert not Log(tmp_path, "http://elsewhere", "x").has("train", "a", "f"), "another store"
    (tmp_path / "mlflow.db").unlink()
    assert not log.has("train", "a", "f"), "the store is gone"


def test_a_store_that_is_moved_with_its_results_has_them_still(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mlflow.db").touch()
    Log(tmp_path / "one", f"sqlite:///{tmp_path}/one/mlflow.db", "x").note("train", "a", "f")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    assert Log(tmp_path / "moved", f"sqlite:///{tmp_path}/moved/mlflow.db", "x").has("train", "a", "f")
    assert not Log(tmp_path / "one", f"sqlite:///{tmp_path}/other/mlflow.db", "x").has("train", "a", "f")


def test_a_new_store_has_nothing_of_the_one_that_lay_there_before(tmp_path):
    log = Log(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", "x")
    log.note("train", "a", "f")
    Tracker(f"sqlite:///{tmp_path}/mlflow.db", "y", tmp_path / "runs/one")
    assert not log.has("train", "a", "f")


def test_fresh_results_are_logged_by_the_next_run_with_tracking(smoke, monkeypatch):
    import hydra

    from pipeline.launch.cell import Cell

    monkeypatch.chdir(smoke)
    counts = []
    for uri in ("outputs/mlflow.db", "later.db", "later.db"):
        words = ["experiment=smoke", "stage=[train,export,evaluate]", f"tracking.uri=sqlite:///{uri}"]
        with hydra.initialize_config_module("conf", version_base="1.3"):
            cell = Cell(hydra.compose("config", words), words, sweep=False)
        cell.logbook = Cells(cell)
        cell.run()
        counts.append([stage["stage"] for stage in cell.ran])
        cell.logbook.write(None)
    assert counts == [[], ["train", "export", "evaluate"], []]
    client = MlflowClient(f"sqlite:///{smoke}/later.db")
    found = client.search_runs([client.get_experiment_by_name("smoke").experiment_id])
    (cell,) = (run for run in found if run.data.tags["kind"] == "cell")
    assert {"ap", "params"} <= set(cell.data.metrics)
