"""A package goes to a device without torch, and its results come home."""

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from pipeline import edge
from pipeline.datasets.packaged import Packaged
from pipeline.deploy import results_zip
from pipeline.deploy.package import LOCK
from pipeline.results.manifest import write_manifest
from pipeline.results.store import Results
from posepress.errors import UserError
from tests.conftest import FAKES, ROOT, SMOKE, command, compiled_before, pipeline, refused

WORDS = [*SMOKE, "precision=int8"]


def packaged(sweep, target, *more):
    """A package of the smoke network's INT8, taken away from where it was made."""
    words = [*WORDS, f"backend={target}", f"target={target}"]
    for stage in ("quantize", "package"):  # on a processor without VNNI, only ONNX Runtime's INT8 is there already
        pipeline(*words, f"stage={stage}", *more, cwd=sweep, double=True, check=0)
    (folder,) = (sweep / "outputs/smoke/package").glob(f"*_{target}")
    device = shutil.copytree(folder, sweep / "device" / target)
    compiled_before(device)
    return device


def on_device(folder, python=sys.executable, double=False, check=0):
    """Run a package as its README says, without the project on the path."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("POSEPRESS_RUN", "PYTHONPATH"))}
    env |= {"PYTHONPATH": str(FAKES)} if double else {}
    done = subprocess.run(
        [str(python), "-m", "pipeline.edge"], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == check, done.stdout[-2000:] + done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def package(finished, tmp_path_factory):
    """A package of the smoke network's INT8 for ONNX Runtime, and beside it what a device made of it: results.zip."""
    sweep = tmp_path_factory.mktemp("packaged")
    shutil.copytree(finished / "outputs", sweep / "outputs")
    folder = packaged(sweep, "onnxruntime")
    away = shutil.copytree(folder, sweep / "away")
    on_device(away)
    shutil.move(away / "results.zip", folder.parent / "results.zip")
    return folder


@pytest.fixture
def home(smoke, package):
    """A finished sweep, and the results of a package of it that ran with ONNX Runtime."""
    return smoke, package.parent / "results.zip"


def rewritten(source, target, change):
    """A copy of a zip file whose members a function changes."""
    with zipfile.ZipFile(source) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(target, "w") as archive:
        for name, blob in files.items():
            archive.writestr(name, blob)
    return target


def resealed(files):
    """Somebody changed a figure and the listing with it, but not the manifest."""
    name = next(name for name in files if name.endswith("latency.json"))
    files[name] = files[name].replace(b"latency_p50_ms", b"latency_p05_ms")
    about = json.loads(files["package.json"])
    about["files"][name] = edge.sha256(files[name]).hexdigest()
    files["package.json"] = json.dumps(about).encode()


def edited(files):
    name = next(name for name in files if name.endswith("metrics.json"))
    files[name] = files[name].replace(b'"ap": ', b'"ap": 0.9')


def removed(files):
    del files[next(name for name in files if name.endswith("audit.json"))]


def added(files):
    files["evaluate/../../escaped.txt"] = b""
    about = json.loads(files["package.json"])
    about["files"]["evaluate/../../escaped.txt"] = edge.sha256(b"").hexdigest()
    files["package.json"] = json.dumps(about).encode()


def above(files):
    """A manifest in place of a whole stage: everything that was built here would go."""
    files["build/manifest.json"] = b'{"files": {}, "inputs": {}, "summary": {}}'
    about = json.loads(files["package.json"])
    about["files"]["build/manifest.json"] = edge.sha256(files["build/manifest.json"]).hexdigest()
    files["package.json"] = json.dumps(about).encode()


def no_manifest(files):
    name = next(name for name in files if name.startswith("build/") and name.endswith("manifest.json"))
    files[name] = b"{}"
    about = json.loads(files["package.json"])
    about["files"][name] = edge.sha256(b"{}").hexdigest()
    files["package.json"] = json.dumps(about).encode()


