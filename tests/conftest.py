"""What the tests share: the command, a finished smoke sweep, the real data where there is some."""

import io
import os
import pickle
import shutil
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from copy import deepcopy
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores

import omegaconf.base
import pytest
from filelock import FileLock
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hypothesis import settings
from omegaconf import OmegaConf

from pipeline.probing import processes
from tests import forks

ROOT = Path(__file__).resolve().parent.parent
FAKES = ROOT / "tests" / "fakes"
REAL = Path(os.environ.get("POSEPRESS_REAL_DATA", ROOT.parent / "shared" / "data"))
RTX = find_spec("tensorrt_rtx_bindings")
RTX_FIX = "`make rtx` installs it and runs them"


# --- configurations, of which the tests compose hundreds --------------------------------------------------------------------

omegaconf.base.parse = cache(omegaconf.base.parse)  # of interpolations: a thousand calls a command, for a hundred texts
_load, _loaded = OmegaConf.load, {}


def load_once(file):
    """What OmegaConf loads of a file of the product, which no test changes."""
    name = Path(getattr(file, "name", file))
    if not name.is_relative_to(ROOT / "conf"):
        return _load(file)
    if name not in _loaded:
        _loaded[name] = pickle.dumps(_load(file))
    return pickle.loads(_loaded[name])


OmegaConf.load = load_once
_lists, _composed = {}, {}
_list, _compose = config_loader_impl.create_defaults_list, ConfigLoaderImpl._compose_config_from_defaults_list


def list_once(repo, config_name, overrides_list, **options):
    """Hydra's defaults list. It depends on the choices of groups alone, so each set of choices has it computed once."""
    if any(source.provider not in ("hydra", "main", "schema") for source in repo.get_sources()):
        return _list(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
    plain = [override for override in overrides_list if not override.is_sweep_override()]
    chosen = [o for o in plain if repo.group_exists(o.key_or_group) and not isinstance(o.value(), dict)]
    key = (config_name, *options.values(), *(override.input_line for override in chosen))
    if key not in _lists:
        _lists[key] = _list(repo=repo, config_name=config_name, overrides_list=overrides_list, **options)
    return replace(_lists[key], config_overrides=[override for override in plain if override not in chosen])


def compose_once(loader, defaults, repo):
    """The configuration of a defaults list, before other options are applied."""
    if not any(made.defaults is defaults for made in _lists.values()):
        return _compose(loader, defaults, repo)
    if id(defaults) not in _composed:
        _composed[id(defaults)] = pickle.dumps(_compose(loader, defaults, repo))
    return pickle.loads(_composed[id(defaults)])


config_loader_impl.create_defaults_list = list_once
ConfigLoaderImpl._compose_config_from_defaults_list = compose_once

processes.pool = forks.pool

# `make fuzz` asks for many examples that differ from run to run; the other runs see the same few each time.
settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=10_000, deadline=None, print_blob=True)
settings.load_profile("fuzz" if os.environ.get("POSEPRESS_FUZZ") == "1" else "ci")


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


# These files take longest and begin. The first needs the smoke sweep; the second does not, and runs while that is made.
FIRST = ["repro", "chains", "training", "device", "pruning", "command", "wrong_options", "tensorrt_double", "evaluating"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": n for n, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if RTX is None:
        for item in items:
            if item.get_closest_marker("rtx"):
                item.add_marker(pytest.mark.skip(reason=f"no TensorRT for RTX: {RTX_FIX}"))
    if not REAL.is_dir():
        for item in items:
            if item.get_closest_marker("real"):
                item.add_marker(pytest.mark.skip(reason=f"no real images at {REAL}: set POSEPRESS_REAL_DATA"))


# --- the time of each file -------------------------------------------------------------------------------------------------

_spent = [sum(os.times()[:4])]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Each report carries the processor's seconds since the one before, those of ended child processes included."""
    report = yield
    now = sum(os.times()[:4])
    report.processor = now - _spent[0]
    _spent[0] = now
    return report


def pytest_terminal_summary(terminalreporter):
    seconds, processor = defaultdict(float), defaultdict(float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if hasattr(report, "processor"):
            file = report.nodeid.partition("::")[0]
            seconds[file] += report.duration
            processor[file] += report.processor
    if len(seconds) > 1:
        terminalreporter.section("seconds, and those of the processor")
        for file in sorted(seconds, key=seconds.__getitem__, reverse=True):
            terminalreporter.write_line(f"{seconds[file]:8.1f} {processor[file]:8.1f}  {file}")
        terminalreporter.write_line(f"{sum(seconds.values()):8.1f} {sum(processor.values()):8.1f}  all")


# --- the command -----------------------------------------------------------------------------------------------------------

_launches = count()
_shared: list[Path] = []  # the folder of this run that all workers share


@pytest.fixture(scope="session", autouse=True)
def shared(tmp_path_factory):
    """The folder of this run that all workers share."""
    base = tmp_path_factory.getbasetemp()
    _shared[:] = [base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base]
    (_shared[0] / "exports").mkdir(exist_ok=True)
    return _shared[0]


@pytest.fixture(autouse=True)
def operators():
    """Exports after a worker's first do not read torch's table of operators again."""
    forks.keep_operators()


@contextmanager
def shared_exports(cwd, *words):
    """While the command runs in a folder, what it keeps of exports is shared by all tests; nothing of that is left there."""
    outputs = next((word.partition("=")[2] for word in words if word.startswith("outputs=")), "outputs")
    link = Path(cwd) / outputs / "cache" / "exports"
    made = [folder for folder in (link.parent, link.parent.parent) if not folder.exists()]
    with suppress(OSError):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(_shared[0] / "exports")
    try:
        yield
    finally:
        with suppress(OSError):
            link.unlink()
            for folder in made:
                folder.rmdir()


@contextmanager
def composed_once(*words):
    """Hydra composes a configuration a first time only to find hydra.mode, which a choice of `--config-dir` alone can set."""
    own = any(word.partition("=")[0] in ("--config-dir", "-cd") for word in words)
    with nullcontext() if own else mock.patch.object(Hydra, "get_mode", return_value=None):
        yield


def pipeline(*words, cwd, double=False, check=None, env=None):
    """Run the command in this process, without the seconds that a process of its own takes to import everything.

    Args:
        words: of the command line.
        cwd: the folder it runs in.
        double: TensorRT's test double can be imported.
        check: the exit status it must have.
        env: more environment variables.

    Returns:
        What `command` returns: returncode, stdout and stderr.
    """
    from pipeline import __main__ as program

    assert "tracking=none" in words, "MLflow keeps the database of another test's folder open: use command()"
    out, err = io.StringIO(), io.StringIO()
    before, variables, paths, argv = Path.cwd(), dict(os.environ), list(sys.path), sys.argv
    forget_doubles()
    sys.argv = ["pipeline", *words]
    if double:
        sys.path.insert(0, str(FAKES))
    run = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{next(_launches)}"
    os.environ |= {"COLUMNS": "200", "POSEPRESS_RUN": run, **(env or {})}
    os.chdir(cwd)
    try:
        with redirect_stdout(out), redirect_stderr(err), shared_exports(cwd, *words), composed_once(*words):
            status = _status(program.main)
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(variables)
        sys.path[:], sys.argv = paths, argv
        forget_doubles()
    done = SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())
    return _checked(done, check)


def _status(main):
    """The exit status of a program, whose traceback goes where Python writes it."""
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _checked(done, status):
    if status is not None:
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def command(*words, cwd, check=None, timeout=300, env=None):
    """Run the command in a process of its own, forked from the server of this worker."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})}
    variables.pop("POSEPRESS_RUN", None)
    with shared_exports(cwd, *words), open(os.devnull) as given, TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        status = forks.ask(forks.server(), words, cwd, variables, timeout, [file.fileno() for file in (given, out, err)])
        for file in (out, err):
            file.seek(0)
        done = SimpleNamespace(returncode=status, stdout=out.read(), stderr=err.read())
    return _checked(done, check)


def refused(done):
    """The message of a run that was refused: exit status 2, one clear error, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])
    assert "Traceback" not in done.stderr, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines, done.stderr[-2000:]
    return done.stderr[done.stderr.index("error:") :]


