"""quantize: write a precision into the network, for both runtimes."""

import json
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from evaluation.pixels import normalise
from evaluation.types import Resolution
from pipeline.artifacts import Job
from pipeline.datasets.coco import Coco
from pipeline.errors import UserError
from pipeline.export import macs
from pipeline.inference import batches
from pipeline.quantization.probe import Probe
from pipeline.specs import Backend, CalibrationFeed, Decoder, Framing, Metric, Quantizer, Splits, read_spec


def run(
    job: Job,
    data: Splits,
    framing: Framing,
    resolution: str,
    quantizer: Quantizer,
    backend: Backend | None,
    decoder: Callable[..., Decoder[Any]],
    metric: Callable[..., Metric[Any, Any]],
    agreement: Callable[..., Metric[Any, Any]] | None,
    probe_images: int,
    threads: int,
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
        decoder: of candidates' fields.
        metric: of what they find.
        agreement: with what FP32 finds.
        probe_images: most tune images that candidates are measured on.
        threads: of the processor, when they are timed.
        image_dir: the folder that the calibration images were sampled from.

    Raises:
        UserError: a calibration image is gone or changed, or the quantizer's options do not fit.
    """
    model = job.inputs["network"] / "model.onnx"
    spec, size = read_spec(model), Resolution.parse(resolution)
    feed = None
    if "calibration" in job.inputs:
        chosen = json.loads((job.inputs["calibration"] / "calibration.json").read_text())
        sources = _sources(data, chosen["images"], image_dir, job)

        def read(most: int | None) -> Iterator[NDArray[np.float32]]:
            from rich.progress import track

            count = sum(len(order) for _, order in sources)
            every = (batch for part, order in sources for batch in batches(part, framing, spec.input, size, 1, order))
            shown = track(islice(every, most), "calibrating", min(count, most or count), transient=True)
            for batch in shown:
                if batch.views:
                    yield normalise(batch.images, spec.input)

        form = [repr(framing), str(size), spec.input.__dict__]
        digest = sha256(json.dumps([(i["file_name"], i["sha256"]) for i in chosen["images"]]).encode()).hexdigest()
        feed = CalibrationFeed(read, digest, sha256(json.dumps(form, default=str).encode()).hexdigest())
    probe = None
    if backend is not None and "tune" in data:
        tuned = job.inputs.get("tuned")
        options = json.loads((tuned / "decoder.json").read_text())["options"] if tuned else None
        decode = decoder(spec, **options) if options is not None else None
        probe = Probe(data, probe_images, framing, size, backend, decode, metric, agreement, model, threads)
    try:
        report = dict(quantizer.quantize(model, feed, probe, job.out))
    except ValueError as error:
        raise UserError(str(error)) from error
    return {**report, "macs": macs(onnx.load(model), size)}


def _sources(
    data: Splits, images: list[Mapping[str, str]], image_dir: str | None, job: Job
) -> list[tuple[Any, list[int]]]:
    """Where the calibration images are: data sets, and places in them.

    Raises:
        UserError: an image is gone or changed.
    """
    found = []
    for split in dict.fromkeys(image["split"] for image in images):
        part: Any = data.open(split) if split != "image_dir" else Coco.folder(str(image_dir))
        contents = part.contents(job.cache)
        listed = [image for image in images if image["split"] == split]
        changed = [i["file_name"] for i in listed if contents.get(i["file_name"]) != i["sha256"]]
        if changed:
            raise UserError(f"calibration image {changed[0]} changed since it was chosen; run stage=sample again")
        place = {record["file_name"]: n for n, record in enumerate(part.records)}
        found.append((part, [place[image["file_name"]] for image in listed]))
    return found
