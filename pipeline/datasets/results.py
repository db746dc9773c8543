"""Results in COCO's format: https://cocodataset.org/#format-results."""

from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np

from evaluation.types import Poses, Skeleton
from pipeline.datasets.coco import read_json
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
    raw = read_json(file, "check the path of the results")
    if not isinstance(raw, list) or not all(isinstance(record, dict) for record in raw):
        raise UserError(f"{file}: not a list of results; see https://cocodataset.org/#format-results")
    K = len(labels.names)
    for key in ("image_id", "keypoints", "score"):
        absent = next((n for n, record in enumerate(raw) if key not in record), None)
        if absent is not None:
            raise UserError(f"{file}: result {absent} has no '{key}'; each needs image_id, keypoints and score")
    lists = [record["keypoints"] for record in raw]
    wrong = next((n for n, flat in enumerate(lists) if not isinstance(flat, list) or len(flat) != 3 * K), None)
    if wrong is not None:
        many = len(lists[wrong]) if isinstance(lists[wrong], list) else "no list of"
        raise UserError(f"{file}: result {wrong} has {many} keypoint numbers, not {3 * K} ({K} keypoints)")
    try:
        keypoints = np.array(lists, np.float32).reshape(-1, K, 3)
        scores = np.array([record["score"] for record in raw], np.float32).reshape(-1)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: keypoints and scores must be numbers ({error})") from error
    bad = np.flatnonzero(~np.isfinite(scores) | ~np.isfinite(keypoints).all(axis=(1, 2)) | (scores < 0))
    if len(bad):
        score = raw[bad[0]]["score"]
        raise UserError(f"{file}: result {bad[0]} (score {score}) has a negative score, or a score or point that is not finite")
    places: dict[str, list[int]] = {image: [] for image in images}
    unknown = set()
    for n, record in enumerate(raw):
        image = str(record["image_id"])
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
