"""Reading of COCO annotation files: this module checks them and converts them to ground truth.

Only annotations of one category are kept. They are checked as arrays, hundreds at a time. If a check finds something
unusual, `pipeline.datasets.records` checks these annotations one by one and names the error.
"""

import gc
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from evaluation.truth import People
from pipeline.datasets import records
from pipeline.datasets.records import FAR, Category
from posepress.errors import UserError
from posepress.image_headers import MOST_PIXELS
from posepress.images import read_bytes
from posepress.skeletons import COCO_17

MOST_BYTES = 4 << 30  # largest file of annotations or results; COCO's largest has a tenth of it
_POLYGONS = re.compile(rb'"segmentation" ?: ?(\[\[[-+0-9.,eE \[\]]*\]\])')
_LIST, _BETWEEN, _END = (re.compile(p) for p in (rb'"annotations"\s*:\s*\[', rb"\}\s*,\s*\{", rb"\}\s*\]"))
_ODD = (b"true", b"false")  # pieces with these are checked one by one, because Python's arrays accept true as 1
_PIECE = 1 << 20  # bytes that are parsed at once
_RECORDS = 1000  # records that are checked at once if the file is not parsed in pieces


@contextmanager
def unwatched() -> Iterator[None]:
    """Switch garbage collection off: its repeated scans of millions of new numbers take four times as long as reading them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def read_file(file: Path, fix: str) -> bytes:
    """Return the content of a JSON file without the byte order mark that some editors write.

    Raises:
        UserError: the file cannot be read, or is in UTF-16 or UTF-32. `fix` is the advice if it cannot be read.
    """
    try:
        content = read_bytes(file, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot read it ({getattr(error, 'strerror', None) or error}); {fix}") from error
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{file}: it is written in UTF-16 or UTF-32; save it as UTF-8")
    return content.removeprefix(b"\xef\xbb\xbf")


def read_json(content: bytes, file: Path) -> Any:
    """Parse the content of a large JSON file.

    Raises:
        UserError: the content is not JSON.
    """
    try:
        with unwatched():
            return orjson.loads(content)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); it may be truncated, or hold NaN: download or export it again") from error


@dataclass(frozen=True)
class Annotations:
    """A checked annotation file: its images, and the annotations of one category, N people with K keypoints.

    Attributes:
        category: category of the people.
        images: COCO's image records.
        people: COCO's annotation records.
        visibility: uint8 [N, K], 0 not labelled, 1 hidden, 2 visible.
        areas: float64 [N], area of each person in pixels.
        labelled: int64 [N], number of labelled keypoints, from "num_keypoints" if the file has it.
        crowd: bool [N], whether the annotation is a crowd region.
        left_out: number of annotations of other categories.
        boxed: number of people without a box, or with an empty one; their boxes were computed from keypoints.
    """

    category: Category
    images: list[dict[str, Any]]
    people: list[dict[str, Any]]
    visibility: NDArray[np.uint8]
    areas: NDArray[np.float64]
    labelled: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    left_out: int = 0
    boxed: int = 0


@dataclass(frozen=True)
class _Columns:
    """The columns of checked annotations that are kept as arrays."""

    visibility: NDArray[np.uint8]
    areas: NDArray[np.float64]
    labelled: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class _Kept:
    """A collection of the annotations of one category, which are added and checked piece by piece."""

    def __init__(self, categories: Any, wanted: int | str | None, file: Path) -> None:
        """Choose the category and start with no annotations.

        Args:
            categories: the file's list of categories.
            wanted: name or id of the category; None chooses it from the list.
            file: path of the file, for messages.

        Raises:
            UserError: the list does not determine the category.
        """
        self.category = records.choose_category(categories, wanted, str(file))
        self.declared = frozenset(record["id"] for record in categories or ())
        self.asked, self.file = wanted is not None, str(file)
        self.people: list[dict[str, Any]] = []
        self.columns: list[_Columns] = []
        self.seen = self.left_out = self.boxed = 0

    def take(self, piece: list[Any], odd: bool = True) -> None:
        """Check and add some annotations. `odd` says that the values true or false may be among their numbers.

        Raises:
            UserError: an annotation is not in COCO's format.
        """
        chosen = self._of_category(piece)
        people = piece if len(chosen) == len(piece) else [piece[n] for n in chosen]
        K = len(self.category.labels.names)
        found = None if odd else _columns(people, K)
        if found is None:
            check = records.PersonCheck(self.file, K)
            mended = [check(person, self.seen + n) for n, person in zip(chosen, people, strict=True)]
            self.boxed += sum(new["bbox"] != old.get("bbox") for new, old in zip(mended, people, strict=True))
            people, found = mended, _columns(mended, K, flat=True)
            assert found is not None, self.file
        self.columns.append(found)
        self.people += people
        self.seen += len(piece)
        self.left_out += len(piece) - len(people)

    def _of_category(self, piece: list[Any]) -> Sequence[int]:
        """Return the indices of the annotations that belong to the category."""
        try:
            ids = [record["category_id"] for record in piece]
        except (KeyError, TypeError, IndexError):
            ids = []
        own = self.category.id
        if own is not None and ids.count(own) == len(piece) and set(map(type, ids)) <= {type(own)}:
            return range(len(piece))
        return [n for n, record in enumerate(piece) if self._belongs(record, self.seen + n)]

    def _belongs(self, record: Any, position: int) -> bool:
        number = record.get("category_id") if isinstance(record, dict) else None
        named = isinstance(record, dict) and records.is_id(record.get("id"))
        where = f"{self.file}: " + (f"annotation {record['id']}" if named else f"annotations[{position}]")
        if number is None:
            if len(self.declared) > 1:
                raise UserError(f"{where} has no 'category_id', and there are {len(self.declared)} categories; add its id")
            return True
        if not records.is_id(number) or (self.declared and number not in self.declared):
            raise UserError(f"{where}: category_id is {records.shown(number)}, none of the file's categories; correct it")
        if not self.declared and not self.asked:
            if self.category.id is None:
                self.category = Category(number, "", self.category.labels)
            elif number != self.category.id:
                raise UserError(
                    f"{where}: category_id is {number}, others have {self.category.id}, and there is no list 'categories'; add "
                    f"it, or choose with data.category={self.category.id}"
                )
        return bool(number == self.category.id)


def _columns(people: Sequence[dict[str, Any]], K: int, flat: bool = False) -> _Columns | None:
    """Convert annotations to arrays. Return None if an annotation is unusual and must be checked alone.

    Args:
        people: records of the annotations.
        K: number of keypoints of a person.
        flat: the annotations were checked before and may have boxes of width or height 0, so their values are accepted.
    """
    if not people:
        return _Columns(np.zeros((0, K), np.uint8), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, bool))
    nothing = [0] * (3 * K)
    try:
        lists = [a.get("keypoints") or nothing for a in people]
        points = _numbers(lists, 3 * K)
        boxes = _numbers([a["bbox"] for a in people], 4)
        areas = np.array(array("d", [a["area"] if "area" in a else a["bbox"][2] * a["bbox"][3] for a in people]))
        crowd = np.array(array("b", [a.get("iscrowd", 0) for a in people]))
        counts = np.array(array("h", [a.get("num_keypoints", -1) for a in people]))
        kinds = {type(a["image_id"]) for a in people} | {type(a.get("id", 0)) for a in people}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        return None
    seen = points[:, 2::3]
    if not flat and not (
        kinds <= {int}
        and all(np.abs(values).max() <= FAR for values in (points, boxes))
        and boxes[:, 2:].min() > 0
        and 0 <= areas.min() <= areas.max() <= FAR * FAR
        and 0 <= crowd.min() <= crowd.max() <= 1
        and counts.max() <= 10_000
        and np.count_nonzero(counts >= 0) == sum("num_keypoints" in a for a in people)
        and ((seen == 0) | (seen == 1) | (seen == 2)).all()
    ):
        return None
    visibility = seen.astype(np.uint8)
    labelled = np.where(counts < 0, np.count_nonzero(visibility, axis=1), counts)
    return _Columns(visibility, areas, labelled.astype(np.int64), crowd.astype(bool))


def _numbers(lists: Sequence[Sequence[Any]], length: int) -> NDArray[np.float64]:
    """Convert lists of numbers to an array [len(lists), length]. Unlike numpy, Python's arrays do not convert text to numbers.

    Raises:
        ValueError: a list has another length.
        TypeError: a list holds something other than numbers.
    """
    if set(map(len, lists)) != {length}:
        raise ValueError
    return np.frombuffer(array("d", list(chain.from_iterable(lists)))).reshape(-1, length)


def _in_pieces(content: bytes, start_taking: Callable[[Any], _Kept]) -> tuple[Any, _Kept] | None:
    """Parse an annotation file and its long list of annotations piece by piece. Return None if its layout is unlike COCO's.

    The memory of each piece's numbers is used again for the next piece. Polygons stay text, because they are most of the file
    and only few people's are needed.
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
                return None  # the pattern matched another list with this name
            kept = start_taking(raw)
            at = start.end()
            while at < end.end() - 1:
                cut = _BETWEEN.search(content, at + _PIECE, end.end())
                stop = cut.start() + 1 if cut else end.end() - 1
                piece = _POLYGONS.sub(rb'"segmentation":"\1"', content[at:stop])
                kept.take(orjson.loads(b"[" + piece + b"]"), any(word in piece for word in _ODD))
                at = cut.end() - 1 if cut else stop
    except (ValueError, TypeError, KeyError):
        return None  # the caller parses the whole file again, which gives the error message
    return raw, kept


