"""Forwarding of moved modules: for one release the old place still works and gives a warning."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def forward(old: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__` that looks names up where they are now.

    Args:
        old: name of the old module.
        places: the new module of each name, or "module:name" if the name changed, too; "*" stands for all other names.
    """

    def get(name: str) -> Any:
        place = places.get(name, places.get("*"))
        if place is None or name.startswith("__"):
            raise AttributeError(f"{old} has no {name}")
        module, _, new = place.partition(":")
        renamed = f" as {new}" if new else ""
        warnings.warn(f"{old}.{name} moved: import it from {module}{renamed}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(module), new or name)

    return get
