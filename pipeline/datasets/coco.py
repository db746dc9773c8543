"""Data sets in COCO's format, and their splits."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from evaluation.skeletons import COCO_17
from evaluation.types import People, Resolution, Sample, Skeleton
from pipeline.datasets.annotations import labelled_keypoints, load_annotations, people, skeleton_of
from pipeline.datasets.images import IMAGE_TYPES, inspect_files, read_image, read_sized
from pipeline.errors import UserError, nearest

SPLITS = ("train", "unlabelled", "tune", "agreement", "validation")


@dataclass(frozen=True)
class Coco:
    """Images of one split with COCO keypoint labels, or without labels.

    Attributes:
        images: the folder of images.
        annotations: the annotation file; None for unlabelled images.
        names: only these files, in this order; None is all of them.
        remedy: what to do about images that are missing or not whole.
    """

    images: Path
    annotations: Path | None = None
    names: tuple[str, ...] | None = None
    remedy: str = "restore them, or pass strict=false to skip and count them"

    @classmethod
    def folder(cls, images: str) -> "Coco":
        """The images of a plain folder, without labels.

        Raises:
            UserError: there is no such folder, or no image in it.
        """
        made = cls(Path(images), remedy="restore them or take them out of image_dir")
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
        truth = None if record["annotations"] is None else self._people(record["annotations"])
        if "height" in record:
            size = Resolution(record["height"], record["width"])
            read: Callable[[], NDArray[np.uint8]] = partial(read_sized, file, size)
        else:
            image = read_image(file, upright=True)  # once: nothing else knows its size
            size, read = Resolution(*image.shape[:2]), lambda: image
        return Sample(str(record["id"]), size, read, truth, None if truth is None else truth.boxes[~truth.crowd])

    def _people(self, records: Sequence[Mapping[str, Any]]) -> People:
        try:
            return people(records, len(self.labels.names))
        except UserError as error:
            raise UserError(f"{self.annotations}: {error}") from error

    def table(self) -> dict[str, NDArray[Any]]:
        """Columns id, file_name, persons, area, keypoints and coverage, one row an image.

        Those are: people with keypoints (-1 in an image that nobody labelled); the median of their areas in pixels; the mean
        count of their visible keypoints; the part, 0 to 1, of keypoint types of which one is visible in the image.
        """
        K = len(self.labels.names)
        every = [record["annotations"] for record in self.records]
        labelled = [
            [a for a in some or () if not a.get("iscrowd") and a.get("keypoints") and labelled_keypoints(a)] for some in every
        ]
        flat = [a for some in labelled for a in some]
        image = np.repeat(np.arange(len(every)), [len(some) for some in labelled])
        for record in flat:
            if len(record["keypoints"]) != 3 * K:
                self._people([record])  # whose complaint it is
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
            raise UserError(f"{self.images}: {len(wrong)} images are missing or not whole: {listed}{more}; {self.remedy}")
        return digests


def _medians(values: NDArray[np.float64], group: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """The median of each group's values, 0 where it has none; `group` is sorted."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ordered = np.append(values[order], 0.0)
    low, high = (starts + (sizes - 1) // 2, starts + sizes // 2)
    return np.where(sizes > 0, (ordered[np.where(sizes > 0, low, 0)] + ordered[np.where(sizes > 0, high, 0)]) / 2, 0.0)


class Labelled(TypedDict):
    """Where the images of a part lie, and their annotation file."""

    images: str | Path
    annotations: str | Path


class Unlabelled(TypedDict):
    """Where images without labels lie."""

    images: str | Path | None


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

    train: Labelled
    val: Labelled
    unlabelled: Unlabelled | None = None
    splits: str | None = None
    cache: str = "outputs/cache"
    strict: bool = True
    dropped: dict[str, list[str]] = field(default_factory=dict, compare=False, init=False)
    _kept: dict[str, Coco] = field(default_factory=dict, compare=False, repr=False, init=False)

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
            raise UserError(f"{part.annotations}: no person with keypoints in the split '{split}'; label some, or give others")
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
