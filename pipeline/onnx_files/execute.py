"""Inner tensors of an ONNX file, computed by ONNX Runtime."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray


def observed(model: onnx.ModelProto, tensors: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy of a model that also returns inner tensors, and the names of these tensors without the input."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {output.name for output in probe.graph.output}
    given = {i.name for i in probe.graph.input}
    wanted = [name for name in tensors if name not in given]
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in wanted if name not in present
    )
    return probe, wanted


def computed_over(
    model: onnx.ModelProto, tensors: Sequence[str], feed: Iterable[NDArray[np.float32]], optimise: bool = True
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Inner tensors of a network, image by image. Their memory is reused for the next image but one.

    Args:
        model: a network with one input.
        tensors: names of the tensors, which may include the input.
        feed: batches [B, 3, H, W].
        optimise: whether the runtime may optimise the graph. False computes Q/DQ as arithmetic in float.
    """
    import onnxruntime

    probe, wanted = observed(model, tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    # Memory is reused, because allocating hundreds of megabytes takes as long as computing the tensors.
    memory: dict[tuple[int, ...], list[dict[str, NDArray[np.float32]]]] = {}
    for images in feed:
        if not wanted:
            yield {name: images}
            continue
        kept = memory.setdefault(images.shape, [])
        if len(kept) < 2:
            kept.append(dict(zip(wanted, session.run(wanted, {name: images}), strict=True)))
            made = kept[-1]
        else:
            kept.reverse()
            made = kept[-1]
            binding = session.io_binding()
            binding.bind_cpu_input(name, np.ascontiguousarray(images))
            for tensor, values in made.items():
                binding.bind_output(tensor, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
            session.run_with_iobinding(binding)
        yield {**made, name: images} if name in tensors else dict(made)
        if len(memory) > 4:  # with images of many sizes, save memory rather than time
            memory.clear()
