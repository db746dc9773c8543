"""Count the multiply-accumulates of an ONNX network."""

import numpy as np
import onnx

from posepress.resolution import Resolution
from posepress.spec import InputSpec


def macs(model: onnx.ModelProto, resolution: Resolution, spec: InputSpec) -> dict[str, int]:
    """Return the multiply-accumulates of each convolution and matrix product for one image, by node name.

    Args:
        model: a network with one input, with or without Q/DQ nodes.
        resolution: size of the input image, in pixels.
        spec: description of the input.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    dims = fixed.graph.input[0].type.tensor_type.shape.dim
    for dim, size in zip(dims, spec.shape(1, resolution), strict=True):
        dim.Clear()
        dim.dim_value = size
    del fixed.graph.value_info[:]
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    sizes = {i.name: list(i.dims) for i in graph.initializer}
    sizes |= {n.output[0]: sizes[n.input[0]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in sizes}
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in (*graph.value_info, *graph.output)}
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul") and node.input[1] in sizes:
            weights = sizes[node.input[1]]
            outputs = weights[0] if "Conv" in node.op_type else weights[-1]
            spread = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
            found[node.name] = int(np.prod(weights)) // outputs * int(np.prod(shapes.get(spread, [0])))
    return found
