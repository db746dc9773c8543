"""Check of every option's type and range before any work.

The options of a stage and of a component are the arguments of its `_target_`. Their annotations
state the allowed values, for example `Annotated[int, Ge(1)]`. All other options are declared in `Command`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from annotated_types import Ge, Interval, MinLen, Predicate, doc
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch.detector import find_detector
from pipeline.launch.skeleton import read_skeleton
from pipeline.launch.values import Check, parameters, refuse_unless, shown, target_of
from pipeline.results.stage import ABOUT, WIRING
from posepress.errors import UserError, nearest

Size = Annotated[str, Predicate(re.compile(r"\d+x\d+").fullmatch), doc("HEIGHTxWIDTH, for example 288x384")]

Word = Annotated[str, Predicate(re.compile(r"[\w.+=-]{0,100}").fullmatch), doc("letters, digits and ._+=-, 100 at most")]

# The folder may be part of MLflow's URI of a database, in which "?" ends the path and "%20" means a blank.
Folder = Annotated[str, Predicate(re.compile(r"(?!.*%[0-9A-Fa-f]{2})[^?\n]+").fullmatch), doc("a folder without ? and %20")]

Seed = Annotated[int, Interval(ge=0, lt=2**32)]


class Command(TypedDict):
    """The options of conf/config.yaml. Options of type Any are components; values of type object are computed."""

    name: Word
    stage: str | Sequence[str] | None
    training_resolution: Size
    resolution: Size
    keep_aspect_ratio_mode: Literal["pad_image_input", "adjust_network_input"] | None
    scales: Annotated[Sequence[Annotated[float, Interval(ge=0.1, le=8)]], MinLen(1)]
    flip: bool
    batch: Annotated[int, Interval(ge=1, le=65536)]
    rebuild: Annotated[int, Ge(0)]
    threads: Annotated[int, Interval(ge=0, le=65536)]
    seed: Seed
    control: Literal["pruned", "scratch"] | None
    control_seed: Seed
    exported: str | None
    quantized: str | None
    tuned_by: str | None
    weights: str | None
    skeleton: str | Mapping[str, object]
    trusted_modules: Sequence[str]
    engines: Sequence[str]
    source: str | Annotated[int, Ge(0)] | Sequence[str | Annotated[int, Ge(0)]] | None
    track: bool
    every: Annotated[int, Ge(1)]
    live: bool
    target: Literal["tensorrt", "onnxruntime", "bundle"]
    results: str | None
    outputs: Folder
    tag: Word
    force: bool
    strict: bool
    debug: bool
    addresses: Mapping[str, object]
    axes: Mapping[str, object]
    judged_by: Any
    stages: Mapping[str, object]
    data: Any
    detector: Any
    model: Any
    pruner: Any
    sampler: Any
    precision: Any
    backend: Any
    tracking: "Tracking"
    objective: Any
    framing: Any
    decoder: Any
    metric: Any
    agreement: Any


class Tracking(TypedDict):
    """The options of conf/tracking."""

    enabled: bool
    uri: str | None


class About(TypedDict, total=False):
    """The description of a component in its file, under `about`. Its keys are no arguments of the `_target_`.

    `name` and `label` appear in addresses and tables. Unless `label` is given, it is `name` and the suffix that the component's
    `label_of` returns. `network`, `calibration`, `checkpoint` and `tuned_by` name the stages that the component reads.
    """

    label: str
    name: str
    recipe: str
    calibration: str | None
    checkpoint: str | None
    network: str | None
    tuned_by: str | None
    only_on: str | None
    requires: Sequence[str]
    multiple: Annotated[int, Interval(ge=1, le=4096)]
    offset: Annotated[int, Interval(ge=0, le=4096)]
    last_tensorrt: Annotated[int, Ge(1)]
    retrain_lr: Annotated[float, Interval(ge=0, le=100)]
    fixed_size: bool
    boxes: str
    measured_on: Any
    framing: Any
    resolution: str | None


def check_command(config: DictConfig) -> None:
    """Check the options of conf/config.yaml, and convert numbers to text where an option is a text.

    Raises:
        UserError: an option is unknown, missing or wrong.
    """
    known = get_type_hints(Command, include_extras=True)
    check = Check()
    for key in map(str, config):
        if key not in known and key != "hydra":
            raise UserError(f"{key}: no such option{nearest(key, known)}; `python -m pipeline --cfg job` lists them")
    here = set(config.keys())  # "in config" resolves the value
    if "skeleton" in here:
        read_skeleton(config)
    if {"detector", "outputs"} <= here:
        find_detector(config)
    for key, hint in known.items():
        if key not in here:
            raise UserError(f"{key}: is not there, but it is needed; do not take it out of the configuration")
        if hint is not Any:
            check.option(config, key, hint)
    for key in ("data", "model", "pruner", "precision", "backend", "judged_by"):  # every chain needs these
        refuse_unless(isinstance(config[key], DictConfig), key, config[key], DictConfig)
    for key in config.model if "_target_" not in config.model else ():
        if OmegaConf.is_missing(config.model, key):
            raise UserError(f"model.{key} has no value; give it as model.{key}=FILE")
    for key, hint in known.items():
        node = config[key] if hint is Any else None
        if isinstance(node, DictConfig) and ABOUT in node and not OmegaConf.is_missing(node, ABOUT):
            check.option(node, ABOUT, About)


def check_wiring(config: DictConfig) -> None:
    """Check the class, inputs and address of every stage, from which the plan is made.

    Raises:
        UserError: a stage is no mapping, or lacks its class, inputs or address.
    """
    check = Check()
    shape = "a stage is a mapping with _target_, inputs and address"
    for name, node in config.stages.items():
        place = f"stages.{name}"
        if not isinstance(node, DictConfig):
            raise UserError(f"{place}={shown(node)}: no stage; {shape}{nearest(name, set(config.stages) - {name})}")
        kinds = {"_target_": str, "inputs": Mapping[str, str | None], "address": str}
        here = node.keys()
        absent = [key for key in kinds if key not in here]
        if len(absent) == len(kinds):
            raise UserError(f"{place}: no such stage{nearest(name, set(config.stages) - {name})}; {shape}")
        if absent:
            raise UserError(f"{place}.{absent[0]}: is not there; {shape}")
        for key, hint in kinds.items():
            check.option(node, key, hint)
        if "aside" in node:
            check.option(node, "aside", bool)


def check_stages(config: DictConfig, names: Sequence[str]) -> None:
    """Check the options of stages and of the components in them.

    Raises:
        UserError: an option is unknown, missing or wrong.
    """
    check = Check()
    for name in names:
        if not OmegaConf.is_dict(config.stages.get(name)) or "_target_" not in config.stages[name]:
            raise UserError(f"stages.{name}: no such stage{nearest(name, config.stages)}")
        check.stage(config.stages[name], name)


def installed(node: Any) -> bool:
    """Whether the packages that a component needs are installed. A device has no torch; its options were checked before."""
    target = str(node.get("_target_", "")) if isinstance(node, DictConfig) else ""
    try:
        parameters(target)
    except ModuleNotFoundError as error:
        return error.name is None or target.startswith(error.name)
    except Exception:  # noqa: BLE001 - the check of the options reports any error
        return True
    return True


def check_component(config: DictConfig, group: str) -> None:
    """Check the options of a component that the command names, even if no planned stage uses it.

    Raises:
        UserError: an option is unknown, missing or wrong.
    """
    node = config.get(group)
    if isinstance(node, DictConfig) and "_target_" in node:
        Check().component(node)


def check_added(config: DictConfig, words: Sequence[str]) -> None:
    """Refuse options that `+` adds to the configuration although no signature has them.

    Raises:
        UserError: no signature has the added option, or it is added to something that is no component.
    """
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if not word.startswith("+") or key.startswith("hydra.") or "@" in key or f"~{key}" in words:
            continue
        parts = key.split(".")
        components = [n for n in range(1, len(parts)) if _component_at(config, parts[:n]) is not None]
        free = parts[:2] in (["model", "spec"], ["model", "tensors"])
        if len(parts) == 1 or parts[1] == ABOUT or (free and not components):
            continue  # `Command`, `About` or the network's description checks it
        place = components[-1] if components else 0
        node = _component_at(config, parts[:place]) if components else None
        if node is not None and not installed(node):
            continue
        takes = parameters(target_of(node)) if node is not None else {}
        wiring = WIRING if parts[0] == "stages" and place == 2 else ()
        if place == 0 or (parts[place] not in (*takes, *wiring) and "**" not in takes):
            raise UserError(f"{key}: no such option{nearest(parts[place], takes)}; `python -m pipeline --cfg job` lists them")


def _component_at(config: DictConfig, parts: Sequence[str]) -> DictConfig | None:
    try:
        node = OmegaConf.select(config, ".".join(parts))
    except OmegaConfBaseException:
        return None
    return node if isinstance(node, DictConfig) and node.get("_target_") is not None else None
