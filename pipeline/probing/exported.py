"""A torch network as a candidate: exported for building an engine of it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pipeline.models.contract import duplicate, spec_of
from pipeline.onnx_files import export
from pipeline.probing.candidate import Candidate
from posepress.resolution import Resolution

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
    spec = spec_of(network)
    image = torch.zeros(spec.input.shape(1, size)).numpy()
    if scratch is not None:
        scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        file = Path(folder) / "model.onnx"
        export.export(duplicate(network).cpu().eval(), image, _OPSET, file, any_shape, graphs)
        export.stamp(file, spec)
        return Candidate.of_file(file, checkpoint)
