"""Results in COCO's format: https://cocodataset.org/#format-results."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from evaluation.types import Poses, Skeleton
from pipeline.datasets.annotations import read_file, read_json, unwatched
from pipeline.errors import UserError

_PIECE = 1 << 20  # bytes read into Python's numbers at once


def _pieces(content: bytes) -> Iterator[list[Any]]:
    """The records of a JSON list, some at a time: the memory of their numbers is used again, which is most of the work.

    Raises:
        ValueError: it is no such list, or its records hold others.
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


def _arrays(pieces: Iterator[Any], file: Path, K: int) -> tuple[list[Any], NDArray[Any], NDArray[Any]]:
    """Image ids, keypoints [N, K, 3] and scores [N] of checked records."""
    ids: list[Any] = []
    keypoints, scores = [np.zeros((0, K, 3), np.float64)], [np.zeros(0, np.float64)]
    for piece in pieces:
        if not isinstance(piece, list) or not all(isinstance(record, dict) for record in piece):
            raise UserError(f"{file}: not a list of results; see https://cocodataset.org/#format-results")
        for key in ("image_id", "keypoints", "score"):
            absent = next((n for n, record in enumerate(piece) if key not in record), None)
            if absent is not None:
                raise UserError(f"{file}: result {len(ids) + absent} has no '{key}'; each needs image_id, keypoints and score")
        lists = [record["keypoints"] for record in piece]
        wrong = next((n for n, flat in enumerate(lists) if not isinstance(flat, list) or len(flat) != 3 * K), None)
        if wrong is not None:
            many = len(lists[wrong]) if isinstance(lists[wrong], list) else "no list of"
            raise UserError(f"{file}: result {len(ids) + wrong} has {many} keypoint numbers, not {3 * K} ({K} keypoints)")
        try:
            points, values = np.array(lists), np.array([record["score"] for record in piece])
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: keypoints and scores must be numbers ({error})") from error
        if points.size and (points.ndim != 2 or values.ndim != 1 or any(a.dtype.kind not in "if" for a in (points, values))):
            raise UserError(f"{file}: keypoints and scores must be numbers, not words, lists or null")
        points, values = points.reshape(-1, K, 3).astype(np.float64), values.astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values) | ~np.isfinite(points).all(axis=(1, 2)) | (values < 0))
        if len(bad):
            at, score = len(ids) + bad[0], piece[bad[0]]["score"]
            raise UserError(f"{file}: result {at} (score {score}) has a negative score, or a score or point that is not finite")
        ids += [record["image_id"] for record in piece]
        keypoints.append(points)
        scores.append(values)
    return ids, np.concatenate(keypoints), np.concatenate(scores)


def load_results(file: Path, labels: Skeleton, images: AbstractSet[str]) -> dict[str, Poses]:
    """Read and check found people.

    Args:
        file: a JSON list of {"image_id", "category_id", "keypoints": [x, y, score, ...], "score"}.
        labels: the skeleton of the keypoints.
        images: the ids of the images that were to be looked at.

    Returns:
        Poses of every image, of some nobody.

    Raises:
        UserError: the file is missing or no such list; an image is unknown, keypoints are missing or too many, a number is
            not finite, a score is negative, or a person is there twice.
    """
    content, K = read_file(file, "check the path of the results"), len(labels.names)
    try:
        with unwatched():
            ids, keypoints, scores = _arrays(_pieces(content), file, K)
    except ValueError:
        ids, keypoints, scores = _arrays(iter([read_json(content, file)]), file, K)
    places: dict[str, list[int]] = {image: [] for image in images}
    unknown = set()
    for n, image in enumerate(map(str, ids)):
        if image in places:
            places[image].append(n)
        else:
            unknown.add(image)
    if unknown:
        listed = ", ".join(sorted(unknown)[:5])
        raise UserError(f"{file}: {len(unknown)} image ids are not of the validation images: {listed}")
    for image, rows in places.items():
        seen: dict[bytes, int] = {}
        for n in rows:
            other = seen.setdefault(keypoints[n].tobytes() + scores[n].tobytes(), n)
            if other != n:
                raise UserError(f"{file}: results {other} and {n} are the same person of image {image}; drop one of them")
    return {image: Poses(keypoints[rows], scores[rows]) for image, rows in places.items()}
