"""The words that labels, and with them the addresses of results, are made of."""

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.options import REFERENCE
from pipeline.results.content import digest_of

_FRAMINGS = {None: "stretch", "pad_image_input": "pad", "adjust_network_input": "adjust"}


def _framing_label(mode: str | None, scales: Any, flip: bool) -> str:
    """How images become inputs, in a word: pad, or pad-x0.5-1-1.5-2-flip where several views are averaged."""
    scales = scales if isinstance(scales, Sequence) else [scales]  # which the framing then refuses
    several = "" if list(scales) == [1] else "-x" + "-".join(f"{scale:g}" for scale in scales)
    return f"{_FRAMINGS.get(mode, mode)}{several}{'-flip' if flip else ''}"


def _sampler_words(images: Any, image_dir: str | None, allocation: str) -> str:
    """What of a sampler differs from the usual, in its label."""
    where = "-dir" if image_dir is not None else "" if list(images) == ["train"] else f"-{'+'.join(images)}"
    return where + ("" if allocation == "proportional" else f"-{allocation}")


def _int8_words(
    percentile: float, weights: str, concatenations: bool, layers: bool, bias: bool, rest: str, narrow: bool
) -> str:
    """What of INT8 differs from the usual, in its label."""
    off = {"concat": concatenations, "layers": layers, "bias": bias}
    words = ["" if percentile == 99.99 else str(percentile), "" if weights == "max" else f"-w.{weights}"]
    words += [f"-no.{name}" for name, on in off.items() if not on]
    return "".join(words) + ("" if rest == "fp32" else f"-{rest}") + ("-w7" if narrow else "")


def _pruner_words(backend: str, resolution: str, framing: str, threads: int, *, _parent_: Any) -> str:
    """How a network is pruned, in a label; what is measured depends on where."""
    pruner = _parent_
    ways = {"": pruner.pruning_ratio, "th": pruner.pruning_threshold, f"{pruner.target}-": pruner.value}
    name = {"group_l1": "l1", "l1": "own.l1"}.get(pruner.criterion, pruner.criterion.replace("_", "."))
    words = [name, *(f"{way}{value}" for way, value in ways.items() if value is not None)]
    usual = {"normalizer": None, "equalization_criterion": "union", "max_pruning_ratio": 0.9, "min_num_filters": 8}
    words += [f"{option[:3]}.{pruner[option]}" for option, value in usual.items() if pruner[option] != value]
    words += [f"own.{_digest(pruner.pruning_ratio_dict)}"] if pruner.pruning_ratio_dict else []
    words += [f"ex.{_digest(pruner.excluded_layers)}"] if pruner.excluded_layers else []
    words += [f"n{pruner.iterative_steps}"] if pruner.iterative_steps > 1 else []
    words += ["global"] if pruner.global_pruning and not pruner.isomorphic else []
    words += ["isomorphic"] if pruner.isomorphic else []
    words += ["sensitivity"] if pruner.sensitivity is not None else []
    if pruner.round_to is None and pruner.target is None:
        words.append(f"r{pruner.unmeasured}")
    else:
        otherwise = "" if pruner.unmeasured == 16 else f".{pruner.unmeasured}"
        words.append(f"rauto{otherwise}" if pruner.round_to is None else f"r{pruner.round_to}")
    if pruner.measures_here:
        words.append(f"{backend}-{resolution}-{framing}-t{threads}")
    return "-".join(words)


def _ranking_words(normalizer: str | None, equalization: str) -> str:
    """How a criterion's norms are read, in the label of what ranks channels by them."""
    return ("" if normalizer is None else f"-{normalizer}") + ("" if equalization == "union" else f"-{equalization}")


def _measuring(measures: bool, *, _root_: Any) -> Any:
    """The backend that measures a pruning's steps, the same one for every precision and rebuild of the pruned network."""
    if not measures:
        return None
    if _root_.rebuild:
        _root_ = deepcopy(_root_)
        _root_.rebuild = 0
    backend = OmegaConf.to_container(_root_.backend, resolve=True)
    assert isinstance(backend, dict)
    return {**backend, "precision": "fp32"} if "precision" in backend else backend


def _digest(option: Any) -> str:
    """Six letters that stand for an option too long for a label."""
    plain = OmegaConf.to_container(option) if OmegaConf.is_config(option) else option
    return digest_of(plain)[:6]


def _excluded_words(excluded: Any) -> str:
    return f"-ex.{_digest(excluded)}" if excluded else ""


def _control_words(control: str | None, seed: int) -> str:
    return "" if control is None else f"-{control}{seed}" if control == "scratch" else f"-{control}"


def _divisor_for(round_to: int | None, target: str | None, backend: str, precision: str) -> int:
    """Channel counts are best multiples of this, where nothing is measured: NVIDIA's documentation of its tensor cores.

    One value for all where nobody asks for it, lest prunings that are the same have two addresses.
    """
    if round_to is not None or target == "latency":
        return 16
    return 32 if backend.startswith("tensorrt") and precision.startswith("int8") else 16


def _without_vnni(backend: str) -> bool:
    """Whether INT8 kernels of this processor add two products of 8 bits in 16 bits, so that weights need one bit less."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return backend == "onnxruntime" and "avx2" in text and "vnni" not in text


def settle(config: DictConfig) -> None:
    """Replace the interpolation of each label and address by its value: a hundred options refer to them.

    A plain reference stays, for a message names the option that it refers to.
    """
    for group in map(str, config):
        node: Any = config._get_node(group)  # noqa: SLF001 - reading it would resolve an interpolation, which may fail
        keys = ("recipe", "label", "address") if group not in ("addresses", "axes") else node or ()
        for key in keys if isinstance(node, DictConfig) else ():
            raw: Any = node._get_node(key, validate_access=False)  # noqa: SLF001
            text = None if raw is None else raw._value()  # noqa: SLF001
            if not isinstance(text, str) or "${" not in text or REFERENCE.fullmatch(text):
                continue
            try:
                node[key] = node[key]
            except OmegaConfBaseException:
                continue  # made of an option that is wrong, which is named in its own place


def register() -> None:
    """Make these words known to the configuration."""
    for name, resolver in (
        ("framing_label", _framing_label),
        ("sampler_words", _sampler_words),
        ("int8_words", _int8_words),
        ("latency_words", lambda limit: "" if limit is None else f"-t{limit}"),
        ("quantized_by", lambda exported: None if exported is None else "quantize"),
        ("placed_words", lambda placement, backend, threads: "" if placement == "default" else f"-placed-{backend}-t{threads}"),
        ("is_search", lambda placement: placement == "search"),
        ("first_build", lambda rebuild, value: value if rebuild == 0 else None),
        ("stem", lambda file: re.sub(r"[^\w.+=-]", "-", Path(str(file)).stem)),
        ("word_if", lambda on, word: word if on else ""),
        ("qat_word", lambda network: "-qat" if network == "qat" else ""),
        ("pruner_words", _pruner_words),
        ("ranking_words", _ranking_words),
        ("measuring", _measuring),
        ("divisor_for", _divisor_for),
        ("either", lambda condition, yes, no: yes if condition else no),
        ("not_null", lambda value: value is not None),
        ("several", lambda steps: steps > 1),
        ("steps_measured", lambda target, steps: target is not None or steps > 1),
        ("weights_of", lambda control: "prune" if control == "pruned" else "retrain"),
        ("from_scratch", lambda control: control == "scratch"),
        ("control_words", _control_words),
        ("excluded_words", _excluded_words),
        ("without_vnni", _without_vnni),
    ):
        OmegaConf.register_new_resolver(name, resolver, replace=True)
