"""Predictions for an image, and their file format."""

import collections.abc
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from posepress.draw import draw_boxes, draw_people
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.resolution import Resolution

T = TypeVar("T")


@dataclass(frozen=True)
class Poses:
    """Predicted poses of the people in an image.

    Attributes:
        keypoints: float32 [N, K, 3]: x and y in image pixels, and the keypoint's own score; (0, 0, 0) for a missing keypoint.
            Keypoints and scores read from a file are float64, so that rounding does not change the order of scores.
        scores: float32 [N]; a higher score means higher confidence.
        notes: arrays with a row for each person that the decoder adds: "guessed" bool [N, K], whether a missing keypoint was
            filled in; "features" float32 [N, F], the inputs of a fitted score, of which the first is the plain score.
        counts: counts of problems in the image, for example "dropped_peaks" and "images_not_finite"; metrics sum them.
        boxes: float32 [N, 4], x, y, width and height of each person's box in image pixels; None where no network gives boxes.
        ids: int64 [N], the number of each person in a video; None where people are not tracked.
        labels: names and limbs of the keypoints. A loaded model gives them; files do not keep them.
    """

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    notes: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    boxes: NDArray[np.float32] | None = None
    ids: NDArray[np.int64] | None = None
    labels: Skeleton | None = None

    def __len__(self) -> int:
        """The number of people."""
        return len(self.scores)

    def above(self, threshold: float) -> "Poses":
        """The people with a score of at least `threshold`."""
        rows = self.scores >= threshold
        optional = {name: getattr(self, name) for name in ("boxes", "ids") if getattr(self, name) is not None}
        return replace(
            self,
            keypoints=self.keypoints[rows],
            scores=self.scores[rows],
            notes={name: values[rows] for name, values in self.notes.items()},
            **{name: values[rows] for name, values in optional.items()},
        )

    def draw(self, image: NDArray[np.uint8], labels: Skeleton | None = None, captions: bool = True) -> NDArray[np.uint8]:
        """The people drawn over an RGB image [H, W, 3], without filled-in keypoints; the image itself is not changed.

        Args:
            image: the image.
            labels: limbs of the keypoints; None takes those of the poses.
            captions: whether the id and the score stand above each person. A tracked person keeps its colour.
        """
        numbers = list(range(len(self))) if self.ids is None else self.ids.tolist()
        texts = [f"{score:.2f}" for score in self.scores.tolist()]
        if self.ids is not None:
            texts = [f"{number}: {text}" for number, text in zip(numbers, texts, strict=True)]
        limbs = (labels or self._skeleton).limbs
        return draw_people(image, self.as_found().keypoints, limbs, numbers, texts if captions else ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: "people", each with "score", "keypoints" by name, [x, y, score] or None, "box" and "id".

        Points and boxes are in image pixels, a box is x, y, width and height.
        """
        people = []
        for n, (points, score) in enumerate(zip(self.keypoints.tolist(), self.scores.tolist(), strict=True)):
            named = {
                name: [round(value, 4) for value in point] if point[2] > 0 else None
                for name, point in zip(self._skeleton.names, points, strict=True)
            }
            person: dict[str, Any] = {"score": round(score, 4), "keypoints": named}
            if self.boxes is not None:
                person["box"] = [round(side, 2) for side in self.boxes[n].tolist()]
            if self.ids is not None:
                person["id"] = int(self.ids[n])
            people.append(person)
        return {"people": people}

    def to_coco(self, image_id: int | str, category_id: int = 1) -> list[dict[str, Any]]:
        """Records in COCO's result format (https://cocodataset.org/#format-results), with "track_id" for tracked people."""
        rows: list[dict[str, Any]] = []
        for n, (points, score) in enumerate(zip(self.keypoints, self.scores.tolist(), strict=True)):
            flat = points.astype(np.float64).round(3).ravel().tolist()
            row = {"image_id": image_id, "category_id": category_id, "keypoints": flat, "score": score}
            rows.append(row if self.ids is None else {**row, "track_id": int(self.ids[n])})
        return rows

    def to_supervision(self) -> Any:
        """The people as `supervision.KeyPoints`.

        Raises:
            UserError: supervision is not installed.
        """
        missing = np.where(self.keypoints[..., 2:] > 0, self.keypoints[..., :2], 0)  # supervision leaves out points at (0, 0)
        return _supervision().KeyPoints(xy=missing.astype(np.float32), keypoint_confidence=self.keypoints[..., 2])

    @property
    def _skeleton(self) -> Skeleton:
        """The labels, or numbers as names where there are none."""
        return self.labels or Skeleton(tuple(f"keypoint_{n}" for n in range(max(self.keypoints.shape[1], 1))))

    def as_found(self) -> "Poses":
        """The same poses without filled-in keypoints, and with their plain scores."""
        guessed, features = self.notes.get("guessed"), self.notes.get("features")
        keypoints = self.keypoints if guessed is None else np.where(guessed[..., None], 0, self.keypoints)
        scores = self.scores if features is None else features[:, 0]
        notes = {name: values for name, values in self.notes.items() if name != "guessed"}
        return replace(self, keypoints=keypoints, scores=scores, notes=notes)


@dataclass(frozen=True)
class SemanticMask:
    """Segmentation of an image.

    Attributes:
        classes: uint8 [H, W], index of the class of each pixel.
    """

    classes: NDArray[np.uint8]


@dataclass(frozen=True)
class Boxes:
    """Boxes of the instances in an image.

    Attributes:
        xywh: float64 [N, 4]: x and y of the upper left corner, width, height, in image pixels.
        scores: float64 [N], a detector's scores; None for annotated boxes.
        counts: counts of problems in the image, like "images_not_finite"; metrics sum them.
    """

    xywh: NDArray[np.float64]
    scores: NDArray[np.float64] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of boxes."""
        return len(self.xywh)

    def above(self, threshold: float) -> "Boxes":
        """The boxes with a score of at least `threshold`; boxes without scores all stay."""
        if self.scores is None:
            return self
        rows = self.scores >= threshold
        return replace(self, xywh=self.xywh[rows], scores=self.scores[rows])

    def draw(self, image: NDArray[np.uint8], threshold: float = 0.0) -> NDArray[np.uint8]:
        """The boxes with at least a score drawn over an RGB image [H, W, 3]; the image itself is not changed."""
        return draw_boxes(image, self.xywh, self.scores, threshold)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: "boxes", each with "box", x, y, width and height in image pixels, and "score"."""
        rows: list[dict[str, Any]] = [{"box": [round(side, 2) for side in box]} for box in self.xywh.tolist()]
        for row, score in zip(rows, [] if self.scores is None else self.scores.tolist(), strict=False):
            row["score"] = round(score, 4)
        return {"boxes": rows}

    def to_coco(self, image_id: int | str, category_id: int = 1) -> list[dict[str, Any]]:
        """Records in COCO's result format (https://cocodataset.org/#format-results)."""
        scores = [1.0] * len(self) if self.scores is None else self.scores.tolist()
        return [
            {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
            for box, score in zip(self.xywh.round(3).tolist(), scores, strict=True)
        ]

    def to_supervision(self) -> Any:
        """The boxes as `supervision.Detections`.

        Raises:
            UserError: supervision is not installed.
        """
        corners = np.concatenate((self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]), axis=1).astype(np.float32)
        return _supervision().Detections(xyxy=corners.reshape(-1, 4), confidence=self.scores)


def _supervision() -> Any:
    """The module `supervision`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise UserError("to_supervision() needs the package supervision: pip install supervision") from error
    return supervision


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One image with its labels.

    Attributes:
        id: name that is unique in the data set; for COCO, the image id as text.
        size: the image's size.
        read: function that reads the RGB pixels, uint8 [H, W, 3].
        truth: the labels; None for an unlabelled image.
        boxes: boxes of the instances, for networks that see one instance at a time; None where they are not known.
    """

    id: str
    size: Resolution
    read: Callable[[], NDArray[np.uint8]]
    truth: T | None
    boxes: Boxes | None = None


_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (Poses, SemanticMask, Boxes)}
_IN_0_1 = {  # fields of poses in files of version 0.1, and where their values are now
    "guessed": "notes.guessed",
    "features": "notes.features",
    "dropped_peaks": "counts.dropped_peaks",
    "not_finite": "counts.images_not_finite",
}
DAMAGED = (  # exceptions that numpy and zipfile raise for a damaged file
    OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, MemoryError, ArithmeticError,
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, tokenize.TokenError,
)  # fmt: skip


