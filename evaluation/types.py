"""Where these types were up to version 0.1; they forward to `posepress` and `evaluation.truth` for one release."""

import warnings
from importlib import import_module
from typing import Any

_PLACES = {
    **dict.fromkeys(("Poses", "Sample", "SemanticMask"), "posepress.results"),
    **dict.fromkeys(("number", "whole"), "posepress.checks"),
    "View": "posepress.geometry",
    "People": "evaluation.truth",
}
_SPEC = ("Array", "Fields", "Resolution", "InputSpec", "FieldSpec", "Skeleton", "Palette", "NetworkSpec")


def __getattr__(name: str) -> Any:
    """A type from its new place, with a warning.

    Raises:
        AttributeError: there was none of this name.
    """
    place = "posepress.spec" if name in _SPEC else _PLACES.get(name)
    if place is None:
        raise AttributeError(f"evaluation.types has no {name}")
    warnings.warn(f"evaluation.types.{name} moved: import it from {place}", DeprecationWarning, stacklevel=2)
    return getattr(import_module(place), name)
