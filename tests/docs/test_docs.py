"""The reference says what the code says, and defaults are written once."""

import dataclasses
import importlib.util
import inspect

import hydra
import pytest
import yaml

from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)

# What a choice is for: it differs from the default of its class in these options.
PRESETS = {
    "pruner=threshold": {"criterion", "normalizer", "pruning_threshold", "pruning_granularity", "min_num_filters"},
    "sampler=uniform": {"columns"},
    "precision=int8_qat": {"bias_correction"},  # training takes biases where they should be
    "backend=tensorrt": {"timing_cache"},
    "family=heatmap_paf": {"score_weights"},
    "precision=mixed": {"int8"},  # its own options are compared
}


def test_the_reference_is_what_the_signatures_say():
    assert generate.PAGE.read_text() == generate.page(), "write it: make docs"


@pytest.mark.parametrize("group", [g for g in generate.GROUPS if g not in ("stages", "data")])
def test_defaults_in_files_are_those_of_the_classes(group):
    compared = 0
    for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
        content = yaml.safe_load(file.read_text())
        for _, node in generate.components(content, ""):
            usual = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
            for name, value in node.items():
                if name not in usual or usual[name].default is inspect.Parameter.empty or "${" in str(value):
                    continue
                default = usual[name].default
                if default is dataclasses._HAS_DEFAULT_FACTORY:
                    default = getattr(hydra.utils.get_object(node["_target_"])(), name)
                default = list(default) if isinstance(default, tuple) else default
                first = value[0] if group == "family" and isinstance(value, list) and not isinstance(default, list) else value
                same = first == default
                assert same or name in PRESETS.get(f"{group}={file.stem}", ()), f"{file.name}: {name}={value}, class {default}"
                compared += same
    assert compared or group == "model", group


def test_every_option_has_a_sentence():
    rows = [line for line in generate.page().splitlines() if line.startswith("| `") and not line.endswith("|  |")]
    silent = [line for line in generate.page().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert len(rows) > 300
    assert not silent, silent