def save_results(file: Path, results: Sequence[tuple[str, Any]]) -> None:
    """Write results, (image id, result), to an .npz file.

    A result is a dataclass of arrays, numbers and mappings of these. The keys are "number.field" of image and field, or
    "number.field.name" for an entry of a mapping.
    """
    arrays: dict[str, Any] = {"ids": np.array([i for i, _ in results], dtype=str)}
    kinds = {type(found).__name__ for _, found in results}
    arrays["kind"] = np.array(sorted(kinds), dtype=str)
    for n, (_, found) in enumerate(results):
        for one in fields(found):
            value = getattr(found, one.name)
            if one.name == "labels":  # the network's description holds them
                continue
            if isinstance(value, Mapping):
                arrays |= {f"{n}.{one.name}.{name}": entry for name, entry in value.items()}
            elif value is not None:
                arrays[f"{n}.{one.name}"] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{os.getpid()}-{file.name}")  # several processes may write one file
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    unfinished.replace(file)


def _complete(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The fields of a result as they were saved: an empty mapping has left nothing in the file.

    Raises:
        ValueError: a mapping, or anything else, stands where the class has the other.
    """
    hints = get_type_hints(kind)
    for one in fields(kind):
        is_mapping = get_origin(hints[one.name]) is collections.abc.Mapping
        if is_mapping != isinstance(found.get(one.name, {} if is_mapping else None), dict):
            raise ValueError(f"{one.name} is no {'mapping' if is_mapping else 'array'}")
        if is_mapping:
            found.setdefault(one.name, {})
    return found


def kind_of(file: Path) -> str:
    """The name of the class of the results in a file; empty if there are none, or the file is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return str(next(iter(stored["kind"].tolist()), ""))
    except DAMAGED:
        return ""


def load_results(file: Path, kind: type | None = None) -> dict[str, Any]:
    """The results that `save_results` wrote, by image id.

    Args:
        file: the .npz file.
        kind: the results' class; None finds the classes of this module by their names.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(file, allow_pickle=False) as stored:
            ids, kinds = [str(name) for name in stored["ids"].tolist()], stored["kind"].tolist()
            values: list[dict[str, Any]] = [{} for _ in ids]
            for key in stored.files:
                number, _, path = key.partition(".")
                if path and not number.isdigit():
                    raise ValueError(f"{key} is no field of a result")
                if path:
                    value = stored[key]
                    path = _IN_0_1.get(path, path) if kinds[:1] == [Poses.__name__] else path
                    name, _, entry = path.partition(".")
                    into = values[int(number)].setdefault(name, {}) if entry else values[int(number)]
                    into[entry or name] = value if value.ndim else value.item()
        if len(set(ids)) < len(ids):
            raise ValueError("it holds an image twice")
        if not ids:
            return {}
        made: Any = kind or _KINDS.get(kinds[0])
        if made is None or made.__name__ != kinds[0]:
            raise ValueError(f"it holds {kinds[0]}, which is not the expected kind of result")
        return {i: made(**_complete(made, found)) for i, found in zip(ids, values, strict=True)}
    except DAMAGED as error:
        raise UserError(f"{file}: damaged ({error}); delete it, or make it again with force=true") from error
