"""A typed network that is not built yet, as quantizers and pruners make and measure it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from pipeline.onnx_files.files import FLAVOURS, ModelFiles


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
