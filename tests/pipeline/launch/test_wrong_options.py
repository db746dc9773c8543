"""Wrong options: each is refused with its name, its value and what is allowed, before any work, and nothing is written."""

import pickle
import re
from copy import deepcopy
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from annotated_types import Ge, Gt, Interval, Le, Lt
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.launch import command_line, options, preflight, wiring
from pipeline.launch import values as values_module
from pipeline.launch.cell import Cell
from pipeline.launch.tracking import Cells
from pipeline.results.stage import ABOUT, WIRING
from posepress.errors import UserError
from tests.conftest import ROOT, SMOKE

CASES = yaml.safe_load((ROOT / "tests/pipeline/launch/wrong_options.yaml").read_text())
GROUPS = {folder.name for folder in (ROOT / "conf").iterdir() if folder.is_dir()}

FOLDERS = command_line._folders(None)


@cache
def base(*choices):
    """The configuration of some choices of groups, composed once."""
    return command_line.compose(choices, None)


def changed(config, words):
    """A configuration with further words of the command, which choose no group."""
    config = pickle.loads(pickle.dumps(config))  # three times as fast as deepcopy
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(words)), config)
    return config


def refusal(words):
    """What the command says of some words, in this process."""
    read = None
    try:
        read = command_line.read([*SMOKE, *words])
        if any(word.partition("=")[0] in GROUPS and not command_line._is_choice(word, FOLDERS) for word in read.options):
            command_line.compose(read.options, None)
        choices = [word for word in read.options if command_line._is_choice(word, FOLDERS)]
        config = changed(base(*choices), [word for word in read.options if word not in choices])
        cell = Cell(config, read.options, read.sweep)
        cell.logbook = Cells(cell)
        cell.preflight()
    except UserError as error:
        return str(error)
    except (HydraException, OmegaConfBaseException) as error:
        return command_line.explained(error, read)
    pytest.fail(f"{words}: taken")


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case["words"]))
def test_a_wrong_option_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refusal(case["words"])
    assert re.search(case["says"], said), said
    assert len(said) < 700, said
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_there_are_many_of_them():
    assert len(CASES) >= 150
    assert len({" ".join(case["words"]) for case in CASES}) == len(CASES)


# Every option of every choice, by its annotation.
SETS = [
    ["pruner=l1", "precision=int8", "pruner.sensitivity=sensitivity", "pruner.target=latency", "pruner.value=0.5x"],
    ["pruner=threshold", "precision=mixed", "sampler=coverage", "backend=tensorrt"],
    ["pruner=torch_pruning", "precision=int8_qat", "model=mobilenetv2_paf", "backend=torch"],
    ["precision=fp16", "sampler=uniform"],
    ["precision=fp8", "pruner=sparse24"],
    ["precision=int8_entropy", "backend=tensorrt"],
    ["family=topdown", "model=onnx", "model.onnx=m", "precision=external", "precision.file=f"],
]


def components(node, found):
    """Every node below one that is built from a signature."""
    for key in map(str, node):
        if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        if isinstance(node[key], DictConfig):
            if "_target_" in node[key]:
                found.append(node[key])
            components(node[key], found)
    return found


def annotated(config):
    """Name and annotation of every option that stands in its own place."""
    yield from ((key, hint) for key, hint in get_type_hints(options.Command, include_extras=True).items() if hint is not Any)
    planned = {*preflight.planned(config, sweep=False)[0], "parity", "compare", "doctor"}
    for node in components(config, []):
        place = node._get_full_key(None).split(".")
        if place[0] == "stages" and place[1] not in planned:
            continue
        stage = node._get_full_key(None).startswith("stages.") and node._get_full_key(None).count(".") == 1
        for key, parameter in values_module.parameters(node["_target_"]).items():
            if key in node and key not in (WIRING if stage else (ABOUT,)) and not OmegaConf.is_interpolation(node, key):
                hint = values_module._candidates(parameter.hint) if node._get_full_key(None) == "decoder" else parameter.hint
                yield node._get_full_key(key), hint


def kinds(hint):
    """The alternatives of an annotation, with their markers."""
    for kind in values_module._alternatives(hint):
        markers = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
        yield (get_args(kind)[0] if markers else kind), markers


def outside(markers):
    """A number that a range does not hold."""
    bounds = [bound for marker in markers for bound in (marker if isinstance(marker, Interval) else [marker])]
    for bound in bounds:
        if isinstance(bound, Ge):
            return bound.ge - 1
        if isinstance(bound, Gt):
            return bound.gt
        if isinstance(bound, Le):
            return bound.le + 1
        if isinstance(bound, Lt):
            return bound.lt
    return None


def wrong_values(name, hint):
    """Values that an option must not have."""
    found = []
    inside = [kind for kind, _ in kinds(hint)]
    for kind, markers in kinds(hint):
        if kind in (int, float):
            assert outside(markers) is not None, f"{name} has no range"
            found += [outside(markers), float("nan"), float("inf"), True, *([] if str in inside else ["abc"])]
            found += [1.5] if kind is int else []
        elif kind is bool:
            found += ["maybe", 5]
        elif get_origin(kind) is Literal:
            found += ["nonsense", True, [1]]
        elif kind is str:
            found += [True, {"a": 1}]
        elif values_module._container(kind) is not None:
            found += [
                *([] if bool in inside else [True]),
                "" if values_module._container(kind) in (dict, options.Mapping) else {"a": 1},
            ]
    return found if NoneType in inside or Any in inside else [*found, None]


def refused(config, name):
    """What the check of what an option belongs to says of it."""
    group, _, rest = name.partition(".")
    try:
        if not rest:
            options.check_command(config)
        elif group == "stages":
            options.check_stages(config, [rest.partition(".")[0]])
        else:
            options.check_component(config, group)
            wiring.wire(config, ["quantize", "qat"])
            options.check_stages(config, ["quantize", "qat"] if "trained_with" in rest else ["quantize"])
    except UserError as error:
        return str(error)
    return "nothing"


def test_every_option_is_checked_against_its_annotation():
    tried = set()
    for words in SETS:
        before_set = len(tried)
        choices = [word for word in words if word.partition("=")[0] in GROUPS]
        config = changed(base(*SMOKE, *choices), [word for word in words if word not in choices])
        wiring.settle(config)
        wiring.wire(config, config.stages)
        for name, hint in annotated(config):
            parent, _, key = name.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            option = (name, str(hint), node.get("_target_"))
            if option in tried:
                continue
            tried.add(option)
            before = deepcopy(node._get_node(key))
            for value in wrong_values(name, hint):
                node[key] = value
                assert refused(config, name).startswith(name), (name, value, refused(config, name))
            node._content[key] = before
        assert len(tried) > before_set, words
    assert len(tried) > 200
