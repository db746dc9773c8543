"""The error class for bad input, and helpers for its messages."""

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file or option, its value and the fix; `__main__` prints it and exits with code 2."""


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint at the known word closest to `word`, to append to an error message; empty if no word is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's error without ONNX Runtime's prefixes; its class if it has no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0].removeprefix("[ONNXRuntimeError] : ").rpartition(" was false. ")[2].rpartition(" Status Message: ")[2]
    return re.sub(r"^\d+ : [A-Z_]+ : |/onnxruntime_src\S+ .*?\) (?=[A-Z])", "", text)[:240]
