"""Reading of results in COCO's format, https://cocodataset.org/#format-results."""

from array import array
from collections import Counter
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from pipeline.datasets.annotations import read_file, read_json, unwatched
from pipeline.datasets.records import Category, flattened, is_id, is_number, shown
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.results import Poses

_PIECE = 1 << 20  # bytes that are parsed at once


def _pieces(content: bytes) -> Iterator[list[Any]]:
    """Yield the records of a JSON list piece by piece. This is faster, since each piece uses the memory of the last one again.

    Raises:
        ValueError: the content is no list of records, or a record contains further records.
    """
    at, end = content.index(b"[") + 1, content.rindex(b"]")
    if content[: at - 1].strip() or content[end + 1 :].strip():
        raise ValueError
    while at < end:
        cut = content.find(b"}", min(at + _PIECE, end - 1), end) + 1 or end
        yield orjson.loads(b"[" + content[at:cut] + b"]")
        at = content.find(b"{", cut, end)
        if at < 0:
            at = end
        if content[cut:at].strip() != (b"," if at < end else b""):
            raise ValueError


@dataclass
class _Reader:
    """Checks and collects the records of one category.

    Attributes:
        file: path of the file, for messages.
        K: number of keypoints of a person.
        category: category to collect; None collects all.
        ids: image id of each collected record.
        where: index of each collected record in the file.
        keypoints: keypoints of each piece, [N, K, 3].
        scores: scores of each piece, [N].
        seen: number of records read so far, of all categories.
        left_out: number of records of each other category so far.
    """

    file: Path
    K: int
    category: Category | None
    ids: list[Any] = field(default_factory=list)
    where: list[int] = field(default_factory=list)
    keypoints: list[NDArray[np.float64]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    seen: int = 0
    left_out: Counter[Any] = field(default_factory=Counter)

    def take(self, piece: Any, odd: bool) -> None:
        """Check and add some records. `odd` says that the values true or false may be among their numbers.

        Raises:
            UserError: a record is no result, or has another number of keypoints.
        """
        if not isinstance(piece, list) or not all(isinstance(record, dict) for record in piece):
            raise UserError(f"{self.file}: not a list of results; see https://cocodataset.org/#format-results")
        own = [n for n, record in enumerate(piece) if self._belongs(record, self.seen + n)]
        kept = piece if len(own) == len(piece) else [piece[n] for n in own]
        where = [self.seen + n for n in own]
        self.seen += len(piece)
        for key in ("image_id", "keypoints", "score"):
            absent = next((n for n, record in enumerate(kept) if key not in record), None)
            if absent is not None:
                raise UserError(f"{self.file}: result {where[absent]} has no '{key}'; each needs image_id, keypoints and score")
        points, values = self._numbers(kept, where, odd)
        bad = np.flatnonzero(~np.isfinite(values) | ~np.isfinite(points).all(axis=(1, 2)) | (values < 0))
        if len(bad):
            at, score = where[bad[0]], kept[bad[0]]["score"]
            raise UserError(
                f"{self.file}: result {at} (score {score}) has a negative score, or a score or point that is not finite"
            )
        self.where += where
        self.ids += [record["image_id"] for record in kept]
        self.keypoints.append(points)
        self.scores.append(values)

    def _belongs(self, record: dict[str, Any], place: int) -> bool:
        given, own = record.get("category_id"), None if self.category is None else self.category.id
        if given is None or own is None or (given == own and not isinstance(given, bool)):
            return True
        if not is_id(given):
            raise UserError(f"{self.file}: result {place}: category_id is {shown(given)}; give a category's id")
        self.left_out[given] += 1
        return False

    def _numbers(
        self, kept: list[dict[str, Any]], where: list[int], odd: bool
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        K, lists = self.K, [record["keypoints"] for record in kept]
        if any(isinstance(flat, list) and flat and isinstance(flat[0], list) for flat in lists):
            lists = [flattened(flat) for flat in lists]
        wrong = next((n for n, flat in enumerate(lists) if not isinstance(flat, list) or len(flat) != 3 * K), None)
        if wrong is not None:
            many = len(lists[wrong]) if isinstance(lists[wrong], list) else "no list of"
            raise UserError(
                f"{self.file}: result {where[wrong]} has {many} keypoint numbers, not {3 * K} ({K} keypoints); "
                "correct it, or choose another data.category"
            )
        scores = [record["score"] for record in kept]
        strange = next((n for n in range(len(kept)) if not all(map(is_number, (scores[n], *lists[n])))), None) if odd else None
        try:
            points, values = array("d", list(chain.from_iterable(lists))), array("d", scores)
        except (TypeError, OverflowError):
            strange = next((n for n in range(len(kept)) if not all(map(is_number, (scores[n], *lists[n])))), 0)
        if strange is not None:
            raise UserError(
                f"{self.file}: result {where[strange]}: keypoints and scores must be numbers, not words, lists or null"
            )
        return np.array(points).reshape(-1, K, 3), np.array(values)


def load_results(file: Path, labels: Skeleton, images: AbstractSet[str], category: Category | None = None) -> dict[str, Poses]:
    """Read and check predicted people.

    Args:
        file: a JSON list of {"image_id", "category_id", "keypoints": [x, y, score, ...], "score"}.
        labels: the skeleton of the keypoints.
        images: the ids of the images in the evaluation.
        category: category of the results to read; results of other categories are left out. None keeps all results.

    Returns:
        Poses of every image, which are empty for an image without results.

    Raises:
        UserError: the file is missing or no list of results, an image is unknown, the number of keypoints is wrong, a number
            is not finite, a score is negative, a person occurs twice, or all results are of other categories.
    """
    content, K = read_file(file, "check the path of the results"), len(labels.names)
    odd = b"true" in content or b"false" in content
    read = _Reader(file, K, category)
    try:
        with unwatched():
            for piece in _pieces(content):
                read.take(piece, odd)
    except ValueError:
        read = _Reader(file, K, category)
        read.take(read_json(content, file), odd=True)
    if read.seen and not read.ids and category is not None:
        (other, count), *_ = read.left_out.most_common(1)
        raise UserError(
            f"{file}: no result has the category_id {category.id} ({category}), but {count} have {other}; "
            "correct category_id, or choose another data.category"
        )
    if others := sum(read.left_out.values()):
        from rich.console import Console

        said = f"{file}: {others} results of other categories than {category} are left out; data.category chooses"
        Console(stderr=True, highlight=False, markup=False).print(said, style="yellow", soft_wrap=True)
    keypoints = np.concatenate([np.zeros((0, K, 3)), *read.keypoints])
    scores = np.concatenate([np.zeros(0), *read.scores])
    places: dict[str, list[int]] = {image: [] for image in images}
    unknown = set()
    for n, image in enumerate(read.ids):
        if not is_id(image):
            raise UserError(f"{file}: an image_id is {shown(image)}; give the id of one of the images")
        if str(image) in places:
            places[str(image)].append(n)
        else:
            unknown.add(str(image))
    if unknown:
        listed = ", ".join(sorted(unknown)[:5])
        raise UserError(f"{file}: {len(unknown)} image ids are not of the validation images: {listed}")
    for image, rows in places.items():
        seen: dict[bytes, int] = {}
        for n in rows:
            other = seen.setdefault(keypoints[n].tobytes() + scores[n].tobytes(), n)
            if other != n:
                first, second = read.where[other], read.where[n]
                raise UserError(f"{file}: results {first} and {second} are the same person of image {image}; drop one of them")
    return {image: Poses(keypoints[rows], scores[rows]) for image, rows in places.items()}
