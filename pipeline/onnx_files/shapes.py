"""Reshapes that hold for inputs of every size, in a graph that was exported for one size."""

import numpy as np
import onnx
from onnx import numpy_helper


def free_shapes(model: onnx.ModelProto) -> None:
    """Replace the shapes of reshapes by forms that hold at other sizes, in place, where one can be told.

    The axes at the beginning that equal the input's become 0, which copies them. If one axis is left, it becomes -1. A reshape
    with more axes left stays as it is.

    Args:
        model: a graph that was exported for one size.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    for place, node in enumerate(model.graph.node):
        given, wanted = (shapes.get(name, []) for name in (node.input[0] if node.input else "", node.output[0]))
        if node.op_type != "Reshape" or not given or not wanted or 0 in (*given, *wanted):
            continue
        differing = (n for n, (a, b) in enumerate(zip(given, wanted, strict=False)) if a != b)
        same = next(differing, min(len(given), len(wanted)))
        if len(wanted) - same > 1:
            continue
        name = f"posepress_free_shape_{place}"
        free = np.array([0] * same + [-1] * (len(wanted) - same), np.int64)
        model.graph.initializer.append(numpy_helper.from_array(free, name))
        node.input[1] = name
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
