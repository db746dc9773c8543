"""Results in COCO's format: https://cocodataset.org/#format-results."""

from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
import orjson

from evaluation.types import Poses, Skeleton
from pipeline.errors import UserError


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
    try:
        raw = orjson.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot read the results ({error.strerror}); check the path") from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); NaN and Infinity are none either") from error
    if not isinstance(raw, list) or not all(isinstance(record, dict) for record in raw):
        raise UserError(f"{file}: not a list of results; see https://cocodataset.org/#format-results")
    K = len(labels.names)
    for position, record in enumerate(raw):
        for key in ("image_id", "keypoints", "score"):
            if key not in record:
                raise UserError(f"{file}: result {position} has no '{key}'; each needs image_id, keypoints and score")
        if len(record["keypoints"]) != 3 * K:
            raise UserError(
                f"{file}: result {position} has {len(record['keypoints'])} keypoint numbers, not {3 * K} ({K} keypoints)"
            )
    try:
        keypoints = np.array([record["keypoints"] for record in raw], np.float32).reshape(-1, K, 3)
        scores = np.array([record["score"] for record in raw], np.float32).reshape(-1)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: keypoints and scores must be numbers ({error})") from error
    wrong = np.flatnonzero(~np.isfinite(scores) | ~np.isfinite(keypoints).all(axis=(1, 2)) | (scores < 0))
    if len(wrong):
        raise UserError(
            f"{file}: result {wrong[0]} has a score or a point that is negative or not finite: {raw[wrong[0]]['score']}"
        )
    ids = [str(record["image_id"]) for record in raw]
    unknown = sorted(set(ids) - set(images))
    if unknown:
        raise UserError(f"{file}: {len(unknown)} image ids are not of the validation images: {', '.join(unknown[:5])}")
    places: dict[str, list[int]] = {image: [] for image in images}
    seen: dict[tuple[str, bytes], int] = {}
    for n, image in enumerate(ids):
        other = seen.setdefault((image, keypoints[n].tobytes() + scores[n].tobytes()), n)
        if other != n:
            raise UserError(f"{file}: results {other} and {n} are the same person of image {image}; drop one of them")
        places[image].append(n)
    return {image: Poses(keypoints[rows], scores[rows]) for image, rows in places.items()}