def load_annotations(file: Path, category: int | str | None = None) -> Annotations:
    """Read and check a COCO keypoint annotation file.

    Args:
        file: the annotation file.
        category: name or id of the category to read; None chooses it with `records.choose_category`.

    Raises:
        UserError: the file is missing, is not JSON, lacks COCO's lists or does not determine the category, or a record is
            not in COCO's format.
    """
    content = read_file(file, "check data.*.annotations")

    def start_taking(raw: Any) -> _Kept:
        for key in ("images", "annotations"):
            if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
                raise UserError(f"{file}: no list '{key}', so not COCO's format; expected images, annotations, categories")
        return _Kept(raw.get("categories"), category, file)

    read = _in_pieces(content, start_taking)
    if read is None:
        raw = read_json(content, file)
        kept = start_taking(raw)
        for at in range(0, len(raw["annotations"]), _RECORDS):
            kept.take(raw["annotations"][at : at + _RECORDS])
    else:
        raw, kept = read
    del content
    images = _images(raw["images"], str(file))
    _check_ids(images, kept.people, str(file))

    kept.take([])  # makes empty arrays if there are no people

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(columns, name) for columns in kept.columns])

    return Annotations(
        category=kept.category,
        images=images,
        people=kept.people,
        visibility=joined("visibility"),
        areas=joined("areas"),
        labelled=joined("labelled"),
        crowd=joined("crowd"),
        left_out=kept.left_out,
        boxed=kept.boxed,
    )


