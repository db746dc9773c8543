"""Data sets in COCO's format, and their splits."""

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from evaluation.skeletons import COCO_17
from evaluation.types import People, Resolution, Sample, Skeleton
from pipeline import MOST_PIXELS
from pipeline.errors import UserError, nearest

_POLYGONS = re.compile(rb'"segmentation" ?: ?(\[\[[-+0-9.,eE \[\]]*\]\])')
_LIST, _BETWEEN, _END = (re.compile(p) for p in (rb'"annotations"\s*:\s*\[', rb"\}\s*,\s*\{", rb"\}\s*\]"))
_PIECE = 1 << 20  # bytes read into Python's numbers at once
SPLITS = ("train", "unlabelled", "tune", "agreement", "validation")
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def read_image(file: Path, upright: bool = False) -> NDArray[np.uint8]:
    """Read an image file as uint8 [H, W, 3], RGB; grey, CMYK and 16-bit files too.

    Args:
        file: of the image.
        upright: turn it as its EXIF orientation says; COCO's annotations are of the pixels as they are stored.

    Raises:
        UserError: the file is missing, larger than `MOST_PIXELS`, or no image can be read from it.
    """
    import cv2

    try:
        data = np.fromfile(file, np.uint8)
    except OSError as error:
        raise UserError(f"{file}: cannot read the image ({error.strerror}); restore the file or pass strict=false") from error
    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    try:
        image = cv2.imdecode(data, flags) if _whole(file, data.data) else None
    except cv2.error as error:
        if "pixels" in str(error).lower():
            raise UserError(
                f"{file}: more than {MOST_PIXELS // 10**6} megapixels; scale it down or pass strict=false to skip it"
            ) from error
        image = None
    if image is None:
        raise UserError(f"{file}: not a whole image ({data.size} bytes); restore the file or pass strict=false to skip it")
    return np.asarray(image, np.uint8)


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
    unknown = sorted({str(a["image_id"]) for a in raw["annotations"] if a["image_id"] not in known})
    if unknown:
        raise UserError(
            f"{file}: annotations name {len(unknown)} unknown images ({', '.join(unknown[:5])}, ...); "
            "add them to 'images' or drop their annotations"
        )
    return dict(raw)


def skeleton_of(raw: Mapping[str, Any]) -> Skeleton:
    """The keypoints that an annotation file's category names, with its "sigmas" where it has them; COCO's if it names none."""
    for category in raw.get("categories") or []:
        names = tuple(category.get("keypoints") or ())
        if names and names != COCO_17.names:
            limbs = tuple((a - 1, b - 1) for a, b in category.get("skeleton") or [])
            return Skeleton(names, limbs, tuple(category.get("sigmas") or ()))
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


def _labelled(annotation: Mapping[str, Any]) -> int:
    """How many keypoints of a person are labelled."""
    flat = annotation.get("keypoints") or []
    return int(annotation.get("num_keypoints", sum(v > 0 for v in flat[2::3])))


