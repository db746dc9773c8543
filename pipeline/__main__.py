"""The command composes the configuration, checks it before any work, runs the stages and turns errors into exit codes."""

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra re-raises instead of printing its own traceback
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch import command_line, tracking
from pipeline.launch.cell import Cell, run_folder
from pipeline.launch.messages import message_of
from pipeline.launch.sweep import finish_sweep, swept
from pipeline.version import VERSION
from posepress.errors import UserError

_errors: list[str] = []  # error of a single cell; the cells of a sweep write theirs to files


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
        cell.logbook = tracking.Cells(cell)
        if sweep:
            print(f"\ncell {context.job.num}: {' '.join(overrides)}", file=sys.stderr)
        cell.run()
    except (UserError, OmegaConfBaseException, OSError) as error:
        if config.get("debug"):
            raise
        message = message_of(error, Path(str(config.get("outputs"))))
    except Exception as error:
        if not sweep:
            raise
        traceback.print_exc()  # a bug in one cell must not stop the other cells
        message = f"{type(error).__name__}: {error}"
    if cell is not None:
        try:
            tracking.Cells(cell).write(message)
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
        swept[Path(str(config.outputs))] = None
        folder = run_folder(Path(str(config.outputs))) / "cells"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{context.job.num:06d}.json").write_text(json.dumps(content))


def command(words: Sequence[str]) -> None:
    """Run `posepress run WORDS`, which is `python -m pipeline WORDS`."""
    sys.argv[1:] = list(words)
    main()


def main() -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 a bug."""
    words: command_line.Words | None = None
    _errors.clear()
    swept.clear()
    try:
        words = command_line.read(sys.argv[1:] or ["--help"])
        if "--version" in words.flags:
            print(f"posepress {VERSION}")
            return
        sys.argv[1:] = [*words.flags, *words.options]
        _cell()
        if words.sweep or swept:  # a configuration may ask for a sweep too
            finish_sweep(words)
        if _errors:
            print(f"error: {_errors[0]}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to continue from here", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reading program, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if "debug=true" in sys.argv:
            raise
        explain = isinstance(error, (HydraException, OmegaConfBaseException))
        outputs = words.outputs()[0] if words is not None and isinstance(error, OSError) else Path("outputs")
        text = command_line.explained(error, words) if explain and words is not None else message_of(error, outputs)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
