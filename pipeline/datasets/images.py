"""Checks of the image files of a data set against their annotations."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.image_headers import MOST_PIXELS, Header, read_header
from posepress.images import MOST_BYTES, content_of, decoded, is_whole, read_bytes
from posepress.resolution import Resolution

# Types of an entry in the cache of digests. Height and width are None for files without a readable header.
_ENTRIES = tuple([int, int, str, side, side, int, bool] for side in (int, type(None)))


def read_sized(file: Path, size: Resolution, upright: bool | None = None) -> NDArray[np.uint8]:
    """Read an image and check that it has the size in its annotations.

    Args:
        file: the image file.
        size: size of the image in the annotations.
        upright: whether the annotations belong to the image after the rotation that its EXIF orientation asks for; None
            decides it by the size.

    Raises:
        UserError: the image has another size, or cannot be read.
    """
    data = content_of(file)
    header = read_header(data)
    if header is not None:
        turn = turned(header, size, upright)
        if (header.shown if turn else header.size) != size:
            raise UserError(f"{file}: {mismatch(header.size, size)}")
        upright = turn
    image = decoded(file, data, bool(upright))
    if image.shape[:2] != (size.height, size.width):
        raise UserError(f"{file}: {mismatch(Resolution(*image.shape[:2]), size)}")
    return image


def turned(header: Header, size: Resolution, upright: bool | None = None) -> bool:
    """Whether annotations of this size belong to the image after the rotation that its EXIF orientation asks for."""
    return size != header.size and size == header.shown if upright is None else upright


def mismatch(stored: Resolution, said: Resolution) -> str:
    """Return the error message for an image with another size than its annotations state."""
    return (
        f"{stored} pixels, but its annotations say {said}; they do not belong together: give the images that were annotated, "
        "correct height and width, or set data.upright"
    )


@dataclass(frozen=True)
class Inspection:
    """The results of a check of image files.

    Attributes:
        digests: SHA-256 of each intact file, by name.
        headers: readable headers, by name.
        wrong: error messages about damaged or missing files, by name.
    """

    digests: dict[str, str]
    headers: dict[str, Header]
    wrong: dict[str, str]


def inspect_files(folder: Path, names: Iterable[str], cache: Path, decode: bool = False) -> Inspection:
    """Check which image files are missing or damaged, and compute the digests of the others.

    Args:
        folder: folder of the files.
        names: names of the files.
        cache: folder of earlier results. Files with unchanged size and modification time are not read again.
        decode: also decode each file once.
    """
    index = cache / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    known = _known(index)
    found = Inspection({}, {}, {})
    stale: list[tuple[str, list[int]]] = []
    for name in names:
        try:
            status = os.stat(folder / name)  # noqa: PTH116 - faster than pathlib for 100,000 files
        except (OSError, ValueError):
            found.wrong[name] = "missing"
            continue
        if not stat.S_ISREG(status.st_mode):
            found.wrong[name] = "not a regular file"
            continue
        stamp = [status.st_size, status.st_mtime_ns]
        if name in known and known[name][:2] == stamp and known[name][6] >= decode:
            _take(found, name, known[name])
        else:
            stale.append((name, stamp))
    if stale:
        with ThreadPoolExecutor() as pool:
            every = pool.map(lambda entry: _inspect(folder / entry[0], decode), stale)
            for (name, stamp), looked in zip(stale, every, strict=True):
                if isinstance(looked, str):
                    found.wrong[name] = looked
                else:
                    known[name] = [*stamp, *looked]
                    _take(found, name, known[name])
        index.parent.mkdir(parents=True, exist_ok=True)
        unfinished = index.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(known))
        unfinished.replace(index)
    return found


def _known(index: Path) -> dict[str, list[Any]]:
    """Read an earlier inspection: size, time, digest, height, width, orientation and decoding of each file, by name."""
    try:
        listed = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in listed.items() if _is_entry(entry)} if isinstance(listed, dict) else {}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or [type(value) for value in entry] not in _ENTRIES:
        return False
    sized = entry[3] is None or min(entry[3], entry[4]) > 0
    return sized and 1 <= entry[5] <= 8 and re.fullmatch("[0-9a-f]{64}", entry[2]) is not None


def _take(found: Inspection, name: str, entry: list[Any]) -> None:
    found.digests[name] = entry[2]
    if entry[3] is not None:
        found.headers[name] = Header(Resolution(entry[3], entry[4]), entry[5])


def _inspect(file: Path, decode: bool) -> list[Any] | str:
    """Return digest, height, width and orientation of a file and whether it was decoded, or else an error message."""
    try:
        data = read_bytes(file, MOST_BYTES)
    except OSError as error:
        return str(error.strerror or error)
    header = read_header(data)
    if not is_whole(file, data):
        return "not a whole image"
    if header is not None and header.size.height * header.size.width > MOST_PIXELS:
        return f"more than {MOST_PIXELS // 10**6} megapixels"
    if decode:
        try:
            decoded(file, data, upright=False)
        except UserError:
            return "not a whole image"
    form = [None, None, 1] if header is None else [header.size.height, header.size.width, header.orientation]
    return [hashlib.sha256(data).hexdigest(), *form, decode]
