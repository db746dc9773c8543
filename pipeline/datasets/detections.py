"""Boxes of people from a file of detections in COCO's result format."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.annotations import read_file, read_json
from pipeline.datasets.outside import outside
from pipeline.datasets.records import is_id, is_number, shown
from pipeline.progress import say
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.results import Boxes

Found = Mapping[str, Boxes]  # boxes by image id
_OUTSIDE = 0.2  # share of boxes that end outside of their images, above which they seem to be corners


def read_boxes(file: Path, category: int | str | None = None, images: AbstractSet[str] | None = None) -> dict[str, Boxes]:
    """Boxes of a file in COCO's result format: a list of {"image_id", "category_id", "bbox", "score"}.

    Detections of other categories and of unknown images are left out, and their numbers are said.

    Args:
        file: the file.
        category: id of the category to keep; None keeps all.
        images: ids of the images of all splits; None keeps the boxes of every image.

    Raises:
        UserError: the file is missing or no such list, a box is empty or not finite, or no box is of the category or
            of a known image.
    """
    rows = read_json(read_file(file, "check data.boxes"), file)
    if not isinstance(rows, list):
        raise UserError(f"{file}: not a list of detections; see https://cocodataset.org/#format-results")
    kept: dict[str, list[list[float]]] = {}
    others: dict[str, int] = {}
    for place, row in enumerate(rows):
        subject = f"{file}: detection {place}"
        if not isinstance(row, dict) or not {"image_id", "bbox", "score"} <= row.keys() or not is_id(row["image_id"]):
            raise UserError(f"{subject} has no image_id, bbox and score; each needs them (see cocodataset.org/#format-results)")
        given = row.get("category_id")
        if category is not None and given is not None and str(given) != str(category):
            others[str(given)] = others.get(str(given), 0) + 1
            continue
        box, score = row["bbox"], row["score"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)) or not np.isfinite(box).all():
            raise UserError(f"{subject}: bbox is {shown(box)}; give x, y, width and height in pixels")
        if min(box[2:]) <= 0:
            raise UserError(f"{subject}: bbox is {box}; width and height must be above 0; give x, y, width and height")
        if not is_number(score) or not np.isfinite(score):
            raise UserError(f"{subject}: score is {shown(score)}; give a number")
        kept.setdefault(str(row["image_id"]), []).append([*box, score])
    if not kept and others:
        raise UserError(
            f"{file}: no detection has the category_id {category}, but {sum(others.values())} have {', '.join(others)}; "
            "correct category_id, or choose data.category"
        )
    if others:
        many = f"{sum(others.values())} of {len(rows)} detections"
        say(f"{file}: {many} have another category_id than {category}, like {next(iter(others))}, and are left out", "yellow")
    unknown = [image for image in kept if images is not None and image not in images]
    if unknown and len(unknown) == len(kept):
        raise _foreign(file, unknown)
    if unknown:
        many = f"{sum(len(kept.pop(image)) for image in unknown)} of {len(rows)} detections"
        say(
            f"{file}: {many} name images that are not in the data, like image_id {unknown[0]}, and are left out; "
            "compare image_id with the ids of the images",
            "yellow",
        )
    values = {image: np.array(rows, np.float64) for image, rows in kept.items()}
    return {image: Boxes(rows[:, :4], rows[:, 4]) for image, rows in values.items()}


def check_inside(found: Found, sizes: Mapping[str, Resolution | None], file: Path) -> None:
    """Make sure that detections belong to the images. The number of boxes that lie wholly outside their images is said.

    Args:
        found: boxes by image id.
        sizes: size of each image.
        file: for the message.

    Raises:
        UserError: no image has a detection, or many boxes end outside of their images, as corners do.
    """
    known = {image: boxes for image, boxes in found.items() if image in sizes}
    if not known:
        raise _foreign(file, list(found))
    ends: list[NDArray[np.bool_]] = []
    for image, boxes in known.items():
        if (size := sizes[image]) is not None:
            beyond = boxes.xywh[:, :2] + boxes.xywh[:, 2:] > np.array([size.width, size.height]) + 2
            ends.append(np.asarray(beyond.any(axis=1)))
    share = float(np.concatenate(ends).mean()) if ends else 0.0
    if share > _OUTSIDE:
        raise UserError(
            f"{file}: {share:.0%} of the boxes end outside of their images, so bbox seems to hold two corners; give x, y, "
            "width and height"
        )
    away = [
        (image, size, box)
        for image, boxes in known.items()
        if (size := sizes[image]) is not None
        for box in boxes.xywh[outside(boxes.xywh, np.array([size.width, size.height]))]
    ]
    if away:
        image, size, box = away[0]
        say(
            f"{file}: {len(away)} boxes lie wholly outside their images, like {box.tolist()} in image {image} of {size}: "
            "the network sees no person in them; give bbox as x, y, width and height in pixels",
            "yellow",
        )


def _foreign(file: Path, ids: Sequence[str]) -> UserError:
    example = f" ({', '.join(ids[:3])}, ...)" if ids else ""
    return UserError(f"{file}: no image_id{example} is that of an image here; give the detections of these images")