@dataclass(frozen=True)
class Coco:
    """Images of one split with COCO keypoint labels, or without labels.

    Attributes:
        images: the folder of images.
        annotations: the annotation file; None for unlabelled images.
        names: only these files, in this order; None is all of them.
    """

    images: Path
    annotations: Path | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def folder(cls, images: str) -> "Coco":
        """The images of a plain folder, without labels.

        Raises:
            UserError: there is no such folder, or no image in it.
        """
        made = cls(Path(images))
        if not made.images.is_dir() or not len(made):
            what = "no image in this folder" if made.images.is_dir() else "no such folder"
            raise UserError(f"image_dir={images}: {what}; give one that holds images ({', '.join(IMAGE_TYPES)})")
        return made

    @property
    def labels(self) -> Skeleton:
        """The skeleton of the keypoints, COCO's unless the file's category names others."""
        return self._content[1]

    @property
    def records(self) -> list[dict[str, Any]]:
        """COCO's image records, each with its `annotations` (None where unlabelled), in the order of their ids."""
        return self._content[0]

    @cached_property
    def _content(self) -> tuple[list[dict[str, Any]], Skeleton]:
        if self.annotations is None:
            return self._unlabelled(), COCO_17
        raw = load_annotations(self.annotations)
        by_image: dict[Any, list[dict[str, Any]]] = {image["id"]: [] for image in raw["images"]}
        for record in raw["annotations"]:
            by_image[record["image_id"]].append(record)
        wanted = None if self.names is None else set(self.names)
        records = [
            {**image, "annotations": by_image[image["id"]]}
            for image in sorted(raw["images"], key=lambda image: (len(str(image["id"])), str(image["id"])))
            if wanted is None or image["file_name"] in wanted
        ]
        if wanted and len(records) < len(wanted):
            absent = sorted(wanted - {r["file_name"] for r in records})
            raise UserError(
                f"{self.annotations}: the splits name {len(absent)} images it does not hold: {', '.join(absent[:5])}"
            )
        return records, skeleton_of(raw)

    def _unlabelled(self) -> list[dict[str, Any]]:
        if self.names is not None:
            return [{"id": Path(name).stem.lstrip("0") or "0", "file_name": name, "annotations": None} for name in self.names]
        return [
            {"id": file.stem.lstrip("0") or "0", "file_name": file.name, "annotations": None}
            for file in sorted(self.images.iterdir())
            if file.suffix.lower() in IMAGE_TYPES
        ]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample[People]:
        record = self.records[index]
        file = self.images / record["file_name"]
        truth = None if record["annotations"] is None else people(record["annotations"], len(self.labels.names))
        if "height" in record:
            size = Resolution(record["height"], record["width"])
            read: Callable[[], NDArray[np.uint8]] = partial(_read_checked, file, size)
        else:
            image = read_image(file, upright=True)  # once: nothing else knows its size
            size, read = Resolution(*image.shape[:2]), lambda: image
        return Sample(str(record["id"]), size, read, truth, None if truth is None else truth.boxes[~truth.crowd])

    def table(self) -> dict[str, NDArray[Any]]:
        """Columns id, file_name, persons, area, keypoints and coverage, one row an image.

        Those are: people with keypoints (-1 in an image that nobody labelled); the median of their areas in pixels; the mean
        count of their visible keypoints; the part, 0 to 1, of keypoint types of which one is visible in the image.
        """
        K = len(self.labels.names)
        every = [record["annotations"] for record in self.records]
        labelled = [[a for a in some or () if not a.get("iscrowd") and a.get("keypoints") and _labelled(a)] for some in every]
        flat = [a for some in labelled for a in some]
        image = np.repeat(np.arange(len(every)), [len(some) for some in labelled])
        for record in flat:
            if len(record["keypoints"]) != 3 * K:
                people([record], K)  # whose complaint it is
        numbers = np.array([a["keypoints"][2::3] for a in flat]).reshape(len(flat), K)
        areas = np.array([a.get("area", a["bbox"][2] * a["bbox"][3]) for a in flat], np.float64)
        visible = numbers == 2
        persons = np.bincount(image, minlength=len(every))
        seen = np.zeros((len(every), K), bool)
        np.logical_or.at(seen, image, visible)
        columns: dict[str, Any] = {
            "id": [str(record["id"]) for record in self.records],
            "file_name": [record["file_name"] for record in self.records],
            "persons": np.where([some is None for some in every], -1, persons),
            "area": _medians(areas, image, len(every)),
            "keypoints": np.bincount(image, visible.sum(axis=1), len(every)) / np.maximum(persons, 1),
            "coverage": seen.mean(axis=1),
        }
        return {name: np.array(values) for name, values in columns.items()}

    def contents(self, cache: Path) -> dict[str, str]:
        """SHA-256 of every image file, by name.

        Args:
            cache: folder where digests are kept, with each file's size and time.

        Raises:
            UserError: files are missing or not whole; up to ten are listed.
        """
        digests, wrong = inspect_files(self.images, [record["file_name"] for record in self.records], cache)
        if wrong:
            listed = ", ".join(f"{name} ({what})" for name, what in list(wrong.items())[:10])
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise UserError(
                f"{self.images}: {len(wrong)} images are missing or not whole: {listed}{more}; "
                "restore them, or pass strict=false to skip and count them"
            )
        return digests


