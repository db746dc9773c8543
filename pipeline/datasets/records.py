"""Checks of single COCO records. Error messages name the record and the wrong field."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from posepress.errors import UserError, nearest
from posepress.image_headers import MOST_PIXELS
from posepress.labels import Skeleton
from posepress.skeletons import COCO_17

FAR = 1e8  # largest coordinate of a point or box, in pixels
_MOST_TEXT = 1000  # longest id or file name, in characters
_PLAIN_NAME = re.compile(r"(?!/)(?!.*(?:^|/)\.\.(?:/|$))[^\\]+")
_UNUSUAL = re.compile(r"[^\n\x20-\x5b\x5d-\x7e]|(?:^|/)\.\.(?:/|$)|^/|^$", re.MULTILINE)
_MOST_COUNT = 10_000  # largest value of num_keypoints
_SEEN = (0, 1, 2)


@dataclass(frozen=True)
class Category:
    """The category whose annotations are read.

    Attributes:
        id: the category's id in the file; None if the file lists no categories.
        name: the category's name in the file; "" if it has none.
        labels: the skeleton of its keypoints; COCO's if the category names no keypoints.
    """

    id: int | str | None
    name: str
    labels: Skeleton

    def __str__(self) -> str:
        return self.name or ("person" if self.id is None else f"category {self.id}")


def plain(text: object) -> str:
    """Return text that is safe to print on one line. Question marks replace characters that cannot be printed."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:200])


def shown(value: Any) -> str:
    """Describe a wrong value for an error message."""
    if isinstance(value, str):
        return f"the text '{plain(value[:40])}{'...' if len(value) > 40 else ''}'"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "an object"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number. true and false are not numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def flattened(points: Any) -> Any:
    """Join a list of triples to one flat list. Other values are returned unchanged."""
    if isinstance(points, list) and points and all(isinstance(triple, list) and len(triple) == 3 for triple in points):
        return [value for triple in points for value in triple]
    return points


def is_id(value: Any) -> bool:
    """Whether a value can identify a record: a whole number, or printable text of moderate length."""
    if isinstance(value, str):
        return 0 < len(value) <= _MOST_TEXT and value.isprintable()
    return isinstance(value, int) and not isinstance(value, bool)


def choose_category(categories: Any, wanted: int | str | None, where: str) -> Category:
    """Choose the category to read.

    Args:
        categories: the file's list of categories.
        wanted: name or id of the category. None chooses the category with keypoints, or the one named person of several. If
            no category names keypoints, it is the only category or the one named person.
        where: path of the file, for messages.

    Raises:
        UserError: the category does not exist or is ambiguous, or its keypoints are described wrongly.
    """
    if categories is not None and not isinstance(categories, list):
        raise UserError(f"{where}: categories is {shown(categories)}, not a list; see https://cocodataset.org/#format-data")
    listed = [] if categories is None else categories
    for position, record in enumerate(listed):
        if not isinstance(record, dict) or not is_id(record.get("id")):
            raise UserError(f"{where}: categories[{position}] has no 'id' that is a whole number or text, so not COCO's format")
        if not isinstance(record.get("name") or "", str):
            raise UserError(f"{where}: category {record['id']}: name is {shown(record['name'])}, not text")
    ids = [record["id"] for record in listed]
    if len({str(i) for i in ids}) < len(ids):
        twice = next(i for i in ids if [str(other) for other in ids].count(str(i)) > 1)
        raise UserError(f"{where}: the category id {twice} is there twice; give every category one of its own")
    if not listed:
        if wanted is None or str(wanted) == "person":
            return Category(None, "", COCO_17)
        return Category(int(wanted) if str(wanted).isdecimal() else wanted, "", COCO_17)
    chosen = _chosen(listed, wanted, where)
    return Category(chosen["id"], plain(chosen.get("name") or ""), _skeleton(chosen, where))


