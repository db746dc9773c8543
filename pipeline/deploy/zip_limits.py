"""Limits of zip files that come from elsewhere, checked before anything of them is unpacked."""

import struct
import zipfile
from pathlib import Path

_MOST_MEMBERS = 10_000


_MOST_DIRECTORY = 4 << 20  # largest list of members, in bytes; zipfile reads it into memory


_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file, APPNOTE.TXT 4.3.16


def check_directory(file: Path) -> None:
    """Check the size of the list of members at the end of a zip file, before zipfile reads the list.

    The check must use the same record at the end as zipfile, so that another record cannot mislead it.
    """
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise zipfile.BadZipFile(f"{size} bytes, more than {MOST_BYTES}")
    with file.open("rb") as stream:
        start = max(size - _LONGEST_END - _LOCATOR, 0)
        stream.seek(start)
        tail = stream.read()
    at = len(tail) - _END.size
    if at < 0 or not (tail.startswith(b"PK\5\6", at) and tail.endswith(b"\0\0")):
        at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("not a whole zip file")
    _, disk, first, here, members, listed, offset, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise zipfile.BadZipFile("something lies behind its end")
    most = listed > _MOST_DIRECTORY or members > _MOST_MEMBERS
    if most or tail[max(at - _LOCATOR, 0) : at].startswith(b"PK\6\7"):
        raise zipfile.BadZipFile("it lists more members than results have")
    if disk or first or here != members or listed < _ENTRY * members or offset + listed != start + at:
        raise zipfile.BadZipFile("the size or place of its list of members is wrong")


MOST_BYTES = 8 << 30  # largest unpacked size of all members together, in bytes


# Sizes in bytes: the record at the end with its longest comment, the locator of ZIP64, the shortest entry of the list.
_LONGEST_END, _LOCATOR, _ENTRY = _END.size + 0xFFFF, 20, 46
