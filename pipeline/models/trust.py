"""The network classes that a file may name. Checkpoints may come from other people, so they must not choose any code to run."""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posepress.errors import UserError

_OWN = "pipeline.models"
_VARIABLE = "POSEPRESS_TRUSTED_MODULES"  # passes the command's trusted modules on to its processes


def _dotted(name: object) -> bool:
    return isinstance(name, str) and all(part.isidentifier() for part in name.split("."))


def trust(modules: Sequence[str], network: str | None) -> None:
    """Set the modules that this command trusts, beside those below pipeline.models.

    Args:
        modules: files may name network classes of these modules and of the modules below them.
        network: `_target_` of the network that the command itself makes; files may name it, too.

    Raises:
        UserError: a name cannot be the name of a module.
    """
    if not isinstance(modules, list) or not all(_dotted(name) for name in modules):
        raise UserError(f"trusted_modules={modules}: not a list of names of modules; give them like trusted_modules=[my.nets]")
    os.environ[_VARIABLE] = json.dumps([list(modules), network])


def _below(module: str, modules: Sequence[str]) -> bool:
    return any(module == known or module.startswith(f"{known}.") for known in modules)


def network_class(target: object, file: Path) -> Callable[..., Any]:
    """Return the network class that a file names.

    Args:
        target: dotted name of the class in the file.
        file: path of the file, for messages.

    Raises:
        UserError: the command does not trust the module, the class cannot be imported, or it is no network class.
    """
    if not _dotted(target):
        raise UserError(f"{file}: the target {target!r} is no dotted name of a class; the file is damaged, make it again")
    text = str(target)
    modules, own = json.loads(os.environ.get(_VARIABLE, "[[], null]"))
    known = [_OWN, *modules]
    module = text.rpartition(".")[0]
    if _below(module, known):
        found = _imported(text, f"{file}: its network is {text}")
    else:
        found = None if own is None else _imported(own, f"model._target_={own}")
        if found is None or _name_of(found) != text:
            raise UserError(
                f"{file}: its network is {text}, from a module that this command does not name. If you trust its code, "
                f"add trusted_modules=[{module or text}]"
            )
        known.append(found.__module__)
    if found is None:
        raise UserError(f"{file}: cannot import {text}; put its module on PYTHONPATH, or make the file again")
    from torch import nn

    if not (isinstance(found, type) and issubclass(found, nn.Module) and _below(found.__module__, known)):
        raise UserError(f"{file}: {text} is no class of a network (a torch.nn.Module of {module}); the file is damaged")
    return found


def _name_of(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _imported(target: str, where: str) -> Any:
    """Import the object with a dotted name. Return None if the module or the object does not exist.

    Raises:
        UserError: the module exists but its own code fails.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except Exception as error:  # a module's own code raises anything
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            return None
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where}: its module cannot be imported ({what}); correct it") from error
