"""Labels, addresses and what else follows from the choices of a configuration.

A component says itself how its options are called in a label: its class has `label_of`. What is put together here are the
labels of several components: addresses, the axes of a table, the wiring of stages.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.results.stage import ABOUT

Config = Any  # a DictConfig, whose attributes are options

GROUPS = ("data", "model", "pruner", "sampler", "precision", "backend")  # whose labels are in addresses
# Words about a component that stood beside its arguments up to version 0.1; `about` holds them now.
MOVED: Mapping[str, tuple[str, ...]] = {
    "data": ("label",),
    "model": ("label", "multiple", "offset", "requires", "only_on", "retrain_lr"),
    "pruner": ("label",),
    "sampler": ("label", "network", "framing", "resolution"),
    "precision": (
        *("label", "name", "recipe", "network", "calibration", "tuned_by", "measured_on", "requires", "only_on"),
        "last_tensorrt",
    ),
    "backend": ("label", "requires", "checkpoint"),
    "framing": ("label",),
}
_GONE: Mapping[str, tuple[str, ...]] = {
    "model": ("weights_from", "onnx", "spec"),
    "pruner": ("weights_from", "measured_on", "measures_here", "by_sensitivity"),
    "sampler": ("address",),
    "precision": ("judged_by", "measures_here", "measuring"),
}
# Classes that files of choices written for version 0.1 name.
_TARGETS: Mapping[str, str] = {
    "evaluation.types.Resolution": "posepress.spec.Resolution",
    "evaluation.views.WholeImage": "posepress.framing.whole_image.WholeImage",
    "evaluation.views.PersonCrops": "posepress.framing.person_crops.PersonCrops",
    "evaluation.heatmap_paf.HeatmapPafDecoder": "posepress.decoders.heatmap_paf.decoder.HeatmapPafDecoder",
    "evaluation.topdown.TopDownDecoder": "posepress.decoders.heatmap_argmax.TopDownDecoder",
    "evaluation.coco.CocoKeypoints": "evaluation.metrics.coco_keypoints.CocoKeypoints",
    "evaluation.agreement.PoseAgreement": "evaluation.metrics.agreement.PoseAgreement",
}
# Parameters of stages that are options of the whole command: a stage's file need not name them.
SHARED = (
    *("data", "pruner", "sampler", "backend", "objective", "framing", "decoder", "metric", "agreement", "resolution", "batch"),
    *("threads", "seed", "control", "weights", "axes", "engines", "results", "target", "outputs", "name"),
    "training_resolution",
)


def said(config: Config, group: str, key: str, otherwise: Any = None) -> Any:
    """What a component's file says about it, in `about`."""
    node = config.get(group)
    if not isinstance(node, DictConfig):
        return otherwise
    about = node.get(ABOUT)
    value = node[key] if key in MOVED.get(group, ()) and _has(node, key) else None
    value = about.get(key) if value is None and isinstance(about, DictConfig) else value
    return otherwise if value is None else value


def label(config: Config, group: str) -> str:
    """How the choice of a group is called in tables and addresses."""
    if (given := said(config, group, "label")) is not None:
        return str(given)
    if group == "model" and said(config, group, "name") == "plan":
        return "plan-" + re.sub(r"[^\w.+=-]", "-", Path(str(config.model.plan)).stem)
    return "-".join(filter(None, [str(said(config, group, "name", "")), recipe(config, group)]))


def recipe(config: Config, group: str = "precision") -> str:
    """The part of a choice's label that follows from its options."""
    if (given := said(config, group, "recipe")) is not None:
        return str(given)
    function = _method(config, group, "label_of")
    return (
        ""
        if function is None
        else str(function({**_options(config, group), **_automatic(config, group)}, _setting(config, group)))
    )


def holds(config: Config, condition: str) -> bool:
    """Whether a choice says yes of its options: "pruner.measures", "precision.measures", "pruner.trains".

    What measures candidates on this machine makes a result that belongs here.
    """
    group, _, name = condition.partition(".")
    function = _method(config, group, name)
    with _quietly():
        return bool(function is not None and function(_options(config, group)))
    return False


def grid(config: Config) -> tuple[int, int]:
    """What sides of its input a network takes: k * multiple + offset."""
    given = OmegaConf.select(config, "model.spec.input")
    values = [said(config, "model", key) for key in ("multiple", "offset")]
    if isinstance(given, DictConfig):
        values = [given.get(key) if value is None else value for key, value in zip(("multiple", "offset"), values, strict=True)]
    return int(values[0] or 1), int(values[1] or 0)


