"""Stages of a chain as plain data, and functions for their options."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posepress.errors import UserError

ABOUT = "about"  # key of a component's description: its name, its needs and where it runs; it is no argument
# Keys of a stage's yaml that connect it to others and are no arguments.
WIRING = ("address", "inputs", "toolchain", "splits", "files", "folders", "collect", "device", "aside")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, as plain data.

    Attributes:
        name: name of the stage.
        address: name of its result's folder in outputs/<name>/<stage>/.
        options: `_target_` and the arguments of its class.
        inputs: the stage that makes each input, by role.
        toolchain: Python distributions that may change the result when their version changes.
        splits: splits of `options["data"]` that the stage reads.
        files: options that name files of the user.
        folders: options that name image folders of the user.
        collect: the stage reads all finished results of its inputs, not only one.
        device: the result is valid on this machine only.
        aside: on demand. The stage is not part of the chain, runs only when requested and is then never skipped as fresh.
            Stages that collect its results treat them as optional.
    """

    name: str
    address: str
    options: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    toolchain: Sequence[str] = ()
    splits: Sequence[Literal["train", "unlabelled", "tune", "agreement", "validation"]] = ()
    files: Sequence[str] = ()
    folders: Sequence[str] = ()
    collect: bool = False
    device: bool = False
    aside: bool = False

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> "Stage":
        """Make a stage from a resolved entry of the group `stages`.

        Raises:
            UserError: the address is not a valid folder name.
        """
        address = config.get("address")
        if not isinstance(address, str) or not re.fullmatch(r"[\w.+=-]*", address) or address.startswith("."):
            raise UserError(f"stages.{name}.address={address}: a label holds more than letters, digits and ._+=-; correct it")
        wiring = {key: config[key] for key in WIRING if key in config}
        wiring["inputs"] = {role: stage for role, stage in (wiring.get("inputs") or {}).items() if stage is not None}
        return cls(name=name, options={k: v for k, v in config.items() if k not in WIRING}, **wiring)


def option_of(key: str) -> str:
    """Return the name on the command line of an option of a stage."""
    return {"plan": "model.plan", "onnx": "model.onnx"}.get(key, key.replace("quantizer.", "precision."))


def value_at(options: Mapping[str, Any], path: str) -> Any:
    """Return a nested option by its dotted path, or None if it does not exist."""
    value: Any = options
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def targets(value: Any) -> Iterator[str]:
    """Yield every `_target_` in nested options."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        for key, inner in value.items():
            if key != ABOUT:
                yield from targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from targets(inner)


def arguments(stage: Stage) -> dict[str, Any]:
    """Return the options that become arguments. Components are included without their `about`."""
    return {key: _component(value) for key, value in stage.options.items()}


def _component(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _component(inner) for key, inner in value.items() if key != ABOUT}
    return [_component(v) for v in value] if isinstance(value, (list, tuple)) else value