def _chosen(listed: Sequence[Mapping[str, Any]], wanted: int | str | None, where: str) -> Mapping[str, Any]:
    names = [plain(record.get("name") or record["id"]) for record in listed]
    if wanted is not None:
        exact = [record for record in listed if record["id"] == wanted or str(record["id"]) == str(wanted)]
        called = [record for record in listed if record.get("name") == str(wanted)] or exact
        if not called:
            few = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise UserError(f"data.category={wanted}: {where} has no such category{nearest(wanted, names)}; it has {few}")
        if len(called) > 1:
            raise UserError(
                f"data.category={wanted}: {where} has {len(called)} of that name; give the id of one, like "
                f"data.category={called[0]['id']}"
            )
        return called[0]
    jointed = [record for record in listed if record.get("keypoints")]
    for some in (jointed, [r for r in jointed or listed if str(r.get("name") or "").lower() == "person"], listed[:2]):
        if len(some) == 1:
            return some[0]
    have = [plain(r.get("name") or r["id"]) for r in jointed or listed]
    ids = [r["id"] for r in jointed or listed]
    told = "name keypoints" if jointed else "could be meant, and none names keypoints"
    raise UserError(
        f"{where}: {len(have)} categories {told} ({', '.join(have[:5])}{', ...' if len(have) > 5 else ''}); "
        f"choose one with data.category=NAME or its id, like data.category={have[0] if len(set(have)) == len(have) else ids[0]}"
    )


def _skeleton(category: Mapping[str, Any], where: str) -> Skeleton:
    """Return the skeleton of a category, with its "sigmas" if it has them. It is COCO's if the category names no keypoints."""
    who = f"{where}: category {plain(category.get('name') or category['id'])}"
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(n, str) and n.isprintable() and 0 < len(n) < 100 for n in names):
        raise UserError(f"{who}: keypoints is {shown(names)}; give a list of names, one for each keypoint")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{who}: the keypoint {twice} is there twice; give every keypoint a name of its own")
    if not names or tuple(names) == COCO_17.names:
        return COCO_17
    limbs = category.get("skeleton") or []
    for limb in limbs if isinstance(limbs, list) else [limbs]:
        right = isinstance(limb, list) and len(limb) == 2 and all(isinstance(k, int) and is_number(k) for k in limb)
        if not right or not all(1 <= k <= len(names) for k in limb):
            raise UserError(
                f"{who}: skeleton holds {limb if right else shown(limb)}; give pairs of keypoints, counted from 1 "
                f"to {len(names)}"
            )
    sigmas = category.get("sigmas") or []
    if sigmas and not (isinstance(sigmas, list) and all(is_number(s) and 0 < s <= 1 for s in sigmas)):
        raise UserError(f"{who}: sigmas must be numbers above 0, at most 1; give one for each keypoint")
    if sigmas and len(sigmas) != len(names):
        raise UserError(f"{who}: {len(names)} keypoints but {len(sigmas)} sigmas; give one for each keypoint")
    try:
        return Skeleton(tuple(names), tuple((a - 1, b - 1) for a, b in limbs), tuple(float(s) for s in sigmas))
    except ValueError as error:
        raise UserError(
            f"{who}: its keypoints, skeleton (pairs counted from 1) or sigmas are wrong ({error}); correct them"
        ) from error


def inside(name: str) -> bool:
    """Whether a file name is a relative path that stays inside its folder."""
    return name.isprintable() and 0 < len(name) <= _MOST_TEXT and _PLAIN_NAME.fullmatch(name) is not None


def all_inside(names: Sequence[str]) -> bool:
    """Whether all names are plain ASCII and `inside`, tested by one search. Other names must be checked one by one.

    Raises:
        TypeError: a name is no text.
    """
    joined = "\n".join(names)
    plain = joined.count("\n") == max(len(names) - 1, 0) and _UNUSUAL.search(joined) is None
    return plain and max(map(len, names), default=1) <= _MOST_TEXT


