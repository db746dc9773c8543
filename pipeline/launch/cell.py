"""A cell: one configuration, which is checked before any work and then run stage by stage."""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from omegaconf import DictConfig, OmegaConf

from pipeline.launch import labels, options, preflight, wiring
from pipeline.launch.components import build
from pipeline.launch.messages import own_code
from pipeline.models.trust import trust
from pipeline.results.job import Job
from pipeline.results.manifest import MANIFEST, SHOWN, absent, made_here, read_manifest
from pipeline.results.stage import Stage, arguments
from pipeline.results.store import Results
from posepress.errors import UserError

RUN_VARIABLE = "POSEPRESS_RUN"
os.environ.setdefault(RUN_VARIABLE, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
labels.register()


class _Stages(Mapping[str, Stage]):
    """The stages of a configuration. Each is resolved at its first use, because a run needs few of them."""

    def __init__(self, config: DictConfig) -> None:
        self._config, self._node = config, config.stages
        self._resolved: dict[str, Stage] = {}

    def __getitem__(self, name: str) -> Stage:
        if name not in self._resolved:
            wiring.wire(self._config, [name])
            self._resolved[name] = Stage.from_config(name, resolved(self._node[name]))
        return self._resolved[name]

    def __iter__(self) -> Iterator[str]:
        return map(str, self._node)

    def __len__(self) -> int:
        return len(self._node)


class Logbook(Protocol):
    """A log of runs. A device has none."""

    def check(self) -> None:
        """Check before any work that figures can be logged.

        Raises:
            UserError: figures cannot be logged.
        """
        ...

    def has(self, stage: str, address: str, fingerprint: str) -> bool:
        """Whether a result was logged."""
        ...


class Cell:
    """One configuration, its stages and their results.

    Attributes:
        logbook: log of runs, which the caller sets; None logs nothing.
        plan: the stages to run, in order.
        skipped: requested stages that this cell of a sweep does not need.
    """

    def __init__(
        self, config: DictConfig, overrides: Sequence[str], sweep: bool, flags: Sequence[str] = (), program: str = ""
    ) -> None:
        """Check every option by itself. No file is read or written.

        Args:
            config: configuration of this cell.
            overrides: options of the command line for this cell.
            sweep: whether the cell is one of a sweep.
            flags: flags of the command line that a suggested command must repeat.
            program: command that makes all results, on a device where stages have no command of their own.

        Raises:
            UserError: an option is unknown, missing or wrong, or a stage cannot run in this configuration.
        """
        self.config, self.overrides, self.sweep, self.flags = config, list(overrides), sweep, list(flags)
        self.program = program
        options.check_command(config)
        keep_compiled(Path(str(config.outputs)))  # must precede the import of numba, which labels may trigger
        wiring.settle(config)
        options.check_wiring(config)
        preflight.check_pruner(config)
        trust(plain(config.trusted_modules), plain(config.model.get("_target_")))
        self.plan, self.skipped = preflight.planned(config, sweep)
        preflight.check_options(config, self.plan, self.overrides, sweep)
        self.stages = _Stages(config)
        self.ran: list[dict[str, Any]] = []
        self.summaries: dict[str, Mapping[str, Any]] = {}
        self.logbook: Logbook | None = None

    @cached_property
    def results(self) -> Results:
        """The results of this name. Their folder is made at the first use."""
        return Results(Path(str(self.config.outputs)), str(self.config.name), os.environ[RUN_VARIABLE])

    def command(self, stage: str) -> str:
        """Return the command line that runs a stage of this cell."""
        if self.program:
            return self.program
        others = [o for o in self.overrides if not o.startswith(("stage=", "hydra.", "force="))]
        return shlex.join(["python", "-m", "pipeline", *self.flags, f"stage={stage}", *others])

    def preflight(self) -> None:
        """Check everything that can be checked before any work.

        The options are checked first, so that nothing is written while one is wrong.

        Raises:
            UserError: options do not fit each other or the given file, or a file, package or input is missing.
        """
        preflight.check_given(self.config, self.stages, self.plan)
        for name in self.plan:
            preflight.check_files(self.stages[name])
        preflight.check_data(self.config, self.stages, self.plan, self.overrides)
        preflight.check_choices(self.config, self.plan, self.overrides)
        for name in self.plan:
            preflight.check_packages(self.stages[name])
        for name in self.plan:
            build({key: value for key, value in arguments(self.stages[name]).items() if key != "_target_"})
        for name in self.plan:
            stage = self.stages[name]
            for upstream in () if stage.collect else stage.inputs.values():
                folder = self.results.folder(self.stages[upstream])
                if upstream not in self.plan and not made_here(read_manifest(folder), folder):
                    raise absent(name, folder, self.command(upstream))
        preflight.check_images(self.stages, self.plan)
        if self.logbook is not None:
            self.logbook.check()

    def run(self) -> None:
        """Run the planned stages. In a sweep, stages that collect all cells run at the end of the sweep."""
        self.preflight()
        this_device(self.results)
        for name in self.skipped:
            print(f"{name:10} skipped: this cell does not need it", file=sys.stderr)
        for name in self.plan:
            if self.sweep and self.stages[name].collect:
                continue
            self.run_stage(self.stages[name])

    def run_stage(self, stage: Stage) -> None:
        """Run one stage unless its result is fresh."""
        from rich.console import Console
        from rich.markup import escape

        console = Console(stderr=True, highlight=False)
        inputs = self.results.input_manifests(stage, self.stages, self.command)
        for folder in self.results.damaged:
            console.print(
                f"[yellow]left out: {escape(str(folder))} is damaged; run its cell again with force=true[/]", soft_wrap=True
            )
        data = None
        if stage.options.get("data") is not None and stage.splits:
            data = build(arguments(stage)["data"]).digest(stage.splits)
        device = this_device(self.results) if stage.device else {}
        fingerprint, parts = self.results.fingerprint(stage, inputs, data, device)
        folder = self.results.folder(stage)
        if not stage.collect:
            self.results.claim(stage, fingerprint)
        if self.results.fresh(stage, fingerprint) and not self.config.force and not stage.aside:
            self._keep(stage, fingerprint, console)
            return
        with self.results.lock(stage):
            if (
                self.results.fresh(stage, fingerprint) and not self.config.force and not stage.aside
            ):  # another process has made it meanwhile
                self._keep(stage, fingerprint, console)
                return
            console.print(f"[bold]{stage.name:10}[/] ...    {escape(str(folder))}", soft_wrap=True)
            started = time.time()
            runs = build(arguments(stage))
            scratch = self.results.scratch(stage, fingerprint)
            if self.config.force:
                shutil.rmtree(scratch, ignore_errors=True)
            with self.results.writing(stage) as out:
                job = Job(
                    out=out,
                    inputs={} if stage.collect else {role: found[0][0] for role, found in inputs.items()},
                    collected={role: [f for f, _ in found] for role, found in inputs.items()} if stage.collect else {},
                    scratch=scratch,
                    cache=self.results.cache,
                    overrides=self.overrides,
                    config_dir=self.flags[1] if self.flags else None,
                )
                summary = self._ran(stage, runs, job)
                dropped = getattr(getattr(runs, "data", None), "dropped", {})
                skipped = sum(len(names) for split, names in dropped.items() if split in stage.splits)
                if skipped:
                    console.print(f"[yellow]{stage.name:10} skipped {skipped} images: missing, not whole or of another size[/]")
                    summary = {**summary, "images_skipped": skipped}
                self.results.finish(out, fingerprint, parts, summary)
            self.summaries[stage.name] = summary
            self._note(stage, fingerprint, started, time.time())
            console.print(
                f"[bold green]{stage.name:10}[/] done   {escape(str(folder))}  ({time.time() - started:.1f} s)", soft_wrap=True
            )

    def _ran(self, stage: Stage, runs: Any, job: Job) -> Mapping[str, Any]:
        """Run a stage, and say where a module of the user failed.

        Raises:
            UserError: the stage failed, or a component from outside the project did.
        """
        try:
            summary: Mapping[str, Any] = runs.run(job)
        except (UserError, OSError):
            raise
        except Exception as error:
            if self.config.debug or not (place := own_code(error)):
                raise
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"stage={stage.name}: {place}: {what}; correct it (debug=true shows all calls)") from error
        return summary

    def _note(self, stage: Stage, fingerprint: str, started: float, ended: float) -> None:
        """Record a stage for the log."""
        times = {"started": started, "ended": ended, "summary": self.summaries[stage.name]}
        self.ran.append({"stage": stage.name, "address": stage.address, "fingerprint": fingerprint, **times})

    def _keep(self, stage: Stage, fingerprint: str, console: Any) -> None:
        """Report that a result is fresh, read its figures, and record it for the log if it was never logged."""
        from rich.markup import escape

        folder = self.results.folder(stage)
        console.print(f"[dim]{stage.name:10} fresh  {escape(str(folder))}[/]", soft_wrap=True)
        if (folder / SHOWN).is_file():
            print((folder / SHOWN).read_text(), end="")
        self.summaries[stage.name] = (read_manifest(folder) or {}).get("summary", {})
        if self.logbook is not None and not self.logbook.has(stage.name, stage.address, fingerprint):
            made = (folder / MANIFEST).stat().st_mtime
            self._note(stage, fingerprint, made, made)


