"""Reshapes of a graph that was exported for one size."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from pipeline.models.onestage_pose import OneStagePose
from pipeline.onnx_files.compare import compare, torch_reference
from pipeline.onnx_files.export import export
from pipeline.onnx_files.shapes import free_shapes


def reshaping(given, wanted):
    """A graph that reshapes an input of one size, with the constants of that size."""
    shape = numpy_helper.from_array(np.array(wanted, np.int64), "shape")
    node = helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in (("x", given), ("y", wanted))]
    return helper.make_model(
        helper.make_graph([node], "g", ends[:1], ends[1:], [shape]), opset_imports=[helper.make_opsetid("", 17)]
    )


@pytest.mark.parametrize(
    ("given", "wanted", "free"),
    [
        ([2, 4, 6, 7], [2, 4, 42], [0, 0, -1]),
        ([2, 90, 17, 3], [2, 90, 51], [0, 0, -1]),
        ([2, 42], [2, 42], [0, 0]),
        ([2, 6, 7], [84], [-1]),
        ([2, 12, 6, 7], [2, 3, 4, 6, 7], None),
    ],
)
def test_axes_are_copied_or_left_open_where_that_is_certain(given, wanted, free):
    model = reshaping(given, wanted)
    free_shapes(model)
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in model.graph.initializer}
    node = model.graph.node[0]
    assert constants[node.input[1]] == (free or wanted)
    assert (len(node.attribute) == 0) == (free is not None), "with allowzero a 0 would be a side of 0"


def test_a_network_of_sets_is_exported_for_every_size_by_the_short_way(tmp_path, capsys):
    torch.manual_seed(0)
    network = OneStagePose(0.125).eval()
    for head in network.ignored_layers:
        torch.nn.init.normal_(head.weight, std=0.1)
    file = tmp_path / "model.onnx"
    export(network, np.zeros((1, 3, 64, 96), np.float32), 20, file)
    draw = np.random.default_rng(0)
    inputs = [draw.standard_normal(shape, np.float32) for shape in ((1, 3, 64, 96), (3, 3, 128, 64), (2, 3, 32, 160))]
    compare(file, network.spec, torch_reference(network), inputs, 1e-4)
    model = onnx.load(file)
    assert not {"Shape", "Range", "ConstantOfShape"} & {node.op_type for node in model.graph.node}
    entries = {output.name: output.type.tensor_type.shape.dim[1].dim_param for output in model.graph.output}
    assert entries["boxes"] == "boxes_entries"
    assert "torch's exporter" not in capsys.readouterr().err
    onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
