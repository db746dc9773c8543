"""Data sets in COCO's format and their division into splits."""

import difflib
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from evaluation.truth import People
from pipeline.datasets.annotations import Annotations, load_annotations, people, read_file, read_json, unwatched
from pipeline.datasets.images import (
    IMAGE_TYPES,
    Inspection,
    inspect_files,
    mismatch,
    read_image,
    read_sized,
    shown_size,
    turned,
)
from pipeline.datasets.records import file_name, plain
from posepress.errors import UserError, nearest
from posepress.results import Sample
from posepress.skeletons import COCO_17
from posepress.spec import Resolution, Skeleton

# Most people that are checked, and the share of their keypoints or boxes outside images above which a doubt is reported.
_LOOKED_AT, _MANY_OUTSIDE = 4000, 0.2
SPLITS = ("train", "unlabelled", "tune", "agreement", "validation")
_NAMED = ("train", "tune", "agreement", "validation")  # splits that a splits file may name


@dataclass(frozen=True)
class Coco:
    """Images of one split with COCO keypoint labels, or without labels.

    Attributes:
        images: folder of the images.
        annotations: the annotation file; None for unlabelled images.
        names: names of the files to use, in this order; None uses all.
        remedy: advice in the message about missing or damaged images.
        category: name or id of the category to read; None chooses the one with keypoints, or person.
        upright: whether the annotations belong to the images after the rotation that EXIF's orientation asks for; None
            decides it by the size of each image.
    """

    images: Path
    annotations: Path | None = None
    names: tuple[str, ...] | None = None
    remedy: str = "restore them, or pass strict=false to skip and count them"
    category: int | str | None = None
    upright: bool | None = None

    @classmethod
    def folder(cls, images: str) -> "Coco":
        """Return the images of a plain folder, without labels.

        Raises:
            UserError: the folder does not exist or holds no image.
        """
        made = cls(Path(images), remedy="restore them or take them out of image_dir")
        if not made.images.is_dir() or not len(made):
            what = "no image in this folder" if made.images.is_dir() else "no such folder"
            raise UserError(f"image_dir={images}: {what}; give a folder that holds images ({', '.join(IMAGE_TYPES)})")
        return made

    def only(self, names: Sequence[str]) -> "Coco":
        """Return a data set with some of the images. The annotation file is not read again."""
        part = replace(self, names=tuple(names))
        if self.annotations is not None:
            part.__dict__["truth"] = self.truth
        return part

    @property
    def labels(self) -> Skeleton:
        """The skeleton of the keypoints. It is COCO's unless the file's category names other keypoints."""
        return COCO_17 if self.truth is None else self.truth.category.labels

    @cached_property
    def truth(self) -> Annotations | None:
        """The whole annotation file; None for unlabelled images."""
        return None if self.annotations is None else load_annotations(self.annotations, self.category)

    @property
    def records(self) -> list[dict[str, Any]]:
        """COCO's image records in the order of their ids. Each holds its `annotations`, which are None without labels."""
        return self._rows[0]

    @cached_property
    def _rows(self) -> tuple[list[dict[str, Any]], list[list[int]]]:
        """The records, and the indices of their annotations in the file."""
        if self.truth is None:
            records = self._unlabelled()
            return records, [[] for _ in records]
        with unwatched():
            return self._labelled(self.truth)

    def _labelled(self, truth: Annotations) -> tuple[list[dict[str, Any]], list[list[int]]]:
        by_image: dict[Any, list[int]] = {image["id"]: [] for image in truth.images}
        for row, record in enumerate(truth.people):
            by_image[record["image_id"]].append(row)
        wanted = None if self.names is None else set(self.names)
        images = [
            image
            for image in sorted(truth.images, key=lambda image: (len(str(image["id"])), str(image["id"])))
            if wanted is None or image["file_name"] in wanted
        ]
        if wanted and len(images) < len(wanted):
            absent = sorted(wanted - {image["file_name"] for image in images})
            if absent:
                raise UserError(
                    f"{self.annotations}: the splits name {len(absent)} images it does not hold: {', '.join(absent[:5])}"
                )
        rows = [by_image[image["id"]] for image in images]
        every = truth.people
        return [{**image, "annotations": [every[n] for n in own]} for image, own in zip(images, rows, strict=True)], rows

    def _unlabelled(self) -> list[dict[str, Any]]:
        names = self.names
        if names is None:
            names = tuple(file.name for file in sorted(self.images.iterdir()) if file.suffix.lower() in IMAGE_TYPES)
        names = tuple(dict.fromkeys(names))
        ids = [Path(name).stem.lstrip("0") or "0" for name in names]
        if len(set(ids)) < len(ids):
            ids = list(names)  # 1.jpg and 01.jpg, or equal names in two folders, have equal ids
        return [{"id": i, "file_name": name, "annotations": None} for i, name in zip(ids, names, strict=True)]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample[People]:
        record = self.records[index]
        file = self.images / record["file_name"]
        truth = None if record["annotations"] is None else self._people(record["annotations"])
        if "height" in record:
            size = Resolution(record["height"], record["width"])
            read: Callable[[], NDArray[np.uint8]] = partial(read_sized, file, size, self.upright)
        else:
            size, read = shown_size(file), partial(read_image, file, upright=True)
        return Sample(str(record["id"]), size, read, truth, None if truth is None else truth.boxes[~truth.crowd])

    def _people(self, records: Sequence[Mapping[str, Any]]) -> People:
        try:
            return people(records, len(self.labels.names))
        except UserError as error:
            raise UserError(f"{self.annotations}: {error}") from error

    def table(self) -> dict[str, NDArray[Any]]:
        """Return a table with one row for each image.

        Its columns are "id", "file_name" and four more. "persons" is the number of people with keypoints, or -1 in an
        unlabelled data set. "area" is the median of their areas, in pixels. "keypoints" is the mean number of their visible
        keypoints. "coverage" is the share (0 to 1) of keypoint types that are visible in the image at least once.
        """
        records, rows = self._rows
        count, K = len(records), len(self.labels.names)
        flat = np.array([row for own in rows for row in own], np.intp)
        image = np.repeat(np.arange(count), [len(own) for own in rows])
        seen = np.zeros((0, K), np.uint8)
        areas = np.zeros(0)
        if self.truth is not None:
            counted = ~self.truth.crowd & (self.truth.labelled > 0)
            image, flat = image[counted[flat]], flat[counted[flat]]
            seen, areas = self.truth.visibility[flat], self.truth.areas[flat]
        visible = seen == 2
        persons = np.bincount(image, minlength=count)
        types = np.zeros((count, K), bool)
        np.logical_or.at(types, image, visible)
        columns: dict[str, Any] = {
            "id": [str(record["id"]) for record in records],
            "file_name": [record["file_name"] for record in records],
            "persons": persons if self.truth is not None else np.full(count, -1),
            "area": _medians(areas, image, count),
            "keypoints": np.bincount(image, visible.sum(axis=1), count) / np.maximum(persons, 1),
            "coverage": types.mean(axis=1),
        }
        return {name: np.array(values) for name, values in columns.items()}

    def contents(self, cache: Path) -> dict[str, str]:
        """Return the SHA-256 of every image file, by name.

        Args:
            cache: folder that keeps digests, with each file's size and modification time.

        Raises:
            UserError: files are missing or damaged; the message lists up to ten.
        """
        found = self.inspection(cache)
        if found.wrong:
            listed = ", ".join(f"{name} ({what})" for name, what in list(found.wrong.items())[:10])
            more = f" and {len(found.wrong) - 10} more" if len(found.wrong) > 10 else ""
            raise UserError(
                f"{self.images}: {len(found.wrong)} images are missing or not whole, of {len(self.records)}: {listed}{more}; "
                f"{self.remedy}"
            )
        for name, what in self.misfits(found).items():
            raise UserError(f"{self.images / name}: {what}; or pass strict=false to skip and count it")
        return found.digests

    def misfits(self, found: Inspection) -> dict[str, str]:
        """Return messages by image name: the header of each image states another size than its annotations."""
        wrong = {}
        for record in self.records if self.truth is not None else ():
            header, size = found.headers.get(record["file_name"]), Resolution(record["height"], record["width"])
            if header is not None and (header.shown if turned(header, size, self.upright) else header.size) != size:
                wrong[record["file_name"]] = mismatch(header.size, size)
        return wrong

    def inspection(self, cache: Path, decode: bool = False) -> Inspection:
        """Check the image files by their headers. With `decode`, each is also decoded once."""
        return inspect_files(self.images, [record["file_name"] for record in self.records], cache, decode)

    def _outside(self) -> list[str]:
        """Return doubts if many labelled keypoints or boxes lie outside their images. A sample of the people is checked."""
        people = [(r, a) for r in self.records for a in r["annotations"] if a.get("keypoints") and not a.get("iscrowd")]
        people = people[:: max(len(people) // _LOOKED_AT, 1)]
        if not people:
            return []
        size = np.array([(record["width"], record["height"]) for record, _ in people])[:, None]
        points = np.array([a["keypoints"] for _, a in people], np.float64).reshape(len(people), -1, 3)
        away = ((points[..., :2] < -1) | (points[..., :2] > size)).any(axis=-1)
        away = np.asarray(away)[points[..., 2] > 0]
        boxes = np.array([a["bbox"] for _, a in people], np.float64)
        beyond = (boxes[:, :2] + boxes[:, 2:] / 2 > size[:, 0]).any(axis=1)
        said = []
        if away.size and away.mean() > _MANY_OUTSIDE:
            said.append(
                f"{100 * away.mean():.0f} % of the labelled keypoints lie outside their images; check that data.*.images "
                "belongs to data.*.annotations, that the images have the annotated size, and that points are x before y"
            )
        if beyond.mean() > _MANY_OUTSIDE:
            said.append(
                f"{100 * beyond.mean():.0f} % of the boxes have their centre outside their images: bbox is x, y, width and "
                "height, not two corners"
            )
        return said

    def doubts(self, cache: Path) -> list[str]:
        """Return warnings about annotations and images that may distort the metrics. Each names the cause and the fix.

        Args:
            cache: folder that keeps digests of images.
        """
        if self.truth is None:
            return []
        found, category = [], self.truth.category
        if self.truth.left_out:
            found.append(
                f"{self.truth.left_out} annotations of other categories than {category} are left out; data.category chooses"
            )
        if self.truth.boxed:
            found.append(
                f"{self.truth.boxed} people have no box, or an empty one: it is made of their labelled keypoints, so it is "
                "smaller than the person; give bbox for top-down networks"
            )
        rows = np.array([row for own in self._rows[1] for row in own], np.intp)
        counted, points = self.truth.labelled[rows], self.truth.visibility[rows].any(axis=1)
        for wrong, said in (
            (points & (counted == 0), "num_keypoints is 0 for {} people with labelled keypoints: COCO's rules ignore them"),
            (
                ~points & (counted > 0),
                "num_keypoints is above 0 for {} people without labelled keypoints: all of them are missed",
            ),
        ):
            if number := int((wrong & ~self.truth.crowd[rows]).sum()):
                found.append(f"{said.format(number)}; correct or drop num_keypoints")
        found += self._outside()
        headers = self.inspection(cache).headers
        hidden = 0  # images with an orientation that does not change their size
        for record in self.records:
            header = headers.get(record["file_name"])
            hidden += header is not None and header.orientation != 1 and header.shown == header.size
        if hidden and self.upright is None:
            found.append(
                f"EXIF turns or mirrors {hidden} images in a way that their size does not tell; they are read as "
                "stored; pass data.upright=true if they were annotated as viewers show them, else data.upright=false"
            )
        return found


def _medians(values: NDArray[np.float64], group: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """Return the median of each group's values, or 0 for an empty group. `group` must be sorted."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ordered = np.append(values[order], 0.0)
    low, high = (starts + (sizes - 1) // 2, starts + sizes // 2)
    return np.where(sizes > 0, (ordered[np.where(sizes > 0, low, 0)] + ordered[np.where(sizes > 0, high, 0)]) / 2, 0.0)


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
    """

    train: Labelled
    val: Labelled
    unlabelled: Unlabelled | None = None
    splits: str | None = None
    cache: str = "outputs/cache"
    strict: bool = True
    category: int | str | None = None
    upright: bool | None = None
    dropped: dict[str, list[str]] = field(default_factory=dict, compare=False, init=False)
    _kept: dict[str, Coco] = field(default_factory=dict, compare=False, repr=False, init=False)

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
            UserError: a folder or file is missing or wrong, or the keypoints have no sigmas.
        """
        train, val = (self._source(paths, role) for paths, role in ((self.train, "train"), (self.val, "val")))
        loose = None
        if self.unlabelled and self.unlabelled.get("images"):
            loose = self._source(self.unlabelled, "unlabelled")
        for part in (train, val):
            if part.truth is not None and not part.labels.sigmas:
                raise UserError(
                    f"{part.annotations}: {len(part.labels.names)} keypoints but 0 sigmas: OKS needs one for each; add "
                    f'"sigmas": [...] to the category {part.truth.category}'
                )
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
            unknown = [plain(name) for name in others if not os.path.exists(loose.images / name)]  # noqa: PTH110 - names of any length
            if unknown:
                raise UserError(
                    f"{self.splits}: train names {len(unknown)} images that are neither in {train.annotations} nor in "
                    f"{loose.images}: {', '.join(unknown[:5])}; correct the names, or restore the images"
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
        return Coco(images, file, category=self.category, upright=self.upright)

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
            raise UserError(f"{part.annotations or part.images}: no images for the split '{split}'")
        if part.annotations is not None and not part.table()["persons"].any():
            others, truth = "", part.truth
            if truth is not None and truth.left_out:
                others = f" ({truth.left_out} annotations of other categories than {truth.category}: see data.category)"
            raise UserError(
                f"{part.annotations}: no person with keypoints in the split '{split}'{others}; label some, or give others"
            )
        self._check_disjoint()
        return part

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
        """Return a SHA-256 over the names, contents and labels of some splits."""
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
