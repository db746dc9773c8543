"""FP8 (E4M3, arXiv:2209.05433) for GPUs from SM 8.9 on: Q/DQ with one scale for each tensor, the rest in half precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from pipeline.contracts import CalibrationFeed
from pipeline.probing.candidate import Candidate
from pipeline.probing.probe import Probe
from pipeline.quantization import calibration, half, writers
from pipeline.quantization.graph import Graph, attribute, load, matching, with_opset
from pipeline.quantization.place import place
from pipeline.quantization.weights import LEAST_SCALE
from posepress.errors import UserError

_VECTOR = 16  # number of channels that FP8 tensor cores process at once


@dataclass(frozen=True)
class Fp8:
    """FP8 convolutions. Activations are scaled by their extremes on the calibration images, weights by their own extremes.

    Depthwise, grouped and transposed convolutions stay in float, like those without a multiple of 16 channels.
    ONNX Runtime has no FP8 kernels. Its runtime variant simulates FP8 in float32, which shows the accuracy but not the speed.

    Attributes:
        high_precision_dtype: "fp16" or "fp32": type of the layers that are not FP8 in TensorRT's runtime variant.
        nodes_to_exclude: name patterns of nodes that stay in float.
    """

    high_precision_dtype: Literal["fp16", "fp32"] = "fp16"
    nodes_to_exclude: tuple[str, ...] = ()

    @staticmethod
    def label_of(options: Mapping[str, Any], setting: Mapping[str, str]) -> str:
        """The label suffix: the type of the other layers, and the calibration images."""
        return f"{options['high_precision_dtype']}-{setting['sampler']}"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: the type is unknown.
        """
        if self.high_precision_dtype not in ("fp16", "fp32"):
            raise ValueError(f"precision.high_precision_dtype={self.high_precision_dtype}: choose fp16, fp32")

    def quantize(self, onnx_file: Path, feed: CalibrationFeed | None, probe: Probe | None, out: Path) -> dict[str, Any]:
        """Write both runtime variants.

        Raises:
            UserError: a pattern matches no node, or no convolution fits FP8's kernels.
        """
        assert feed is not None
        model = with_opset(load(onnx_file), 19, "FP8")
        asked = matching(model, self.nodes_to_exclude, "precision.nodes_to_exclude")
        unfit = _unfit(model)
        placement = place(model, asked | unfit)
        if not placement.quantized(model):
            raise UserError(
                f"{onnx_file.name}: no convolution fits FP8's kernels (ungrouped, channels in multiples of {_VECTOR}); "
                "choose precision=int8"
            )
        names = [*dict.fromkeys([model.graph.input[0].name, *placement.tensors, *half.activations(model)])]
        found = calibration.observe(model, names, feed.read(None), histograms=False)
        in_half = self.high_precision_dtype == "fp16"
        scales = writers.Scales.of(
            {name: found[name].peak for name in placement.tensors},
            {name: found[name].least for name in placement.tensors},
            placement,
            least=half.LEAST_NORMAL if in_half else LEAST_SCALE,
            greatest=writers.FP8_GREATEST,
        )
        written = writers.insert(model, placement, scales, "tensorrt", fp8=True)
        near = half.out_of_range(model, found) if in_half else {}
        candidate = Candidate(
            {"tensorrt": half.convert(written, near) if in_half else written, "onnxruntime": simulated(written)}
        )
        candidate.write(out)
        kept = {"kept_fp32": sorted(near)} if in_half else {}
        return {"precision": "fp8", "float_layers": sorted(placement.excluded), **kept, **Probe.summary(probe, candidate)}


def _unfit(model: onnx.ModelProto) -> set[str]:
    """Names of convolutions that stay in float."""
    graph = Graph(model)
    return {
        node.name
        for node in graph.nodes
        if (weights := graph.weights(node)) is not None
        and (node.op_type != "Conv" or any(size % _VECTOR for size in weights.shape[:2]) or attribute(node, "group", 1) > 1)
    }


def simulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace Q/DQ nodes by equal arithmetic, because ONNX Runtime would fuse them into integer kernels that refuse FP8.

    Args:
        model: a network with FP8 Q/DQ.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in graph.nodes:
        source, target = node.input[0], node.output[0]
        if node.op_type == "QuantizeLinear":
            scaled = f"{target}_scaled"
            nodes.append(helper.make_node("Div", [source, node.input[1]], [scaled], name=scaled))
            nodes.append(helper.make_node("Cast", [scaled], [target], name=node.name, to=TensorProto.FLOAT8E4M3FN))
        elif node.op_type == "DequantizeLinear" and source in graph.constants:
            values = graph.value(source).astype(np.float32) * graph.value(node.input[1]).astype(np.float32)
            constants.append(numpy_helper.from_array(values, target))
        elif node.op_type == "DequantizeLinear":
            held = f"{target}_held"
            nodes.append(helper.make_node("Cast", [source], [held], name=node.name, to=TensorProto.FLOAT))
            nodes.append(helper.make_node("Mul", [held, node.input[1]], [target], name=f"{target}_unscaled"))
        else:
            nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(copies)
    read = {name for node in copies for name in node.input}
    kept = [tensor for tensor in (*graph.constants.values(), *constants) if tensor.name in read]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    onnx.checker.check_model(made)
    return made
