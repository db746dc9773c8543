"""Boxes of people from a file of detections in COCO's result format."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.annotations import read_file, read_json
from pipeline.datasets.records import is_id, is_number, shown
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.results import Boxes

Found = Mapping[str, Boxes]  # boxes by image id
_OUTSIDE = 0.2  # share of boxes that end outside of their images, above which they seem to be corners


def read_boxes(file: Path, category: int | str | None = None) -> dict[str, Boxes]:
    """Boxes of a file in COCO's result format: a list of {"image_id", "category_id", "bbox", "score"}.

    Args:
        file: the file.
        category: id of the category to keep; None keeps all.

    Raises:
        UserError: the file is missing or no such list, a box is empty or not finite, or no box is of the category.
    """
    rows = read_json(read_file(file, "check data.boxes"), file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of detections; see https://cocodataset.org/#format-results")
    kept: dict[str, list[list[float]]] = {}
    others: dict[str, int] = {}
    for place, row in enumerate(rows):
        who = f"{file}: detection {place}"
        if not isinstance(row, dict) or not {"image_id", "bbox", "score"} <= row.keys() or not is_id(row["image_id"]):
            raise UserError(f"{who} has no image_id, bbox and score; each needs them (see cocodataset.org/#format-results)")
        given = row.get("category_id")
        if category is not None and given is not None and str(given) != str(category):
            others[str(given)] = others.get(str(given), 0) + 1
            continue
        box, score = row["bbox"], row["score"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)) or not np.isfinite(box).all():
            raise UserError(f"{who}: bbox is {shown(box)}; give x, y, width and height in pixels")
        if min(box[2:]) <= 0:
            raise UserError(f"{who}: bbox is {box}; width and height must be above 0; give x, y, width and height")
        if not is_number(score) or not np.isfinite(score):
            raise UserError(f"{who}: score is {shown(score)}; give a number")
        kept.setdefault(str(row["image_id"]), []).append([*box, score])
    if not kept and others:
        raise UserError(
            f"{file}: no detection has the category_id {category}, but {sum(others.values())} have {', '.join(others)}; "
            "correct category_id, or choose data.category"
        )
    values = {image: np.array(rows, np.float64) for image, rows in kept.items()}
    return {image: Boxes(rows[:, :4], rows[:, 4]) for image, rows in values.items()}


def check_inside(found: Found, sizes: Mapping[str, Resolution | None], file: Path) -> None:
    """Make sure that detections belong to the images.

    Args:
        found: boxes by image id.
        sizes: size of each image.
        file: for the message.

    Raises:
        UserError: no image has a detection, or many boxes end outside of their images, as corners do.
    """
    known = {image: boxes for image, boxes in found.items() if image in sizes}
    if not known:
        example = ", ".join(list(found)[:3])
        raise UserError(f"{file}: no image_id ({example}, ...) is that of an image here; give the detections of these images")
    ends: list[NDArray[np.bool_]] = []
    for image, boxes in known.items():
        if (size := sizes[image]) is not None:
            beyond = boxes.xywh[:, :2] + boxes.xywh[:, 2:] > np.array([size.width, size.height]) + 2
            ends.append(np.asarray(beyond.any(axis=1)))
    outside = float(np.concatenate(ends).mean()) if ends else 0.0
    if outside > _OUTSIDE:
        raise UserError(
            f"{file}: {outside:.0%} of the boxes end outside of their images, so bbox seems to hold two corners; give x, y, "
            "width and height"
        )
