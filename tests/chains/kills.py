"""Kill the smoke chain at random moments, resume it, and compare its results with those of an undisturbed run.

`make kills` runs 300 kills. A round deletes the results of one or two stages, kills their next run up to three times, runs the
command to its end and compares everything. The same command goes on where it was stopped; the seed and the number of a round
decide all of it but the time a stage takes.
"""

import argparse
import csv
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.forks import leave, load_libraries

WORDS = ["experiment=smoke", "tracking=none", "pruner=l1", "precision=int8"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = ("process", "group")
# How often a stage is chosen; exporting takes most of a chain's time.
STAGES = {
    "train": 3, "prune": 3, "retrain": 3, "export": 1, "sample": 2, "quantize": 4, "build": 2, "tune": 2, "evaluate": 3,
    "benchmark": 2, "report": 3,
}  # fmt: skip
MEASURED = ("benchmark", "report")  # their files hold latencies
NEW_INTERPRETER = 0.1  # of the runs; the others are forked from a process that has loaded the libraries
COLUMNS = ("round", "stages", "signal", "target", "seconds", "verdict")


def hear_signals():
    """Undo what nohup and a shell's background jobs do to signals."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Run:
    """The command in a session of its own, forked from this process or started anew."""

    def __init__(self, folder, fresh):
        self.log = folder / "log"
        environment = {
            "TMPDIR": str(folder / "tmp"),
            "POSEPRESS_RUN": f"{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
        }
        self.started = time.monotonic()
        with self.log.open("wb") as log:
            if fresh:
                words = [sys.executable, "-m", "pipeline", *WORDS]
                variables = os.environ | environment
                self.process = subprocess.Popen(
                    words,
                    cwd=folder,
                    env=variables,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=hear_signals,  # noqa: PLW1509
                )
                self.pid = self.process.pid
            else:
                self.process, self.pid = None, os.fork()
                if self.pid == 0:
                    self._child(folder, environment, log)

    @staticmethod
    def _child(folder, environment, log):
        import tempfile

        hear_signals()
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None  # TMPDIR is another now
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        sys.argv = ["pipeline", *WORDS]
        leave(import_module("pipeline.__main__").main)

    def ended(self):
        """The exit status, negative for a signal; None while it runs."""
        if self.process is not None:
            return self.process.poll()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self, seconds):
        """Wait for the end; None if it did not come in time."""
        end = time.monotonic() + seconds
        while (status := self.ended()) is None and time.monotonic() < end:
            time.sleep(0.01)
        return status

    def kill(self, number, target):
        (os.killpg if target == "group" else os.kill)(self.pid, number)

    def left_behind(self, seconds=20):
        """Processes of the session that live on though the command ended."""
        end = time.monotonic() + seconds
        while (alive := session(self.pid)) and time.monotonic() < end:
            time.sleep(0.05)
        return alive


def session(number):
    """The processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == number and state != "Z":
            found.append(int(stat.parent.name))
    return found


def content(folder):
    """What must be the same after every round: of each file its digest, of those with latencies the parts without them."""
    found = {}
    root = folder / "outputs" / "smoke"
    for file in sorted(root.rglob("*")):
        name = str(file.relative_to(root))
        if not file.is_file():
            continue
        if name.partition("/")[0] not in MEASURED:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        elif file.name == "manifest.json":
            manifest = json.loads(file.read_text())
            found[name] = [manifest["address"], manifest["config"], sorted(manifest["files"])]
        elif file.name == "results.csv":
            with file.open(newline="") as stream:
                rows = list(csv.DictReader(stream))
            exact = [c for c in rows[0] if not re.search("_ms|latency|speedup|joules|rss|calls", c)]
            found[name] = [{column: row[column] for column in exact} for row in rows]
        else:
            found[name] = "measured"
    return found


def leftovers(folder):
    """Files and folders that a finished run must not leave: temporary ones, and hidden or half-made ones outside the cache."""
    found = [str(path.relative_to(folder)) for path in (folder / "tmp").iterdir() if not LIBRARIES.fullmatch(path.name)]
    for path in (folder / "outputs").rglob("*"):
        name = path.relative_to(folder / "outputs")
        if name.parts[0] != "cache" and (path.name.startswith(".") or path.suffix in (".tmp", ".new", ".old", ".holder")):
            found.append(f"outputs/{name}")
    return found + [path.name for path in folder.iterdir() if path.name not in OWN]


# What every run leaves of onnxruntime (the number of a session) and of torch (its compiler's empty folder).
LIBRARIES = re.compile(r"\.ses|torchinductor_\w+")
OWN = {"outputs", "tmp", "log", "kills.csv", "faults"}


def differences(folder, expected):
    """Names of results that are not as expected."""
    found = content(folder)
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


class Kills:
    """Rounds of kills in a folder that holds `outputs`, or will."""

    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        self.table, self.durations, self.start = folder / "kills.csv", {}, 1.0
        self.results = {}  # where each stage's result lies; a sweep may have left others beside them
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        self.finish("before the first kill")
        self.expected = content(folder)
        if (left := leftovers(folder)) or not self.expected:
            raise SystemExit(f"an undisturbed run leaves {left}, {len(self.expected)} results")
        shutil.copytree(folder / "outputs/smoke", folder / "faults/expected", dirs_exist_ok=True)

    def rows(self):
        if not self.table.exists():
            return []
        with self.table.open(newline="") as stream:
            return list(csv.DictReader(stream))

    def run(self, count):
        """Kill until the table has `count` rows; returns how many of them found a fault."""
        while len(rows := self.rows()) < count:
            number = int(rows[-1]["round"]) + 1 if rows else 0
            began = time.monotonic()
            kills, faults = self.round(number, count - len(rows))
            verdict = "; ".join(faults) or "ok"
            new = not self.table.exists()
            with self.table.open("a", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerows([COLUMNS] if new else [])
                writer.writerows([[number, *kill, verdict] for kill in kills])
            done = len(rows) + len(kills)
            what = ", ".join(f"{row[1]} to {row[2]} after {row[3]} s" for row in kills) or "every run ended before its kill"
            print(f"{done:4} of {count}  {time.monotonic() - began:5.1f} s  {what}: {verdict}", flush=True)
            if not kills:  # the next round is another
                self.seed += 1
        return sum(row["verdict"] != "ok" for row in self.rows())

    def round(self, number, most):
        """Delete, kill, finish, compare; returns the kills and what was wrong after them."""
        draw = random.Random(f"{self.seed} {number}")
        stages = sorted(set(draw.choices(list(STAGES), list(STAGES.values()), k=draw.choice((1, 1, 2)))))
        for stage in stages:
            for folder in (self.folder / self.results[stage], self.folder / "outputs/cache" / stage):
                shutil.rmtree(folder, ignore_errors=True)
        kills, faults = [], []
        for _ in range(min(most, draw.choice((1, 2, 3)))):
            signum, target = draw.choice(SIGNALS), draw.choice(TARGETS)
            fresh = draw.random() < NEW_INTERPRETER
            longest = self.start + sum(self.durations.get(stage, 2.0) for stage in stages) + 3 * fresh
            moment = draw.uniform(0.05, longest)
            run = Run(self.folder, fresh)
            if run.wait(moment) is not None:
                break  # it ended before
            run.kill(signum, target)
            status = run.wait(120)
            if status is None:
                faults.append(f"{signum.name} to the {target} did not end it")
                run.kill(signal.SIGKILL, "group")
                run.wait(60)
            elif status not in (-signum, 2, 0):
                faults.append(f"{signum.name} to the {target} ended it with status {status}: {self._log(run)}")
            if alive := run.left_behind():
                faults.append(f"processes left behind by {signum.name} to the {target}: {alive}")
                for pid in alive:
                    os.kill(pid, signal.SIGKILL)
            kills.append((" ".join(stages), signum.name, target, round(moment, 2)))
        faults += self.finish(stages)
        if wrong := differences(self.folder, self.expected):
            faults.append(f"{len(wrong)} results differ, the first is {wrong[0]}")
            (self.folder / "outputs/smoke").rename(self.folder / f"faults/{number}")
            shutil.copytree(self.folder / "faults/expected", self.folder / "outputs/smoke")
        if left := leftovers(self.folder):
            faults.append(f"left behind: {', '.join(left[:5])}")
            for name in left:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return kills, faults

    def finish(self, what):
        """Run the command to its end; learns what its stages take."""
        run = Run(self.folder, fresh=False)
        status = run.wait(900)
        took = time.monotonic() - run.started
        self.results |= dict(re.findall(r"^(\w+) +(?:done|fresh) +(outputs/\S+)", run.log.read_text(), re.MULTILINE))
        found = dict(re.findall(r"^(\w+) +done .*\(([\d.]+) s\)", run.log.read_text(), re.MULTILINE))
        self.durations |= {stage: float(seconds) for stage, seconds in found.items()}
        self.start = max(0.5, took - sum(float(seconds) for seconds in found.values()))
        if status == 0:
            return []
        if what == "before the first kill":
            raise SystemExit(f"the undisturbed run ended with status {status}: {self._log(run)}")
        return [f"resumed after {what}, it ended with status {status}: {self._log(run)}"]

    @staticmethod
    def _log(run):
        return " | ".join(run.log.read_text().splitlines()[-3:])


def summary(rows):
    """A table: by signal and target, how many kills and how many rounds were in order."""
    kills, right = Counter(), Counter()
    for row in rows:
        kills[row["signal"], row["target"]] += 1
        right[row["signal"], row["target"]] += row["verdict"] == "ok"
    lines = [f"{'signal':8} {'to the':8} {'kills':>6} {'ok':>6}"]
    lines += [f"{name:8} {target:8} {kills[name, target]:6} {right[name, target]:6}" for name, target in sorted(kills)]
    return "\n".join([*lines, f"{'all':17} {kills.total():6} {right.total():6}"])


def in_fork(function):
    """Call a function in a forked process of its own session; its exit status is 1 where the function raises."""
    pid = os.fork()
    if pid == 0:
        hear_signals()
        os.setsid()
        leave(function)
    return pid


def ended_well(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def database(folder, kills):
    """Kill the process that makes MLflow's database; returns after how many kills the next one could log."""
    import_module("mlflow.store.tracking.sqlalchemy_store")
    from pipeline.launch.tracking import Tracker

    os.chdir(folder)
    file, run = Path("outputs/mlflow.db"), Path("outputs/runs/one")
    stage = {"stage": "train", "address": "a", "started": 1.0, "ended": 2.0, "summary": {}}

    def make():
        run.mkdir(parents=True, exist_ok=True)
        return Tracker(f"sqlite:///{file}", "kills", run)

    def go_on():
        make().log_cell({"network": "n"}, {"ap": 0.5}, [stage], None)
        if left := [path.name for path in file.parent.iterdir() if path.name.startswith(".")]:
            raise RuntimeError(f"left behind: {left}")

    began = time.monotonic()
    assert ended_well(in_fork(make))
    took, good = time.monotonic() - began, 0
    for number in range(kills):
        shutil.rmtree(file.parent)
        pid = in_fork(make)
        time.sleep(took * (number + 0.5) / kills)
        os.kill(pid, SIGNALS[number % 2])
        os.waitpid(pid, 0)
        good += ended_well(in_fork(go_on))
    shutil.rmtree(file.parent)
    print(f"MLflow's database, killed while it was made: {good} of {kills} go on", flush=True)
    return good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path("outputs/cache/kills"), help="may hold a finished smoke run"
    )
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--databases", type=int, default=24, help="how often the making of MLflow's database is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    load_libraries()
    kills = Kills(options.folder.resolve(), options.seed)
    faults = kills.run(options.kills)
    print(summary(kills.rows()))
    if options.databases:
        elsewhere = options.folder.resolve() / "tmp" / "database"
        elsewhere.mkdir()
        faults += options.databases - database(elsewhere, options.databases)
        elsewhere.rmdir()
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
