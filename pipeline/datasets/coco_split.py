"""The images of one split in COCO's format, with their labels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.truth import People
from pipeline.contracts import ImageRecord
from pipeline.datasets.annotations import Annotations, load_annotations, people, unwatched
from pipeline.datasets.images import Inspection, inspect_files, mismatch, read_sized, turned
from pipeline.datasets.outside import without_outside
from pipeline.progress import say
from posepress.errors import UserError
from posepress.images import IMAGE_TYPES, read_image, shown_size
from posepress.labels import SIGMA, Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes, Sample
from posepress.skeletons import COCO_17, completed

# Most people that are checked, and the share of their keypoints or boxes outside images above which a doubt is reported.
_LOOKED_AT, _MANY_OUTSIDE = 4000, 0.2


@dataclass(frozen=True)
class Coco:
    """Images of one split with COCO keypoint labels, or without labels.

    Attributes:
        root: folder of the images.
        annotations: the annotation file; None for unlabelled images.
        names: names of the files to use, in this order; None uses all.
        remedy: advice in the message about missing or damaged images.
        category: name or id of the category to read; None chooses the one with keypoints, or person.
        upright: whether the annotations belong to the images after the rotation that EXIF's orientation asks for; None
            decides it by the size of each image.
        skeleton: gives mirror pairs to keypoints of the same names, in any order, and limbs where the category has none. It
            gives its sigmas where the category has none, if both have the same names.
        boxes: boxes by image id, from a detector or a file; an image without an entry has none. None takes the annotations'.
    """

    root: Path
    annotations: Path | None = None
    names: tuple[str, ...] | None = None
    remedy: str = "restore them, or pass strict=false to skip and count them"
    category: int | str | None = None
    upright: bool | None = None
    boxes: Mapping[str, Boxes] | None = field(default=None, repr=False, compare=False)
    skeleton: Skeleton | None = None

    @classmethod
    def folder(cls, images: str) -> "Coco":
        """Return the images of a plain folder, without labels.

        Raises:
            UserError: the folder does not exist or holds no image.
        """
        made = cls(Path(images), remedy="restore them or take them out of image_dir")
        if not made.root.is_dir() or not len(made):
            what = "no image in this folder" if made.root.is_dir() else "no such folder"
            raise UserError(f"image_dir={images}: {what}; give a folder that holds images ({', '.join(IMAGE_TYPES)})")
        return made

    def only(self, names: Sequence[str]) -> "Coco":
        """Return a data set with some of the images. The annotation file is not read again."""
        part = replace(self, names=tuple(names))
        if self.annotations is not None:
            part.__dict__["_read"] = self._read
        return part

    @cached_property
    def labels(self) -> Skeleton:
        """The skeleton of the keypoints. It is COCO's unless the file's category names other keypoints."""
        own = COCO_17 if self.truth is None else self.truth.category.labels
        return own if self.skeleton is None else completed(own, self.skeleton)

    @property
    def truth(self) -> Annotations | None:
        """The whole annotation file, without people outside of their images; None for unlabelled images."""
        return None if self._read is None else self._read[0]

    @cached_property
    def _read(self) -> tuple[Annotations, str] | None:
        """The annotation file, and a sentence about boxes outside of their images, which is empty if there are none."""
        if self.annotations is None:
            return None
        with unwatched():
            truth, sentence = without_outside(load_annotations(self.annotations, self.category))
        if sentence:
            _say_once(f"{self.annotations}: {sentence}")
        return truth, sentence

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
            names = tuple(file.name for file in sorted(self.root.iterdir()) if file.suffix.lower() in IMAGE_TYPES)
        names = tuple(dict.fromkeys(names))
        ids = [Path(name).stem.lstrip("0") or "0" for name in names]
        if len(set(ids)) < len(ids):
            ids = list(names)  # 1.jpg and 01.jpg, or equal names in two folders, have equal ids
        return [{"id": i, "file_name": name, "annotations": None} for i, name in zip(ids, names, strict=True)]

    @cached_property
    def images(self) -> list[ImageRecord]:
        """The images in the order of `records`."""
        return [
            ImageRecord(
                str(record["id"]),
                record["file_name"],
                Resolution(record["height"], record["width"]) if "height" in record else None,
                str(record.get("flickr_url", "")),
            )
            for record in self.records
        ]

    @property
    def labelled(self) -> bool:
        """Whether there is an annotation file."""
        return self.annotations is not None

    @property
    def subject(self) -> str:
        """The labelled category's name."""
        return "" if self.truth is None else str(self.truth.category)

    def named(self, image: str) -> dict[str, Any]:
        """What COCO's results call an image: its id as the annotation file writes it, and the category's id."""
        category = None if self.truth is None else self.truth.category.id
        return {"image_id": self._given_ids.get(image, image), "category_id": 1 if category is None else category}

    @cached_property
    def _given_ids(self) -> dict[str, int | str]:
        return {str(record["id"]): record["id"] for record in self.records}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample[People]:
        record = self.records[index]
        file = self.root / record["file_name"]
        truth = None if record["annotations"] is None else self._people(record["annotations"])
        if "height" in record:
            size = Resolution(record["height"], record["width"])
            read: Callable[[], NDArray[np.uint8]] = partial(read_sized, file, size, self.upright)
        else:
            size, read = shown_size(file), partial(read_image, file, upright=True)
        return Sample(str(record["id"]), size, read, truth, self._boxes(str(record["id"]), truth))

    def _boxes(self, image: str, truth: People | None) -> Boxes | None:
        if self.boxes is not None:
            return self.boxes.get(image, Boxes(np.zeros((0, 4)), np.zeros(0)))
        return None if truth is None else Boxes(truth.boxes[~truth.crowd])

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
                f"{self.root}: {len(found.wrong)} images are missing or not whole, of {len(self.records)}: {listed}{more}; "
                f"{self.remedy}"
            )
        for name, what in self.misfits(found).items():
            raise UserError(f"{self.root / name}: {what}; or pass strict=false to skip and count it")
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
        return inspect_files(self.root, [record["file_name"] for record in self.records], cache, decode)

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
        if not self.labels.sigmas:
            found.append(
                f"the category {category} has no sigmas, so OKS takes {SIGMA} for each of its {len(self.labels.names)} "
                'keypoints; add "sigmas": [...] to the category, or give skeleton=FILE.json with them'
            )
        if self.truth.left_out:
            found.append(
                f"{self.truth.left_out} annotations of other categories than {category} are left out; data.category chooses"
            )
        if self.truth.boxed:
            found.append(
                f"{self.truth.boxed} people have no box, or an empty one: it is made of their labelled keypoints, so it is "
                "smaller than the person; give bbox for top-down networks"
            )
        if self._read is not None and self._read[1]:
            found.append(self._read[1])
        if self.boxes is not None:
            empty = sum(image.id not in self.boxes or not len(self.boxes[image.id].xywh) for image in self.images)
            if empty:
                found.append(
                    f"no box for {empty} of {len(self)} images: their people count as missed; lower "
                    "detector.score_threshold, or complete data.boxes"
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


@cache
def _say_once(text: str) -> None:
    say(text, "yellow")


def _medians(values: NDArray[np.float64], group: NDArray[np.intp], count: int) -> NDArray[np.float64]:
    """Return the median of each group's values, or 0 for an empty group. `group` must be sorted."""
    order = np.lexsort((values, group))
    sizes = np.bincount(group, minlength=count)
    starts = np.cumsum(sizes) - sizes
    ordered = np.append(values[order], 0.0)
    low, high = (starts + (sizes - 1) // 2, starts + sizes // 2)
    return np.where(sizes > 0, (ordered[np.where(sizes > 0, low, 0)] + ordered[np.where(sizes > 0, high, 0)]) / 2, 0.0)
