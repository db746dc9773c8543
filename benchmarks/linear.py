"""INT8 of linear layers in ONNX Runtime, timed in turns with FP32 on one thread.

    python benchmarks/linear.py

Four layers of equal size with ReLU between them, of each kind that exporters write: a Gemm with a bias over [rows, features],
and a MatMul without one over [1, rows, features].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from quantization import session
from rich.console import Console
from rich.table import Table

from evaluation import latency
from pipeline.quantization import calibration, place, writers

LAYERS, SECONDS = 5, 5.0  # the last layer stays in float


def chain(kind: str, rows: int, features: int) -> onnx.ModelProto:
    """A network of linear layers."""
    draw = np.random.default_rng(0)
    nodes, constants, source = [], [], "x"
    for n in range(LAYERS):
        weights = (draw.standard_normal((features, features)) / np.sqrt(features / 2)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"w{n}"))
        given = [source, f"w{n}"]
        if kind == "Gemm":
            constants.append(numpy_helper.from_array(draw.standard_normal(features).astype(np.float32) / 10, f"b{n}"))
            given.append(f"b{n}")
        last = n == LAYERS - 1
        nodes.append(helper.make_node(kind, given, ["out" if last else f"y{n}"], name=f"layer_{n}"))
        nodes += [] if last else [helper.make_node("Relu", [f"y{n}"], [f"r{n}"], name=f"relu_{n}")]
        source = f"r{n}"
    shape = [rows, features] if kind == "Gemm" else [1, rows, features]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "out")]
    made = helper.make_model(
        helper.make_graph(nodes, "linear", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(made)


def _call(run: Callable[..., Any], noise: NDArray[np.float32], _: object) -> Any:
    return run(None, {"x": noise})


def main() -> None:
    """Print a row for each kind and size."""
    table = Table("layer", "rows", "features", "FP32, ms", "INT8, ms", "INT8 x FP32")
    for kind in ("Gemm", "MatMul"):
        for rows, features in ((17, 256), (136, 256), (136, 512)):
            model = chain(kind, rows, features)
            shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
            noise = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
            placed = place.place(model)
            found = calibration.observe(model, placed.tensors, [noise])
            peaks, lows = {name: one.peak for name, one in found.items()}, {name: one.least for name, one in found.items()}
            written = writers.insert(model, placed, writers.Scales.of(peaks, lows, placed), "onnxruntime")
            runs = [session(network).run for network in (model, written)]
            plain, rounded = latency.in_turns([[partial(_call, run, noise)] for run in runs], SECONDS)
            ends = [f"{times.percentile(50)}" for times in (plain, rounded)]
            table.add_row(kind, str(rows), str(features), *ends, str(latency.speedup(rounded, plain)))
    Console().print(table)


if __name__ == "__main__":
    main()
