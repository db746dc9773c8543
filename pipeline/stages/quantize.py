"""quantize: write a precision into the network, for both runtimes."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from evaluation.pixels import normalise
from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.errors import UserError
from pipeline.export import macs
from pipeline.inference import batches
from pipeline.specs import Framing, Quantizer, Splits, read_spec


def run(job: Job, data: Splits, framing: Framing, resolution: str, quantizer: Quantizer) -> dict[str, Any]:
    """Quantize the input "network" with the images of the input "calibration", if there is one.

    Raises:
        UserError: a calibration image is gone or changed, or the quantizer's options do not fit.
    """
    model = job.inputs["network"] / "model.onnx"
    spec, size = read_spec(model), Resolution.parse(resolution)

    def feed() -> Iterator[NDArray[np.float32]]:
        from rich.progress import track

        train: Any = data.open("train")
        listed = json.loads((job.inputs["calibration"] / "calibration.json").read_text())["images"]
        contents = train.contents(job.cache)
        changed = [i["file_name"] for i in listed if contents.get(i["file_name"]) != i["sha256"]]
        if changed:
            raise UserError(f"calibration image {changed[0]} changed since it was chosen; run stage=sample again")
        place = {record["file_name"]: n for n, record in enumerate(train.records)}
        order = [place[i["file_name"]] for i in listed]
        for batch in track(batches(train, framing, spec.input, size, 1, order), "calibrating", len(order), transient=True):
            yield normalise(batch.images, spec.input)

    try:
        report = dict(quantizer.quantize(model, feed, job.out))
    except ValueError as error:
        raise UserError(str(error)) from error
    return {**report, "macs": macs(onnx.load(model), size)}
