"""What follows from the choices of a configuration, and files of choices that were written for version 0.1."""

import re

import pytest

from pipeline.launch import command_line, labels, wiring
from pipeline.launch.cell import resolved
from pipeline.quantization.precisions import int8 as quantizers
from pipeline.results.stage import Stage, arguments
from pipeline.stages.evaluate import Evaluate
from tests.conftest import ROOT

FLAT = {
    "sampler/own.yaml": """
_target_: calib_samplers.coverage.Coverage
label: own-${.num_images}
address: ${addresses.network}_${resolution}_${framing.label}_${.label}
network: export
framing: ${framing}
resolution: ${resolution}
images: [train]
image_dir: null
num_images: 16
max_candidates: 20
seed: 0
""",
    "precision/own.yaml": """
_target_: pipeline.quantization.precisions.int8.Int8
label: own-${.recipe}
name: int8
recipe: ${.calibration_method}${int8_words:${.percentile}}
network: export
calibration: sample
tuned_by: ${tuned_by}
measured_on: null
judged_by: null
calibration_method: minmax
percentile: 99.99
""",
    "pruner/own.yaml": """
_target_: pipeline.pruning.pruner.Pruner
label: own
weights_from: ${weights_of:${control}}
criterion: l2
pruning_ratio: 0.3
round_to: null
""",
    "model/own.yaml": """
_target_: pipeline.models.lightweight_openpose.LightweightOpenPose
_partial_: true
label: own-w${.width}
weights_from: ${pruner.weights_from}
multiple: 8
onnx: null
spec: null
stages: 1
width: 0.25
""",
    "family/own.yaml": """
# @package _global_
tuned_by: tune
framing:
  _target_: evaluation.views.WholeImage
  keep_aspect_ratio_mode: null
decoder: {_target_: evaluation.heatmap_paf.HeatmapPafDecoder, _partial_: true}
metric: {_target_: evaluation.coco.CocoKeypoints, _partial_: true}
agreement: null
objective: null
""",
}


def settled(*words, folder=None):
    read = command_line.read(words)
    config = command_line.compose(read.options, folder)
    wiring.settle(config)
    wiring.wire(config, config.stages)
    return config


def stage(config, name):
    return Stage.from_config(name, resolved(config.stages[name]))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder of choices as version 0.1 wrote them."""
    for name, text in FLAT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.lstrip())
    monkeypatch.setattr(quantizers, "without_vnni", lambda backend: True)
    return str(tmp_path)


def test_files_of_version_0_1_are_read_and_said(own, capsys):
    config = settled("sampler=own", "precision=own", "pruner=own", "model=own", "family=own", folder=own)
    said = capsys.readouterr().err
    for place in ("sampler.label", "precision.label", "pruner.label", "model.label", "framing._target_"):
        assert f"warning: {place}" in said
    assert stage(config, "sample").inputs == {"network": "export"}
    assert stage(config, "sample").address.endswith("_own-16")
    assert stage(config, "quantize").inputs == {"network": "export", "calibration": "sample", "tuned": "tune"}
    assert stage(config, "export").inputs == {"network": "retrain"}
    assert stage(config, "quantize").address == "own-w0.25_own_288x384_stretch_int8-minmax-w7-own-16"
    assert arguments(stage(config, "quantize"))["quantizer"]["reduce_range"] is True, "as the label says"
    assert arguments(stage(config, "prune"))["pruner"]["unmeasured"] == 16
    assert labels.grid(config) == (8, 0)
    assert config.decoder["_target_"] == "posepress.decoders.heatmap_paf.decoder.HeatmapPafDecoder"


STAGES_OF_0_1 = [file for file in sorted((ROOT / "pipeline" / "stages").glob("[a-z]*.py")) if file.stem != "predict"]


@pytest.mark.parametrize("file", STAGES_OF_0_1, ids=lambda file: file.stem)
def test_the_function_of_a_stage_is_read_as_its_class(file, capsys):
    """Version 0.1 had a function `run` in each file."""
    config = command_line.compose([], None)
    name = {"import_results": "import"}.get(file.stem, file.stem)
    now, config.stages[name]["_target_"] = config.stages[name]["_target_"], f"pipeline.stages.{file.stem}.run"
    wiring.settle(config)
    assert config.stages[name]["_target_"] == now
    assert f"stages.{name}._target_=pipeline.stages.{file.stem}.run: write {now}" in capsys.readouterr().err


class Wider(Evaluate):
    """A stage with an option more."""

    note: str


def test_an_own_stage_may_extend_another():
    assert wiring._parameters(f"{__name__}.Wider") == [*Evaluate.__dataclass_fields__]


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("pruner=l1", "pruner.target=macs", "pruner.value=0.5x"), "prune.backend"),
        (("pruner=l1", "pruner.target=macs", "pruner.value=0.5x"), "prune.judged_by"),
        (("pruner=l1", "pruner.iterative_steps=2"), "prune.distillation"),
        (("precision=int8",), "quantize.backend"),
        (("precision=mixed",), "quantize.backend"),
    ],
)
def test_what_the_command_says_of_a_measurement_stands(words, option):
    name, key = option.split(".")
    assert arguments(stage(settled(*words), name))[key] is not None
    assert arguments(stage(settled(*words, f"stages.{option}=null"), name))[key] is None


def test_a_pruning_of_one_address_is_one_pruning():
    for words in (["pruner=threshold"], ["pruner=l1", "pruner.round_to=8"]):
        one, other = (stage(settled(*words, "backend=tensorrt", f"precision={p}"), "prune") for p in ("fp32", "int8"))
        assert (one.address, arguments(one)) == (other.address, arguments(other))


def test_training_follows_the_stage_before_it():
    config = settled("pruner=l1", "stages.train.training.batch_size=7", "stages.retrain.training.clip=2.0")
    assert [config.stages[name].training.batch_size for name in ("retrain", "prune", "qat")] == [7, 7, 7]
    assert [config.stages[name].training.clip for name in ("retrain", "prune", "qat")] == [2.0, 2.0, 5.0]
    given = settled("pruner=l1", "stages.retrain.training={batch_size: 3}")
    assert given.stages.prune.training.batch_size == 3


def test_retraining_takes_its_rate_from_the_network_or_from_training():
    assert settled("pruner=l1").stages.retrain.training.lr == 1e-3
    assert settled("pruner=l1", "model=mobilenetv2_paf").stages.retrain.training.lr == 3e-4
    assert settled("pruner=l1", "model=mobilenetv2_paf", "model.retrain_lr=1e-4").stages.retrain.training.lr == 1e-4
    scratch = settled("pruner=l1", "control=scratch", "control_seed=5", "seed=1")
    assert (scratch.stages.retrain.training.lr, scratch.stages.retrain.seed) == (2e-3, 5)


def test_the_configuration_is_plain():
    text = "".join(file.read_text() for file in (ROOT / "conf").rglob("*.yaml"))
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    assert sum(line.count("${") for line in lines) <= 150
    resolvers = {name for line in lines for name in re.findall(r"\$\{([\w.]+):", line)}
    assert resolvers <= {"label_of", "measuring", "unless", "oc.select", "oc.env", "now"}
