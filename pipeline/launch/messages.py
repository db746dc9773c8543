"""Conversion of errors to one line that names the file or option."""

import errno
import re
import traceback
from pathlib import Path

from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from pipeline.results.fingerprint import of_a_library, of_the_project


def message_of(error: BaseException, outputs: Path) -> str:
    """Return an error as one line that names the file or option."""
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if isinstance(error, MissingMandatoryValue) or missing:
        return f"{missing[1]} has no value; give it as {missing[1]}=..." if missing else f"an option has no value: {error}"
    if isinstance(error, OSError):
        inside = bool(error.filename) and Path(error.filename).is_relative_to(outputs)
        full = error.errno == errno.ENOSPC
        gone = inside and error.errno == errno.ENOENT and outputs.exists()  # otherwise the folder outputs itself cannot be made
        if inside and not gone and not full:
            return f"outputs={outputs}: cannot write there ({error.strerror}); choose another folder with outputs=DIR"
        where = f"{error.filename}: " if error.filename else ""
        fix = "; free some space and run the same command again" if full else "; make it again with force=true" if gone else ""
        return f"{where}{error.strerror or error}{fix}"
    return lost(error) or str(error) if isinstance(error, OmegaConfBaseException) else str(error)


def own_code(error: BaseException) -> str:
    """Return where a module of the user failed, as "nets.py, line 7"; empty if the project's code failed.

    An error in a library belongs to the module that called the library.
    """
    files = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    calls = [(file, line) for file, line in files if file.is_file() and not of_a_library(file)]
    if not calls or of_the_project(calls[-1][0]):
        return ""
    file, line = calls[-1]
    return f"{file.name}, line {line}"


def lost(error: Exception) -> str | None:
    """Shorten OmegaConf's message about a missing option to one line. Return None for other errors."""
    place = re.search(r"full_key: (\S+)", str(error))
    if place and (found := re.match(r"Interpolation key '([^']+)' not found", str(error))):
        return f"{found[1]}: is not there, and {place[1]} needs it"
    if place and (found := re.match(r"Unsupported interpolation type (\w+)", str(error))):
        return f"{place[1]}: the resolver {found[1]} is gone; leave this option out, or give a plain value"
    if place and re.match(r"Key '[^']*' is not in struct", str(error)):
        return f"{place[1]}: is not there, and is needed; add it"
    return None
