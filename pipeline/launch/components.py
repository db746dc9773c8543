"""Construction of components from plain options: mappings with a `_target_` that names a class or function."""

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from posepress.errors import UserError

_WORDS = ("_target_", "_partial_", "_convert_", "_recursive_")


def located(target: str) -> Any:
    """Return the class or function with this dotted name."""
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(value: Any) -> Any:
    """Build a component and the components inside it, or a container of components.

    With `_partial_` the result is a functools.partial, which takes further arguments.

    Raises:
        UserError: a component rejects its options.
    """
    if isinstance(value, Mapping):
        given = {str(key): build(inner) for key, inner in value.items() if key not in _WORDS}
        if "_target_" not in value:
            return given
        made = located(str(value["_target_"]))
        if value.get("_partial_"):
            return partial(made, **given)
        try:
            return made(**given)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
    return [build(item) for item in value] if isinstance(value, (list, tuple)) else value
