"""What is found in an image, and its file format."""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.spec import Resolution

T = TypeVar("T")


@dataclass(frozen=True)
class Poses:
    """People found in an image.

    Attributes:
        keypoints: float32 [N, K, 3]: x and y in image pixels, and the keypoint's own score; (0, 0, 0) where none was found.
            Like the scores, float64 where they come from a file, whose order must not suffer from rounding.
        scores: float32 [N], the greater the surer.
        guessed: bool [N, K], keypoints that were completed rather than found; None where nothing was.
        features: float32 [N, F], what a score can be fitted to; the first is the plain score.
        dropped_peaks: peaks of this image that had no room.
        not_finite: the network returned NaN or infinity.
    """

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    guessed: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None
    dropped_peaks: int = 0
    not_finite: bool = False

    def as_found(self) -> "Poses":
        """The same people without guesses, and with their plain scores."""
        keypoints = self.keypoints if self.guessed is None else np.where(self.guessed[..., None], 0, self.keypoints)
        scores = self.scores if self.features is None else self.features[:, 0]
        return replace(self, keypoints=keypoints, scores=scores, guessed=None)


@dataclass(frozen=True)
class SemanticMask:
    """Segmentation of an image.

    Attributes:
        classes: uint8 [H, W], index of the class of each pixel.
    """

    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One image and what is known of it.

    Attributes:
        id: unique in its data set; COCO's image id as text.
        size: the image's size.
        read: reads the pixels, uint8 [H, W, 3], RGB.
        truth: the labels; None for an unlabelled image.
        boxes: float64 [N, 4], people's boxes for top-down networks.
    """

    id: str
    size: Resolution
    read: Callable[[], NDArray[np.uint8]]
    truth: T | None
    boxes: NDArray[np.float64] | None = None


_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (Poses, SemanticMask)}
DAMAGED = (  # what numpy and zipfile raise over bytes that are none of theirs
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, ArithmeticError,
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def save_results(file: Path, results: Sequence[tuple[str, Any]]) -> None:
    """Write results, (image id, result), to an .npz file: the fields of each, by number of image."""
    arrays: dict[str, Any] = {"ids": np.array([i for i, _ in results], dtype=str)}
    kinds = {type(found).__name__ for _, found in results}
    arrays["kind"] = np.array(sorted(kinds), dtype=str)
    for n, (_, found) in enumerate(results):
        arrays |= {f"{n}.{f.name}": getattr(found, f.name) for f in fields(found) if getattr(found, f.name) is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    unfinished.replace(file)


def load_results(file: Path) -> dict[str, Any]:
    """What `save_results` wrote, by image id.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, kinds = [str(name) for name in stored["ids"].tolist()], stored["kind"].tolist()
            values: list[dict[str, Any]] = [{} for _ in ids]
            for key in stored.files:
                number, _, name = key.partition(".")
                if name:
                    value = stored[key]
                    values[int(number)][name] = value if value.ndim else value.item()
        kind: Any = _KINDS.get(kinds[0]) if ids else None
        if ids and kind is None:
            raise ValueError(f"it holds {kinds[0]}, which is no kind of result")
        return {i: kind(**found) for i, found in zip(ids, values, strict=True)}
    except DAMAGED as error:
        raise UserError(f"{file}: damaged ({error}); delete it, or make it again with force=true") from error
