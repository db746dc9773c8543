"""Where images come from: files, folders, patterns, videos, cameras, network streams and lists of paths."""

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.images import IMAGE_TYPES, read_image, shown_size
from posepress.resolution import Resolution
from posepress.results import Sample

_STREAM = re.compile(r"(rtsp|rtsps|http|https)://", re.IGNORECASE)
_LISTED = 5  # names in a message


@dataclass(frozen=True)
class Shot:
    """One image of a source.

    Attributes:
        name: the image's file, or the source's name.
        index: number of the image in its source, from 0.
        seconds: time from the start of a video or camera; 0 for images.
        sample: the image, for `Model.predict`; its pixels are read once.
    """

    name: str
    index: int
    seconds: float
    sample: Sample[Any]


@dataclass
class Source:
    """Images in order.

    Attributes:
        name: a short name without folders, for the files that results go to.
        shots: the images.
        total: number of images; None if unknown.
        frame_rate: frames per second of a video; None for images.
        file: the video's file, whose sound an annotated video keeps; None for others.
        live: whether the images come in real time.
        counts: counts of problems, for example "skipped_files" and "dropped_frames".
        close: ends reading.
    """

    name: str
    shots: Iterable[Shot]
    total: int | None = None
    frame_rate: float | None = None
    file: Path | None = None
    live: bool = False
    counts: Mapping[str, int] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


def open_source(given: str | int | Path, strict: bool = True, live: bool = False) -> Source:
    """Open a source of images.

    Args:
        given: an image, a folder of images, a pattern such as "photos/*.jpg", a video, the index of a camera, an address that
            begins with rtsp:// or http://, or "-" for paths from the standard input, one in each line.
        strict: whether a file that is no image is an error; else it is skipped and counted.
        live: whether a camera gives its newest frame and drops those that came meanwhile; they are counted.

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    text = str(given)
    if text.isdecimal() or _STREAM.match(text):
        return _camera(int(text) if text.isdecimal() else text, live)
    if text == "-":
        return _paths("stdin", (line.rstrip("\n") for line in sys.stdin if line.strip()), None, strict)
    path = Path(text)
    if path.is_dir():
        return _folder(path, strict)
    if path.is_file():
        return _images(path.stem, [path], strict) if path.suffix.lower() in IMAGE_TYPES else _video(path)
    files = [Path(name) for name in sorted(glob(text, recursive=True))] if any(sign in text for sign in "*?[") else []  # noqa: PTH207 - patterns may be absolute
    if not files:
        raise UserError(f"{text}: no such image, folder, video or pattern; give one, a camera's index or an rtsp:// address")
    return _images(re.sub(r"[^\w.-]+", "-", path.parent.name or "images"), files, strict)


def _folder(folder: Path, strict: bool) -> Source:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    if not files:
        raise UserError(f"{folder}: holds no file; give a folder with images ({', '.join(IMAGE_TYPES)})")
    return _images(folder.resolve().name, files, strict)


def _images(name: str, files: Sequence[Path], strict: bool) -> Source:
    """Image files in order.

    Raises:
        UserError: one is no image, and `strict` is true; or none is.
    """
    others = [file.name for file in files if file.suffix.lower() not in IMAGE_TYPES]
    images = [file for file in files if file.suffix.lower() in IMAGE_TYPES]
    if others and (strict or not images):
        more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        raise UserError(
            f"{files[0].parent}: {', '.join(others[:_LISTED])}{more}: no images; remove them, or skip them with strict=false"
        )
    made = _paths(name, map(str, images), len(images), strict)
    made.counts["skipped_files"] += len(others)  # type: ignore[index]
    return made


def _paths(name: str, paths: Iterable[str], total: int | None, strict: bool) -> Source:
    counts = {"skipped_files": 0}

    def shots() -> Iterator[Shot]:
        index = 0
        for path in paths:
            try:
                size = shown_size(Path(path))
            except UserError:
                if strict:
                    raise
                counts["skipped_files"] += 1
                continue
            read = cache(_reader(Path(path)))
            yield Shot(path, index, 0.0, Sample(path, size, read, None))
            index += 1

    return Source(name, shots(), total, counts=counts)


def _reader(path: Path) -> Callable[[], NDArray[np.uint8]]:
    return lambda: read_image(path, upright=True)


def _video(file: Path) -> Source:
    from posepress.video import open_video

    video = open_video(file)
    shots = (_shot(str(file), frame) for frame in video)
    return Source(file.stem, shots, video.frames, video.frame_rate, file, counts=video.counts, close=video.close)


def _camera(address: int | str, live: bool) -> Source:
    from posepress.video import open_camera

    camera = open_camera(address, newest=live)
    name = (
        f"camera{address}" if isinstance(address, int) else re.sub(r"[^\w.-]+", "-", address.partition("://")[2].split("@")[-1])
    )
    shots = (_shot(name, frame) for frame in camera)
    return Source(name, shots, None, 30.0, live=True, counts=camera.counts, close=camera.close)


def _shot(name: str, frame: Any) -> Shot:
    image: NDArray[np.uint8] = frame.image
    sample: Sample[Any] = Sample(f"{name}:{frame.index}", Resolution(*image.shape[:2]), lambda: image, None)
    return Shot(name, frame.index, frame.seconds, sample)


def distinct(sources: Sequence[Source]) -> None:
    """Make sure that the results of several sources go to different files.

    Raises:
        UserError: two sources have the same name.
    """
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        for source in sources:
            with suppress(Exception):
                source.close()
        raise UserError(f"two sources are named '{twice[0]}', and their results would overwrite each other; rename one")
