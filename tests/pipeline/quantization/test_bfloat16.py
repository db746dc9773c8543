"""bfloat16 by casts, with operators that TensorRT does not compute in it left in float32."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from pipeline.onnx_files.files import ModelFiles
from pipeline.quantization.precisions import bf16 as bfloat16
from pipeline.quantization.precisions.bf16 import Bf16
from tests.pipeline.backends.test_rtx import NETWORKS, Network, model_of
from tests.pipeline.quantization.test_half import with_spec


def saved(made, folder, channels=4):
    model = with_spec(onnx.shape_inference.infer_shapes(model_of(made.nodes, made.constants, opset=22)), channels)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def types_of(model):
    """The element type of every tensor, as ONNX's own rules infer it."""
    found = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    infos = {i.name: i.type.tensor_type.elem_type for i in (*found.value_info, *found.input, *found.output)}
    return infos | {i.name: i.data_type for i in found.initializer}


def chain():
    """Two operators without bfloat16 in a row, and weights that both kinds of operators read."""
    made = Network()
    made.conv("image", "a", 16, 3)
    made.add("HardSwish", "a", out="h")
    made.conv("h", "up", 16, 16, 4, op="ConvTranspose", strides=[2, 2], pads=[1] * 4)
    made.constant("shared", np.full((16, 16, 1, 1), 1 / 3, np.float32))
    made.add("Conv", "up", "shared", out="dense")
    made.add("ConvTranspose", "dense", "shared", out="last")
    made.add("Add", "last", "dense", out="sum")
    made.conv("sum", "out", 4, 16)
    return made


def test_operators_without_bfloat16_compute_in_float32_and_are_named(tmp_path):
    file = saved(chain(), tmp_path)
    report = Bf16().quantize(file, None, None, tmp_path)
    assert report["kept_fp32"] == ["h", "last", "up"]
    model = onnx.load(ModelFiles.in_folder(tmp_path).onnx["tensorrt"])
    types = types_of(model)
    for node in model.graph.node:
        wanted = TensorProto.FLOAT if node.name in report["kept_fp32"] else TensorProto.BFLOAT16
        if node.op_type != "Cast":
            assert {types[name] for name in (*node.input, *node.output)} == {wanted}, node.name
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert (stored["up_w"], stored["shared"], stored["a_w"]) == (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.BFLOAT16)
    assert "kept_fp32" not in Bf16().quantize(saved(NETWORKS["residual"](), tmp_path), None, None, tmp_path)


@pytest.mark.parametrize("made", [chain(), NETWORKS["residual"](), NETWORKS["mobile"]()])
def test_the_simulation_rounds_what_the_file_holds_in_bfloat16(made, tmp_path):
    model = onnx.load(saved(made, tmp_path, 5))
    given = np.random.default_rng(0).normal(0, 2, (1, 3, 16, 16)).astype(np.float32)
    expected = onnxruntime.InferenceSession(bfloat16.simulated(model).SerializeToString()).run(None, {"image": given})[0]
    exact = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": given})[0]
    found = ReferenceEvaluator(bfloat16.convert(model)).run(None, {"image": given})[0]
    error = np.abs(found - expected).max() / np.abs(exact).max()
    assert error < 0.02
    assert np.abs(expected - exact).max() > 0


def test_sizes_that_are_computed_stay_float32(tmp_path):
    """Resize's scales come from the image's shape by a Cast; both would lose their meaning with 8 bits of mantissa."""
    made = Network()
    made.conv("image", "a", 16, 3)
    made.add("Shape", "image", out="shape")
    made.add("Cast", "shape", out="sizes", to=TensorProto.FLOAT)
    made.add("Div", "sizes", "sizes", out="ones")
    made.add("Cast", "ones", out="whole", to=TensorProto.INT64)
    made.add("Cast", "whole", out="scales", to=TensorProto.FLOAT)
    made.add("Resize", "a", "", "scales", out="same", mode="nearest")
    made.conv("same", "out", 4, 16)
    model = bfloat16.convert(onnx.load(saved(made, tmp_path)))
    types = types_of(model)
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    assert (types[resize.input[0]], types[resize.input[2]]) == (TensorProto.BFLOAT16, TensorProto.FLOAT)