def prunes(config: Config) -> bool:
    """Whether a pruner is chosen."""
    return isinstance(config.pruner, DictConfig) and "_target_" in config.pruner


def given(config: Config) -> bool:
    """Whether the network is given as a file, so that no torch weights are there."""
    return "_target_" not in config.model


def weights(config: Config) -> str | None:
    """The stage that makes the weights of the network that is exported."""
    if given(config):
        return None
    return "train" if not prunes(config) else "prune" if config.control == "pruned" else "retrain"


def _has(node: DictConfig, key: str) -> bool:
    return node._get_node(key, validate_access=False) is not None  # noqa: SLF001 - "in" resolves the value


def _options(config: Config, group: str) -> dict[str, Any]:
    options: Any = OmegaConf.to_container(config[group], resolve=True) if isinstance(config.get(group), DictConfig) else {}
    return {key: value for key, value in options.items() if key != ABOUT}


@cache
def _class(target: str) -> Any:
    """A component's class; None where it cannot be imported, which the check of its options says."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # noqa: BLE001 - the code of a module raises anything
        return None


def _method(config: Config, group: str, name: str) -> Callable[..., Any] | None:
    """A class method of a choice. A network's class is not looked at: whether it may be imported is not known yet."""
    node = config.get(group)
    target = node.get("_target_") if isinstance(node, DictConfig) and group != "model" else None
    return getattr(_class(str(target)), name, None) if target is not None else None


def _setting(config: Config, group: str) -> dict[str, str]:
    """The choices beside a component that its label, or its automatic values, may follow from."""
    setting = {"resolution": str(config.resolution), "threads": str(config.threads)}
    if group in ("pruner", "precision"):
        setting |= {"backend": label(config, "backend"), "framing": label(config, "framing")}
        setting |= {"precision": str(said(config, "precision", "name", ""))}
    if group == "precision":
        steps = OmegaConf.select(config, "stages.qat.training.steps")
        setting |= {"sampler": label(config, "sampler"), "qat_steps": str(steps)}
    return setting


def _automatic(config: Config, group: str) -> dict[str, Any]:
    """Values of the options of a choice that were left to it, where they follow from other choices."""
    function = _method(config, group, "settled")
    return {} if function is None else dict(function(_options(config, group), _setting(config, group)))


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


def _as_here(config: Config) -> dict[str, str]:
    """Labels that follow from this machine and its choices, and must not follow from the device that a package goes to."""
    groups = [group for group in (*GROUPS, "framing") if group != "backend"]
    fixed = {f"{group}.about.label": label(config, group) for group in groups}
    return {**fixed, "precision.about.recipe": recipe(config), "addresses.quantize": str(config.addresses.quantize)}


