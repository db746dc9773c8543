"""Reading of JSON that may be damaged, and digests of files and data."""

import hashlib
import json
from pathlib import Path
from typing import Any

from posepress.errors import UserError

MOST_JSON = 64 << 20  # largest JSON file, in bytes


def parse_json(content: bytes) -> Any:
    """Parse JSON that may be damaged or malicious.

    Raises:
        ValueError: the content is no JSON, is nested too deeply or is larger than 64 MiB.
    """
    if len(content) > MOST_JSON:
        raise ValueError(f"{len(content)} bytes of JSON, more than {MOST_JSON}")
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits.

    Raises:
        UserError: the permissions of the file forbid reading it.
    """
    digest = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except PermissionError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); its owner must allow it") from error
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of plain data, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
