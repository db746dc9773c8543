"""Training images and labels as a few arrays on disk: read once with the data set's own code, then by rows."""

import hashlib
import inspect
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

from pipeline import datasets
from pipeline.contracts import Objective, Splits
from posepress import skeletons
from posepress.contracts import Dataset
from posepress.errors import UserError
from posepress.spec import Resolution, Skeleton

_SPARE = 1.05  # free disk space wanted, relative to the shard


@dataclass(frozen=True)
class Shard:
    """Images and labels of some splits, mapped from disk.

    Attributes:
        images: uint8 [N, H, W, 3], RGB, each image in the upper left corner, the rest padding.
        sizes: of the image in that corner, int32 [N, 2], height and width.
        labels: what the objective keeps of each image, [N, ...] by name; "boxes" [N, P, 4] are of labelled people, x, y,
            width and height, 0 where there are fewer, "labelled" [N] tells images without labels.
        folder: where they lie; another process maps them itself.
    """

    images: NDArray[np.uint8]
    sizes: NDArray[np.int32]
    labels: Mapping[str, NDArray[Any]]
    folder: Path | None = None

    def __reduce__(self) -> Any:
        """How it travels to other processes: as its folder, if it has one."""
        if self.folder is not None:
            return Shard.open, (self.folder,)
        return Shard, (self.images, self.sizes, dict(self.labels))

    def __len__(self) -> int:
        return len(self.images)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a training reads by rows: "image" and the labels."""
        return {"image": self.images, **self.labels}

    @property
    def bytes(self) -> int:
        """How much memory all of it takes."""
        return sum(values.nbytes for values in self.arrays.values())

    def first(self, count: int) -> "Shard":
        """At most so many images, spread evenly."""
        rows = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Shard(self.images[rows], self.sizes[rows], {name: values[rows] for name, values in self.labels.items()})

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Map a finished shard."""
        arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
        return cls(arrays.pop("images"), arrays.pop("sizes"), arrays, folder)


def shard(
    data: Splits, splits: Sequence[str], objective: Objective[Any], resolution: Resolution, zoom: float, pad: int, cache: Path
) -> Shard:
    """The images of some splits, from the cache or written there.

    Args:
        data: the data set.
        splits: of it, in order; images of "unlabelled" have no labels.
        objective: says what is kept of the labels.
        resolution: of the network's input.
        zoom: the greatest enlargement of views; images are kept no larger than it can use.
        pad: grey level beside the images.
        cache: folder of shards.

    Raises:
        UserError: the disk has no room for it, or an image cannot be read.
    """
    readers = sorted(Path(datasets.__file__).parent.glob("*.py"))
    sources = [str(inspect.getsourcefile(part)) for part in (Shard, type(objective))]
    code = [Path(str(file)).read_text() for file in (*sources, skeletons.__file__, *readers)]
    key = [code, data.digest(splits), list(splits), str(resolution), zoom, pad]
    folder = cache / "shards" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                parts = [data.open(split) for split in splits]
                _refuse_others(parts)
                _write(parts, objective, resolution, zoom, pad, unfinished)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            unfinished.rename(folder)
    return Shard.open(folder)


def _refuse_others(parts: Sequence[Any]) -> None:
    """Refuse to train on other keypoints than COCO's.

    Raises:
        UserError: the labels of some images are of others.
    """
    for part in parts:
        labels = getattr(part, "labels", None)
        if isinstance(labels, Skeleton) and labels.names != skeletons.COCO_17.names:
            few = ", ".join(labels.names[:4]) + (", ..." if len(labels.names) > 4 else "")
            raise UserError(
                f"{getattr(part, 'annotations', 'data')}: training knows COCO's 17 keypoints alone, and this category has "
                f"{len(labels.names)} others ({few}); give labels of COCO's keypoints, or train elsewhere and adopt the "
                "network with model=onnx"
            )


def _write(
    parts: Sequence[Dataset[Any]], objective: Objective[Any], resolution: Resolution, zoom: float, pad: int, folder: Path
) -> None:
    import cv2

    from pipeline.progress import track

    samples = [(part, n) for part in parts for n in range(len(part))]
    sizes = np.array([_stored(part[n].size, resolution, zoom) for part, n in samples], np.int32)
    height, width = (int(side) for side in sizes.max(axis=0))
    count = len(samples)
    wanted, free = count * height * width * 3, shutil.disk_usage(folder).free
    if wanted * _SPARE > free:
        raise UserError(
            f"{folder.parent}: {count} training images of {height}x{width} take {wanted / 1e9:.1f} GB there, and "
            f"{free / 1e9:.1f} GB are free; free some, choose another folder with outputs=DIR, or a smaller training_resolution"
        )
    images = _mapped(folder / "images.npy", np.dtype(np.uint8), (count, height, width, 3))
    most = max((objective.people(part[n].truth) for part, n in samples), default=0)

    def write(row: int) -> dict[str, NDArray[Any]]:
        part, n = samples[row]
        sample, (h, w) = part[n], sizes[row]
        image = sample.read()
        if image.shape[:2] != (h, w):
            image = np.asarray(cv2.resize(image, (int(w), int(h)), interpolation=cv2.INTER_AREA), np.uint8)
        images[row] = pad
        images[row, :h, :w] = image
        kept: dict[str, NDArray[Any]] = objective.labels(
            sample.truth, sample.size, Resolution(int(h), int(w)), Resolution(height, width), most
        )
        return kept | {"labelled": np.array(sample.truth is not None)}

    with ThreadPoolExecutor() as pool:
        rows = track(pool.map(write, range(count)), "reading training images", count, "images")
        first = next(iter(rows))
        arrays = {name: _mapped(folder / f"{name}.npy", value.dtype, (count, *value.shape)) for name, value in first.items()}
        for row, kept in enumerate((first, *rows)):
            for name, value in kept.items():
                arrays[name][row] = value
    np.save(folder / "sizes.npy", sizes)
    images.flush()


def _mapped(file: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array on disk, to be written through memory.

    Raises:
        UserError: the disk has no room for it. Writing into a hole of a full disk would end the process instead.
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


def _stored(size: Resolution, resolution: Resolution, zoom: float) -> tuple[int, int]:
    """The size an image is kept at: no larger than the largest view of it shows."""
    scale = min(1.0, zoom * min(resolution.height / size.height, resolution.width / size.width))
    return max(1, round(size.height * scale)), max(1, round(size.width * scale))
