"""Support for files of choices from version 0.1, in which some keys and classes had other places."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.results.stage import ABOUT

# Keys that describe a component. Up to version 0.1 they stood beside its arguments; now `about` holds them.
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

# New names of classes that files of choices from version 0.1 may name.
_TARGETS: Mapping[str, str] = {
    "evaluation.types.Resolution": "posepress.resolution.Resolution",
    "evaluation.views.WholeImage": "posepress.framing.whole_image.WholeImage",
    "evaluation.views.PersonCrops": "posepress.framing.person_crops.PersonCrops",
    "evaluation.heatmap_paf.HeatmapPafDecoder": "posepress.decoders.heatmap_paf.decoder.HeatmapPafDecoder",
    "evaluation.topdown.TopDownDecoder": "posepress.decoders.heatmap_argmax.TopDownDecoder",
    "evaluation.coco.CocoKeypoints": "evaluation.metrics.coco_keypoints.CocoKeypoints",
    "pipeline.training.heatmap_paf.HeatmapPafObjective": "pipeline.objectives.heatmap_paf.HeatmapPafObjective",
    "evaluation.agreement.PoseAgreement": "evaluation.metrics.agreement.PoseAgreement",
    "pipeline.quantization.bfloat16.Bf16": "pipeline.quantization.precisions.bf16.Bf16",
    "pipeline.quantization.fp8.Fp8": "pipeline.quantization.precisions.fp8.Fp8",
    "pipeline.quantization.implicit.ImplicitInt8": "pipeline.quantization.precisions.int8_entropy.ImplicitInt8",
    "pipeline.quantization.mixed.Mixed": "pipeline.quantization.precisions.mixed.Mixed",
    "pipeline.quantization.quantizers.External": "pipeline.quantization.precisions.external.External",
    "pipeline.quantization.quantizers.Fp16": "pipeline.quantization.precisions.fp16.Fp16",
    "pipeline.quantization.quantizers.Fp32": "pipeline.quantization.precisions.fp32.Fp32",
    "pipeline.quantization.quantizers.Int8": "pipeline.quantization.precisions.int8.Int8",
    "pipeline.quantization.quantizers.Retrained": "pipeline.quantization.precisions.int8_qat.Retrained",
    "pipeline.training.loop.Training": "pipeline.training.options.Training",
    **{
        f"pipeline.stages.{name}.run": f"pipeline.stages.{name}.{name.title().replace('_', '')}"
        for name in (
            *("train", "sensitivity", "prune", "export", "sample", "qat", "quantize", "build", "tune", "evaluate", "benchmark"),
            *("report", "compare", "doctor", "parity", "package", "import_results"),
        )
    },
}


def has(node: DictConfig, key: str) -> bool:
    """Whether a node holds a key, without resolving its value."""
    return node._get_node(key, validate_access=False) is not None  # noqa: SLF001 - "in" resolves the value


def move(config: Any) -> None:
    """Convert choices from version 0.1: keys that describe a component move into `about`."""
    _rename(config)
    if config.exported is None:
        config.quantized = None
    for group in {*MOVED, *_GONE}:
        node = config.get(group)
        if not isinstance(node, DictConfig):
            continue
        moved = [key for key in MOVED.get(group, ()) if has(node, key)]
        for key in moved:
            OmegaConf.set_struct(node, value=False)
            if not isinstance(node.get(ABOUT), DictConfig):
                node[ABOUT] = {}
            with suppress(OmegaConfBaseException):  # the value's resolver is gone; the component computes it now
                node[ABOUT][key] = node[key]
            del node[key]
        for key in _GONE.get(group, ()):
            if "_target_" in node and has(node, key):
                remove(node, key)
        if moved:
            words = ", ".join(f"{key}: ..." for key in moved)
            print(f"warning: {group}.{moved[0]}: write `about: {{{words}}}` in the file of this choice", file=sys.stderr)


def _rename(node: Any) -> None:
    """Replace the old names of classes that moved."""
    for key in list(node.keys()):
        inner = node._get_node(key)  # noqa: SLF001 - reading it would resolve an interpolation
        if isinstance(inner, DictConfig) and not inner._is_none() and not inner._is_interpolation():  # noqa: SLF001
            _rename(inner)
        elif key == "_target_" and (new := _TARGETS.get(str(inner._value()))) is not None:  # noqa: SLF001
            print(f"warning: {node._get_full_key(key)}={inner._value()}: write {new}", file=sys.stderr)  # noqa: SLF001
            node[key] = new


def remove(node: DictConfig, key: str) -> None:
    """Remove a key from a node."""
    OmegaConf.set_struct(node, value=False)
    del node[key]
