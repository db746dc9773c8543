"""Completion of a configuration: automatic values, and the options that stages take from other places."""

import ast
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch.earlier import has, move, remove
from pipeline.launch.labels import GROUPS, Config, automatic, class_of, method, options_of, said
from pipeline.launch.options import Command
from pipeline.launch.values import parameters
from posepress.errors import UserError

SHARED = tuple(Command.__annotations__)  # a stage gets these options if its class has attributes with their names


def holds(config: Config, condition: str) -> bool:
    """Whether a condition such as "pruner.measures", "precision.measures" or "pruner.trains" holds.

    The class of the choice has a method of this name, which decides by the choice's options. A choice that measures
    candidates makes results that are valid on this machine only.
    """
    group, _, name = condition.partition(".")
    function = method(config, group, name)
    with _quietly():
        return bool(function is not None and function(options_of(config, group)))
    return False


def settle(config: DictConfig) -> None:
    """Write automatic values, labels and the stages' wiring into a configuration.

    Values that depend on a wrong option stay unchanged, because the check of that option reports the error.
    """
    move(config)
    for group in ("pruner", "precision"):
        with _quietly():
            _write(config[group], automatic(config, group))
    with _quietly():
        _retraining(config)
    for name in map(str, config.stages) if isinstance(config.stages, DictConfig) else ():
        _follow(config, name)
    for name in map(str, config.addresses):
        with _quietly():
            config.addresses[name] = config.addresses[name]
    with _quietly():
        config.axes = config.axes


@contextmanager
def _quietly() -> Iterator[None]:
    """Ignore errors of values that depend on a wrong option, because the check of that option reports them."""
    with suppress(OmegaConfBaseException, TypeError, ValueError, KeyError, AttributeError):
        yield


def _write(node: Any, values: Mapping[str, Any]) -> None:
    OmegaConf.set_struct(node, value=False)
    for key, value in values.items():
        if isinstance(value, Mapping):
            _write(node[key], value)
        else:
            node[key] = value


def _retraining(config: Config) -> None:
    """Set the learning rate and the seed of retraining if they are null."""
    retrain = config.stages.get("retrain")
    if not isinstance(retrain, DictConfig):
        return
    if retrain.get("seed", 0) is None:
        retrain.seed = config.seed if config.control is None else config.control_seed
    training = retrain.get("training")
    if isinstance(training, DictConfig) and training.get("lr", 0) is None:
        own = said(config, "model", "retrain_lr", 1e-3)
        training.lr = config.stages.train.training.lr if config.control == "scratch" else own


def _follow(config: Config, stage: str) -> None:
    """Replace options that a stage does not set by references to the options of another stage."""
    node = config.stages.get(stage)
    follows = node.get("follows") if isinstance(node, DictConfig) else None
    if not isinstance(follows, DictConfig):
        return
    remove(node, "follows")
    for part, source in follows.items():
        _follow(config, str(source).removeprefix("stages.").partition(".")[0])
        there, here = OmegaConf.select(config, source), node.get(part)
        for key in map(str, there) if isinstance(there, DictConfig) and isinstance(here, DictConfig) else ():
            if not has(here, key):
                _refer(here, key, f"{source}.{key}")


def _refer(node: DictConfig, key: str, place: str) -> None:
    OmegaConf.set_struct(node, value=False)
    node[key] = f"${{{place}}}"


def wire(config: DictConfig, names: Iterable[str]) -> None:
    """Add to stages the options of the whole command that their classes take, and those that a condition requires."""
    for name in names:
        node: Any = config.stages.get(name)
        if not isinstance(node, DictConfig):
            continue
        device, when = node.get("device"), node.get("when")
        if isinstance(device, str) and device.partition(".")[0] in GROUPS:
            node["device"] = holds(config, device)
        if isinstance(when, DictConfig):
            remove(node, "when")
            for condition, options in when.items():
                for key in options if condition == "otherwise" or holds(config, str(condition)) else ():
                    if not has(node, key):
                        node[key] = options._get_node(key)._value()  # noqa: SLF001 - copies the reference, not its value
        found = _found(node, name)
        for key in (key for key in _parameters(str(node.get("_target_"))) if not has(node, key)):
            own = _bases(config) if key == "bases" else _annotated(config) if key == "data" and not found else {}
            if own:
                OmegaConf.set_struct(node, value=False)
                node[key] = own
            elif key in SHARED and key in config:
                _refer(node, key, key)


def _found(node: DictConfig, name: str) -> bool:
    """Whether a stage's file asks for the boxes that are found, instead of those of the annotations.

    Raises:
        UserError: it asks for others.
    """
    boxes = node.get("boxes")
    if boxes is None:
        return False
    remove(node, "boxes")
    if boxes != "found":
        raise UserError(f"stages.{name}.boxes={boxes}: choose found, or leave it out for annotated boxes")
    return True


def _bases(config: Config) -> dict[str, Any]:
    """The framing for training: its other options change no base view, so that training does not depend on them."""
    options = options_of(config, "framing")
    used = getattr(class_of(str(options.get("_target_"))), "bases_use", tuple(options))
    return {key: value for key, value in options.items() if key == "_target_" or key in used}


def _annotated(config: Config) -> dict[str, Any]:
    """The data with the boxes of its annotations, if others are chosen: a network does not depend on where people are found."""
    data = options_of(config, "data")
    usual = {"boxes": "annotations", "detector": None}
    others = {key: value for key, value in usual.items() if data.get(key, value) != value}
    return {**data, **others} if others else {}


@cache
def _parameters(target: str) -> list[str]:
    """The names of a stage's options, read from its source: an import takes seconds, also where the stage is fresh."""
    module, _, name = target.rpartition(".")
    try:
        found = find_spec(module)
        tree = ast.parse(Path(str(found.origin)).read_text()) if found is not None else ast.Module([], [])
    except (ImportError, ValueError, OSError, SyntaxError):
        return []
    stage = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if stage is None:
        return []
    if stage.bases or any(isinstance(node, ast.FunctionDef) and node.name == "__init__" for node in stage.body):
        return list(parameters(target))  # its own source does not tell
    fields = [node for node in stage.body if isinstance(node, ast.AnnAssign) and "ClassVar" not in ast.unparse(node.annotation)]
    return [field.target.id for field in fields if isinstance(field.target, ast.Name)]
