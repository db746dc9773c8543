r"""AP against MACs: pruned and retrained networks, and equal structures trained from scratch with equal compute.

All GPUs work in parallel. Every step is a command of the pipeline. If you run the same line again, finished steps are not
repeated, and a killed training resumes. Without a GPU, the steps run one after another.

    python benchmarks/pruning_study.py --values 0.75x,0.5x:3,0.25x,0.1x experiment=synthetic_full
    python benchmarks/pruning_study.py --torch-pruning 0.29 experiment=synthetic_full name=few data.counts.train=1000 \
        data.counts.unlabelled=7000
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread

import torch

from pipeline.pruning.pruner import Target
from pipeline.pruning.torch_pruning_default import TorchPruningDefault
from posepress.errors import UserError

PRUNER = (
    "pruner=l1",
    "pruner.criterion=taylor",
    "pruner.sensitivity=sensitivity",
    "pruner.target=macs",
    "stages.prune.backend=null",
)
EVALUATED = "stage=[export,quantize,build,tune,evaluate]"


@dataclass
class Step:
    """One command, which runs after the commands that it needs."""

    name: str
    words: Sequence[str]
    needs: Sequence[str] = ()
    trains: bool = True
    state: str = field(default="waits", compare=False)


def steps(values: dict[str, int], ratios: Sequence[str], own: Sequence[str]) -> list[Step]:
    """All steps of the table: MACs with their baselines, and ratios of Torch-Pruning. `own` are options of our pruner.

    The first seeds come before the second ones, so that an interrupted study has complete rows.
    """
    ours = [*PRUNER, *own]
    made = [
        Step("dense", ["stage=train", "pruner=none"]),
        Step("dense, AP", [EVALUATED, "pruner=none"], ["dense"], trains=False),
        Step("sensitivity", ["stage=sensitivity", *ours, f"pruner.value={next(iter(values))}"], ["dense"]),
    ]
    wanted = [(value, [*ours, f"pruner.value={value}"], "sensitivity") for value in values]
    wanted += [(f"Torch-Pruning {r}", ["pruner=torch_pruning", f"pruner.pruning_ratio={r}"], "dense") for r in ratios]
    later = []
    for name, words, before in wanted:
        made.append(Step(f"{name} pruned", ["stage=prune", *words], [before]))
        kinds: dict[str, Sequence[str]] = {"pruned": ["control=pruned"], "retrained": []}
        seeds = values[name] if before == "sensitivity" else 0
        as_dense = "stages.retrain.training.lr=${stages.train.training.lr}"  # independent of the retraining's rate
        kinds |= {f"scratch {seed}": ["control=scratch", f"control_seed={seed}", as_dense] for seed in range(seeds)}
        for turn, (kind, control) in enumerate(kinds.items()):
            trained = f"{name} {kind}"
            if kind != "pruned":
                later.append((turn, Step(trained, ["stage=retrain", *words, *control], [f"{name} pruned"])))
            later.append((turn, Step(f"{trained}, AP", [EVALUATED, *words, *control], [trained], trains=False)))
    return made + [step for _, step in sorted(later, key=lambda pair: pair[0])]


class Study:
    """Runs steps on several workers until all are done, no step can run, or the time is over."""

    def __init__(self, plan: Sequence[Step], given: Sequence[str], logs: Path, seconds: float) -> None:
        self.plan, self.given, self.logs = plan, given, logs
        self.end, self.began, self.changed = time.monotonic() + seconds, time.monotonic(), Condition()
        self.running: set[subprocess.Popen[bytes]] = set()

    def _next(self, trains: bool | None) -> Step | None:
        """Wait for the next step of a kind that can run; None if no further step can ever run."""
        with self.changed:
            while True:
                open_ones = [s for s in self.plan if s.state == "waits" and trains in (None, s.trains)]
                done = {s.name for s in self.plan if s.state == "done"}
                lost = {s.name for s in self.plan if s.state == "failed"}
                for step in open_ones:
                    if lost & {*step.needs}:
                        step.state = "failed"
                        self.changed.notify_all()
                        break
                    if done >= {*step.needs}:
                        step.state = "runs"
                        return step
                else:
                    if not open_ones or time.monotonic() > self.end:
                        return None
                    self.changed.wait(1.0)

    def work(self, trains: bool | None, device: str, threads: int) -> None:
        """Run steps of a kind on a device."""
        while time.monotonic() < self.end and (step := self._next(trains)) is not None:
            began, log = time.monotonic(), self.logs / f"{step.name.replace(' ', '-').replace(',', '')}.log"
            told = {"CUDA_VISIBLE_DEVICES": device, "OMP_NUM_THREADS": str(threads), "COLUMNS": "150"}
            words = [sys.executable, "-m", "pipeline", "tracking=none", *self.given, *step.words]
            with log.open("w") as file:
                running = subprocess.Popen(
                    words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | told, start_new_session=True
                )
                self.running.add(running)
                try:
                    good = running.wait(max(self.end - time.monotonic(), 0.1)) == 0
                except subprocess.TimeoutExpired:
                    os.killpg(running.pid, signal.SIGKILL)
                    running.wait()
                    good = False
                self.running.discard(running)
            lines = [line.strip() for line in log.read_text().splitlines() if "images/s" in line or line.startswith("error")]
            print(
                f"{time.monotonic() - self.began:6.0f} s  {step.name}: {'done' if good else 'NOT DONE'} in "
                f"{time.monotonic() - began:.0f} s  {lines[-1][:120] if lines else ''}",
                flush=True,
            )
            with self.changed:
                step.state = "done" if good else "failed"
                self.changed.notify_all()

    def run(self, gpus: int, at_once: int) -> list[str]:
        """Run all steps, and return the names of those that are not done."""
        cores = os.cpu_count() or 1
        if gpus:
            kinds: list[tuple[bool | None, str]] = [(True, str(gpu)) for _ in range(at_once) for gpu in range(gpus)]
            kinds += [(False, "")] * max(1, cores // 8)
        else:
            kinds = [(None, "")]
        threads = max(1, cores // len(kinds))
        workers = [Thread(target=self.work, args=(*kind, threads)) for kind in kinds]
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self.end = 0.0
            for running in [*self.running]:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
            for worker in workers:
                worker.join()
        return [step.name for step in self.plan if step.state != "done"]


def main() -> None:
    """Run the steps that are not done yet, and print the report's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", default="0.5x:3,0.25x", help="MACs of the pruned networks, each with :SEEDS of a baseline")
    parser.add_argument(
        "--torch-pruning", action="append", default=[], help="a ratio of Torch-Pruning's default; may be repeated"
    )
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--at-once", type=int, default=2, help="trainings on a GPU at once: one computes, one starts")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="seconds after which running steps are killed")
    given, words = parser.parse_known_args()
    told = dict(word.split("=", 1) for word in words if "=" in word)
    outputs = Path(told.get("outputs", "outputs"))
    logs = outputs / "study"
    logs.mkdir(parents=True, exist_ok=True)
    own = [word for word in words if word.startswith("pruner.")]
    words = [word for word in words if word not in own]
    try:
        values = {value: int(seeds or 1) for value, _, seeds in (part.partition(":") for part in given.values.split(","))}
        for value in values:
            Target.parse("macs", value)
        for ratio in given.torch_pruning:
            TorchPruningDefault(pruning_ratio=float(ratio))
    except (ValueError, UserError) as error:
        parser.error(f"--values {given.values}, --torch-pruning {','.join(given.torch_pruning)}: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # running steps end with this process
    plan = steps(values, given.torch_pruning, own)
    missing = Study(plan, words, logs, given.seconds).run(given.gpus, given.at_once)
    report = subprocess.run([sys.executable, "-m", "pipeline", "tracking=none", *words, "stage=report"], check=False)
    if missing:
        print(f"not done: {', '.join(missing)}; the reasons are in {logs}; run the same line to go on")
    sys.exit(1 if missing else report.returncode)


if __name__ == "__main__":
    main()
