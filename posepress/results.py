"""Predictions for an image, and their file format."""

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
    """Predicted poses of the people in an image.

    Attributes:
        keypoints: float32 [N, K, 3]: x and y in image pixels, and the keypoint's own score; (0, 0, 0) for a missing keypoint.
            Keypoints and scores read from a file are float64, so that rounding does not change the order of scores.
        scores: float32 [N]; a higher score means higher confidence.
        guessed: bool [N, K], whether a missing keypoint was filled in; None if the decoder fills in none.
        features: float32 [N, F], the inputs of a fitted score; the first is the plain score.
        dropped_peaks: number of peaks that were dropped because a heatmap had too many.
        not_finite: whether the network returned NaN or infinity.
    """

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    guessed: NDArray[np.bool_] | None = None
    features: NDArray[np.float32] | None = None
    dropped_peaks: int = 0
    not_finite: bool = False

    def as_found(self) -> "Poses":
        """The same poses without filled-in keypoints, and with their plain scores."""
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
    """One image with its labels.

    Attributes:
        id: name that is unique in the data set; for COCO, the image id as text.
        size: the image's size.
        read: function that reads the RGB pixels, uint8 [H, W, 3].
        truth: the labels; None for an unlabelled image.
        boxes: float64 [N, 4], people's boxes for top-down networks.
    """

    id: str
    size: Resolution
    read: Callable[[], NDArray[np.uint8]]
    truth: T | None
    boxes: NDArray[np.float64] | None = None


_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (Poses, SemanticMask)}
DAMAGED = (  # exceptions that numpy and zipfile raise for a damaged file
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, ArithmeticError,
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def save_results(file: Path, results: Sequence[tuple[str, Any]]) -> None:
    """Write results, (image id, result), to an .npz file; its keys are "number.name" of image and field."""
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
    """The results that `save_results` wrote, by image id.

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
