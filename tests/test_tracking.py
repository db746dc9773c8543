"""MLflow: a sweep holds cells, a cell holds stages; several processes at once on a new database."""

import subprocess
import sys

import pytest
from conftest import ROOT
from mlflow import MlflowClient

from pipeline.errors import UserError
from pipeline.tracking import Tracker


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
        "import sys, time; from pathlib import Path; from pipeline.tracking import Tracker\n"
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
        for n in range(3)
    ]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    client = MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("race").experiment_id])
    kinds = [r.data.tags["kind"] for r in found]
    assert (kinds.count("sweep"), kinds.count("cell"), kinds.count("stage")) == (1, 3, 3)


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
