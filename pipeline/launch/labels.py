"""Labels and addresses of a configuration.

A component's class determines its own label suffix with the method `label_of`. This module joins the labels of several
components to addresses and to the axes of a table.
"""

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pipeline.launch.components import located
from pipeline.launch.earlier import MOVED, has
from pipeline.results.stage import ABOUT

Config = Any  # a DictConfig, whose attributes are options

GROUPS = ("data", "model", "pruner", "sampler", "precision", "backend")  # groups with a label in addresses


def said(config: Config, group: str, key: str, otherwise: Any = None) -> Any:
    """Return a value from the `about` of a component's file, or `otherwise`."""
    node = config.get(group)
    if not isinstance(node, DictConfig):
        return otherwise
    about = node.get(ABOUT)
    value = node[key] if key in MOVED.get(group, ()) and has(node, key) else None
    value = about.get(key) if value is None and isinstance(about, DictConfig) else value
    return otherwise if value is None else value


def label(config: Config, group: str) -> str:
    """Return the label of a group's choice in tables and addresses."""
    if (given := said(config, group, "label")) is not None:
        return str(given)
    if group == "model" and said(config, group, "name") == "plan":
        return "plan-" + re.sub(r"[^\w.+=-]", "-", Path(str(config.model.plan)).stem)
    return "-".join(filter(None, [str(said(config, group, "name", "")), recipe(config, group)]))


def recipe(config: Config, group: str = "precision") -> str:
    """Return the part of a choice's label that depends on its options."""
    if (given := said(config, group, "recipe")) is not None:
        return str(given)
    function = method(config, group, "label_of")
    if function is None:
        return ""
    return str(function({**options_of(config, group), **automatic(config, group)}, _setting(config, group)))


def grid(config: Config) -> tuple[int, int]:
    """Return multiple and offset of a network: the sides of its input must be k * multiple + offset."""
    given = OmegaConf.select(config, "model.spec.input")
    values = [said(config, "model", key) for key in ("multiple", "offset")]
    if isinstance(given, DictConfig):
        values = [given.get(key) if value is None else value for key, value in zip(("multiple", "offset"), values, strict=True)]
    return int(values[0] or 1), int(values[1] or 0)


def prunes(config: Config) -> bool:
    """Whether a pruner is chosen."""
    return isinstance(config.pruner, DictConfig) and "_target_" in config.pruner


def given(config: Config) -> bool:
    """Whether the network is given as an ONNX file or plan, so that there are no torch weights."""
    return "_target_" not in config.model


def weights(config: Config) -> str | None:
    """Return the stage that makes the weights of the exported network, or None for a given file."""
    if given(config):
        return None
    return "train" if not prunes(config) else "prune" if config.control == "pruned" else "retrain"


def options_of(config: Config, group: str) -> dict[str, Any]:
    """Return the arguments of a choice with references resolved and without `about`."""
    options: Any = OmegaConf.to_container(config[group], resolve=True) if isinstance(config.get(group), DictConfig) else {}
    return {key: value for key, value in options.items() if key != ABOUT}


@cache
def class_of(target: str) -> Any:
    """Return a component's class, or None if it cannot be imported. The check of its options reports this error."""
    try:
        return located(target)
    except Exception:  # noqa: BLE001 - the code of a module raises anything
        return None


def method(config: Config, group: str, name: str) -> Callable[..., Any] | None:
    """Return a class method of a choice, or None. A network's class is not imported, because it may not be trusted."""
    node = config.get(group)
    target = node.get("_target_") if isinstance(node, DictConfig) and group != "model" else None
    return getattr(class_of(str(target)), name, None) if target is not None else None


def _setting(config: Config, group: str) -> dict[str, str]:
    """Return the other choices on which a component's label and automatic values may depend."""
    setting = {"resolution": str(config.resolution), "threads": str(config.threads)}
    if group in ("pruner", "precision"):
        setting |= {"backend": label(config, "backend"), "framing": label(config, "framing")}
        setting |= {"precision": str(said(config, "precision", "name", ""))}
    if group == "precision":
        steps = OmegaConf.select(config, "stages.qat.training.steps")
        setting |= {"sampler": label(config, "sampler"), "qat_steps": str(steps)}
    return setting


def automatic(config: Config, group: str) -> dict[str, Any]:
    """Return the automatic values of a choice's options, which depend on other choices."""
    function = method(config, group, "settled")
    return {} if function is None else dict(function(options_of(config, group), _setting(config, group)))


def _control(config: Config) -> str:
    if config.control is None:
        return ""
    return f"-{config.control}{config.control_seed}" if config.control == "scratch" else f"-{config.control}"


def _word(config: Config) -> str:
    return "-qat" if said(config, "precision", "network") == "qat" else ""


def _sample(config: Config) -> str:
    chosen, tag = label(config, "sampler"), config.tag
    if said(config, "sampler", "network") is None:
        return f"{chosen}{tag}"
    return f"{config.addresses.network}_{config.resolution}_{label(config, 'framing')}_{chosen}"


