"""The command: composes the configuration, checks everything before any work, runs stages, and turns errors into exit codes."""

import errno
import json
import os
import re
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own traceback
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.launch import command_line, labels, options, preflight, tracking
from pipeline.models.trust import trust
from pipeline.results.job import Job
from pipeline.results.manifest import MANIFEST, SHOWN, absent, made_here, read_manifest
from pipeline.results.stage import Stage, arguments
from pipeline.results.store import Results
from pipeline.version import VERSION
from posepress.errors import UserError

RUN_VARIABLE = "POSEPRESS_RUN"
os.environ.setdefault(RUN_VARIABLE, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
labels.register()


class _Stages(Mapping[str, Stage]):
    """The stages of a configuration, each resolved when it is first asked for: a run needs few of them."""

    def __init__(self, config: DictConfig) -> None:
        self._config, self._node = config, config.stages
        self._resolved: dict[str, Stage] = {}

    def __getitem__(self, name: str) -> Stage:
        if name not in self._resolved:
            labels.wire(self._config, [name])
            self._resolved[name] = Stage.from_config(name, _resolved(self._node[name]))
        return self._resolved[name]

    def __iter__(self) -> Iterator[str]:
        return map(str, self._node)

    def __len__(self) -> int:
        return len(self._node)


class Cell:
    """One configuration: its stages, and what became of them.

    Attributes:
        plan: the stages to run, in order.
        skipped: stages that were asked for and that this cell of a sweep does not need.
    """

    def __init__(self, config: DictConfig, overrides: Sequence[str], sweep: bool, flags: Sequence[str] = ()) -> None:
        """Check every option by itself, touching nothing.

        Args:
            config: of this cell.
            overrides: its words of the command line.
            sweep: whether it is one of several.
            flags: of the command line, that the same command needs again.

        Raises:
            UserError: an option is unknown, missing or wrong, or no such stage runs.
        """
        self.config, self.overrides, self.sweep, self.flags = config, list(overrides), sweep, list(flags)
        options.check_command(config)
        labels.settle(config)
        _keep_compiled(Path(str(config.outputs)))  # before numba is imported
        options.check_wiring(config)
        preflight.check_pruner(config)
        trust(_plain(config.trusted_modules), _plain(config.model.get("_target_")))
        self.plan, self.skipped = preflight.planned(config, sweep)
        preflight.check_options(config, self.plan, self.overrides, sweep)
        self.stages = _Stages(config)
        self.ran: list[dict[str, Any]] = []
        self.summaries: dict[str, Mapping[str, Any]] = {}

    @cached_property
    def results(self) -> Results:
        """Where results lie; the folder is made when it is first asked for."""
        return Results(Path(str(self.config.outputs)), str(self.config.name), os.environ[RUN_VARIABLE])

    @cached_property
    def logged(self) -> tracking.Log | None:
        """What was logged before; None where nothing is logged, as where nothing can be written."""
        if not self.config.tracking.enabled or not self.results.writable:
            return None
        return tracking.Log(self.results.outputs, str(self.config.tracking.uri), str(self.config.name))

    def command(self, stage: str) -> str:
        """The command line that runs a stage of this cell."""
        others = [o for o in self.overrides if not o.startswith(("stage=", "hydra.", "force="))]
        return shlex.join(["python", "-m", "pipeline", *self.flags, f"stage={stage}", *others])

    def preflight(self) -> None:
        """Check what can be checked before any work, the options first: nothing is written before they are known to be right.

        Raises:
            UserError: options do not go together or do not fit the given file, a file, package or input is missing.
        """
        preflight.check_given(self.config, self.stages, self.plan)
        for name in self.plan:
            preflight.check_files(self.stages[name])
        preflight.check_data(self.config, self.stages, self.plan, self.overrides)
        preflight.check_choices(self.config, self.plan, self.overrides)
        for name in self.plan:
            preflight.check_packages(self.stages[name])
        for name in self.plan:
            options.instances(arguments(self.stages[name]))
        for name in self.plan:
            stage = self.stages[name]
            for upstream in () if stage.collect else stage.inputs.values():
                folder = self.results.folder(self.stages[upstream])
                if upstream not in self.plan and not made_here(read_manifest(folder), folder):
                    raise absent(name, folder, self.command(upstream))
        preflight.check_images(self.stages, self.plan)
        if self.logged is not None:
            tracking.check(str(self.config.tracking.uri), str(self.config.name))

    def run(self) -> None:
        """Run the planned stages; those of a sweep that collect all cells are left to the end of the sweep."""
        self.preflight()
        _device(self.results)
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
            data = options.instances({"data": arguments(stage)["data"]})["data"].digest(stage.splits)
        device = _device(self.results) if stage.device else {}
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
            ):  # another process was faster
                self._keep(stage, fingerprint, console)
                return
            console.print(f"[bold]{stage.name:10}[/] ...    {escape(str(folder))}", soft_wrap=True)
            started = time.time()
            given = options.instances(arguments(stage))
            target = given.pop("_target_")
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
                )
                summary = hydra.utils.get_method(target)(job, **given)
                dropped = getattr(given.get("data"), "dropped", {})
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

    def _note(self, stage: Stage, fingerprint: str, started: float, ended: float) -> None:
        """Remember a stage to be logged."""
        times = {"started": started, "ended": ended, "summary": self.summaries[stage.name]}
        self.ran.append({"stage": stage.name, "address": stage.address, "fingerprint": fingerprint, **times})

    def _keep(self, stage: Stage, fingerprint: str, console: Any) -> None:
        """Say that a result is fresh, take its figures, and have it logged if it never was."""
        from rich.markup import escape

        folder = self.results.folder(stage)
        console.print(f"[dim]{stage.name:10} fresh  {escape(str(folder))}[/]", soft_wrap=True)
        if (folder / SHOWN).is_file():
            print((folder / SHOWN).read_text(), end="")
        self.summaries[stage.name] = (read_manifest(folder) or {}).get("summary", {})
        if self.logged is not None and not self.logged.has(stage.name, stage.address, fingerprint):
            made = (folder / MANIFEST).stat().st_mtime
            self._note(stage, fingerprint, made, made)

    def track(self, error: str | None) -> None:
        """Log what ran to MLflow."""
        if not self.ran or self.logged is None:
            return
        figures: dict[str, Any] = {}
        for name, wanted in (("export", {"params"}), ("quantize", {"macs"}), ("evaluate", None), ("benchmark", None)):
            summary = self.summaries.get(name, {})
            figures |= {key: value for key, value in summary.items() if wanted is None or key in wanted}
        tracker = tracking.Tracker(str(self.config.tracking.uri), str(self.config.name), self.results.run)
        brought = [(ran, cell) for ran in self.ran for cell in ran["summary"].get("cells", [])]
        for ran, cell in brought:  # of a device
            times = {"started": ran["started"], "ended": ran["ended"]}
            tracker.log_cell(cell["axes"], cell["figures"], [{**stage, **times} for stage in cell["stages"]], None)
        if not brought:
            tracker.log_cell(_plain(self.config.axes), figures, self.ran, error)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _resolved(node: DictConfig) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(node, resolve=True, throw_on_missing=False)  # type: ignore[assignment]
    return resolved