def test_results_come_home_whole_or_not_at_all(home, tmp_path):
    sweep, results = home
    before = {file: file.read_bytes() for file in (sweep / "outputs/smoke").rglob("*") if file.is_file()}
    wrong = rewritten(results, tmp_path / "wrong.zip", no_manifest)
    assert "no results of a package" in refused(pipeline(*SMOKE, "stage=import", f"results={wrong}", cwd=sweep))
    for change in (edited, removed, resealed, added, above):
        wrong = rewritten(results, tmp_path / "wrong.zip", change)
        message = refused(pipeline(*SMOKE, "stage=import", f"results={wrong}", cwd=sweep))
        assert "no results of a package" in message, change
        assert "since the device wrote it); copy it again" in message, change
    (tmp_path / "short.zip").write_bytes(results.read_bytes()[:1000])
    message = refused(pipeline(*SMOKE, "stage=import", f"results={tmp_path}/short.zip", cwd=sweep))
    assert "no results of a package" in message
    assert "results has no value" in refused(pipeline(*SMOKE, "stage=import", cwd=sweep))
    message = refused(pipeline(*SMOKE, "stage=import", f"results={results}", "name=other", cwd=sweep))
    assert "of name=smoke, not other; add name=smoke" in message
    assert before == {file: file.read_bytes() for file in before}, "earlier results are untouched"
    (network,) = (sweep / "outputs/smoke/quantize").glob("*_dense_*_int8*")
    manifest = json.loads((network / "manifest.json").read_text())
    write_manifest(network, {**manifest, "digest": "0"})
    with pytest.raises(UserError, match="was made again since; package it again"):
        results_zip.unpack(results, Results(sweep / "outputs", "smoke", "run"), tmp_path / "unpacked")


def test_imported_figures_are_in_report_and_mlflow(home):
    sweep, results = home
    command(SMOKE[0], "stage=import", f"results={results}", cwd=sweep, check=0)
    pipeline(*SMOKE, "stage=report", cwd=sweep, check=0)
    with (sweep / "outputs/smoke/report/results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(row["backend"].startswith("onnxruntime-") and row["precision"] == "int8" for row in rows) == 1
    assert [row["imported"] for row in rows].count("yes") == 1, "what was imported is marked"
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{sweep}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("smoke").experiment_id], "tags.kind = 'cell'")
    brought = [run for run in runs if run.data.params["backend"].startswith("onnxruntime-")]
    assert len(brought) == 1
    assert brought[0].data.metrics["latency_p50_ms"] > 0


def test_a_package_that_was_changed_is_refused_on_the_device(smoke, package, tmp_path):
    folder = shutil.copytree(package, tmp_path / "device")
    image = next((folder / "data/validation/images").iterdir())
    image.write_bytes(b"another")
    assert "not the file that was packaged; copy the package again" in on_device(folder, check=2).stderr
    (folder / "package.json").write_text("{")
    assert "not a package" in on_device(folder, check=2).stderr
    assert not (folder / "results.zip").exists()
    assert "target=mobile: choose tensorrt, onnxruntime" in refused(
        pipeline(*WORDS, "stage=package", "target=mobile", cwd=smoke)
    )


def test_packaged_images_are_those_that_engines_are_measured_on(package):
    data = Packaged(str(package / "data"))
    assert "validation" in data
    assert "train" not in data
    assert len(data.open("validation")) == 12
    with pytest.raises(UserError, match="holds no train images, but validation, agreement"):
        data.open("train")
    with pytest.raises(UserError, match="serves build, evaluate and benchmark alone"):
        data.digest(["train"])


def test_the_edge_lock_pins_what_the_base_needs():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / LOCK).read_text().splitlines()}
    for need in project["dependencies"]:
        assert need.partition(">")[0].lower().replace("_", "-") in pinned, need
    assert not pinned & {"torch", "mlflow", "dvc", "scipy", "hydra-core"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("backend.provder=x", "backend.provder=x: no such option; did you mean 'backend.provider'"),
        ("backend.provider=[0", r"backend.provider=\[0: its value cannot be read"),
        ("threads", "threads: no such option"),
    ],
)
def test_an_option_of_a_device_is_checked(word, message, tmp_path):
    (tmp_path / "config.yaml").write_text("threads: 1\nbackend: {provider: CPUExecutionProvider, device: 0}\n")
    with pytest.raises(UserError, match=message):
        edge._configuration(tmp_path / "config.yaml", [word])
    config = edge._configuration(tmp_path / "config.yaml", ["threads=4", "backend.device=1"])
    assert (config.threads, config.backend.device) == (4, 1)