def replaced(value, path, new):
    """A copy of nested data with another value at a path; a new key where `new` is a pair."""
    if not path:
        return new
    made = deepcopy(value)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return made


def perfect_fields(truth, view, spec):
    """The fields, each [1, C, h, w], of a network that sees the people of an image as they are."""
    import numpy as np
    import torch

    from pipeline.contracts import Stored
    from pipeline.objectives.heatmap_paf import HeatmapPafObjective
    from posepress.resolution import Resolution
    from posepress.skeletons import COCO_17

    objective, size = HeatmapPafObjective(), Resolution(1000, 1000)
    kept = objective.labels(truth, Stored(size, size, size, COCO_17), objective.capacity(truth))
    kept |= {"matrix": view.matrix.astype(np.float32), "flipped": np.array(view.flipped), "labelled": np.array(True)}
    made = objective.targets({name: torch.from_numpy(value[None]) for name, value in kept.items()}, view.size, spec, COCO_17)
    return {name: made[name].numpy() for name in ("heatmaps", "pafs")}


def compiled_before(copy):
    """Give a copy of the project, whose files have the times of the originals, what numba has compiled here."""
    for file in [f for house in ("posepress", "evaluation", "pipeline") for f in (ROOT / house).rglob("__pycache__/*.nb[ci]")]:
        there = copy / file.relative_to(ROOT)
        if there.parent.parent.is_dir():
            there.parent.mkdir(exist_ok=True)
            shutil.copy2(file, there)


def snapshot(folder):
    """When each result in a folder was written, and its size."""
    files = sorted(f for f in (folder / "outputs/smoke").rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


SMOKE = ["experiment=smoke", "tracking=none"]


@pytest.fixture(scope="session")
def finished(shared):
    """A finished sweep of four smoke cells; shared by all workers, so nobody writes into it."""
    folder = shared / "finished"
    with FileLock(shared / "finished.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            words = ["--multirun", "experiment=smoke", "pruner=none,l1", "precision=fp32,int8"]
            program = [sys.executable, "-m", "pipeline", *words]  # the whole chain, once a run, as users start it
            variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
            with shared_exports(folder, *words), (folder / "log").open("w") as log:
                subprocess.run(program, cwd=folder, env=variables, stdout=log, stderr=log, check=True, timeout=900)
            (folder / "done").touch()
    return folder


def forget_doubles():
    """Nothing that was imported from the doubles stays for the next test."""
    if loaded := sys.modules.get("posepress.runners.tensorrt_module"):
        loaded.load.cache_clear()
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
    from pipeline.datasets.drawing import Preset
    from pipeline.datasets.synthetic import Synthetic
    from posepress.resolution import Resolution

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
    train, val, loose = REAL / "coco-train-70", REAL / "coco-val-72", REAL / "coco-train-unlabelled"
    return [
        "data=coco",
        f"data.train.images={train}/images/train2017",
        f"data.train.annotations={train}/annotations/person_keypoints_train2017.json",
        f"data.val.images={val}/images/val2017",
        f"data.val.annotations={val}/annotations/person_keypoints_val2017.json",
        f"data.unlabelled.images={loose}/images/train2017",
        f"data.splits={REAL}/splits.json",
    ]
