"""What may lie behind figures that are not believable: each cause that the data shows, with what to look at."""

from dataclasses import replace

import numpy as np

from evaluation.metrics.oks import Everybody
from posepress.spec import Skeleton

IMPLAUSIBLE = 0.05  # average precision below which a trained network is in doubt
_FLAT = 1e-4  # of the box's area; a person fills a quarter and more of it
_FEW = 0.25  # found people, as a part of those to be found

_UNKNOWN = (
    "few of the people found lie where people are: the network may be untrained or of other data; look at the pictures in the "
    "report, and compare order, range, mean, std, strides and labels in model.spec, and data.*.images with data.*.annotations"
)
_BETTER = 0.05  # average precision that mended points must gain


def doubts(people: Everybody, labels: Skeleton, found_labels: Skeleton) -> list[str]:
    """Causes of figures that are other than expected, the likeliest first.

    Args:
        people: what was found and the ground truth.
        labels: the skeleton of the ground truth.
        found_labels: the skeleton of the network.
    """
    said = []
    counted = ~people.never
    flat = int((counted & (people.areas <= _FLAT * people.boxes[:, 2:].prod(axis=1))).sum())
    if flat:
        said.append(
            f"area is 0 for {flat} of {int(counted.sum())} people, or far below their box's, and OKS is 0 then: give the "
            "areas, or drop 'area' from the annotations, so that the box's is taken"
        )
    lacking = [name for name in labels.names if name not in found_labels.names]
    if lacking:
        few = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        said.append(
            f"the network has no keypoint named like {len(lacking)} of {len(labels.names)} of the annotations ({few}): "
            "keypoints are joined by name; compare model.spec.labels with the category in the annotation file"
        )
    ap = people.matches().figures(None, ["ap"])["ap"]
    if not 0 <= ap < IMPLAUSIBLE:
        return said
    return [
        f"AP is {ap:.3f}, implausible for a trained network; what it may come from:",
        *said,
        *(_causes(people, labels, ap) or ([] if said else [_UNKNOWN])),
    ]


def _causes(people: Everybody, labels: Skeleton, ap: float) -> list[str]:
    """Causes of an average precision near 0."""
    wanted, found = int((~people.never).sum()), len(people.scores)
    said = []
    if found < _FEW * wanted:
        said.append(
            f"{found} people found, {wanted} to be found: lower the decoder's thresholds (decoder.*), and compare the input's "
            "order, range, mean and std in model.spec with the network's training"
        )
    truth = people.truth[~people.never]
    seen = truth[..., 2] > 0
    if seen.any() and np.abs(truth[seen][:, :2]).max() <= 2:
        said.append("all labelled keypoints lie within 2 pixels: they may be fractions of the image's size; write pixels")
    flip = np.array(labels.flip)
    for what, other, fix in (
        (
            "left and right exchanged",
            people.found[:, flip],
            "compare the order of model.spec.labels with the network's outputs",
        ),
        ("x and y exchanged", people.found[..., ::-1], "compare the axes of the annotations and of the network's outputs"),
    ):
        mended = replace(people, found=np.ascontiguousarray(other)).matches().figures(None, ["ap"])["ap"]
        if mended > ap + _BETTER:
            said.append(f"AP is {mended:.3f} with {what}: {fix}")
    return said
