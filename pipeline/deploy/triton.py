"""Model repositories of NVIDIA's Triton Inference Server."""

from pathlib import Path
from typing import Any

_TYPES = {  # types of ONNX tensors, by number, and their names in a model configuration
    1: "TYPE_FP32", 2: "TYPE_UINT8", 3: "TYPE_INT8", 6: "TYPE_INT32", 7: "TYPE_INT64", 9: "TYPE_BOOL", 10: "TYPE_FP16",
}  # fmt: skip
_MOST_IMAGES = 8  # images that a server may put together where the network takes any number


def config(engine: Path, name: str, platform: str, batch: int | None) -> str:
    """The configuration of a network, the content of config.pbtxt.

    Triton adds the batch itself, so the sizes below are those of one image where the batch is free. A free side is -1.

    Args:
        engine: ONNX file of the network.
        name: name of the model; it is also the name of its folder.
        platform: "onnxruntime_onnx" or "tensorrt_plan".
        batch: largest batch; None where the runtime takes any.
    """
    import onnx

    graph = onnx.load(engine, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [tensor for tensor in graph.input if tensor.name not in constants]
    free = all(_dims(tensor)[:1] == [-1] for tensor in (*inputs, *graph.output))
    most = (_MOST_IMAGES if batch is None else batch) if free else 0  # 0: the network's own sizes hold the batch
    parts = [f'name: "{name}"', f'platform: "{platform}"', f"max_batch_size: {most}"]
    for kind, tensors in (("input", inputs), ("output", graph.output)):
        parts.append(f"{kind} [\n" + ",\n".join(_tensor(tensor, 1 if free else 0) for tensor in tensors) + "\n]")
    return "\n".join([*parts, *(["dynamic_batching { }"] if most > 1 else [])]) + "\n"


def _dims(tensor: Any) -> list[int]:
    """Sides of a tensor; -1 for a free one."""
    return [side.dim_value if side.HasField("dim_value") else -1 for side in tensor.type.tensor_type.shape.dim]


def _tensor(tensor: Any, skipped: int) -> str:
    sides = ", ".join(map(str, _dims(tensor)[skipped:]))
    kind = _TYPES[tensor.type.tensor_type.elem_type]
    return f'  {{\n    name: "{tensor.name}"\n    data_type: {kind}\n    dims: [ {sides} ]\n  }}'
