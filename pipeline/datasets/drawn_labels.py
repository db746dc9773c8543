"""Labels of drawn people: keypoints, masks and boxes, as COCO's annotators give them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.canvas import F64, Canvas
from posepress.skeletons import COCO_17

_OWN_PARTS = {
    "nose": {2, 3}, "left_eye": {2, 3}, "right_eye": {2, 3}, "left_ear": {2, 3}, "right_ear": {2, 3},
    "left_shoulder": {1, 40}, "right_shoulder": {1, 41}, "left_elbow": {40, 50}, "right_elbow": {41, 51},
    "left_wrist": {50, 60}, "right_wrist": {51, 61}, "left_hip": {1, 10}, "right_hip": {1, 11},
    "left_knee": {10, 20}, "right_knee": {11, 21}, "left_ankle": {20, 30}, "right_ankle": {21, 31},
}  # fmt: skip


def label(canvas: Canvas, joints: dict[str, F64], scale: float, owner: int) -> NDArray[np.float64]:
    """Return keypoints [17, 3] as COCO's annotators label them: 2 visible, 1 hidden but guessed, 0 not labelled."""
    H, W = canvas.owner.shape
    keypoints = np.zeros((len(COCO_17.names), 3))
    head = joints["head"]
    for k, name in enumerate(COCO_17.names):
        x, y, z = joints[name]
        i, j = round(y), round(x)
        if not (0 <= i < H and 0 <= j < W):
            continue
        if k < 5 and z - head[2] <= (-0.02 if "ear" in name else 0.012) * scale:
            continue  # annotators do not label points on the far side of the head
        mine = canvas.owner[i, j] == owner
        seen = mine and canvas.part[i, j] in _OWN_PARTS[name]
        if k < 5 and not mine:
            continue
        keypoints[k] = (round(x, 2), round(y, 2), 2 if seen else 1)
    return keypoints


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return COCO's uncompressed run lengths of a mask, column by column."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size])))
    counts = [0, *runs.tolist()] if flat[0] else runs.tolist()
    return {"size": list(mask.shape), "counts": counts}


def annotation(mask: NDArray[np.bool_], keypoints: F64 | None) -> dict[str, Any]:
    """A COCO annotation of a person, or of a crowd without keypoints, from its visible pixels [H, W]."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    labels = np.zeros((len(COCO_17.names), 3)) if keypoints is None else keypoints
    return {
        "category_id": 1,
        "iscrowd": 0,
        "area": float(mask.sum()),
        "bbox": [float(xs[0]), float(ys[0]), float(xs[-1] - xs[0] + 1), float(ys[-1] - ys[0] + 1)],
        "segmentation": run_lengths(mask),
        "num_keypoints": int((labels[:, 2] > 0).sum()),
        "keypoints": [round(float(v), 2) for v in labels.ravel()],
    }
