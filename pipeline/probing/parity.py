"""One network in every form of the chain, computed on the same images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from evaluation.parity import compare, first_apart
from pipeline.contracts import Backend
from pipeline.onnx_files.cut import cut, tensors_of
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import ModelFiles, Shapes
from pipeline.quantization.graph import Graph
from posepress.contracts import Runner
from posepress.pixels import normalise
from posepress.spec import NetworkSpec


@dataclass(frozen=True)
class Forms:
    """The network in its typed file, in engines, and in engines of its parts.

    Attributes:
        typed: the typed file, with the shapes of its tensors.
        spec: description of the network.
        frames: framed images, uint8 [1, H, W, 3].
        shapes: shapes to build engines for.
        scratch: folder for engines.
    """

    typed: onnx.ModelProto
    spec: NetworkSpec
    frames: Sequence[NDArray[np.uint8]]
    shapes: Shapes
    scratch: Path

    def written(self) -> list[dict[str, NDArray[Any]]]:
        """The outputs for each image, computed node by node without any optimisation."""
        return [dict(outputs) for outputs in self._written(self.typed, [field.name for field in self.spec.fields])]

    def _written(self, model: onnx.ModelProto, names: Sequence[str]) -> Iterator[Mapping[str, NDArray[Any]]]:
        inputs = (normalise(frame, self.spec.input) for frame in self.frames)
        for outputs in computed_over(model, names, inputs, optimise=False):
            yield {name: np.array(values) for name, values in outputs.items()}

    def built(self, backend: Backend, files: ModelFiles, folder: str) -> list[dict[str, NDArray[Any]]]:
        """The outputs for each image of an engine that is built into a folder of the scratch."""
        (self.scratch / folder).mkdir(exist_ok=True)
        with backend.load(backend.build(files, self.shapes, self.scratch / folder)) as runner:
            return self.loaded(runner)

    def loaded(self, runner: Runner) -> list[dict[str, NDArray[Any]]]:
        """The outputs for each image of an engine."""
        found = (runner.download(runner(runner.upload(frame))) for frame in self.frames)
        return [{name: np.array(values) for name, values in outputs.items()} for outputs in found]

    def first_apart(self, backend: Backend, tensor: str, tolerance: float) -> tuple[str | None, str]:
        """The first tensor in which the typed file and an engine built up to it differ, and its place in words.

        Args:
            backend: backend that builds the parts.
            tensor: an output that differs.
            tolerance: largest relative RMS difference of tensors that count as equal.
        """

        def apart(inner: str) -> bool:
            files = cut(self.typed, inner, self.spec, self.scratch)
            found = self.built(backend, files, "part")
            expected = self._written(onnx.load(files.onnx["tensorrt"]), [inner])
            return compare(list(zip(expected, found, strict=True)))[inner]["relative"] > tolerance

        parted = first_apart(tensors_of(self.typed, tensor), apart)
        if not parted:
            return parted, f"in {tensor}, but no part of the network differs when it is built alone"
        node = Graph(self.typed).producer.get(parted)
        return parted, f"first in '{parted}', of {node and node.name} ({node and node.op_type})"
