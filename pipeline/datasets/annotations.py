"""COCO annotation files: read, checked, and turned into ground truth."""

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from evaluation.skeletons import COCO_17
from evaluation.types import People, Skeleton
from pipeline.errors import UserError

_POLYGONS = re.compile(rb'"segmentation" ?: ?(\[\[[-+0-9.,eE \[\]]*\]\])')
_LIST, _BETWEEN, _END = (re.compile(p) for p in (rb'"annotations"\s*:\s*\[', rb"\}\s*,\s*\{", rb"\}\s*\]"))
_PIECE = 1 << 20  # bytes read into Python's numbers at once


@contextmanager
def unwatched() -> Iterator[None]:
    """No garbage collection: it would look at millions of new numbers again and again, four times the work of reading them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_file(file: Path, fix: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: it cannot be read, for which `fix` is the advice.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read it ({error.strerror}); {fix}") from error


def read_json(content: bytes, file: Path) -> Any:
    """What a large JSON file holds.

    Raises:
        UserError: it is not JSON.
    """
    try:
        with unwatched():
            return orjson.loads(content)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); it may be truncated, or hold NaN: download or export it again") from error


def _in_pieces(content: bytes) -> Any:
    """What an annotation file holds, its long list read some records at a time; None where it is not written as COCO's.

    The memory of a piece's numbers is used again. Polygons are most of the file and are read of few people: they stay text.
    """
    start, end = _LIST.search(content), None
    if start is not None:
        end = _END.search(content, start.end())
    if start is None or end is None:
        return None
    try:
        with unwatched():
            raw = orjson.loads(content[: start.end()] + content[end.end() - 1 :])
            if raw["annotations"] != []:
                return None  # it was another list of this name
            at = start.end()
            while at < end.end() - 1:
                cut = _BETWEEN.search(content, at + _PIECE, end.end())
                stop = cut.start() + 1 if cut else end.end() - 1
                raw["annotations"] += orjson.loads(b"[" + _POLYGONS.sub(rb'"segmentation":"\1"', content[at:stop]) + b"]")
                at = cut.end() - 1 if cut else stop
    except (ValueError, TypeError, KeyError):
        return None  # the whole is read once more, and complained about
    return raw


def load_annotations(file: Path) -> dict[str, Any]:
    """Read and check a COCO keypoint annotation file.

    Raises:
        UserError: the file is missing, is not JSON, lacks COCO's lists, or its annotations name unknown images.
    """
    content = read_file(file, "check data.*.annotations")
    raw = _in_pieces(content)
    if raw is None:
        raw = read_json(content, file)
    del content
    missing = [key for key in ("images", "annotations") if not isinstance(raw, dict) or not isinstance(raw.get(key), list)]
    if missing:
        raise UserError(f"{file}: no list '{missing[0]}', so not COCO's format; expected images, annotations, categories")
    for kind, needed in (("images", ("id", "file_name", "height", "width")), ("annotations", ("image_id", "bbox"))):
        for position, record in enumerate(raw[kind]):
            absent = [key for key in needed if not isinstance(record, dict) or key not in record]
            if absent:
                raise UserError(f"{file}: {kind}[{position}] has no '{absent[0]}', so not COCO's format")
    known = {image["id"] for image in raw["images"]}
    if len({str(i) for i in known}) < len(raw["images"]):
        seen: set[str] = set()
        twice = next(str(i["id"]) for i in raw["images"] if str(i["id"]) in seen or seen.add(str(i["id"])))  # type: ignore[func-returns-value]
        raise UserError(f"{file}: the image id {twice} is there twice; give every image an id of its own")
    numbers = [a["id"] for a in raw["annotations"] if "id" in a]
    if len(set(numbers)) < len(numbers):
        again: set[Any] = set()
        double = next(n for n in numbers if n in again or again.add(n))  # type: ignore[func-returns-value]
        raise UserError(f"{file}: the annotation id {double} is there twice; give every person one, or drop what is doubled")
    unknown = sorted({str(a["image_id"]) for a in raw["annotations"] if a["image_id"] not in known})
    if unknown:
        raise UserError(
            f"{file}: annotations name {len(unknown)} unknown images ({', '.join(unknown[:5])}, ...); "
            "add them to 'images' or drop their annotations"
        )
    return dict(raw)


def skeleton_of(raw: Mapping[str, Any]) -> Skeleton:
    """The keypoints that an annotation file's category names, with its "sigmas" where it has them; COCO's if it names none.

    Raises:
        UserError: a name is there twice, a pair joins what is no keypoint, or sigmas are of another number.
    """
    for category in raw.get("categories") or []:
        names = tuple(category.get("keypoints") or ())
        if names and names != COCO_17.names:
            try:
                limbs = tuple((a - 1, b - 1) for a, b in category.get("skeleton") or [])
                return Skeleton(names, limbs, tuple(category.get("sigmas") or ()))
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"category '{category.get('name')}': its keypoints, skeleton (pairs counted from 1) or sigmas are wrong "
                    f"({error}); mend the annotation file"
                ) from error
    return COCO_17


def people(annotations: Sequence[Mapping[str, Any]], K: int = len(COCO_17.names)) -> People:
    """The ground truth of an image from its COCO records."""
    keypoints = np.zeros((len(annotations), K, 3))
    for row, record in enumerate(annotations):
        flat = record.get("keypoints") or [0] * (3 * K)
        if len(flat) != 3 * K:
            raise UserError(
                f"annotation {record.get('id')}: {len(flat)} keypoint numbers, not {3 * K} ({K} keypoints, as the file's "
                "category names them, or COCO's)"
            )
        keypoints[row] = np.asarray(flat, np.float64).reshape(K, 3)
    return People(
        keypoints=keypoints,
        boxes=np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
        areas=np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], np.float64),
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool),
        masks=tuple(orjson.loads(m) if isinstance(m := a.get("segmentation"), str) else m for a in annotations),
    )


def labelled_keypoints(annotation: Mapping[str, Any]) -> int:
    """How many keypoints of a person are labelled."""
    flat = annotation.get("keypoints") or []
    return int(annotation.get("num_keypoints", sum(v > 0 for v in flat[2::3])))
