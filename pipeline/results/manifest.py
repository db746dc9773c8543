"""The manifest of a result: everything on which the result depends, without times, host names or local paths.

A manifest is written last, so a result without a manifest is not finished.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.results.content import MOST_JSON, digest_of, parse_json
from posepress.errors import UserError

MANIFEST = "manifest.json"
SHOWN = "shown.txt"  # text in a result that a run prints again if the result is fresh
_PLAIN = re.compile(r"[\w+=-][\w.+=-]*")  # a name or address must be one folder that is neither hidden nor a parent


def plain(name: object) -> bool:
    """Whether a text is a plain folder name: letters, digits and ._+=-, without a dot at the beginning."""
    return isinstance(name, str) and _PLAIN.fullmatch(name) is not None


def checked_manifest(found: Any) -> dict[str, Any]:
    """Check that a value is a valid manifest and return it.

    Raises:
        ValueError: a key is missing, a value has another type, a name leaves its folder, or the content was changed.
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
    """Write a manifest with a digest of its own content, which reveals damage. It is a checksum and no signature."""
    plainly = json.loads(json.dumps(dict(manifest)))
    content = {**plainly, "seal": _seal(plainly)}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a finished result. Return None if it is missing or damaged, so that the stage runs again.

    Raises:
        UserError: the permissions of the file forbid reading it.
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
    """Whether a folder holds a result of this machine. Imported results are shown in reports, but no stage reads them."""
    return manifest is not None and "imported" not in manifest and not _imported_before(folder)


def _imported_before(folder: Path) -> bool:
    """Whether a result came from the last import of an older version, which did not mark imported manifests."""
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
    """Return the error of a stage that cannot use its input."""
    what = "was imported" if read_manifest(folder) else "is damaged" if (folder / MANIFEST).exists() else "is not there"
    return UserError(f"{reader}: needs {folder}, which {what}; make it with: {command}")


def current(manifest: Mapping[str, Any], root: Path) -> bool:
    """Whether a result and its inputs, direct and indirect, were made from the results that are now in `root`.

    Args:
        manifest: manifest of the result.
        root: the folder outputs/<name>.
    """
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


def by_double(summary: Mapping[str, Any]) -> bool:
    """Whether the tests' double of TensorRT computed the figures, so that they are no measurements."""
    return str(summary.get("backend", "")).endswith("-double")
