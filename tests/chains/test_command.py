"""The command as a process of its own: what it loads, its exit status, how it ends and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

from tests.conftest import ROOT, SMOKE, command, pipeline, refused, snapshot


def test_help_helps_and_loads_nothing_heavy(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['pipeline', '--help'];\n"
        "try: runpy.run_module('pipeline', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('LOADED', [m for m in ('torch', 'onnx', 'onnxruntime', 'mlflow', 'cv2', 'numba') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("LOADED []")
    for word in ("train", "quantize", "benchmark", "pruner: l1", "--multirun", "resolution="):
        assert word in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_process_ends_as_the_command_does_in_this_one(tmp_path):
    words = [*SMOKE, "stage=trian"]
    ours, forked = pipeline(*words, cwd=tmp_path), command(*words, cwd=tmp_path)
    program, env = [sys.executable, "-m", "pipeline", *words], {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    theirs = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert refused(ours) == refused(theirs) == refused(forked)
    assert ours.returncode == theirs.returncode == 2


def started(words, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    env.pop("POSEPRESS_RUN", None)

    def listen():
        """A shell that runs the tests in the background ignores Ctrl-C for them, and its children inherit that."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.Popen(command, cwd=cwd, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=listen)  # noqa: PLW1509


def lasting(steps):
    return [f"stages.train.training.steps={steps}", "stages.train.training.checkpoint_every=2", "force=true"]


def test_an_interrupted_training_goes_on(smoke):
    shutil.rmtree(smoke / "outputs/cache/scratch/smoke/train", ignore_errors=True)
    before = snapshot(smoke)
    process = started([*SMOKE, "stage=train", *lasting(40)], smoke)
    until = time.monotonic() + 90
    while not list((smoke / "outputs/cache/scratch/smoke").glob("train/*/state.ckpt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "interrupted; run the same command to continue" in errors
    assert "Traceback" not in errors
    assert snapshot(smoke).items() >= before.items(), "the earlier result is still there"
    words = [w for w in lasting(40) if w != "force=true"]
    done = pipeline(*SMOKE, "stage=train", *words, cwd=smoke, check=0)
    assert "done" in done.stderr
    (manifest,) = (smoke / "outputs/smoke/train").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["summary"]["steps"] == 40
    assert not list((smoke / "outputs/smoke/train").glob(".*"))


def test_two_processes_on_one_address(smoke):
    process = started([*SMOKE, "stage=train", *lasting(400)], smoke)
    try:
        until = time.monotonic() + 60
        while not list((smoke / "outputs/runs/locks/smoke").glob("train@*.holder")):
            assert time.monotonic() < until
            time.sleep(0.05)
        text = refused(pipeline(*SMOKE, "stage=train", *lasting(400), cwd=smoke))
        assert f"is being made by process {process.pid} on" in text
    finally:
        process.kill()
        process.communicate()
