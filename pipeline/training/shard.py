"""Training images and labels as a few arrays on disk. The data set's code reads the images once; training reads rows."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from pipeline.contracts import Objective, Split, Splits, Stored
from pipeline.results.fingerprint import closure
from pipeline.training.augment import Augmentation
from posepress.contracts import Framing
from posepress.errors import UserError
from posepress.geometry import View
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.results import Boxes, Sample

_VIEWS = ("rows", "places", "bases", "cropped", "halves")  # arrays with an entry for each base view
_LABEL = "label."  # beginning of the names of files with labels
_RESERVED = ("image", "row", "matrix", "tone", "flipped", "base", "labelled")  # other arrays of a batch
_HALF = 3  # least number of labelled keypoints of half a person
_SPARE = 1.05  # required free disk space, relative to the size of the shard


@dataclass(frozen=True)
class Shard:
    """Images and labels of some splits, mapped from disk, and the views that training starts from.

    Attributes:
        images: uint8 [N, H, W, 3], RGB, each image in the upper left corner, the rest padding.
        labels: what the objective keeps of each image, [N, ...] by name; "anchors" [N, P, 4] are boxes (x, y, width and height,
            0 where there are fewer), and "labelled" [N] is false for images without labels.
        rows: the image of each base view, int64 [M].
        places: the number of each base view in its image, int64 [M].
        bases: from stored image to base view, float64 [M, 2, 3]; `Framing.bases` makes them.
        cropped: whether a base view shows a part of its image, bool [M]; such views ignore the anchors.
        halves: from stored image to the views of the upper and the lower half of the person that a base view shows, float64
            [M, 2, 2, 3]; NaN where there are too few labelled keypoints.
        folder: folder of the arrays, which other processes map themselves; None if they are in memory alone.
    """

    images: NDArray[np.uint8]
    labels: Mapping[str, NDArray[Any]]
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    bases: NDArray[np.float64]
    cropped: NDArray[np.bool_]
    halves: NDArray[np.float64]
    folder: Path | None = None

    def __reduce__(self) -> Any:
        """What is sent to other processes: the folder, if there is one, otherwise the arrays."""
        if self.folder is not None:
            return Shard.open, (self.folder,)
        return Shard, (self.images, dict(self.labels), *(getattr(self, name) for name in _VIEWS))

    def __len__(self) -> int:
        """Number of base views."""
        return len(self.rows)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that a training reads by rows: "image" and the labels."""
        return {"image": self.images, **self.labels}

    @property
    def bytes(self) -> int:
        """Size of all arrays."""
        return sum(values.nbytes for values in self.arrays.values())

    def first(self, count: int) -> "Shard":
        """At most `count` base views, evenly spaced, with their images."""
        items = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        kept, rows = np.unique(self.rows[items], return_inverse=True)
        labels = {name: values[kept] for name, values in self.labels.items()}
        views = [getattr(self, name)[items] for name in _VIEWS[1:]]
        return Shard(self.images[kept], labels, rows, *views)

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Map a finished shard."""
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        views: dict[str, Any] = {name: arrays.pop(name) for name in _VIEWS}
        images = arrays.pop("images")
        return cls(images, {name.removeprefix(_LABEL): values for name, values in arrays.items()}, **views, folder=folder)


@dataclass(frozen=True)
class Material:
    """What networks of a family are trained on, before any network is known.

    Attributes:
        data: the data set.
        objective: objective that chooses the labels to keep.
        framing: gives the base views of an image.
        resolution: size of the network's input.
        augment: augmentation of the base views; stored images are no larger than its largest magnification needs.
        cache: folder of shards.
    """

    data: Splits
    objective: Objective[Any]
    framing: Framing
    resolution: Resolution
    augment: Augmentation
    cache: Path

    def shard(self, splits: Sequence[str], pad: int) -> Shard:
        """The images of some splits, from the cache or written there.

        Args:
            splits: splits in order; the images of "unlabelled" have no labels.
            pad: grey level beside the images.

        Raises:
            UserError: the disk has not enough free space, an image cannot be read, or splits have different labels.
        """
        folder = self.cache / "shards" / self._key(splits, pad)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                unfinished = folder.with_suffix(".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    self._write([self.data.open(split) for split in splits], pad, self.source(splits), unfinished)
                except BaseException:
                    shutil.rmtree(unfinished, ignore_errors=True)
                    raise
                unfinished.rename(folder)
        return Shard.open(folder)

    def source(self, splits: Sequence[str]) -> Skeleton | Palette:
        """The labels of some splits.

        Raises:
            UserError: two splits have labels of different names.
        """
        found: dict[str, Skeleton | Palette] = {}
        for split in splits:
            part = self.data.open(split)
            if part.labelled:
                found[split] = part.labels
        if not found:
            raise UserError(f"no labels in {', '.join(splits)}; training needs images with labels")
        first = next(iter(found))
        for split, labels in found.items():
            if labels.names != found[first].names:
                raise UserError(
                    f"the labels of '{split}' ({', '.join(labels.names[:4])}, ...) are not those of '{first}' "
                    f"({', '.join(found[first].names[:4])}, ...); choose one category with data.category"
                )
        return found[first]

    def _key(self, splits: Sequence[str], pad: int) -> str:
        parts = (type(self), type(self.objective), type(self.framing), type(self.data))
        code = [file.read_text() for file in closure(part.__module__ for part in parts)]
        options = [repr(self.framing), repr(self.objective), str(self.resolution), self._zoom, pad]
        key = [code, self.data.digest(splits), list(splits), options]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def _write(self, parts: Sequence[Split[Any]], pad: int, source: Skeleton | Palette, folder: Path) -> None:
        import cv2

        from pipeline.progress import track

        samples = [(part, n) for part in parts for n in range(len(part))]
        described = [self._described(part[n]) for part, n in samples]
        sizes, most = np.array([size for size, _ in described], np.int32), max(capacity for _, capacity in described)
        height, width = (int(side) for side in sizes.max(axis=0))
        count = len(samples)
        _check_space(folder, count, height, width)
        images = _mapped(folder / "images.npy", np.dtype(np.uint8), (count, height, width, 3))

        def write(row: int) -> tuple[dict[str, NDArray[Any]], list[tuple[int, View, NDArray[np.float64]]]]:
            part, n = samples[row]
            sample, (h, w) = part[n], sizes[row].tolist()
            image = sample.read()
            if image.shape[:2] != (h, w):
                image = np.asarray(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA), np.uint8)
            images[row] = pad
            images[row, :h, :w] = image
            stored = Stored(sample.size, Resolution(h, w), Resolution(height, width), source)
            kept = self.objective.labels(sample.truth, stored, most)
            every = enumerate(self._bases(sample, stored.size))
            bases = [(place, view) for place, view in every if _taught(sample, view, place, kept)]
            return kept, [(place, view, self._halves(view, place, kept, stored.size)) for place, view in bases]

        views: list[tuple[int, int, View, NDArray[np.float64]]] = []
        with ThreadPoolExecutor() as pool:
            rows = track(pool.map(write, range(count)), "reading training images", count, "images")
            arrays: dict[str, NDArray[Any]] = {}
            for row, (kept, bases) in enumerate(rows):
                for name, value in kept.items():
                    if name in _RESERVED:
                        raise UserError(f"{type(self.objective).__name__}: a label cannot be called '{name}'; rename it")
                    if name not in arrays:
                        arrays[name] = _mapped(folder / f"{_LABEL}{name}.npy", value.dtype, (count, *value.shape))
                    arrays[name][row] = value
                views += [(row, place, view, both) for place, view, both in bases]
        if not views:
            raise UserError("no view to train on: these images show no instance that the framing cuts out; give other images")
        for name, values in (
            ("rows", np.array([row for row, _, _, _ in views], np.int64)),
            ("places", np.array([place for _, place, _, _ in views], np.int64)),
            ("bases", np.array([view.matrix for _, _, view, _ in views], np.float64)),
            ("cropped", np.array([view.box is not None for _, _, view, _ in views])),
            ("halves", np.array([both for _, _, _, both in views], np.float64)),
        ):
            np.save(folder / f"{name}.npy", values)
        labelled = np.array([part.labelled for part in parts for _ in range(len(part))])
        np.save(folder / f"{_LABEL}labelled.npy", labelled)
        images.flush()

    def _halves(self, view: View, place: int, kept: Mapping[str, NDArray[Any]], size: Resolution) -> NDArray[np.float64]:
        """Matrices [2, 2, 3] of the views of the upper and lower half of a cropped person; NaN where there are none."""
        made = np.full((2, 2, 3), np.nan)
        own = np.flatnonzero(kept["instances"] == place) if "instances" in kept else np.zeros(0, np.intp)
        if view.box is None or not len(own):
            return made
        points = kept["keypoints"][own[0]]
        points = points[points[:, 2] > 0, :2].astype(np.float64)
        if len(points) < 2 * _HALF:
            return made
        order = np.argsort(points[:, 1], kind="stable")
        for n, half in enumerate((points[order[: len(order) // 2]], points[order[len(order) // 2 :]])):
            low, side = half.min(axis=0), np.maximum(np.ptp(half, axis=0), 1.0)
            (seen,) = self.framing.bases(size, self.resolution, Boxes(np.concatenate((low, side))[None]))
            made[n] = seen.matrix
        return made

    @property
    def _zoom(self) -> float:
        return max(float(self.augment.scale[1]), 1.0)

    def _described(self, sample: Sample[Any]) -> tuple[tuple[int, int], int]:
        """The size at which an image is stored, which is no larger than the views need, and its labelled instances."""
        largest = max((float(view.matrix[0, 0]) for view in self._bases(sample, sample.size)), default=0.0)
        scale = min(1.0, self._zoom * largest)
        size = max(1, round(sample.size.height * scale)), max(1, round(sample.size.width * scale))
        return size, 0 if sample.truth is None else self.objective.capacity(sample.truth)

    def _bases(self, sample: Sample[Any], stored: Resolution) -> list[View]:
        """The base views of an image that is stored at a size.

        Raises:
            UserError: the framing needs boxes, and the image has none.
        """
        scale = np.array([stored.width / sample.size.width, stored.height / sample.size.height])
        boxes = None if sample.boxes is None else Boxes(sample.boxes.xywh * np.tile(scale, 2), sample.boxes.scores)
        try:
            return self.framing.bases(stored, self.resolution, boxes)
        except ValueError as error:
            raise UserError(f"image {sample.id}: {error}") from error


def _taught(sample: Sample[Any], view: View, place: int, kept: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a base view has something to learn: a crop of a person without labelled keypoints has nothing."""
    labelled = view.box is None or sample.truth is None or "instances" not in kept
    return labelled or bool((kept["instances"] == place).any())


def _check_space(folder: Path, count: int, height: int, width: int) -> None:
    """Make sure that the disk has space for the images of a shard.

    Raises:
        UserError: it has not.
    """
    wanted, free = count * height * width * 3, shutil.disk_usage(folder).free
    if wanted * _SPARE > free:
        raise UserError(
            f"{folder.parent}: {count} training images of {height}x{width} take {wanted / 1e9:.1f} GB there, and "
            f"{free / 1e9:.1f} GB are free; free some, choose another folder with outputs=DIR, or a smaller training_resolution"
        )


def _mapped(file: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create an array on disk, and map it for writing.

    The space is reserved first, because writing into a hole of a full disk would kill the process.

    Raises:
        UserError: the disk has no room for the array.
    """
    made = np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)
    size = file.stat().st_size
    try:
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
    except OSError as error:
        raise UserError(
            f"{file.parent.parent}: no room for {size / 1e9:.1f} GB of training images there ({error.strerror}); free some, "
            "choose another folder with outputs=DIR, or a smaller training_resolution"
        ) from error
    return made
