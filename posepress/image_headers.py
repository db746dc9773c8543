"""Size and orientation of an image, from the first bytes of its file."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from posepress.resolution import Resolution

MOST_PIXELS = 100_000_000  # of an image that is decoded

_FILL = 65536  # bytes that are skipped at once


@dataclass(frozen=True)
class Header:
    """Size and orientation of an image, from the header of its file.

    Attributes:
        size: size of the image as stored, in pixels.
        orientation: EXIF orientation, 1 to 8. 1 means as stored, 3 upside down, 2 and 4 mirrored, 5 to 8 a quarter turned.
    """

    size: Resolution
    orientation: int = 1

    @property
    def shown(self) -> Resolution:
        """The size of the image after the rotation that its orientation asks for."""
        return Resolution(self.size.width, self.size.height) if self.orientation > 4 else self.size


def read_header(data: bytes | memoryview) -> Header | None:
    """Read the header of a JPEG, PNG, BMP or WebP file. Return None for other or damaged files."""
    content = memoryview(data)
    start = bytes(content[:30])
    try:
        if start[:4] == b"\x89PNG":
            return _png_header(content)
        if start[:2] == b"\xff\xd8":
            return _jpeg_header(content)
        if start[:2] == b"BM":
            wide = struct.unpack_from("<I", content, 14)[0] > 12
            width, height = struct.unpack_from("<ii" if wide else "<HH", content, 18)
            return _header(abs(height), width)
        if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            return _webp_header(content)
    except (struct.error, IndexError):
        pass
    return None


def _header(height: int, width: int, orientation: int = 1) -> Header | None:
    if height < 1 or width < 1:
        return None
    return Header(Resolution(height, width), orientation if 1 <= orientation <= 8 else 1)


def _png_header(content: memoryview) -> Header | None:
    width, height = struct.unpack_from(">II", content, 16)
    at, orientation = 8, 1
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        if kind == b"eXIf":
            orientation = _orientation(content[at + 8 : at + 8 + length])
        if kind in (b"IDAT", b"IEND"):
            break
        at += 12 + length
    return _header(height, width, orientation)


def jpeg_segments(content: memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield the segments of a JPEG up to its first scan: the marker, and the start and end of its content.

    Raises:
        IndexError: the file is cut short.
        struct.error: the file is cut short within a length.
    """
    at = 2
    while content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # fill bytes, of which a file may have millions
            some = bytes(content[at : at + _FILL])
            at += max(len(some) - len(some.lstrip(b"\xff")) - 1, 1)
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            at += 2
            continue
        end = at + 2 + struct.unpack_from(">H", content, at + 2)[0]
        yield marker, at + 4, end
        if marker in (0xD9, 0xDA):
            return
        at = end


def _jpeg_header(content: memoryview) -> Header | None:
    orientation = 1
    for marker, start, end in jpeg_segments(content):
        if marker == 0xE1 and bytes(content[start : start + 6]) == b"Exif\0\0" and orientation == 1:
            orientation = _orientation(content[start + 6 : end])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, start + 1)
            return _header(height, width, orientation)
    return None


def _webp_header(content: memoryview) -> Header | None:
    kind = bytes(content[12:16])
    if kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
        return _header(height, width)
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", content, 21)[0]
        return _header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        return None
    width, height = (int.from_bytes(content[at : at + 3], "little") + 1 for at in (24, 27))
    at, orientation = 12, 1
    while at + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, at)
        if name == b"EXIF":
            exif = content[at + 8 : at + 8 + length]
            orientation = _orientation(exif[6:] if bytes(exif[:6]) == b"Exif\0\0" else exif)
        at += 8 + length + length % 2
    return _header(height, width, orientation)


def _orientation(exif: memoryview) -> int:
    """Return the orientation of an EXIF block that begins with its TIFF header, or 1 if it has none."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(exif[:2]))
    if order is None:
        return 1
    try:
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", exif, start)[0]):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * entry)
            if tag == 0x0112:
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1
