"""quantize: write a precision into the network, for both runtimes."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import onnx
from annotated_types import Interval
from rich.console import Console

from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.backends.macs import macs
from pipeline.errors import UserError
from pipeline.quantization.feed import calibration_feed
from pipeline.quantization.probe import Probe
from pipeline.specs import Backend, Framing, Quantizer, Splits, read_spec


def run(
    job: Job,
    data: Splits,
    framing: Framing,
    resolution: str,
    quantizer: Quantizer,
    backend: Backend | None,
    judged_by: Mapping[str, Any] | None,
    probe_images: Annotated[int, Interval(ge=1, le=10**6)],
    image_dir: str | None,
) -> dict[str, Any]:
    """Quantize the input "network" with the images of the input "calibration", if there is one.

    Args:
        job: inputs hold "network", and "calibration" and "tuned" where the precision needs them.
        data: calibration images are of it, unless they are of `image_dir`; candidates are measured on its tune images.
        framing: of the engines.
        resolution: of the input.
        quantizer: writes the files.
        backend: measures candidates; None measures nothing.
        judged_by: "decoder", "metric" and "agreement" of candidates, and "threads" when they are timed; None measures fields
            alone.
        probe_images: most tune images that candidates are measured on.
        image_dir: the folder that the calibration images were sampled from.

    Raises:
        UserError: a calibration image is gone or changed, or the quantizer's options do not fit.
    """
    model = job.inputs["network"] / "model.onnx"
    spec, size = read_spec(model), Resolution.parse(resolution)
    feed = None
    if "calibration" in job.inputs:
        chosen = job.inputs["calibration"] / "calibration.json"
        feed = calibration_feed(chosen, data, image_dir, framing, spec.input, size, job.cache)
    probe = None
    if backend is not None and "tune" in data:
        tuned = job.inputs.get("tuned")
        options = json.loads((tuned / "decoder.json").read_text())["options"] if tuned else {}
        judge = judged_by or {"decoder": None, "metric": None, "agreement": None, "threads": 0}
        decode = judge["decoder"](spec, **options) if judge["decoder"] else None
        probe = Probe(
            data,
            probe_images,
            framing,
            size,
            backend,
            decode,
            judge["metric"],
            judge["agreement"],
            model,
            judge["threads"],
            job.scratch,
        )
    try:
        report = dict(quantizer.quantize(model, feed, probe, job.out))
    except ValueError as error:
        raise UserError(str(error)) from error
    notes = [f"scales from {source}"] if (source := report.pop("scales_from", "")) else []  # a path, so not for the manifest
    if "tune_error" in report and "tune_agreement" not in report:
        notes.append("agreement did not judge: FP32 is sure of nobody in the tune images")
    if notes:
        Console(stderr=True, highlight=False).print(f"           {'; '.join(notes)}", soft_wrap=True, markup=False)
    return {**report, "macs": sum(macs(onnx.load(model), size).values())}
