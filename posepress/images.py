"""Reading of image files and of uploaded images, with checks that they are whole."""

import os
import stat
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.image_headers import MOST_PIXELS, jpeg_segments, read_header
from posepress.resolution import Resolution

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

MOST_BYTES = 8 * MOST_PIXELS  # largest file; enough for an uncompressed image of 16-bit pixels

_LARGE = MOST_PIXELS // 8  # larger images are decoded one at a time, to limit the memory of parallel readers

_decoding = Lock()


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
    return decoded(file, content_of(file), upright)


def shown_size(file: Path) -> Resolution:
    """Return the size of an image after its EXIF rotation. The image is decoded only if its header does not tell the size.

    Raises:
        UserError: the image cannot be read.
    """
    data = content_of(file)
    header = read_header(data)
    if header is not None and header.orientation == 1:
        return header.size
    return Resolution(*decoded(file, data, upright=True).shape[:2])


def content_of(file: Path) -> bytes:
    """The content of an image file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return read_bytes(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or error
        raise UserError(f"{file}: cannot read the image ({what}); restore the file or pass strict=false") from error


def decoded(file: Path, data: bytes, upright: bool) -> NDArray[np.uint8]:
    """The pixels of an image in memory, uint8 [H, W, 3], RGB.

    Args:
        file: its name, for messages and for its type.
        data: content of the file.
        upright: turn the image as its EXIF orientation says.

    Raises:
        UserError: it is no whole image, or has more than `MOST_PIXELS` pixels; such an image is not decoded.
    """
    import cv2

    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    header = read_header(data)
    pixels = 0 if header is None else header.size.height * header.size.width
    vast = f"{file}: more than {MOST_PIXELS // 10**6} megapixels; scale it down or pass strict=false to skip it"
    if pixels > MOST_PIXELS:
        raise UserError(vast)
    image = None
    try:
        if is_whole(file, data):
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


def is_whole(file: Path, data: bytes | memoryview) -> bool:
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
