"""export: write an ONNX file, simplify and describe it, and compare it with its source."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Gt, Interval
from numpy.typing import NDArray

from pipeline.contracts import Splits
from pipeline.models import store
from pipeline.onnx_files import export as onnx_export
from pipeline.onnx_files.adopt import adopt
from pipeline.progress import Progress, say
from pipeline.pruning.costs import macs
from pipeline.pruning.semi_structured import sparse_layers
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.predict import batches
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec

MODEL = "model.onnx"


def run(
    job: Job,
    onnx: str | None,
    spec: Mapping[str, Any] | None,
    outputs: Mapping[str, Any] | None,
    data: Splits,
    framing: Framing,
    resolution: str,
    opset: Annotated[int, Interval(ge=18, le=23)],
    simplify_seconds: Annotated[float, Interval(gt=0, le=86400)],
    tolerance: Annotated[float, Gt(0)],
) -> dict[str, Any]:
    """Export the input "network", or adopt a given ONNX file.

    Args:
        job: the job. Its inputs hold "network" unless `onnx` is given.
        onnx: a given ONNX file.
        spec: description of the given file.
        outputs: the given file's output for each field that has another name there.
        data: the data set. The comparison uses a few of its train images.
        framing: framing of these images.
        resolution: size of the comparison. A file with a fixed input size is compared at that size.
        opset: opset version of the file.
        simplify_seconds: time limit of each simplifier, in seconds.
        tolerance: largest accepted difference, relative to a field's greatest value.

    Returns:
        The largest difference, the shapes compared, the simplifier, parameters and MACs.
    """
    import onnx as onnx_library

    file, size = job.out / MODEL, Resolution.parse(resolution)
    if onnx is None:
        network, _, _ = store.load(job.inputs["network"])
        network.eval()
        described: NetworkSpec = network.spec  # type: ignore[assignment]
        inputs = _inputs(data, framing, described, size)
        with Progress("exporting", unit="s"):
            onnx_export.export(network, inputs[0], opset, file, graphs=job.cache / "exports")
        reference = onnx_export.torch_reference(network)
        counted = {"params": sum(p.numel() for p in network.parameters()), "macs": macs(network, size)}
        sparse = list(getattr(network, "sparse24", []))
    else:
        assert spec is not None
        adopted = adopt(Path(onnx), spec, outputs, size)
        described = adopted.spec
        if adopted.notes:
            say("; ".join(adopted.notes))
        onnx_library.save(adopted.model, file)
        reference = onnx_export.onnx_reference(Path(onnx), described, adopted.sources)
        inputs = _inputs(data, framing, described, adopted.size)
        counted, sparse = {}, []
    simplifier = onnx_export.simplify(file, simplify_seconds)
    onnx_export.stamp(file, described)
    compared = onnx_export.compare(file, described, reference, inputs, tolerance)
    graph = onnx_library.load(file).graph
    if sparse:
        counted["sparse24_layers"] = len(sparse_layers(graph))
        if counted["sparse24_layers"] < len(sparse):
            raise UserError(
                f"{MODEL}: {counted['sparse24_layers']} convolutions are 2:4 sparse, but {len(sparse)} should be; prune again"
            )
    if not counted:
        counted["params"] = int(sum(np.prod(i.dims) for i in graph.initializer if len(i.dims) > 1))
    batch_norms = sum(node.op_type == "BatchNormalization" for node in graph.node)
    return {**counted, **compared, "simplifier": simplifier, "nodes": len(graph.node), "batch_norms": batch_norms}


def _inputs(data: Splits, framing: Framing, spec: NetworkSpec, size: Resolution) -> list[NDArray[np.float32]]:
    """Real images at the resolution and, if axes are free, at two other resolutions and as a batch of two.

    The first has one multiple more in both sides. The second has one multiple less in height and three more in width.
    """
    step = spec.input.multiple
    sizes = [size]
    if {"height", "width"} <= spec.dynamic:
        sizes += [
            Resolution(size.height + step, size.width + step),
            Resolution(max(size.height - step, step), size.width + 3 * step),
        ]
    images = data.open("train")
    made = []
    for at in sizes:
        few = batches(images, framing, spec.input, at, 1, range(min(2, len(images))))
        made += [normalise(batch.images, spec.input) for batch in few]
    if "batch" in spec.dynamic:
        made.append(np.concatenate([made[0], np.flip(made[0], spec.input.axes["height"])]))
    return made
