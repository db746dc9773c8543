"""The end of a sweep, which makes the reports and lists the cells that failed."""

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch import command_line
from pipeline.launch.cell import Cell, run_folder
from pipeline.launch.messages import message_of
from pipeline.launch.tracking import Cells
from posepress.errors import UserError

swept: dict[Path, None] = {}  # folders `outputs` of this process's cells, in order


def finish_sweep(words: command_line.Words) -> None:
    """Make the reports of a finished sweep, one for each name and folder, and list the cells that failed.

    Raises:
        UserError: a cell or a report failed, or no cell needs a requested stage.
    """
    folders = list(swept) or words.outputs()  # a launcher may run cells in other processes
    files = [file for outputs in folders for file in (run_folder(outputs) / "cells").glob("*.json")]
    cells = [json.loads(file.read_text()) for file in sorted(files, key=lambda file: file.name)]
    if not cells:
        raise UserError(f"outputs={folders[0]}: no cell of this sweep wrote its outcome there; give a plain folder")
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
    """Make the reports of cells. Return the reports that failed, with their error messages."""
    failed: list[dict[str, Any]] = []
    collecting = {(cell["outputs"], cell["name"]): cell for cell in cells if cell["collect"] and cell["error"] is None}
    for (outputs, name), cell in collecting.items():
        others = [o for o in cell["overrides"] if not o.startswith("stage=")]
        # The report must use the resolved values of the cells, because resolving again may give other values.
        place = [command_line.quoted("outputs", outputs), command_line.quoted("name", name)]
        try:
            config = command_line.compose([*others, *place, f"stage=[{','.join(cell['collect'])}]"], words.config_dir)
            report = Cell(config, others, sweep=False)
            report.logbook = Cells(report)
            report.run()
            continue
        except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
            message = message_of(error, Path(outputs))
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()  # a bug in a report must not hide the list of failed cells
            message = f"{type(error).__name__}: {error}"
        failed.append({"overrides": [*others, "stage=report"], "error": message})
    return failed
