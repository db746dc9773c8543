"""Data sets in COCO's format and their division into splits."""

import difflib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from pipeline.contracts import Detector
from pipeline.datasets.annotations import read_file, read_json
from pipeline.datasets.coco_split import Coco
from pipeline.datasets.detections import check_inside, read_boxes
from pipeline.datasets.records import file_name, plain
from pipeline.results.content import sha256
from posepress.errors import UserError, nearest
from posepress.results import Boxes
from posepress.skeletons import COCO_17, skeleton_of

SPLITS = ("train", "unlabelled", "tune", "agreement", "validation")

_NAMED = ("train", "tune", "agreement", "validation")  # splits that a splits file may name


class Labelled(TypedDict):
    """The folder of the images of a part, and their annotation file."""

    images: str | Path
    annotations: str | Path


class Unlabelled(TypedDict):
    """The folder of the images without labels."""

    images: str | Path | None


@dataclass(frozen=True)
class CocoSplits:
    """A COCO data set with a train and a validation part, and the split of each image.

    Attributes:
        train: {"images": folder, "annotations": file} of the train part; the tune images are taken from it.
        val: {"images": folder, "annotations": file} of the validation images.
        unlabelled: {"images": folder} of images without labels, or null; the splits unlabelled and agreement are taken from
            it.
        splits: a file {split: {any name: [file names] or "all"}} that assigns images to splits. Its train images without
            labels become the split "unlabelled". None assigns by a hash of the file names: 5 % of the train images become
            tune images, and half of the unlabelled images become agreement images.
        cache: folder that keeps digests of images.
        strict: true refuses images that are missing, cannot be read or have another size than annotated; false skips and
            counts them.
        category: name or id of the category to read. None chooses the category with keypoints, or the one
            named person of several. If no category names keypoints, it is the only category or the one named person.
        upright: true if the annotations belong to the images after the rotation that EXIF's orientation asks for, false if
            they belong to the pixels as stored; None decides it by the sizes in the annotations.
        boxes: where the boxes of people come from, for networks that see one person at a time: "annotations", or a file in
            COCO's result format with scores. The file serves every split that it has an image of; training takes annotations.
        skeleton: gives sigmas, limbs and mirror pairs to keypoints of the same names that have no sigmas in the file.
        detector: finds the boxes of all images that are not trained on, instead of `boxes`.
    """

    train: Labelled
    val: Labelled
    unlabelled: Unlabelled | None = None
    splits: str | None = None
    cache: str = "outputs/cache"
    strict: bool = True
    category: int | str | None = None
    upright: bool | None = None
    boxes: str = "annotations"
    skeleton: str | Mapping[str, object] = "coco_17"
    detector: Detector | None = None
    dropped: dict[str, list[str]] = field(default_factory=dict, compare=False, init=False)
    _kept: dict[str, Coco] = field(default_factory=dict, compare=False, repr=False, init=False)
    _boxed: dict[str, Coco] = field(default_factory=dict, compare=False, repr=False, init=False)

    def _named(self, file: str) -> dict[str, dict[str, Any]]:
        """Read the splits file {split: {any name: [file names] or "all"}}. Keys that are unlike a split's name are ignored."""
        raw = read_json(read_file(Path(file), "check data.splits"), Path(file))
        if not isinstance(raw, dict):
            raise UserError(f"{file}: not a splits file but a {type(raw).__name__}; see data/README.md")
        for key in sorted(raw.keys() - SPLITS):
            if meant := difflib.get_close_matches(key.lower(), _NAMED, n=1, cutoff=0.75):
                raise UserError(f"{file}: '{plain(key)}' is no split; rename it to '{meant[0]}', or to something unlike it")
        named = {split: groups for split, groups in raw.items() if split in SPLITS}
        for split, groups in named.items():
            if not isinstance(groups, dict):
                raise UserError(
                    f'{file}: {split} is no object; write "{split}": {{"any name": [file names]}}, or "all" for a list'
                )
            for group, names in groups.items():
                if names != "all" and not isinstance(names, list):
                    raise UserError(f'{file}: {split}.{plain(group)} is no list; give file names, or "all"')
                for name in names if names != "all" else ():
                    file_name(name, f"{file}: {split}.{plain(group)}")
        return named

    @cached_property
    def parts(self) -> dict[str, Coco]:
        """The images of every split, by its name.

        Raises:
            UserError: a folder or file is missing or wrong.
        """
        train, val = (self._source(paths, role) for paths, role in ((self.train, "train"), (self.val, "val")))
        loose = None
        if self.unlabelled and self.unlabelled.get("images"):
            loose = self._source(self.unlabelled, "unlabelled")
        if self.splits is not None:
            return self._by_name(train, val, loose, self._named(self.splits))
        names = sorted(r["file_name"] for r in train.records)
        tune = sorted(names, key=_name_hash)[: max(len(names) // 20, 1)]
        parts = {"train": train.only(sorted(set(names) - set(tune))), "tune": train.only(sorted(tune)), "validation": val}
        if loose is not None:
            free = sorted((r["file_name"] for r in loose.records), key=_name_hash)
            parts["unlabelled"] = loose.only(sorted(free[len(free) // 2 :]))
            parts["agreement"] = loose.only(sorted(free[: len(free) // 2]))
        return parts

    def _by_name(self, train: Coco, val: Coco, loose: Coco | None, named: Mapping[str, Mapping[str, Any]]) -> dict[str, Coco]:
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
        others = [name for name in every["train"] if name not in labelled] if loose is not None else []
        if loose is not None and self.strict:
            unknown = [plain(name) for name in others if not os.path.exists(loose.root / name)]  # noqa: PTH110 - names of any length
            if unknown:
                raise UserError(
                    f"{self.splits}: train names {len(unknown)} images that are neither in {train.annotations} nor in "
                    f"{loose.root}: {', '.join(unknown[:5])}; correct the names, or restore the images"
                )
        parts = {
            "train": train.only([n for n in every["train"] if n in labelled or loose is None]),
            "tune": train.only(every["tune"]),
            "validation": val.only(every["validation"]),
        }
        if loose is not None:
            parts["unlabelled"] = loose.only(others)
            parts["agreement"] = loose.only(every.get("agreement", ()))
        return parts

    def _source(self, paths: Mapping[str, Any], role: str) -> Coco:
        images = Path(str(paths["images"]))
        if not images.is_dir():
            raise UserError(f"data.{role}.images={images}: no such folder; give the folder that holds the images")
        file = None if paths.get("annotations") is None else Path(str(paths["annotations"]))
        skeleton = skeleton_of(self.skeleton)
        return Coco(images, file, category=self.category, upright=self.upright, skeleton=skeleton)

    def open(self, split: str) -> Coco:
        """Return the images of a split, after a check that no other split contains one of them.

        Raises:
            UserError: the split does not exist, is empty or has no labelled person, or two splits share an image by id or
                content.
        """
        if split not in self.parts:
            raise UserError(f"no split '{split}' in this data; it has {', '.join(self.parts)}{nearest(split, self.parts)}")
        part = self._present(split, self.parts[split])
        if len(part) == 0:
            where = part.annotations or part.root
            raise UserError(f"{where}: no images for the split '{split}'; give some, or leave the split out")
        if part.annotations is not None and not part.table()["persons"].any():
            others, truth = "", part.truth
            if truth is not None and truth.left_out:
                others = f" ({truth.left_out} annotations of other categories than {truth.category}: see data.category)"
            raise UserError(
                f"{part.annotations}: no person with keypoints in the split '{split}'{others}; label some, or give others"
            )
        self._check_disjoint()
        if split not in self._boxed:
            self._boxed[split] = self._with_boxes(split, part)
        return self._boxed[split]

    def _with_boxes(self, split: str, part: Coco) -> Coco:
        """The images of a split with the boxes of the detector or the file."""
        if split == "train":
            return part
        if self.detector is not None:
            return replace(part, boxes=self.detector.boxes(part, self._content([split]), Path(self.cache)))
        if self.boxes == "annotations":
            return part
        sizes = {record.id: record.size for record in part.images}
        found = {image: boxes for image, boxes in self._file.items() if image in sizes}
        if not found and split != "validation":
            return part
        check_inside(found, sizes, Path(self.boxes))
        return replace(part, boxes=found)

    @cached_property
    def _file(self) -> dict[str, Boxes]:
        """The boxes of the file, by image id."""
        truth = self.parts["validation"].truth
        known = {record.id for part in self.parts.values() for record in part.images}
        return read_boxes(Path(self.boxes), None if truth is None else truth.category.id, known)

    def _present(self, split: str, part: Coco) -> Coco:
        if self.strict:
            return part
        if split in self._kept:
            return self._kept[split]
        found = part.inspection(Path(self.cache), decode=True)
        wrong = {**found.wrong, **part.misfits(found)}
        self.dropped[split] = sorted(wrong)
        self._kept[split] = part.only([r["file_name"] for r in part.records if r["file_name"] not in wrong])
        return self._kept[split]

    def _check_disjoint(self) -> None:
        ids: dict[str, str] = {}
        contents: dict[str, tuple[str, str]] = {}
        for split, part in self.parts.items():
            for record in part.records if part.annotations is not None else ():  # other ids are made from names
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
        """Whether the split has images."""
        return split in self.parts and len(self.parts[split]) > 0

    def digest(self, splits: Sequence[str]) -> str:
        """Return a SHA-256 over the names, contents, labels and boxes of some splits."""
        total = self._content(splits)
        if self.detector is not None and set(splits) - {"train"}:
            total = hashlib.sha256(f"{total} {self.detector.identity}".encode()).hexdigest()
        if self.boxes != "annotations" and set(splits) - {"train"}:
            total = hashlib.sha256(f"{total} {sha256(Path(self.boxes))}".encode()).hexdigest()
        return total

    def _content(self, splits: Sequence[str]) -> str:
        """A SHA-256 over the names, contents and labels of some splits."""
        total = hashlib.sha256()
        for split in splits:
            if split not in self.parts:
                continue
            part = self.parts[split]
            present = self._present(split, part)
            total.update(json.dumps([split, sorted(present.contents(Path(self.cache)).items())]).encode())
            total.update(json.dumps(part.records, sort_keys=True).encode())
            if part.labels != COCO_17 or self.upright is not None:
                total.update(repr((part.labels, self.upright)).encode())
        return total.hexdigest()


def _name_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
