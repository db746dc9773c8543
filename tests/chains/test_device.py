"""A package on a device: a virtual environment that holds the edge lock alone."""

import json
import os
import subprocess
import sys

from tests.conftest import SMOKE, command, pipeline
from tests.pipeline.deploy.test_edge import on_device, packaged


def test_a_device_without_torch_builds_evaluates_and_brings_results_home(smoke):
    """The whole way, in a virtual environment that holds the edge lock alone; TensorRT is its double."""
    folder = packaged(smoke, "tensorrt", "backend.mem_pool_size_mb=256")
    assert "backend.mem_pool_size_mb=256" in json.loads((folder / "package.json").read_text())["options"]
    assert (folder / "README.txt").read_text().count("\n    ") <= 3, "at most three commands"
    install = folder / "install.sh"
    install.write_text(install.read_text().replace("--system-site-packages ", ""))  # what lies on this machine must not help
    subprocess.run(["sh", "install.sh"], cwd=folder, check=True, env={**os.environ, "PYTHON": sys.executable})
    python = folder / ".venv/bin/python"
    listed = subprocess.run([str(python), "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    assert not names & {"torch", "mlflow", "dvc", "scipy", "posepress"}
    assert "copy it to the main machine" in on_device(folder, python, double=True).stdout
    home = command(*SMOKE[:1], "stage=import", f"results={folder / 'results.zip'}", cwd=smoke, check=0)
    assert "double.of.a.gpu" in home.stderr
    (imported,) = (smoke / "outputs/smoke/evaluate").glob("*_tensorrt-double.of.a.gpu-b1/metrics.json")
    assert json.loads(imported.read_text())["backend"] == "tensorrt-double"
    report = pipeline(*SMOKE, "stage=report", cwd=smoke, check=0)
    assert "left out: 1 evaluated with the TensorRT test double" in report.stdout.replace("\n", " ")
