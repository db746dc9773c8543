"""Prediction over a data set, with a progress display and pictures; an interrupted pass can be resumed."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.predict import Watch
from posepress.results import load_results, save_results

Found = TypeVar("Found")
_SAVE_EVERY = 30.0  # seconds between partial results


def shown(results: Iterator[Found], watch: Watch, what: str, total: int) -> Iterator[Found]:
    """Pass results on, and show the images/s and the slowest step; the last line stays visible."""
    from pipeline.progress import Progress

    compiling = "the decoder is compiled or loaded before the first image"
    with Progress(what, total, "images", stays=True) as progress:
        progress.update(0, compiling)
        for n, result in enumerate(results, 1):
            yield result
            progress.update(n, f"held up by {watch.bottleneck}")


def resumed(
    images: Any, file: Path, rest: Callable[[int], Iterator[tuple[Any, Any]]], watch: Watch, what: str, kind: type
) -> Iterator[tuple[int, Any, Any]]:
    """Yield index, sample and predictions of every image; an interrupted pass continues where it stopped.

    Args:
        images: the data set.
        file: file that keeps the predictions of an unfinished pass.
        rest: predicts people, starting at the image of the given index.
        watch: measures the time of each step.
        what: name of the images in the progress bar.
        kind: class of the predictions.
    """
    try:
        kept = list((load_results(file, kind) if file.exists() else {}).items())
    except UserError:  # if the saved predictions cannot be read, the pass starts again
        kept = []
    start, saved = len(kept), time.monotonic()
    for place, (image, found) in enumerate(kept):
        sample = images[place]
        assert sample.id == image
        yield place, sample, found
    try:
        for sample, found in shown(rest(start), watch, what, len(images) - start):
            kept.append((sample.id, found))
            yield len(kept) - 1, sample, found
            if time.monotonic() - saved > _SAVE_EVERY:
                save_results(file, kept)
                saved = time.monotonic()
    finally:
        if len(kept) > start:
            save_results(file, kept)


class Pictures:
    """Pictures of some images' predictions, evenly spaced in the data set, and the address of each image's source.

    Args:
        folder: folder to write to; it is made.
        count: number of pictures.
        images: number of images in the data set.
    """

    def __init__(self, folder: Path, count: int, images: int) -> None:
        folder.mkdir()
        self._folder, self._captions = folder, dict[str, str]()
        self._places = {round(n * (images - 1) / max(count - 1, 1)) for n in range(min(count, images))}
        self._write()

    def __contains__(self, place: int) -> bool:
        """Whether the image of this index is drawn."""
        return place in self._places

    def add(self, place: int, picture: NDArray[np.uint8], credit: str) -> None:
        """Write the picture of an image.

        Args:
            place: index of the image.
            picture: RGB uint8 [H, W, 3].
            credit: address of the image's source; anything but an http address is left out.
        """
        import cv2

        name = f"{place + 1:06d}.jpg"
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
        (self._folder / name).write_bytes(jpeg.tobytes())
        self._captions[name] = credit if re.fullmatch(r"https?://[^\s\"'<>\\]{1,2000}", credit) else ""
        self._write()

    def _write(self) -> None:
        (self._folder / "captions.json").write_text(json.dumps(self._captions))
