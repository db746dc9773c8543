"""Checks of image files, and reading of images."""

import hashlib
import json
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import MOST_PIXELS
from pipeline.datasets.image_headers import Header, jpeg_segments, read_header
from posepress.errors import UserError
from posepress.resolution import Resolution

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

MOST_BYTES = 8 * MOST_PIXELS  # largest file; enough for an uncompressed image of 16-bit pixels

_LARGE = MOST_PIXELS // 8  # larger images are decoded one at a time, to limit the memory of parallel readers

_decoding = Lock()

# Types of an entry in the cache of digests. Height and width are None for files without a readable header.
_ENTRIES = tuple([int, int, str, side, side, int, bool] for side in (int, type(None)))


def read_bytes(file: Path, most: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: the file cannot be read, is larger than `most` bytes, or is a folder, device, pipe or socket.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "not a regular file", str(file))
        if found.st_size > most:
            raise OSError(0, f"larger than {most >> 20} MiB", str(file))
        return stream.read()


def read_image(file: Path, upright: bool = False) -> NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, 3], RGB; grey, CMYK and 16-bit files too.

    Args:
        file: the image file.
        upright: turn the image as its EXIF orientation says. COCO's annotations belong to the pixels as stored.

    Raises:
        UserError: the file is missing, is no readable image, or has more than `MOST_PIXELS` pixels.
    """
    return _decoded(file, _content(file), upright)


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
    data = _content(file)
    header = read_header(data)
    if header is not None:
        turn = turned(header, size, upright)
        if (header.shown if turn else header.size) != size:
            raise UserError(f"{file}: {mismatch(header.size, size)}")
        upright = turn
    image = _decoded(file, data, bool(upright))
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


def shown_size(file: Path) -> Resolution:
    """Return the size of an image after its EXIF rotation. The image is decoded only if its header does not tell the size.

    Raises:
        UserError: the image cannot be read.
    """
    data = _content(file)
    header = read_header(data)
    if header is not None and header.orientation == 1:
        return header.size
    return Resolution(*_decoded(file, data, upright=True).shape[:2])


def _content(file: Path) -> bytes:
    try:
        return read_bytes(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot read the image ({what}); restore the file or pass strict=false") from error


def _decoded(file: Path, data: bytes, upright: bool) -> NDArray[np.uint8]:
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    header = read_header(data)
    pixels = 0 if header is None else header.size.height * header.size.width
    vast = f"{file}: more than {MOST_PIXELS // 10**6} megapixels; scale it down or pass strict=false to skip it"
    if pixels > MOST_PIXELS:
        raise UserError(vast)
    image = None
    try:
        if _whole(file, data):
            with _decoding if pixels > _LARGE else nullcontext():
                image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        if "pixels" in str(error).lower():
            raise UserError(vast) from error
    if image is None:
        raise UserError(
            f"{file}: not a whole image ({len(data)} bytes); restore the file (JPEG, PNG, BMP and WebP are read) or pass "
            "strict=false to skip it"
        )
    return np.asarray(image, np.uint8)


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
    if not _whole(file, data):
        return "not a whole image"
    if header is not None and header.size.height * header.size.width > MOST_PIXELS:
        return f"more than {MOST_PIXELS // 10**6} megapixels"
    if decode:
        try:
            _decoded(file, data, upright=False)
        except UserError:
            return "not a whole image"
    form = [None, None, 1] if header is None else [header.size.height, header.size.width, header.orientation]
    return [hashlib.sha256(data).hexdigest(), *form, decode]


def _whole(file: Path, data: bytes | memoryview) -> bool:
    """Whether an image file is complete and its checksums and sizes are right."""
    content = memoryview(data)
    start = bytes(content[:30])
    if start[:4] == b"\x89PNG":
        return _whole_png(content)
    if start[:2] == b"\xff\xd8":
        return _whole_jpeg(content)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return 8 + int.from_bytes(start[4:8], "little") <= len(content)
    if start[:2] == b"BM":
        return _whole_bmp(content)
    return len(content) > 0 and file.suffix.lower() not in IMAGE_TYPES


def _whole_png(content: memoryview) -> bool:
    at = 8
    while at + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if end + 4 > len(content) or zlib.crc32(content[at + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            return False
        if kind == b"IEND":
            return True
        at = end + 4
    return False


def _whole_jpeg(content: memoryview) -> bool:
    # The search for the end marker starts at the first scan, because a header may hold a whole thumbnail. Within a scan no
    # other bytes look like the marker. It need not be the last bytes: phones append data after it.
    at = 2
    try:
        for marker, start, end in jpeg_segments(content):
            at = start if marker == 0xDA else end
    except (struct.error, IndexError):
        return False
    return bytes(content).find(b"\xff\xd9", at) > 0


def _whole_bmp(content: memoryview) -> bool:
    header = read_header(content)
    if header is None or len(content) < 34 or struct.unpack_from("<I", content, 14)[0] < 40:
        return header is not None
    start, (bits, compression) = struct.unpack_from("<I", content, 10)[0], struct.unpack_from("<HI", content, 28)
    row = -(-header.size.width * bits // 32) * 4
    return compression not in (0, 3) or start + row * header.size.height <= len(content)
