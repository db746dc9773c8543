"""Compare an ONNX file with its source: a torch network, or the given file that it was made of."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.onnx_files.outputs import ending_at, fields_of
from posepress.errors import UserError, first_line
from posepress.spec import NetworkSpec

Reference = Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]]


def torch_reference(network: nn.Module) -> Reference:
    """A network as a function of arrays."""

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            return {name: field.numpy() for name, field in network.eval()(torch.from_numpy(images)).items()}

    return run


def onnx_reference(file: Path, spec: NetworkSpec, sources: Mapping[str, str]) -> Reference:
    """A given ONNX file as a function of arrays; see `pipeline.onnx_files.adopt.Adopted` for `sources`."""
    model = onnx.load(file, load_external_data=False)
    inner = set(sources.values()) - {output.name for output in model.graph.output}
    source = ending_at(onnx.load(file), sources, f"model.onnx={file}").SerializeToString() if inner else str(file)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        returned = dict(zip(names, session.run(names, {spec.input.name: images}), strict=True))
        return fields_of(spec, sources, returned, len(images))

    return run


def compare(
    file: Path, spec: NetworkSpec, reference: Reference, inputs: Sequence[NDArray[np.float32]], tolerance: float
) -> dict[str, Any]:
    """Compare an ONNX file with its source, at several shapes.

    Args:
        file: the ONNX file.
        spec: its description.
        reference: function that returns the results to reproduce.
        inputs: images [B, 3, H, W] of several shapes.
        tolerance: largest accepted difference, relative to a field's greatest magnitude.

    Returns:
        The largest relative difference and the shapes compared.

    Raises:
        UserError: a field differs by more than the tolerance, or has another shape.
    """
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [field.name for field in spec.fields]
    worst = 0.0
    for images in inputs:
        try:
            found = session.run(names, {spec.input.name: images})
        except Exception as error:
            first = first_line(error)
            shape = "x".join(map(str, images.shape))
            raise UserError(
                f"{file.name}: does not run at {shape} ({first}); the network's code depends on its input's size: use layers "
                "that take every size, or name only the axes that are really free in the spec's dynamic"
            ) from error
        expected = reference(images)
        for name, ours in zip(names, found, strict=True):
            theirs = expected[name]
            if ours.shape != theirs.shape:
                raise UserError(
                    f"{file.name}: '{name}' is {ours.shape} instead of {theirs.shape} for an input of {images.shape}"
                )
            difference = _difference(ours, theirs)
            worst = max(worst, difference)
            if not difference <= tolerance:
                raise UserError(
                    f"{file.name}: '{name}' differs from its source by {difference:.2g} of its range at {images.shape}; "
                    f"check the network, or raise stages.export.tolerance={tolerance}"
                )
    return {"max_difference": worst, "shapes": [list(images.shape) for images in inputs]}


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """The greatest difference as a part of the greatest magnitude; of class indices, the share that differs."""
    if theirs.dtype.kind != "f":
        return float(np.mean(ours != theirs)) if theirs.size else 0.0
    greatest, most = np.abs(theirs).max(initial=0), np.abs(np.subtract(ours, theirs, dtype=np.float64)).max(initial=0)
    return float(most / max(float(greatest), 1e-12))
