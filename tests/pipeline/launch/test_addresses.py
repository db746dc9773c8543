"""Addresses of old configurations never change: addresses.yaml holds them, byte for byte.

`PYTHONPATH=. python tests/pipeline/launch/test_addresses.py` adds what is new there, and leaves what is there as it is.
"""

from pathlib import Path

import pytest
import yaml

from pipeline.launch import command_line
from pipeline.launch.labels import register
from pipeline.quantization.precisions import int8 as quantizers
from tests.conftest import ROOT

FILE = Path(__file__).with_name("addresses.yaml")
KEPT = yaml.safe_load(FILE.read_text()) if FILE.exists() else {}
GROUPS = ("data", "family", "model", "pruner", "sampler", "precision", "backend", "tracking", "experiment")
COCO = " data.train.images=a data.train.annotations=a data.val.images=a data.val.annotations=a"
NEEDED = {
    "data=coco": COCO,
    "data=packaged": " data.label=d",
    "model=onnx": " model.onnx=dir/my_net.onnx",
    "model=plan": " model.plan=dir/my.plan backend=tensorrt",
    "precision=external": " precision.file=typed.onnx",
    "experiment=mobilenetv2_paf_coco": f" weights=w.pt{COCO}",
    "experiment=calibration_study": " weights=w.pt",
}
OVERRIDES = [
    "resolution=224x256",
    "training_resolution=256x320 resolution=224x256",
    "keep_aspect_ratio_mode=null",
    "keep_aspect_ratio_mode=adjust_network_input",
    "scales=[0.5,1.0,1.5] flip=true",
    "batch=8 rebuild=3",
    "threads=4",
    "tag=-mine",
    "model.width=0.75 model.stages=3",
    "pruner=l1 pruner.pruning_ratio=0.3",
    "pruner=l1 pruner.criterion=taylor pruner.round_to=8",
    "pruner=l1 pruner.normalizer=max pruner.equalization_criterion=intersection",
    "pruner=l1 pruner.target=macs pruner.value=0.5x",
    "pruner=l1 pruner.target=latency pruner.value=0.6x backend=torch",
    "pruner=l1 pruner.iterative_steps=3 pruner.global_pruning=true",
    "pruner=l1 pruner.isomorphic=true pruner.global_pruning=true",
    "pruner=l1 pruner.excluded_layers=[backbone.*]",
    "pruner=l1 pruner.pruning_ratio_dict={backbone.1:0.2}",
    "pruner=l1 pruner.sensitivity=sensitivity",
    "pruner=l1 control=scratch control_seed=2",
    "pruner=l1 control=pruned precision=int8",
    "pruner=l1 precision=int8 backend=tensorrt",
    "pruner=sparse24 pruner.excluded_layers=[initial.*]",
    "precision=int8 precision.calibration_method=percentile precision.percentile=99.9",
    "precision=int8 precision.weight_scale=mse precision.bias_correction=false",
    "precision=int8 precision.high_precision_dtype=fp16 backend=tensorrt",
    "precision=int8 sampler.num_images=64 sampler.seed=3",
    "precision=int8 sampler.images=[train,unlabelled]",
    "precision=int8 sampler=uniform sampler.image_dir=images",
    "precision=mixed precision.max_latency=0.8x backend=tensorrt",
    "precision=int8_qat sampler=coverage",
    "backend=tensorrt backend.timing_cache=null rebuild=1 precision=fp16",
]


def every_case():
    """The words of every choice of every group, and of the overrides."""
    for group in GROUPS:
        for file in sorted((ROOT / "conf" / group).glob("*.yaml")):
            yield f"{group}={file.stem}{NEEDED.get(f'{group}={file.stem}', '')}"
    yield from OVERRIDES


def addresses(words):
    """The address of every stage whose address has a value, and the labels of what a sweep's cells differ in."""
    register()
    quantizers.without_vnni = lambda backend: False  # the same on every processor
    options = []
    for word in words.split():
        options += command_line.read([word]).options
    config = command_line.compose(options, None)
    found = {str(name): str(config.stages[name].address) for name in config.stages}
    return found | {f"axes.{name}": str(config.axes[name]) for name in config.axes}


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """The function as it is, after each test."""
    monkeypatch.setattr(quantizers, "without_vnni", quantizers.without_vnni)


@pytest.mark.parametrize("words", KEPT)
def test_an_address_stays(words):
    assert addresses(words) == KEPT[words]


def test_every_choice_has_its_addresses_kept():
    assert set(every_case()) <= set(KEPT), "add them: PYTHONPATH=. python tests/pipeline/launch/test_addresses.py"
    assert len(OVERRIDES) >= 30


if __name__ == "__main__":
    for case in every_case():
        KEPT[case] = addresses(case) | KEPT.get(case, {})  # a new stage has an address in old cases, too
    FILE.write_text(yaml.safe_dump(KEPT, sort_keys=False, width=130))
