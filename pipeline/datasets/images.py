"""Image files: read, and looked at before they are read."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.types import Resolution
from pipeline import MOST_PIXELS
from pipeline.errors import UserError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def read_image(file: Path, upright: bool = False) -> NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, 3], RGB; grey, CMYK and 16-bit files too.

    Args:
        file: of the image.
        upright: turn it as its EXIF orientation says; COCO's annotations are of the pixels as they are stored.

    Raises:
        UserError: the file is missing, larger than `MOST_PIXELS`, or no image can be read from it.
    """
    import cv2

    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise UserError(f"{file}: cannot read the image ({error.strerror}); restore the file or pass strict=false") from error
    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(data, flags) if _whole(file, data.data) else None
    except cv2.error as error:
        if "pixels" in str(error).lower():
            raise UserError(
                f"{file}: more than {MOST_PIXELS // 10**6} megapixels; scale it down or pass strict=false to skip it"
            ) from error
        image = None
    if image is None:
        raise UserError(f"{file}: not a whole image ({data.size} bytes); restore the file or pass strict=false to skip it")
    return np.asarray(image, np.uint8)


def read_sized(file: Path, size: Resolution) -> NDArray[np.uint8]:
    """Read an image that annotations say the size of, turned upright if that is how they mean it.

    Raises:
        UserError: it has another size, or cannot be read.
    """
    image = read_image(file)
    if image.shape[:2] == (size.width, size.height) != (size.height, size.width):
        image = read_image(file, upright=True)  # annotated as it is shown
    if image.shape[:2] != (size.height, size.width):
        raise UserError(
            f"{file}: {image.shape[0]}x{image.shape[1]} pixels, but its annotations say {size}; they do not belong together"
        )
    return image


def inspect_files(folder: Path, names: Iterable[str], cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of image files, and what is wrong with those that are missing or cut short.

    Args:
        folder: of the files.
        names: of the files.
        cache: files whose size and time did not change since a list there was written are not read again.

    Returns:
        Digests by name, and complaints by name.
    """
    index = cache / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    try:
        known: dict[str, list[Any]] = json.loads(index.read_text())
    except (OSError, ValueError):
        known = {}
    digests: dict[str, str] = {}
    wrong: dict[str, str] = {}
    stale: list[tuple[str, list[int]]] = []
    for name in names:
        try:
            stat = os.stat(folder / name)  # noqa: PTH116 - a hundred thousand times
        except OSError:
            wrong[name] = "missing"
            continue
        stamp = [stat.st_size, stat.st_mtime_ns]
        if name in known and known[name][:2] == stamp:
            digests[name] = known[name][2]
        else:
            stale.append((name, stamp))
    if stale:
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda entry: _inspect(folder / entry[0]), stale)
            for (name, stamp), (digest, whole) in zip(stale, found, strict=True):
                if whole:
                    digests[name] = digest
                    known[name] = [*stamp, digest]
                else:
                    wrong[name] = "not a whole image"
        index.parent.mkdir(parents=True, exist_ok=True)
        unfinished = index.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(known))
        unfinished.replace(index)
    return digests, wrong


def _inspect(file: Path) -> tuple[str, bool]:
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest(), _whole(file, data)


def _whole(file: Path, data: bytes | memoryview) -> bool:
    """Whether an image file has its end."""
    content = bytes(data)
    if content[:4] == b"\x89PNG":
        return b"IEND" in content
    if content[:2] != b"\xff\xd8":
        return len(content) > 0 and file.suffix.lower() not in (".jpg", ".jpeg", ".png")
    # JPEG: past the headers, one of which may hold a whole thumbnail, to the first scan; in it no byte pair looks like the end.
    # Phones append more after the end.
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content.find(b"\xff\xd9", at) > 0
