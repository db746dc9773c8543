"""Conversion of the chosen calibration images to network inputs."""

import json
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import CalibrationFeed, Split, Splits
from pipeline.datasets.coco_split import Coco
from pipeline.progress import Progress
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.predict import Selection, batches
from posepress.resolution import Resolution
from posepress.spec import InputSpec


def calibration_feed(
    chosen: Path, data: Splits, image_dir: str | None, framing: Framing, spec: InputSpec, size: Resolution, cache: Path
) -> CalibrationFeed:
    """Make a feed of the images that the stage `sample` chose.

    Args:
        chosen: the file calibration.json of the stage `sample`.
        data: the data set with the images in its splits, unless `image_dir` holds them.
        image_dir: folder from which the images were sampled; None if they are from `data`.
        framing: turns an image into views.
        spec: description of the network's input.
        size: size of the network's input, in pixels.
        cache: folder that keeps digests of images.

    Raises:
        UserError: an image is missing or has changed.
    """
    images = json.loads(chosen.read_text())["images"]
    sources = list(_sources(images, data, image_dir, cache))

    def frames(most: int | None) -> Iterator[NDArray[np.uint8]]:
        every = (batch for images in sources for batch in batches(images, framing, spec, size))
        done = 0
        with Progress("calibrating", min(len(images), most or len(images)), "images") as bar:
            for batch in islice(every, most):
                done += sum(batch.last) if batch.views else 1
                bar.update(done)
                if batch.views:
                    yield batch.images

    def read(most: int | None) -> Iterator[NDArray[np.float32]]:
        return (normalise(images, spec) for images in frames(most))

    form = json.dumps([repr(framing), str(size), spec.__dict__], default=str)
    listed = json.dumps([[image["file_name"], image["sha256"]] for image in images])
    return CalibrationFeed(read, frames, sha256(listed.encode()).hexdigest(), sha256(form.encode()).hexdigest())


def _sources(images: list[Mapping[str, str]], data: Splits, image_dir: str | None, cache: Path) -> Iterator[Selection]:
    """Yield the chosen images of each data set."""
    for split in dict.fromkeys(image["split"] for image in images):
        part: Split[Any] = data.open(split) if split != "image_dir" else Coco.folder(str(image_dir))
        contents = part.contents(cache)
        listed = [image for image in images if image["split"] == split]
        changed = [i["file_name"] for i in listed if contents.get(i["file_name"]) != i["sha256"]]
        if changed:
            raise UserError(f"calibration image {changed[0]} changed since it was chosen; run stage=sample again")
        place = {record.file: n for n, record in enumerate(part.images)}
        yield Selection(part, [place[image["file_name"]] for image in listed])