def _medians(values: NDArray[np.float64], group: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """The median of each group's values, 0 where it has none; `group` is sorted."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ordered = np.append(values[order], 0.0)
    low, high = (starts + (sizes - 1) // 2, starts + sizes // 2)
    return np.where(sizes > 0, (ordered[np.where(sizes > 0, low, 0)] + ordered[np.where(sizes > 0, high, 0)]) / 2, 0.0)


def _read_checked(file: Path, size: Resolution) -> NDArray[np.uint8]:
    image = read_image(file)
    if image.shape[:2] == (size.width, size.height) != (size.height, size.width):
        image = read_image(file, upright=True)  # annotated as it is shown
    if image.shape[:2] != (size.height, size.width):
        raise UserError(
            f"{file}: {image.shape[0]}x{image.shape[1]} pixels, but its annotations say {size}; they do not belong together"
        )
    return image


def inspect_files(folder: Path, names: Iterable[str], cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """SHA-256 of image files, and what is wrong with those that are missing or cut short.

    Args:
        folder: of the files.
        names: of the files.
        cache: files whose size and time did not change since a list there was written are not read again.

    Returns:
        Digests by name, and complaints by name.
    """
    index = cache / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    try:
        known: dict[str, list[Any]] = json.loads(index.read_text())
    except (OSError, ValueError):
        known = {}
    digests: dict[str, str] = {}
    wrong: dict[str, str] = {}
    stale: list[tuple[str, list[int]]] = []
    for name in names:
        try:
            stat = os.stat(folder / name)  # noqa: PTH116 - a hundred thousand times
        except OSError:
            wrong[name] = "missing"
            continue
        stamp = [stat.st_size, stat.st_mtime_ns]
        if name in known and known[name][:2] == stamp:
            digests[name] = known[name][2]
        else:
            stale.append((name, stamp))
    if stale:
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda entry: _inspect(folder / entry[0]), stale)
            for (name, stamp), (digest, whole) in zip(stale, found, strict=True):
                if whole:
                    digests[name] = digest
                    known[name] = [*stamp, digest]
                else:
                    wrong[name] = "not a whole image"
        index.parent.mkdir(parents=True, exist_ok=True)
        unfinished = index.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(json.dumps(known))
        unfinished.replace(index)
    return digests, wrong


def _inspect(file: Path) -> tuple[str, bool]:
    data = file.read_bytes()
    return hashlib.sha256(data).hexdigest(), _whole(file, data)


def _whole(file: Path, data: bytes | memoryview) -> bool:
    """Whether an image file has its end."""
    content = bytes(data)
    if content[:4] == b"\x89PNG":
        return b"IEND" in content
    if content[:2] != b"\xff\xd8":
        return len(content) > 0 and file.suffix.lower() not in (".jpg", ".jpeg", ".png")
    # JPEG: past the headers, one of which may hold a whole thumbnail, to the first scan; in it no byte pair looks like the end.
    # Phones append more after the end.
    at = 2
    while content[at : at + 1] == b"\xff" and content[at + 1 : at + 2] != b"\xda":
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content.find(b"\xff\xd9", at) > 0


@dataclass(frozen=True)
class CocoSplits:
    """A COCO data set of a train and a validation part, and what each image is for.

    Attributes:
        train: {"images": folder, "annotations": file}; the tune images are taken from it.
        val: likewise; these are the validation images.
        unlabelled: {"images": folder} or nothing; train and agreement images without labels are taken from it.
        splits: a file {split: {any name: [file names] or "all"}} that says what each image is for; unlabelled images that
            it calls train become the split "unlabelled". None: of the train images, the twentieth part whose file names
            hash lowest is for tuning; of the unlabelled, half is for agreement.
        cache: where digests are kept.
        strict: False drops images that are missing, and counts them, instead of refusing.
    """

    train: Mapping[str, Any]
    val: Mapping[str, Any]
    unlabelled: Mapping[str, Any] | None = None
    splits: str | None = None
    cache: str = "outputs/cache"
    strict: bool = True
    dropped: dict[str, list[str]] = field(default_factory=dict, compare=False)
    _kept: dict[str, Coco] = field(default_factory=dict, compare=False, repr=False)

    def _named(self) -> dict[str, dict[str, Any]] | None:
        if self.splits is None:
            return None
        try:
            raw = json.loads(Path(self.splits).read_bytes())
        except OSError as error:
            raise UserError(f"{self.splits}: cannot read the splits ({error.strerror}); check data.splits") from error
        except ValueError as error:
            raise UserError(f"{self.splits}: not JSON ({error}); check data.splits") from error
        if not isinstance(raw, dict):
            raise UserError(f"{self.splits}: not a splits file but a {type(raw).__name__}; see data/README.md")
        return {split: groups for split, groups in raw.items() if isinstance(groups, dict)}

    @cached_property
    def parts(self) -> dict[str, Coco]:
        """The images of every split."""
        train, val = _source(self.train, "train"), _source(self.val, "val")
        loose = _source(self.unlabelled, "unlabelled") if self.unlabelled and self.unlabelled.get("images") else None
        named = self._named()
        if named is None:
            names = sorted(r["file_name"] for r in train.records)
            tune = sorted(names, key=_name_hash)[: max(len(names) // 20, 1)]
            parts = {
                "train": Coco(train.images, train.annotations, tuple(sorted(set(names) - set(tune)))),
                "tune": Coco(train.images, train.annotations, tuple(sorted(tune))),
                "validation": val,
            }
            if loose is not None:
                free = sorted((r["file_name"] for r in loose.records), key=_name_hash)
                parts["unlabelled"] = Coco(loose.images, None, tuple(sorted(free[len(free) // 2 :])))
                parts["agreement"] = Coco(loose.images, None, tuple(sorted(free[: len(free) // 2])))
            return parts
        labelled = {r["file_name"] for r in train.records}
        whole = {"train": train, "tune": train, "validation": val, "agreement": loose or train}
        every = {
            split: [
                name
                for group in groups.values()
                for name in ([r["file_name"] for r in whole[split].records] if group == "all" else group)
            ]
            for split, groups in named.items()
            if split in whole
        }
        for split in ("train", "tune", "validation"):
            if not every.get(split):
                raise UserError(f"{self.splits}: no images for '{split}'; a splits file names train, tune and validation")
        parts = {
            "train": Coco(train.images, train.annotations, tuple(n for n in every["train"] if n in labelled)),
            "tune": Coco(train.images, train.annotations, tuple(every["tune"])),
            "validation": Coco(val.images, val.annotations, tuple(every["validation"])),
        }
        if loose is not None:
            parts["unlabelled"] = Coco(loose.images, None, tuple(n for n in every["train"] if n not in labelled))
            parts["agreement"] = Coco(loose.images, None, tuple(every.get("agreement", ())))
        return parts

    def open(self, split: str) -> Coco:
        """The images of a split, after checking that no other split has one of them.

        Raises:
            UserError: there is no such split, it is empty, nobody is labelled in it, or two splits share an image, by id
                or by content.
        """
        if split not in self.parts:
            raise UserError(f"no split '{split}' in this data; it has {', '.join(self.parts)}{nearest(split, self.parts)}")
        part = self._present(split, self.parts[split])
        if len(part) == 0:
            raise UserError(f"{part.annotations or part.images}: no images for the split '{split}'")
        if part.annotations is not None and not part.table()["persons"].any():
            raise UserError(f"{part.annotations}: no person with keypoints in the split '{split}'; this product needs some")
        self._check_disjoint()
        return part

    def _present(self, split: str, part: Coco) -> Coco:
        if self.strict:
            return part
        if split in self._kept:
            return self._kept[split]
        digests, wrong = inspect_files(part.images, [record["file_name"] for record in part.records], Path(self.cache))
        self.dropped[split] = sorted(wrong)
        kept = [record["file_name"] for record in part.records if record["file_name"] in digests]
        self._kept[split] = Coco(part.images, part.annotations, tuple(kept))
        return self._kept[split]

    def _check_disjoint(self) -> None:
        ids: dict[str, str] = {}
        contents: dict[str, tuple[str, str]] = {}
        for split, part in self.parts.items():
            for record in part.records:
                other = ids.setdefault(str(record["id"]), split)
                if other != split:
                    raise UserError(
                        f"image {record['id']} ({record['file_name']}) is in '{other}' and '{split}'; splits must not overlap"
                    )
            present = self._present(split, part)
            for name, digest in present.contents(Path(self.cache)).items():
                other, twin = contents.setdefault(digest, (split, name))
                if other != split:
                    raise UserError(f"{name} of '{split}' has the same content as {twin} of '{other}'; splits must not overlap")

    def __contains__(self, split: str) -> bool:
        """Whether there are images for this."""
        return split in self.parts and len(self.parts[split]) > 0

    def digest(self, splits: Sequence[str]) -> str:
        """SHA-256 over names, contents and labels of some splits."""
        total = hashlib.sha256()
        for split in splits:
            if split not in self.parts:
                continue
            part = self.parts[split]
            present = self._present(split, part)
            total.update(json.dumps([split, sorted(present.contents(Path(self.cache)).items())]).encode())
            total.update(json.dumps(part.records, sort_keys=True).encode())
        return total.hexdigest()


def _source(paths: Mapping[str, Any], role: str) -> Coco:
    images = Path(str(paths["images"]))
    if not images.is_dir():
        raise UserError(f"data.{role}.images={images}: no such folder; give the folder that holds the images")
    return Coco(images, None if paths.get("annotations") is None else Path(str(paths["annotations"])))


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