_ADDRESSES: Mapping[str, Callable[[Config], Any]] = {
    "dense": lambda c: f"{label(c, 'model')}{c.tag}",
    "sensitivity": _sensitivity,
    "pruned": _pruned,
    "network": lambda c: _pruned(c, _control(c)),
    "sample": _sample,
    "qat": lambda c: f"{_tuned(c, c.addresses.network)}_{recipe(c)}",
    "quantize": lambda c: f"{_tuned(c, c.addresses.network + _word(c))}_{label(c, 'precision')}",
    "tune": lambda c: _tuned(c, c.addresses.network),
    "build": lambda c: f"{c.addresses.quantize}_{label(c, 'backend')}-b{c.batch}{f'-r{c.rebuild}' if c.rebuild else ''}",
    "benchmark": lambda c: f"{c.addresses.build}_t{c.threads}",
    "axes": lambda c: {
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
    "weights": weights,
}


def _label_of(what: str, *, _root_: Config) -> Any:
    """The resolver of labels and addresses."""
    return _ADDRESSES[what](_root_)


def _measuring(*, _root_: Config) -> Any:
    """The backend that measures a pruning's steps: the same one for every precision and rebuild of the pruned network."""
    root = deepcopy(_root_)
    root.rebuild = 0
    backend: Any = OmegaConf.to_container(root.backend, resolve=True)
    return {**backend, "precision": "fp32"} if "precision" in backend else backend


def register() -> None:
    """Make the resolvers known to the configuration."""
    OmegaConf.register_new_resolver("label_of", _label_of, replace=True)
    OmegaConf.register_new_resolver("measuring", _measuring, replace=True)


def settle(config: DictConfig) -> None:
    """Write into a configuration what follows from its choices: values left to a component, labels, and the stages' wiring.

    What is made of an option that is wrong stays as it is: that option is named by its own check.
    """
    _move(config)
    for group in ("pruner", "precision"):
        with _quietly():
            _write(config[group], _automatic(config, group))
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
    """Leave what is made of an option that is wrong: that option is named in its own place."""
    with suppress(OmegaConfBaseException, TypeError, ValueError, KeyError, AttributeError):
        yield


def _move(config: Config) -> None:
    """Take files of choices written for version 0.1: what they say about a component goes into `about`."""
    _rename(config)
    if config.exported is None:
        config.quantized = None
    for group in {*MOVED, *_GONE}:
        node = config.get(group)
        if not isinstance(node, DictConfig):
            continue
        moved = [key for key in MOVED.get(group, ()) if _has(node, key)]
        for key in moved:
            OmegaConf.set_struct(node, value=False)
            if not isinstance(node.get(ABOUT), DictConfig):
                node[ABOUT] = {}
            with suppress(OmegaConfBaseException):  # made by a resolver that is gone: the component makes it now
                node[ABOUT][key] = node[key]
            del node[key]
        for key in _GONE.get(group, ()):
            if "_target_" in node and _has(node, key):
                _remove(node, key)
        if moved:
            words = ", ".join(f"{key}: ..." for key in moved)
            print(f"warning: {group}.{moved[0]}: write `about: {{{words}}}` in the file of this choice", file=sys.stderr)


def _rename(node: Any) -> None:
    """Write the new names of classes that moved."""
    for key in list(node.keys()):
        inner = node._get_node(key)  # noqa: SLF001 - reading it would resolve an interpolation
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():  # noqa: SLF001
            _rename(inner)
        elif key == "_target_" and (new := _TARGETS.get(str(inner._value()))) is not None:  # noqa: SLF001
            print(f"warning: {node._get_full_key(key)}={inner._value()}: write {new}", file=sys.stderr)  # noqa: SLF001
            node[key] = new


def _remove(node: DictConfig, key: str) -> None:
    OmegaConf.set_struct(node, value=False)
    del node[key]


def _write(node: Any, values: Mapping[str, Any]) -> None:
    OmegaConf.set_struct(node, value=False)
    for key, value in values.items():
        if isinstance(value, Mapping):
            _write(node[key], value)
        else:
            node[key] = value


def _retraining(config: Config) -> None:
    """The rate and the seed of retraining, where they are left to it."""
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
    """Refer to the options of another stage where a stage does not say its own."""
    node = config.stages.get(stage)
    follows = node.get("follows") if isinstance(node, DictConfig) else None
    if not isinstance(follows, DictConfig):
        return
    _remove(node, "follows")
    for part, source in follows.items():
        _follow(config, str(source).removeprefix("stages.").partition(".")[0])
        there, here = OmegaConf.select(config, source), node.get(part)
        for key in map(str, there) if isinstance(there, DictConfig) and isinstance(here, DictConfig) else ():
            if not _has(here, key):
                _refer(here, key, f"{source}.{key}")


def _refer(node: DictConfig, key: str, place: str) -> None:
    OmegaConf.set_struct(node, value=False)
    node[key] = f"${{{place}}}"


def wire(config: DictConfig, names: Iterable[str]) -> None:
    """Give stages the options of the whole command that their functions take, and those of their measuring components."""
    for name in names:
        node: Any = config.stages.get(name)
        if not isinstance(node, DictConfig):
            continue
        device, when = node.get("device"), node.get("when")
        if isinstance(device, str) and device.partition(".")[0] in GROUPS:
            node["device"] = holds(config, device)
        if isinstance(when, DictConfig):
            _remove(node, "when")
            for condition, options in when.items():
                for key in options if condition == "otherwise" or holds(config, str(condition)) else ():
                    if not _has(node, key):
                        node[key] = options._get_node(key)._value()  # noqa: SLF001 - the reference, not what it refers to
        function = _class(str(node.get("_target_")))
        for key in _parameters(function) if callable(function) else ():
            if key in SHARED and not _has(node, key) and key in config:
                _refer(node, key, key)


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []
