"""A stage of a chain as plain data, and its options."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from posepress.errors import UserError

ABOUT = "about"  # the key of a component's file that holds what is no argument: its name, what it needs, where it runs
# Keys of a stage's yaml that wire it and are no arguments.
WIRING = ("address", "inputs", "toolchain", "splits", "files", "folders", "collect", "device", "aside")


@dataclass(frozen=True)
class Stage:
    """One stage of a chain, as plain data.

    Attributes:
        name: of the stage.
        address: of its result under outputs/<name>/<stage>/.
        options: `_target_` and the arguments of its function.
        inputs: role to the stage that makes it.
        toolchain: distributions whose version changes the result's bytes.
        splits: splits of `options["data"]` that it reads.
        files: options that name files of the user.
        folders: options that name folders of images of the user.
        collect: reads every finished result of its inputs, not one.
        device: its result belongs to this machine.
        aside: it belongs to no chain, and always runs when it is asked for; a stage that collects works without it.
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
        """From a resolved entry of the group `stages`.

        Raises:
            UserError: its address is no label.
        """
        address = config.get("address")
        if not isinstance(address, str) or not re.fullmatch(r"[\w.+=-]*", address) or address.startswith("."):
            raise UserError(f"stages.{name}.address={address}: a label holds more than letters, digits and ._+=-")
        wiring = {key: config[key] for key in WIRING if key in config}
        wiring["inputs"] = {role: stage for role, stage in (wiring.get("inputs") or {}).items() if stage is not None}
        return cls(name=name, options={k: v for k, v in config.items() if k not in WIRING}, **wiring)


def option_of(key: str) -> str:
    """What an option of a stage is called on the command line."""
    return {"plan": "model.plan", "onnx": "model.onnx"}.get(key, key.replace("quantizer.", "precision."))


def value_at(options: Mapping[str, Any], path: str) -> Any:
    """A nested option by its dotted path; None where it is not."""
    value: Any = options
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def targets(value: Any) -> Iterator[str]:
    """Every `_target_` in nested options."""
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
    """The options that become arguments: components without what only describes them."""
    return {key: _component(value) for key, value in stage.options.items()}


def _component(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _component(inner) for key, inner in value.items() if key != ABOUT}
    return [_component(v) for v in value] if isinstance(value, (list, tuple)) else value
