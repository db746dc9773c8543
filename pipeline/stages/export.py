"""export: write an ONNX file, simplify and describe it, and compare it with its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from annotated_types import Gt, Interval
from numpy.typing import NDArray

from pipeline.contracts import Splits
from pipeline.models import store
from pipeline.models.contract import spec_of
from pipeline.onnx_files import compare as onnx_compare
from pipeline.onnx_files import export as onnx_export
from pipeline.onnx_files.adopt import adopt
from pipeline.progress import Progress, say
from pipeline.pruning.costs import macs
from pipeline.pruning.semi_structured import sparse_layers
from pipeline.results.job import Job
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.predict import Selection, batches
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec

MODEL = "model.onnx"


@dataclass(frozen=True)
class Export:
    """Export the input "network", or adopt a given ONNX file.

    Attributes:
        onnx: a given ONNX file.
        spec: description of the given file.
        outputs: the given file's output for each field that has another name there.
        data: the data set. The comparison uses a few of its train images.
        framing: framing of these images.
        resolution: size of the comparison. A file with a fixed input size is compared at that size.
        opset: opset version of the file.
        simplify_seconds: time limit of each simplifier, in seconds.
        tolerance: largest accepted difference, relative to a field's greatest value.
    """

    onnx: str | None
    spec: Mapping[str, Any] | None
    outputs: Mapping[str, Any] | None
    data: Splits
    framing: Framing
    resolution: str
    opset: Annotated[int, Interval(ge=18, le=23)]
    simplify_seconds: Annotated[float, Interval(gt=0, le=86400)]
    tolerance: Annotated[float, Gt(0)]

    def run(self, job: Job) -> dict[str, Any]:
        """Run the stage.

        Args:
            job: the job. Its inputs hold "network" unless `onnx` is given.

        Returns:
            The largest difference, the shapes compared, the simplifier, parameters and MACs.
        """
        file = job.out / MODEL
        source = self._exported(job, file) if self.onnx is None else self._adopted(Path(self.onnx), file)
        simplifier = onnx_export.simplify(file, self.simplify_seconds)
        onnx_export.stamp(file, source.spec)
        compared = onnx_compare.compare(file, source.spec, source.reference, source.inputs, self.tolerance)
        graph = onnx.load(file).graph
        summary: dict[str, Any] = dict(source.counted)
        if source.sparse:
            summary["sparse24_layers"] = sparse = len(sparse_layers(graph))
            if sparse < source.sparse:
                raise UserError(f"{MODEL}: {sparse} convolutions are 2:4 sparse, but {source.sparse} should be; prune again")
        if not summary:
            summary["params"] = int(sum(np.prod(i.dims) for i in graph.initializer if len(i.dims) > 1))
        batch_norms = sum(node.op_type == "BatchNormalization" for node in graph.node)
        return {**summary, **compared, "simplifier": simplifier, "nodes": len(graph.node), "batch_norms": batch_norms}

    def _exported(self, job: Job, file: Path) -> "_Source":
        """Write the input "network" as ONNX."""
        network, _, _ = store.load(job.inputs["network"])
        network.eval()
        size, spec = Resolution.parse(self.resolution), spec_of(network)
        inputs = _inputs(self.data, self.framing, spec, size)
        with Progress("exporting", unit="s"):
            onnx_export.export(network, inputs[0], self.opset, file, graphs=job.cache / "exports")
        counted = {"params": sum(p.numel() for p in network.parameters()), "macs": macs(network, size)}
        sparse = len(getattr(network, "sparse24", []))
        return _Source(spec, onnx_compare.torch_reference(network), inputs, counted, sparse)

    def _adopted(self, given: Path, file: Path) -> "_Source":
        """Write the given file with its inputs and outputs in the product's form."""
        assert self.spec is not None
        adopted = adopt(given, self.spec, self.outputs, Resolution.parse(self.resolution))
        if adopted.notes:
            say("; ".join(adopted.notes))
        onnx.save(adopted.model, file)
        inputs = _inputs(self.data, self.framing, adopted.spec, adopted.size)
        return _Source(adopted.spec, onnx_compare.onnx_reference(given, adopted.spec, adopted.sources), inputs)


@dataclass(frozen=True)
class _Source:
    """What an ONNX file was made from.

    Attributes:
        spec: description of the network.
        reference: function that computes the fields of the source.
        inputs: inputs to compare at.
        counted: parameters and MACs, if known.
        sparse: number of layers that must be 2:4 sparse.
    """

    spec: NetworkSpec
    reference: onnx_compare.Reference
    inputs: Sequence[NDArray[np.float32]]
    counted: Mapping[str, float] = field(default_factory=dict)
    sparse: int = 0


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
        few = batches(Selection(images, range(min(2, len(images)))), framing, spec.input, at)
        made += [normalise(batch.images, spec.input) for batch in few]
    if "batch" in spec.dynamic:
        made.append(np.concatenate([made[0], np.flip(made[0], spec.input.axes["height"])]))
    return made