def _images(listed: list[Any], file: str) -> list[dict[str, Any]]:
    """Check image records, all at once if none is unusual, and return them."""
    try:
        names = [record["file_name"] for record in listed]
        kinds = {type(value) for record in listed for value in (record["id"], record["height"], record["width"])}
        text = {type(record.get("flickr_url", "")) for record in listed}
        if kinds <= {int} and text <= {str}:
            sides = [side for record in listed for side in (record["height"], record["width"])]
            if min(sides, default=1) >= 1 and max(sides, default=1) <= MOST_PIXELS and records.all_inside(names):
                return listed
    except (KeyError, TypeError, AttributeError):
        pass
    return [records.image(record, f"images[{position}]", file) for position, record in enumerate(listed)]


def _check_ids(images: Sequence[Mapping[str, Any]], people: Sequence[Mapping[str, Any]], file: str) -> None:
    """Compare the ids of images and annotations.

    Raises:
        UserError: an id is used twice, or an annotation names an unknown image.
    """
    known = {image["id"] for image in images}
    if len({str(i) for i in known}) < len(images):
        raise UserError(
            f"{file}: the image id {_twice(str(i['id']) for i in images)} is there twice; give every image an id of its own"
        )
    numbers = [a["id"] for a in people if "id" in a]
    if len(set(numbers)) < len(numbers):
        raise UserError(
            f"{file}: the annotation id {_twice(numbers)} is there twice; give every person its own, or drop the duplicate"
        )
    unknown = {a["image_id"] for a in people} - known
    if not unknown:
        return
    other = next((i for i in unknown if str(i) in {str(i) for i in known}), None)
    if other is not None:
        kinds = ("text", "numbers") if isinstance(other, str) else ("a number", "text")
        raise UserError(
            f"{file}: image_id {other!r} of annotations is {kinds[0]} where images have {kinds[1]}; write both in the same form"
        )
    raise UserError(
        f"{file}: annotations name {len(unknown)} unknown images ({', '.join(sorted(map(str, unknown))[:5])}, ...); "
        "add them to 'images' or drop their annotations"
    )


def _twice(ids: Any) -> Any:
    """Return the first id that occurs a second time."""
    seen: set[Any] = set()
    for number in ids:
        if number in seen:
            return number
        seen.add(number)
    return None


def people(annotations: Sequence[Mapping[str, Any]], K: int = len(COCO_17.names)) -> People:
    """Return the ground truth of an image from its checked COCO records.

    Raises:
        UserError: a segmentation is not in COCO's format.
    """
    keypoints = np.zeros((len(annotations), K, 3))
    for row, record in enumerate(annotations):
        if record.get("keypoints"):
            keypoints[row] = np.asarray(record["keypoints"], np.float64).reshape(K, 3)
    crowd = np.array([bool(a.get("iscrowd", 0)) for a in annotations], bool)
    labelled = np.array([labelled_keypoints(a) for a in annotations], np.int64)
    return People(
        keypoints=keypoints,
        boxes=np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4),
        areas=np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in annotations], np.float64),
        crowd=crowd,
        masks=tuple(records.mask(a.get("segmentation"), f"annotation {a.get('id')}") for a in annotations),
        ignored=crowd | (labelled == 0),
    )


def labelled_keypoints(annotation: Mapping[str, Any]) -> int:
    """Return the number of a person's labelled keypoints, from "num_keypoints" if the file has it."""
    if "num_keypoints" in annotation:
        return int(annotation["num_keypoints"])
    return sum(v > 0 for v in (annotation.get("keypoints") or [])[2::3])
