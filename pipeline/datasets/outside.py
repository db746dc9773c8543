"""Boxes that lie wholly outside of their images."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.annotations import Annotations


def outside(boxes: NDArray[np.float64], sizes: NDArray[Any]) -> NDArray[np.bool_]:
    """Which boxes [N, 4], as x, y, width and height, lie wholly outside of images of the sizes [N, 2] or [2], width first."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    away = ((high <= 0) & (low < 0)) | ((low >= sizes) & (high > sizes))
    return np.asarray(away.any(axis=1))


def without_outside(truth: Annotations) -> tuple[Annotations, str]:
    """Leave out the boxes that lie wholly outside of their images.

    Returns:
        The annotations, and a sentence with the number of such boxes, which is empty if there are none. The labelled keypoints
        in the image make the new box. An annotation without such keypoints is left out.
    """
    sides = {image["id"]: (image["width"], image["height"]) for image in truth.images}
    sizes = np.array([sides[record["image_id"]] for record in truth.people], np.float64).reshape(-1, 2)
    boxes = np.array([record["bbox"] for record in truth.people], np.float64).reshape(-1, 4)
    rows = np.flatnonzero(outside(boxes, sizes))
    if not len(rows):
        return truth, ""
    every, areas, kept = list(truth.people), truth.areas.copy(), np.ones(len(boxes), bool)
    for row in rows.tolist():
        points = np.array(every[row].get("keypoints") or [], np.float64).reshape(-1, 3)
        points = points[(points[:, 2] > 0) & ((points[:, :2] >= 0) & (points[:, :2] <= sizes[row])).all(axis=1), :2]
        kept[row] = len(points) > 0
        if len(points):
            low, extent = points.min(axis=0), np.ptp(points, axis=0)
            every[row] = {**every[row], "bbox": [*low.tolist(), *extent.tolist()]}
            areas[row] = every[row].get("area", extent.prod())
    first = truth.people[rows[0]]
    width, height = sides[first["image_id"]]
    example = f"{first['bbox']} in image {first['image_id']} of {height}x{width}"
    sentence = (
        f"{len(rows)} annotated boxes lie wholly outside their images, like {example}: {int(kept[rows].sum())} are made of the "
        f"labelled keypoints instead, and {int((~kept).sum())} annotations without keypoints in the image are left out; give "
        "bbox as x, y, width and height in pixels"
    )
    people = [record for record, inside in zip(every, kept, strict=True) if inside]
    return (
        replace(
            truth,
            people=people,
            visibility=truth.visibility[kept],
            areas=areas[kept],
            labelled=truth.labelled[kept],
            crowd=truth.crowd[kept],
        ),
        sentence,
    )
