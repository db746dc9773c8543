"""The configuration tree: every file instantiates, and says of the code what the code says."""

import functools
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from pipeline.launch import cell, labels, wiring
from pipeline.launch.components import build
from pipeline.onnx_files import files
from pipeline.results.fingerprint import closure
from pipeline.results.stage import ABOUT, WIRING, Stage, _component, arguments
from posepress.spec import NetworkSpec
from tests.conftest import ROOT

CONF = ROOT / "conf"
GROUPS = ("data", "family", "model", "pruner", "sampler", "precision", "backend", "tracking", "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
NEEDED = ["weights=w", "data.train.images=a", "data.train.annotations=a", "data.val.images=a", "data.val.annotations=a"]
# Change no byte of a result.


def compose(*words):
    with hydra.initialize_config_module("conf", version_base="1.3"):
        config = hydra.compose("config", list(words))
    wiring.settle(config)
    wiring.wire(config, config.stages)
    return config


@functools.cache
def resolved(name, *words):
    """A stage's options, composed once for all tests that only read them."""
    config = whole(*words)
    return cell.resolved(config.stages[name])


whole = functools.cache(compose)


def composed(group, choice):
    more = {
        "onnx": ["model.onnx=m"],
        "packaged": ["data.about.label=d"],
        "plan": ["model.plan=p", "backend=tensorrt"],
        "external": ["precision.file=f"],
        "calibration_study": ["weights=w"],
    }
    extra = NEEDED if choice in ("coco", "mobilenetv2_paf_coco") else more.get(choice, [])
    return compose(f"{group}={choice}", *extra)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_binds_to_its_signatures(group, choice):
    config = composed(group, choice)
    bound = 0
    for name in config.stages:
        stage = Stage.from_config(name, cell.resolved(config.stages[name]))
        for some in (arguments(stage), *[v for v in arguments(stage).values() if isinstance(v, dict)]):
            for target in [some["_target_"]] if "_target_" in some else []:
                function = hydra.utils.get_object(target)
                given = {k: v for k, v in some.items() if not k.startswith("_")}
                signature = inspect.signature(function)
                if some.get("_partial_"):
                    signature.bind_partial(**given)
                else:
                    signature.bind(**given)
                bound += 1
    assert bound > len(config.stages), "every stage and some components"


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "data" / "README.md"]


def documented_commands():
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [line.partition(" #")[0] for line in blocks.splitlines()]
    found = [line for line in lines if line.startswith("python -m pipeline ") and "experiment=" in line]
    assert len(found) > 20
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", page.read_text()):
        if link and not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 8192


DEMO = [f"python -m pipeline experiment=demo pruner={file.stem}" for file in sorted((CONF / "pruner").glob("*.yaml"))]


@pytest.mark.parametrize("line", [*documented_commands(), *DEMO])
def test_documented_commands_say_what_can_be_made(line):
    words = [word for word in shlex.split(re.sub(r"--(cfg|package) \S+", "", line))[3:] if not word.startswith("--")]
    config = compose(*(word if "[" in word else word.partition(",")[0] for word in words))  # the first of a sweep's values
    for name in config.stages:
        Stage.from_config(name, cell.resolved(config.stages[name]))
    for group in ("pruner", "precision", "backend", "sampler"):
        component = OmegaConf.to_container(config[group], resolve=True)
        if "_target_" in component:
            assert build(_component(component)) is not None


@pytest.mark.parametrize(("group", "choice"), [c for c in CHOICES if c[0] not in ("tracking", "experiment", "family")])
def test_every_component_can_be_made(group, choice):
    if (group, choice) in {("model", "onnx"), ("model", "plan"), ("pruner", "none"), ("precision", "as_built")}:
        return  # described by data alone
    config = composed(group, choice)
    component = OmegaConf.to_container(config[group], resolve=True)
    made = build(_component(component))
    assert made is not None


@pytest.mark.parametrize("model", [c for g, c in CHOICES if g == "model"])
def test_the_multiple_in_the_file_is_the_networks(model):
    config = composed("model", model)
    if "_target_" not in config.model:
        spec = files.described(OmegaConf.to_container(config.model.spec, resolve=True))
    else:
        plain = {k: v for k, v in cell.resolved(config.model).items() if k != ABOUT}
        made = build(plain)
        assert isinstance(made, functools.partial)
        spec = made().spec
    assert isinstance(spec, NetworkSpec)
    assert labels.grid(config) == (spec.input.multiple, spec.input.offset)


def test_stage_files_are_short():
    for file in (ROOT / "pipeline/stages").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 150, file
        imported = {f.relative_to(ROOT) for f in closure([f"pipeline.stages.{file.stem}"])} - {file.relative_to(ROOT)}
        assert {f.name for f in imported if "stages" in f.parts} <= {"__init__.py"}, f"{file} imports a stage"


def test_wiring_is_known():
    for file in (CONF / "stages").glob("*.yaml"):
        (content,) = yaml.safe_load(file.read_text()).values()
        assert set(content) >= {"_target_", "address", "inputs"}
        assert all(key in WIRING for key in ("address", "inputs"))


LEAVES = [
    "posepress.spec",
    "posepress.skeletons",
    "posepress.geometry",
    "posepress.framing.whole_image",
    "posepress.framing.person_crops",
    "posepress.decoders.heatmap_paf.decoder",
    "posepress.decoders.heatmap_argmax",
    "posepress.results",
    "posepress.predict",
    "posepress.runners.onnxruntime",
    "posepress.runners.tensorrt",
    "evaluation.metrics.coco_keypoints",
    "evaluation.latency",
    "calib_samplers.stratified",
]


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_load_nothing_heavy_and_nothing_above_them(module):
    heavy = ("torch", "cv2", "onnx", "onnxruntime", "mlflow", "tensorrt", "hydra", "pipeline", "pycocotools", "plotly")
    code = f"import {module}, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_data_holds_every_yaml():
    text = (ROOT / "pyproject.toml").read_text()
    assert all((folder / "__init__.py").exists() for folder in ROOT.glob("pipeline/*/") if list(folder.glob("*.py")))
    assert 'conf = ["**/*.yaml"]' in text
    assert Path(CONF / "__init__.py").exists()
