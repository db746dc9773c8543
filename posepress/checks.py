"""Checks of values that users give; messages begin with the option."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar, cast

import numpy as np

T = TypeVar("T")
MOST_PIXELS, MOST_CHANNELS, MOST_VALUE = 4096, 65536, 1e9  # greater values are refused as mistakes


def number(option: str, value: object, least: float = -MOST_VALUE, most: float = MOST_VALUE) -> None:
    """Make sure that the value of an option is a finite number within a range.

    Raises:
        ValueError: the value is not; the message begins with the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)) or not least <= value <= most:
        bounds = f"from {least:g} to {most:g}" if (least, most) != (-MOST_VALUE, MOST_VALUE) else "that is finite"
        raise ValueError(f"{option}={shown(value)}: choose a number {bounds}")


def whole(option: str, value: object, least: int, most: int) -> None:
    """Make sure that the value of an option is a whole number within a range.

    Raises:
        ValueError: the value is not; the message begins with the option.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
        raise ValueError(f"{option}={shown(value)}: choose a whole number from {least} to {most}")


def text(option: str, value: object) -> None:
    """Make sure that the value of an option is a name.

    Raises:
        ValueError: the value is no text, or an empty one.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{option}={shown(value)}: choose a name")


def choice(option: str, value: object, known: Iterable[str]) -> None:
    """Make sure that the value of an option is one of the known words.

    Raises:
        ValueError: the value is another one.
    """
    if value not in tuple(known):
        raise ValueError(f"{option}={shown(value)}: choose {', '.join(known)}")


def unique(option: str, names: tuple[object, ...]) -> None:
    """Make sure that names differ.

    Raises:
        ValueError: a name occurs twice, or a value is no name.
    """
    for place, name in enumerate(names):
        text(f"{option}[{place}]", name)
    twice = [str(name) for name in dict.fromkeys(names) if names.count(name) > 1] if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{option}: '{twice[0]}' is there {names.count(twice[0])} times; give each a name of its own")


def listed(value: object) -> tuple[Any, ...]:
    """The items of a list or tuple; an empty tuple for any other value."""
    return tuple(value) if isinstance(value, (list, tuple)) else ()


def shown(value: object) -> str:
    """A value as text for an error message, shortened."""
    try:
        text = "null" if value is None else str(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def within(path: str) -> Iterator[None]:
    """Put a path in front of the messages of errors that are raised inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}{error}") from error


def part(kind: type[T], path: str, raw: object, lists: Iterable[str] = ()) -> T:
    """Build one part of a description from plain data.

    Raises:
        ValueError: a key is unknown or missing, or a value is wrong.
    """
    known = {f.name: f for f in fields(cast("Any", kind))}
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}={shown(raw)}: give it as {{{', '.join(known)}}}")  # noqa: TRY004 - callers catch ValueError
    for key in raw:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"{path}.{shown(key)}: no such key{hint}; it has {', '.join(known)}")
    needed = [name for name, f in known.items() if f.default is f.default_factory and name not in raw]
    if needed:
        raise ValueError(f"{path}.{needed[0]} is missing; add it")
    values = {key: tuple(value) if key in lists and isinstance(value, (list, tuple)) else value for key, value in raw.items()}
    with within(f"{path}."):
        return kind(**values)
