"""A pass over a data set that shows its progress and goes on where it was stopped."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posepress.errors import UserError
from posepress.predict import Found, Watch
from posepress.results import load_results, save_results

_SAVE_EVERY = 30.0  # seconds between partial results


def shown(results: Iterator[Found], watch: Watch, what: str, total: int) -> Iterator[Found]:
    """Pass results on and show images/s and the name of the step that holds them up; both are left behind."""
    from pipeline.progress import Progress

    compiling = "before the first image, decoding is compiled or loaded"
    with Progress(what, total, "images", stays=True, words=compiling) as progress:
        for n, result in enumerate(results, 1):
            yield result
            progress.update(n, f"held up by {watch.bottleneck}")


def resumed(
    images: Any, file: Path, rest: Callable[[int], Iterator[tuple[Any, Any]]], watch: Watch, what: str
) -> Iterator[tuple[int, Any, Any]]:
    """Place, sample and what was found, of every image; an interrupted pass goes on where it was.

    Args:
        images: the data set.
        file: where what was found is kept meanwhile.
        rest: finds people from an image on.
        watch: of the time they take.
        what: the images are, for the progress bar.
    """
    try:
        kept = list((load_results(file) if file.exists() else {}).items())
    except UserError:  # an unfinished pass that cannot be read is begun again
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
