"""What the tests share: the command, a finished smoke sweep, the real data where there is some."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
FAKES = ROOT / "tests" / "fakes"
REAL = Path(os.environ.get("POSEPRESS_REAL_DATA", ROOT.parent / "shared" / "data"))
RTX = find_spec("tensorrt_rtx_bindings")
RTX_FIX = "`make rtx` installs it and runs them"


def pytest_configure(config):
    if RTX is None and os.environ.get("POSEPRESS_REQUIRE_RTX") == "1":
        raise pytest.UsageError(f"POSEPRESS_REQUIRE_RTX=1: TensorRT for RTX is not installed; {RTX_FIX}")
    if RTX is None and not os.environ.get("PYTEST_XDIST_WORKER"):
        config.issue_config_time_warning(
            pytest.PytestWarning(f"no TensorRT for RTX: tests marked 'rtx' are skipped ({RTX_FIX})"), 2
        )
    if not REAL.is_dir() and not os.environ.get("PYTEST_XDIST_WORKER"):
        config.issue_config_time_warning(
            pytest.PytestWarning(f"no real images at {REAL}: tests marked 'real' are skipped (set POSEPRESS_REAL_DATA)"), 2
        )


def pytest_collection_modifyitems(items):
    if RTX is None:
        for item in items:
            if item.get_closest_marker("rtx"):
                item.add_marker(pytest.mark.skip(reason=f"no TensorRT for RTX: {RTX_FIX}"))
    if not REAL.is_dir():
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=f"no real images at {REAL}: set POSEPRESS_REAL_DATA"))


def pipeline(*words, cwd, double=False, check=None, timeout=300, env=None):
    """Run `python -m pipeline`; with `double`, TensorRT's test double can be imported."""
    paths = [str(ROOT), *([str(FAKES)] if double else [])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", **(env or {})}
    variables.pop("POSEPRESS_RUN", None)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout
    )
    if check is not None:
        assert done.returncode == check, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def refused(done):
    """The message of a run that was refused: exit status 2, one clear error, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines, done.stderr[-2000:]
    return done.stderr[done.stderr.index("error:") :]


def perfect_fields(truth, view, spec):
    """The fields, each [1, C, h, w], of a network that sees the people of an image as they are."""
    import numpy as np
    import torch

    from evaluation.types import Resolution
    from pipeline.training.heatmap_paf import HeatmapPafObjective

    objective, size = HeatmapPafObjective(), Resolution(1000, 1000)
    kept = objective.labels(truth, size, size, size, objective.people(truth))
    kept |= {"matrix": view.matrix.astype(np.float32), "flipped": np.array(view.flipped), "labelled": np.array(True)}
    made = objective.targets({name: torch.from_numpy(value[None]) for name, value in kept.items()}, view.size, spec)
    return {name: made[name].numpy() for name in ("heatmaps", "pafs")}


SMOKE = ["experiment=smoke", "tracking=none"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished sweep of four smoke cells; shared by all workers, so nobody writes into it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            words = ["--multirun", "experiment=smoke", "pruner=none,l1", "precision=fp32,int8"]
            (folder / "log").write_text(pipeline(*words, cwd=folder, check=0, timeout=900).stdout)
            (folder / "done").touch()
    return folder


def forget_doubles():
    """Nothing that was imported from the doubles stays for the next test."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tensorrt", "cuda")]:
        del sys.modules[name]


@pytest.fixture
def doubles(monkeypatch):
    """The doubles of TensorRT and cuda-python, importable for one test only."""
    forget_doubles()
    monkeypatch.syspath_prepend(str(FAKES))
    yield
    forget_doubles()


@pytest.fixture
def smoke(finished, tmp_path):
    """A copy of the finished sweep to write into."""
    shutil.copytree(finished / "outputs", tmp_path / "outputs")
    return tmp_path


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A small generated data set on disk."""
    from evaluation.types import Resolution
    from pipeline.datasets.synthetic import Preset, Synthetic

    preset = Preset(Resolution(120, 160), (1, 3), (0.4, 0.9), 4, 1, 0.4, 0.3, 0.1)
    counts = {"train": 20, "unlabelled": 2, "tune": 4, "agreement": 2, "validation": 24}
    data = Synthetic(preset, counts, 3, str(tmp_path_factory.mktemp("images")))
    data.open("train")
    return data


@pytest.fixture(scope="session")
def real():
    """The real COCO images with their fixed splits."""
    from pipeline.datasets.coco import CocoSplits

    def part(name, kind):
        annotations = REAL / name / "annotations" / f"person_keypoints_{kind}.json"
        return {"images": REAL / name / "images" / kind, "annotations": annotations}

    return CocoSplits(
        part("coco-train-70", "train2017"),
        part("coco-val-72", "val2017"),
        {"images": REAL / "coco-train-unlabelled" / "images" / "train2017"},
        str(REAL / "splits.json"),
        str(Path(os.environ.get("TMPDIR", "/tmp")) / "posepress-test-cache"),
    )


def real_options():
    """The same as options of the command."""
    weights = REAL / "weights" / "bottomup_mobilenetv2_paf" / "mobilenetv2_w1.4_paf_state.pt"
    train, val, loose = REAL / "coco-train-70", REAL / "coco-val-72", REAL / "coco-train-unlabelled"
    return [
        "experiment=mobilenetv2_paf_coco",
        f"weights={weights}",
        f"data.train.images={train}/images/train2017",
        f"data.train.annotations={train}/annotations/person_keypoints_train2017.json",
        f"data.val.images={val}/images/val2017",
        f"data.val.annotations={val}/annotations/person_keypoints_val2017.json",
        f"data.unlabelled.images={loose}/images/train2017",
        f"data.splits={REAL}/splits.json",
    ]
