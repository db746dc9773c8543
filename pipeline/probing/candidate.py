"""A typed network that is not built yet, as quantizers and pruners make and measure it."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import nn

from pipeline.models.contract import duplicate
from pipeline.onnx_files import export
from pipeline.onnx_files.files import FLAVOURS, ModelFiles
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec


@dataclass(frozen=True, eq=False)
class Candidate:
    """A typed network in memory. It compares by identity, so that its engine is built once.

    Attributes:
        models: the ONNX models, by runtime variant.
        checkpoint: function that writes the torch network into a folder, for the torch backend; None if there is none.
    """

    models: Mapping[str, onnx.ModelProto]
    checkpoint: Callable[[Path], None] | None = None

    @classmethod
    def of_file(cls, file: Path, checkpoint: Callable[[Path], None] | None = None) -> "Candidate":
        """A candidate that uses one file for both runtime variants."""
        return cls(dict.fromkeys(FLAVOURS, onnx.load(file)), checkpoint)

    def save(self, file: Path) -> None:
        """Write a network with two equal runtime variants."""
        onnx.save(self.models[FLAVOURS[0]], file)

    def write(self, folder: Path) -> ModelFiles:
        """Write both runtime variants, and the torch network, into a folder."""
        torch_folder = folder / "checkpoint" if self.checkpoint is not None else None
        if torch_folder is not None and self.checkpoint is not None:
            torch_folder.mkdir()
            self.checkpoint(torch_folder)
        files = ModelFiles.in_folder(folder, torch_folder)
        for flavour, file in files.onnx.items():
            onnx.save(self.models[flavour], file)
        return files


_OPSET = 20


def exported(
    network: nn.Module,
    size: Resolution,
    checkpoint: Callable[[Path], None] | None = None,
    any_shape: bool = False,
    scratch: Path | None = None,
    graphs: Path | None = None,
) -> Candidate:
    """Export a network for building an engine for one image, of this size only or of any. The runtime folds batch norms.

    Intermediate files are written to the folder `scratch`; None is the system's temporary folder. For the folder `graphs`, see
    `export.export`.
    """
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    image = torch.zeros(spec.input.shape(1, size)).numpy()
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "model.onnx"
        export.export(duplicate(network).cpu().eval(), image, _OPSET, file, any_shape, graphs)
        export.stamp(file, spec)
        return Candidate.of_file(file, checkpoint)
