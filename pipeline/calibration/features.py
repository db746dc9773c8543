"""Activation statistics: a few numbers for each image that describe how the network responds to it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import read_spec
from pipeline.progress import track
from pipeline.quantization.graph import load
from pipeline.quantization.place import place
from posepress.contracts import Framing
from posepress.pixels import normalise
from posepress.predict import Selection, batches
from posepress.resolution import Resolution


def features(onnx_file: Path, images: Sequence[tuple[Any, int]], framing: Framing, size: Resolution) -> NDArray[np.float64]:
    """Return the logarithms of the largest and the mean magnitude of every tensor that would be quantized.

    Args:
        onnx_file: file of a floating-point network.
        images: pairs of a data set and an index in it.
        framing: turns an image into views; only the first view of an image is used.
        size: size of the network's input, in pixels.

    Returns:
        float64 [images, 2 x tensors].
    """
    model, spec = load(onnx_file), read_spec(onnx_file)
    tensors = place(model).tensors

    def inputs() -> Iterator[NDArray[np.float32]]:
        for data, index in track(images, "measuring activations", unit="images"):
            batch = next(iter(batches(Selection(data, [index]), framing, spec.input, size)))
            shape = (1, size.height, size.width, 3)
            yield normalise(batch.images[:1] if batch.views else np.zeros(shape, np.uint8), spec.input)

    rows = []
    for made in computed_over(model, tensors, inputs()):
        greatest = [float(np.abs(made[name]).max()) for name in tensors]
        mean = [float(np.abs(made[name]).mean()) for name in tensors]
        rows.append(np.log(np.array([*greatest, *mean]) + 1e-6))
    return np.array(rows)