def _sensitivity(config: Config) -> str:
    ranks = config.stages.sensitivity
    words = "" if ranks.normalizer is None else f"-{ranks.normalizer}"
    words += "" if ranks.equalization_criterion == "union" else f"-{ranks.equalization_criterion}"
    return f"{config.addresses.dense}_{ranks.criterion}{words}"


def _pruned(config: Config, control: str = "") -> str:
    return f"{label(config, 'model')}_{label(config, 'pruner')}{control}{config.tag}"


def _tuned(config: Config, network: str) -> str:
    return f"{network}_{config.resolution}_{label(config, 'framing')}"


def _boxed(config: Config) -> str:
    """Return the words for boxes that annotations do not give; empty for annotated boxes."""
    if (given := said(config, "data", "boxes")) is not None:  # of a package, which holds the boxes themselves
        return f"_by-{given}" if given else ""
    if isinstance(config.get("detector"), DictConfig):
        return f"_by-{label(config, 'detector')}"
    file = str(config.data.get("boxes", "annotations")) if isinstance(config.data, DictConfig) else "annotations"
    plain = re.sub(r"[^\w.+=-]", "-", Path(file).stem)
    return "" if file == "annotations" else f"_by-{plain}"


def _as_here(config: Config) -> dict[str, str]:
    """Return labels that a package must take from this machine, so that they do not change on the device."""
    groups = [group for group in (*GROUPS, "framing") if group != "backend"]
    fixed = {f"{group}.about.label": label(config, group) for group in groups}
    fixed["data.about.boxes"] = _boxed(config).removeprefix("_by-")
    return {**fixed, "precision.about.recipe": recipe(config), "addresses.quantize": str(config.addresses.quantize)}


_ADDRESSES: Mapping[str, Callable[[Config], Any]] = {
    "dense": lambda c: f"{label(c, 'model')}{c.tag}",
    "sensitivity": _sensitivity,
    "pruned": _pruned,
    "network": lambda c: _pruned(c, _control(c)),
    "sample": _sample,
    "qat": lambda c: f"{_tuned(c, c.addresses.network)}_{recipe(c)}",
    "quantize": lambda c: f"{_tuned(c, c.addresses.network + _word(c))}_{label(c, 'precision')}",
    "tune": lambda c: _tuned(c, c.addresses.network) + _boxed(c),
    "build": lambda c: f"{c.addresses.quantize}_{label(c, 'backend')}-b{c.batch}{f'-r{c.rebuild}' if c.rebuild else ''}",
    "evaluate": lambda c: f"{c.addresses.build}{_boxed(c)}",
    "benchmark": lambda c: f"{c.addresses.evaluate}_t{c.threads}",
    "axes": lambda c: {
        **({"boxes": _boxed(c).removeprefix("_by-")} if _boxed(c) else {}),
        "data": label(c, "data"),
        "network": label(c, "model") + _word(c),
        "pruning": label(c, "pruner") + _control(c),
        "resolution": str(c.resolution),
        "keep_aspect_ratio_mode": label(c, "framing"),
        "precision": str(said(c, "precision", "name")),
        "calibration": recipe(c),
        "backend": label(c, "backend"),
        "batch": c.batch,
        "rebuild": c.rebuild,
        "seed": c.seed,
    },
    "here": _as_here,
    # A bundle is made of an engine and its evaluation, a package for a device of a network.
    "package": lambda c: f"{c.addresses.evaluate if c.target == 'bundle' else c.addresses.quantize}_{c.target}",
    "packaged": lambda c: "evaluate" if c.target == "bundle" else None,
    "weights": weights,
}


def _label_of(what: str, *, _root_: Config) -> Any:
    """Return a label or address. OmegaConf calls this resolver."""
    value = _ADDRESSES[what](_root_)
    return OmegaConf.create(value) if isinstance(value, dict) else value  # `--cfg job --resolve` takes no plain dict


def _measuring(*, _root_: Config) -> Any:
    """Return the backend that measures the steps of pruning. It does not depend on precision or rebuild."""
    root = deepcopy(_root_)
    root.rebuild = 0
    backend: Any = OmegaConf.to_container(root.backend, resolve=True)
    return OmegaConf.create({**backend, "precision": "fp32"} if "precision" in backend else backend)


def _unless(value: Any, usual: Any, otherwise: Any, then: Any = "") -> Any:
    """What stands for an option: `then` where it has its usual value, else `otherwise`."""
    return then if str(value).lower() == str(usual).lower() else otherwise


def register() -> None:
    """Register the resolvers in OmegaConf."""
    OmegaConf.register_new_resolver("unless", _unless, replace=True)
    OmegaConf.register_new_resolver("label_of", _label_of, replace=True)
    OmegaConf.register_new_resolver("measuring", _measuring, replace=True)