def _run_folder(outputs: Path) -> Path:
    """Where the cells of this launch leave what became of them."""
    return outputs / "runs" / os.environ[RUN_VARIABLE]


def _keep_compiled(outputs: Path) -> None:
    """Where numba can keep what it compiles neither beside the code nor in the user's cache, it does so in outputs/cache."""
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
            "warning: nothing that is compiled can be kept; name a folder that can be written by NUMBA_CACHE_DIR",
            file=sys.stderr,
        )


def _device(results: Results) -> dict[str, Any]:
    """This machine's description; outputs/cache/device.json is what DVC watches."""
    from evaluation.device import describe, write

    return write(results.cache / "device.json") if results.writable else describe()


_errors: list[str] = []  # of this process's only cell; a sweep's cells leave theirs in files
_swept: dict[Path, None] = {}  # folders of outputs that this process's cells left theirs in, in order


@hydra.main(version_base="1.3", config_path="pkg://conf", config_name="config")
def _cell(config: DictConfig) -> None:
    context = HydraConfig.get()
    sweep = context.mode == RunMode.MULTIRUN
    overrides = list(context.overrides.task)
    folders = [source.path for source in context.runtime.config_sources if source.provider == "command-line"]
    cell: Cell | None = None
    message: str | None = None
    try:
        cell = Cell(config, overrides, sweep, [word for folder in folders for word in ("--config-dir", folder)])
        if sweep:
            print(f"\ncell {context.job.num}: {' '.join(overrides)}", file=sys.stderr)
        cell.run()
    except (UserError, OmegaConfBaseException, OSError) as error:
        if config.get("debug"):
            raise
        message = _message(error, Path(str(config.get("outputs"))))
    except Exception as error:
        if not sweep:
            raise
        traceback.print_exc()  # a bug in one cell; the others go on
        message = f"{type(error).__name__}: {error}"
    if cell is not None:
        try:
            cell.track(message)
        except UserError as error:
            message = message or str(error)
    if message is not None and not sweep:
        _errors.append(message)
    if sweep:
        content = {
            "overrides": overrides,
            "error": message,
            "collect": [] if cell is None else [name for name in cell.plan if cell.stages[name].collect],
            "skipped": [] if cell is None else cell.skipped,
            "name": str(config.name),
            "outputs": str(config.outputs),
        }
        _swept[Path(str(config.outputs))] = None
        folder = _run_folder(Path(str(config.outputs))) / "cells"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{context.job.num:06d}.json").write_text(json.dumps(content))


