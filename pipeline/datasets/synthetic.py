"""A generated data set of people, or of other things, in COCO's format, drawn from a seed with numpy alone.

A person is a skeleton in three dimensions that is posed by random joint angles and then projected. Its body is drawn as
tapered capsules, distant ones first. The owner of each pixel is recorded, so that masks, areas, boxes and the visibility of
keypoints match the image.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from pipeline.contracts import Detector
from pipeline.datasets.coco import SPLITS, CocoSplits
from pipeline.datasets.coco_split import Coco
from pipeline.probing import processes
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.resolution import Resolution


class Drawing(Protocol):
    """What generated images show, and how difficult they are: a frozen data class whose fields are options.

    Attributes:
        size: size of the images, in pixels.
        category: name of what is labelled.
        skeleton: its keypoints.
        version: raised with every change of a pixel or a label.
    """

    @property
    def size(self) -> Resolution: ...  # noqa: D102

    @property
    def version(self) -> int | str: ...  # noqa: D102

    category: ClassVar[str]
    skeleton: ClassVar[Skeleton]

    def draw(self, seed: Sequence[int]) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
        """An image uint8 [H, W, 3], RGB, and its COCO annotation records without ids; equal seeds give equal images."""
        ...


def _name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _write(job: tuple[Drawing, Path, int, list[int], list[int]]) -> list[tuple[int, list[dict[str, Any]]]]:
    import cv2

    preset, folder, split, ids, seeds = job
    found = []
    for image_id in ids:
        image, annotations = preset.draw([*seeds, split, image_id])
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (folder / _name(image_id)).write_bytes(jpeg.tobytes())
        found.append((image_id, annotations))
    return found


@dataclass(frozen=True)
class Synthetic:
    """A generated data set. It is written once in COCO's layout and then read as any other data set.

    Attributes:
        preset: what the images show, and their difficulty.
        counts: number of images of each split: train, unlabelled, tune, agreement, validation.
        seed: seed of the whole data set.
        cache: folder that holds the data set, in a subfolder named after `identity`.
        detector: finds the boxes of images that are not trained on; None takes the annotations'.
    """

    preset: Drawing
    counts: dict[str, Annotated[int, Interval(ge=1, le=10**7)]]
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    cache: str = "outputs/cache"
    detector: Detector | None = None

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            UserError: a split is unknown or empty.
        """
        wrong = [s for s in self.counts if s not in SPLITS] or [s for s in SPLITS if self.counts.get(s, 0) < 1]
        if wrong:
            raise UserError(
                f"data.counts.{wrong[0]}={self.counts.get(wrong[0])}: give at least one image to each of {', '.join(SPLITS)}"
            )

    @property
    def identity(self) -> str:
        """Digest of all values that determine the pixels and labels."""
        what = {
            "version": self.preset.version,
            "preset": asdict(self.preset),  # type: ignore[call-overload]
            "counts": self.counts,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """The folder of the data set."""
        return Path(self.cache) / "synthetic" / f"v{self.preset.version}-{self.identity[:12]}"

    def digest(self, splits: Sequence[str]) -> str:
        """Return a digest of some splits. It depends on the generator's version and options only, so no file need exist."""
        by = self.detector.identity if self.detector is not None and set(splits) - {"train"} else ""
        return hashlib.sha256(f"{self.identity} {' '.join(splits)}{by}".encode()).hexdigest()

    @cached_property
    def _splits(self) -> CocoSplits:
        self._make()
        root = self.folder
        return CocoSplits(
            {"images": root / "images/train", "annotations": root / "annotations/train.json"},
            {"images": root / "images/validation", "annotations": root / "annotations/validation.json"},
            {"images": root / "images/unlabelled"},
            str(root / "splits.json"),
            self.cache,
            detector=self.detector,
        )

    def __contains__(self, split: str) -> bool:
        """Whether the split has images."""
        return self.counts.get(split, 0) > 0

    def open(self, split: str) -> Coco:
        """Return the images of a split. The data set is written first if it does not exist."""
        return self._splits.open(split)

    def _jobs(self, folder: Path) -> Iterator[tuple[Drawing, Path, int, list[int], list[int]]]:
        for index, split in enumerate(SPLITS):
            first = index * 10_000_000 + 1  # the images of a split must not depend on the sizes of other splits
            ids = list(range(first, first + self.counts[split]))
            where = folder / "images" / {"tune": "train", "agreement": "unlabelled"}.get(split, split)
            where.mkdir(parents=True, exist_ok=True)
            for at in range(0, len(ids), 32):
                yield self.preset, where, index, ids[at : at + 32], [self.seed]

    def _make(self) -> None:
        from filelock import FileLock

        from pipeline.progress import Progress, say

        if (self.folder / "splits.json").exists():
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock")):
            if (self.folder / "splits.json").exists():
                return
            unfinished = self.folder.with_suffix(".tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            count = sum(self.counts.values())
            say(f"drawing {count:,} images of {self.preset.size} once, into {self.folder}; data=coco uses your own images")
            jobs = list(self._jobs(unfinished))
            split_records: dict[int, list[tuple[int, list[dict[str, Any]]]]] = {}
            workers = min(os.cpu_count() or 1, len(jobs))
            with processes.pool(workers) as pool:
                done = zip(jobs, pool.map(_write, jobs), strict=True)
                with Progress("drawing", sum(self.counts.values()), "images") as progress:
                    for job, records in done:
                        split_records.setdefault(job[2], []).extend(records)
                        progress.update(sum(map(len, split_records.values())))
            self._write_annotations(unfinished, split_records)
            unfinished.rename(self.folder)

    def _write_annotations(self, root: Path, records: dict[int, list[tuple[int, list[dict[str, Any]]]]]) -> None:
        skeleton = self.preset.skeleton
        size = {"height": self.preset.size.height, "width": self.preset.size.width}
        (root / "annotations").mkdir(exist_ok=True)
        for file, splits in (("train", ("train", "tune")), ("validation", ("validation",))):
            rows = [row for split in splits for row in records[SPLITS.index(split)]]
            content = {
                "info": {"description": f"Posepress, {self.preset.category}, version {self.preset.version}, {self.identity}"},
                "categories": [
                    {
                        "id": 1,
                        "name": self.preset.category,
                        "supercategory": self.preset.category,
                        "keypoints": list(skeleton.names),
                        "skeleton": [[a + 1, b + 1] for a, b in skeleton.limbs],
                        "sigmas": list(skeleton.sigmas),
                    }
                ],
                "images": [{"id": i, "file_name": _name(i), **size} for i, _ in rows],
                "annotations": [
                    {"id": 1000 * i + n, "image_id": i, **annotation}
                    for i, annotations in rows
                    for n, annotation in enumerate(annotations)
                ],
            }
            (root / "annotations" / f"{file}.json").write_text(json.dumps(content))
        named = {
            split: {"synthetic": [_name(i) for i, _ in records[SPLITS.index(split)]]}
            for split in ("train", "tune", "agreement", "validation")
        }
        named["train"]["unlabelled"] = [_name(i) for i, _ in records[SPLITS.index("unlabelled")]]
        (root / "splits.json").write_text(json.dumps(named))