def file_name(value: Any, where: str) -> str:
    """Check a file name and return it.

    Raises:
        UserError: the value is no file name, or leaves the folder of the images.
    """
    if not isinstance(value, str):
        raise UserError(
            f"{where}: file_name is {shown(value)}, not text; give the path of the image below the folder of images"
        )
    if "\\" in value:
        raise UserError(f"{where}: file_name {value[:80]!r} holds a backslash; write the path with / between folders")
    if not inside(value):
        raise UserError(
            f"{where}: file_name {value[:80]!r} is no relative path that stays inside the folder of images; "
            "name the file below it, without .. or a leading /"
        )
    return value


def image(record: Any, where: str, file: str) -> dict[str, Any]:
    """Check an image record and return it without fields that are null.

    Raises:
        UserError: a field is missing or wrong.
    """
    for key in ("id", "file_name", "height", "width"):
        if not isinstance(record, dict) or record.get(key) is None:
            raise UserError(f"{file}: {where} has no '{key}', so not COCO's format")
    found = {key: value for key, value in record.items() if value is not None}
    if not is_id(found["id"]):
        raise UserError(f"{file}: {where}: id is {shown(found['id'])}; give a whole number or a short text")
    who = f"{file}: image {found['id']}"
    file_name(found["file_name"], who)
    for key in ("height", "width"):
        value = found[key]
        if not is_number(value) or value != int(value) or not 1 <= value <= MOST_PIXELS:
            hint = "; write it without quotes" if isinstance(value, str) else "; give the image's size in whole pixels"
            raise UserError(f"{who}: {key} is {shown(value)}, not a number of pixels{hint}")
        found[key] = int(value)
    if not isinstance(found.get("flickr_url", ""), str):
        raise UserError(f"{who}: flickr_url is {shown(found['flickr_url'])}, not text; drop it or give an address")
    return found


@dataclass(frozen=True)
class PersonCheck:
    """Checks annotations one by one.

    Attributes:
        file: path of the annotation file, for messages.
        keypoints: number of keypoints of the category.
    """

    file: str
    keypoints: int

    def __call__(self, record: Any, position: int) -> dict[str, Any]:
        """Check an annotation. Return it without null fields, with flat keypoints, and with a box.

        A missing or empty box becomes the bounding box of the labelled keypoints.

        Raises:
            UserError: a field is missing or wrong.
        """
        place = f"annotations[{position}]"
        if not isinstance(record, dict) or record.get("image_id") is None:
            raise UserError(f"{self.file}: {place} has no 'image_id', so not COCO's format")
        found = {key: value for key, value in record.items() if value is not None}
        if "id" in found and not is_id(found["id"]):
            raise UserError(f"{self.file}: {place}: id is {shown(found['id'])}; give a whole number or a short text")
        who = f"{self.file}: annotation {found['id']}" if "id" in found else f"{self.file}: {place}"
        if not is_id(found["image_id"]):
            self._wrong(who, "image_id", found["image_id"], "give the id of one of the images")
        self._points(found, who)
        self._box(found, who)
        for key, most in (("area", FAR * FAR), ("num_keypoints", _MOST_COUNT), ("iscrowd", 1)):
            value = found.get(key, 0)
            if key == "iscrowd" and isinstance(value, bool):
                found[key] = value = int(value)
            if not is_number(value) or not 0 <= value <= most or (key != "area" and value != int(value)):
                self._wrong(who, key, value, f"give 0 to {most:.3g}" if key == "area" else f"give 0 to {most}, a whole number")
            if key != "area" and isinstance(value, float):
                found[key] = int(value)
        return found

    def _wrong(self, who: str, key: str, value: Any, fix: str) -> NoReturn:
        quotes = "; write numbers without quotes" if isinstance(value, str) and key != "image_id" else ""
        raise UserError(f"{who}: {key} is {shown(value)}; {fix}{quotes}")

    def _points(self, found: dict[str, Any], who: str) -> None:
        points = found.get("keypoints", [])
        if not isinstance(points, list):
            self._wrong(who, "keypoints", points, f"give {3 * self.keypoints} numbers: x, y and visibility of each keypoint")
        points = flattened(points)
        if not points:
            found.pop("keypoints", None)
            return
        if len(points) != 3 * self.keypoints:
            raise UserError(
                f"{who}: {len(points)} keypoint numbers, not {3 * self.keypoints} ({self.keypoints} keypoints, as the file's "
                "category names them, or COCO's); correct it, or choose another data.category"
            )
        for n, value in enumerate(points):
            if not is_number(value) or abs(value) > FAR:
                fix = "give x, y and a visibility of 0, 1 or 2, and 0, 0, 0 for a keypoint without a label"
                self._wrong(who, f"keypoints[{n}]", value, fix)
            if n % 3 == 2 and value not in _SEEN:
                self._wrong(who, f"the visibility keypoints[{n}]", value, "give 0 not labelled, 1 hidden or 2 visible")
        found["keypoints"] = points

    def _box(self, found: dict[str, Any], who: str) -> None:
        box = found.get("bbox", [])
        if not isinstance(box, list) or len(box) not in (0, 4):
            self._wrong(who, "bbox", box, "give x, y, width and height")
        for n, value in enumerate(box):
            if not is_number(value) or abs(value) > FAR:
                self._wrong(who, f"bbox[{n}]", value, "give x, y, width and height as numbers of pixels")
        if box and min(box[2:]) < 0:
            raise UserError(f"{who}: bbox is {box}; width and height cannot be negative; give x, y, width and height")
        if box and min(box[2:]) > 0:
            return
        points = found.get("keypoints", [])
        labelled = [(x, y) for x, y, seen in zip(points[::3], points[1::3], points[2::3], strict=True) if seen > 0]
        if labelled:
            (left, top), (right, bottom) = (tuple(side(c) for c in zip(*labelled, strict=True)) for side in (min, max))
            found["bbox"] = [left, top, right - left, bottom - top]
        elif not box:
            raise UserError(
                f"{who} has no 'bbox', and no labelled keypoint to make one of; give x, y, width and height, "
                "or drop the annotation"
            )


