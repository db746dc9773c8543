"""The manifest of a result: what its bytes follow from, without a time, host or local path.

A manifest is written last, so that a result without one is not finished.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.results.content import MOST_JSON, digest_of, parse_json
from posepress.errors import UserError

MANIFEST = "manifest.json"
SHOWN = "shown.txt"  # in a result: what a run that finds it fresh prints again
_PLAIN = re.compile(r"[\w+=-][\w.+=-]*")  # of a name or an address: one folder, never hidden, never above


def plain(name: object) -> bool:
    """Whether a text is the name of one folder: letters, digits and ._+=-, and no dot in front."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def checked_manifest(found: Any) -> dict[str, Any]:
    """A manifest as it was read, once it is known to hold what every manifest holds.

    Raises:
        ValueError: a key is missing, a value has another type, a name leaves its folder, or a byte changed.
    """
    kinds = {"stage": str, "address": str, "config": dict, "inputs": dict, "fingerprint": str, "files": dict, "digest": str}
    kinds["summary"] = dict
    wrong = [key for key, kind in kinds.items() if not (isinstance(found, dict) and isinstance(found.get(key), kind))]
    if wrong:
        raise ValueError(f"no manifest: '{wrong[0]}' is missing or of another type")
    for entries in found["inputs"].values():
        for entry in entries if isinstance(entries, list) else [None]:
            if not isinstance(entry, dict) or not plain(entry.get("stage")) or not isinstance(entry.get("digest"), str):
                raise ValueError("no manifest: an input has no stage, address and digest")
            if entry.get("address") != "" and not plain(entry.get("address")):
                raise ValueError(f"no manifest: the address {entry.get('address')!r} of an input is no folder name")
    for name, digest in found["files"].items():
        parts = PurePosixPath(name).parts
        if not isinstance(digest, str) or not parts or ".." in parts or parts[0] == "/" or "\0" in name:
            raise ValueError(f"no manifest: {name!r} is no file of it")
    if "seal" in found and found["seal"] != _seal(found):
        raise ValueError("changed since it was written")
    return dict(found)


def _seal(manifest: Mapping[str, Any]) -> str:
    return digest_of({key: value for key, value in manifest.items() if key != "seal"})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with a digest of its own content, by which damage is noticed (a checksum is no signature)."""
    plainly = json.loads(json.dumps(dict(manifest)))
    content = {**plainly, "seal": _seal(plainly)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished result; None if there is none, or it is damaged: then its stage runs again.

    Raises:
        UserError: the file may not be read.
    """
    file = folder / MANIFEST
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return None
        return checked_manifest(parse_json(file.read_bytes()))
    except ValueError:
        return None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); its owner must allow it") from error


def made_here(manifest: Mapping[str, Any] | None, folder: Path) -> bool:
    """Whether there is a result in a folder, and this machine made it: what `import` brought is shown, and never built upon."""
    return manifest is not None and "imported" not in manifest and not _imported_before(folder)


def _imported_before(folder: Path) -> bool:
    """Whether the last import of an older version, which marked no manifest, brought the result in a folder."""
    file = folder.parent.parent / "import" / "package.json"
    try:
        if not file.is_file() or file.stat().st_size > MOST_JSON:
            return False
        found = parse_json(file.read_bytes())
    except (ValueError, OSError):
        return False
    places = found.get("results") if isinstance(found, dict) else None
    return isinstance(places, list) and f"{folder.parent.name}/{folder.name}" in places  # newer versions write a mapping


def absent(reader: str, folder: Path, command: str) -> UserError:
    """The error of a stage whose input cannot be used."""
    what = "was imported" if read_manifest(folder) else "is damaged" if (folder / MANIFEST).exists() else "is not there"
    return UserError(f"{reader}: needs {folder}, which {what}; make it with: {command}")


def current(manifest: Mapping[str, Any], root: Path) -> bool:
    """Whether a result was made from the inputs that lie under `root`, outputs/<name>, now, and those from theirs."""
    waiting, seen = [manifest], set()
    while waiting:
        for entry in (entry for inputs in waiting.pop()["inputs"].values() for entry in inputs):
            place = (entry["stage"], entry["address"], entry["digest"])
            if place in seen:
                continue
            seen.add(place)
            above = read_manifest(root / entry["stage"] / entry["address"])
            if above is None or above["digest"] != entry["digest"]:
                return False
            waiting.append(above)
    return True