def _message(error: BaseException, outputs: Path) -> str:
    """An error in one line that names the file or option."""
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if isinstance(error, MissingMandatoryValue) or missing:
        return f"{missing[1]} has no value; give it as {missing[1]}=..." if missing else f"an option has no value: {error}"
    if isinstance(error, OSError):
        inside = bool(error.filename) and Path(error.filename).is_relative_to(outputs)
        full = error.errno == errno.ENOSPC
        lost = inside and error.errno == errno.ENOENT and outputs.exists()  # else the folder itself cannot be made
        if inside and not lost and not full:
            return f"outputs={outputs}: cannot write there ({error.strerror}); choose another folder with outputs=DIR"
        where = f"{error.filename}: " if error.filename else ""
        fix = "; free some space and run the same command again" if full else "; make it again with force=true" if lost else ""
        return f"{where}{error.strerror or error}{fix}"
    return command_line.lost(error) or str(error) if isinstance(error, OmegaConfBaseException) else str(error)


def _finish_sweep(words: command_line.Words) -> None:
    """Make the reports of a finished sweep, one a name and folder, and list the cells that failed.

    Raises:
        UserError: a cell or a report failed, or no cell needs a stage that was asked for.
    """
    folders = list(_swept) or words.outputs()  # a launcher may run cells in other processes
    files = [file for outputs in folders for file in (_run_folder(outputs) / "cells").glob("*.json")]
    cells = [json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.name)]
    if not cells:
        raise UserError(f"outputs={folders[0]}: no cell of this sweep left there what became of it; give a plain folder")
    failed = [cell for cell in cells if cell["error"] is not None]
    reports = _failed_reports(cells, words)
    if failed or reports:
        common = set.intersection(*(set(cell["overrides"]) for cell in cells)) if len(cells) > 1 else set()
        lines = ""
        for cell in [*failed, *reports]:
            lines += f"\n  {' '.join(o for o in cell['overrides'] if o not in common)}\n    {cell['error']}"
        what = [f"{len(failed)} of {len(cells)} cells"] if failed else []
        what += [f"{len(reports)} reports" if len(reports) > 1 else "the report"] if reports else []
        raise UserError(f"{' and '.join(what)} failed:{lines}")
    if unneeded := set.intersection(*(set(cell["skipped"]) for cell in cells)):
        raise UserError(f"stage={min(unneeded)}: no cell of this sweep needs it; set the option that does, or leave it out")


def _failed_reports(cells: Sequence[Mapping[str, Any]], words: command_line.Words) -> list[dict[str, Any]]:
    """Make the reports of cells; those that could not be made, with what went wrong."""
    failed: list[dict[str, Any]] = []
    collecting = {(cell["outputs"], cell["name"]): cell for cell in cells if cell["collect"] and cell["error"] is None}
    for (outputs, name), cell in collecting.items():
        others = [o for o in cell["overrides"] if not o.startswith("stage=")]
        place = [command_line.quoted("outputs", outputs), command_line.quoted("name", name)]  # once resolved, they stay
        try:
            config = command_line.compose([*others, *place, f"stage=[{','.join(cell['collect'])}]"], words.config_dir)
            Cell(config, others, sweep=False).run()
            continue
        except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
            message = _message(error, Path(outputs))
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()  # a bug in a report; what failed before it is listed all the same
            message = f"{type(error).__name__}: {error}"
        failed.append({"overrides": [*others, "stage=report"], "error": message})
    return failed


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 a bug."""
    words: command_line.Words | None = None
    _errors.clear()
    _swept.clear()
    try:
        words = command_line.read(sys.argv[1:] or ["--help"])
        if "--version" in words.flags:
            print(f"posepress {VERSION}")
            return
        sys.argv[1:] = [*words.flags, *words.options]
        _cell()
        if words.sweep or _swept:  # a configuration may ask for a sweep too
            _finish_sweep(words)
        if _errors:
            print(f"error: {_errors[0]}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on from here", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # what reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if "debug=true" in sys.argv:
            raise
        explain = isinstance(error, (HydraException, OmegaConfBaseException))
        outputs = words.outputs()[0] if words is not None and isinstance(error, OSError) else Path("outputs")
        text = command_line.explained(error, words) if explain and words is not None else _message(error, outputs)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