def plain(value: Any) -> Any:
    """Convert a value of a configuration to plain data, with references resolved."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def resolved(node: DictConfig) -> dict[str, Any]:
    """Convert a node to plain data, with references resolved. Missing values stay "???"."""
    return cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True, throw_on_missing=False))


def run_folder(outputs: Path) -> Path:
    """Return the folder where the cells of this launch write their outcome."""
    return outputs / "runs" / os.environ[RUN_VARIABLE]


def keep_compiled(outputs: Path) -> None:
    """Let numba keep compiled code in outputs/cache if the folder of the code and the user's cache are not writable."""
    import posepress

    def writable(folder: Path) -> bool:
        there = next(part for part in (folder, *folder.parents) if part.exists())
        return os.access(there, os.W_OK)

    own = Path(str(posepress.__file__)).parent / "__pycache__"
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    if "NUMBA_CACHE_DIR" in os.environ or writable(own) or writable(user):
        return
    if writable(outputs.absolute()):
        os.environ["NUMBA_CACHE_DIR"] = str((outputs / "cache" / "numba").absolute())
    else:
        print(
            "warning: compiled code cannot be kept, so each run compiles again; set NUMBA_CACHE_DIR to a writable folder",
            file=sys.stderr,
        )


def this_device(results: Results) -> dict[str, Any]:
    """Return this machine's description, and write it to outputs/cache/device.json, on which DVC's stages depend."""
    from evaluation.device import describe, write

    return write(results.cache / "device.json") if results.writable else describe()