def mask(shape: Any, where: str) -> Any:
    """Check a segmentation. Return its polygons, or its run lengths as a list, or None if there is none.

    Raises:
        UserError: the segmentation is in neither form.
    """
    if shape is None or shape in ([], {}):
        return None
    if isinstance(shape, str):  # `_in_pieces` leaves polygons as text
        try:
            shape = orjson.loads(shape)
        except ValueError:
            raise UserError(f"{where}: segmentation is {shown(shape)}; give polygons or run lengths") from None
    if isinstance(shape, list):
        for polygon in shape:
            plain = isinstance(polygon, list) and len(polygon) % 2 == 0 and set(map(type, polygon)) <= {int, float}
            if not plain or (polygon and not -FAR <= min(polygon) <= max(polygon) <= FAR):
                raise UserError(
                    f"{where}: segmentation holds a polygon that is no list of x, y, x, y, ... in pixels; correct or drop it"
                )
        return [polygon for polygon in shape if polygon] or None
    if isinstance(shape, dict):
        size: Any = shape.get("size")
        counts: Any = shape.get("counts")
        counts = _run_lengths(counts) if isinstance(counts, str) else counts
        lists = isinstance(size, list) and isinstance(counts, list) and len(size) == 2 and len(counts) > 0
        whole = lists and set(map(type, [*size, *counts])) == {int} and min(*size, *counts) >= 0
        if whole and size[0] * size[1] == sum(counts) <= MOST_PIXELS:
            return {"size": size, "counts": counts}
        raise UserError(f"{where}: the segmentation's counts do not add up to its size, height x width; correct or drop it")
    raise UserError(f"{where}: segmentation is {shown(shape)}; give polygons or run lengths")


def _run_lengths(text: str) -> list[int]:
    """Decode COCO's compressed run lengths, as rleFrString does in cocodataset/cocoapi, common/maskApi.c."""
    counts: list[int] = []
    at = 0
    while at < len(text):
        value, shift, more = 0, 0, True
        while more and at < len(text) and shift < 60:
            bits = ord(text[at]) - 48
            value |= (bits & 0x1F) << shift
            more, at, shift = bool(bits & 0x20), at + 1, shift + 5
            if not more and bits & 0x10:
                value |= -1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts
