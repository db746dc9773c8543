"""Possible causes of implausible figures, as far as the data shows them, each with what to check."""

from dataclasses import replace

import numpy as np

from evaluation.metrics.oks import Everybody
from posepress.labels import Skeleton

IMPLAUSIBLE = 0.05  # an average precision below this threshold is implausible for a trained network
_FLAT = 1e-4  # least area of a person as a share of its box; real people fill a quarter or more
_FEW = 0.25  # least number of predictions as a share of the labelled people

_UNKNOWN = (
    "few predictions match labelled people: the network may be untrained or trained on other data; look at the pictures in the "
    "report, and compare order, range, mean, std, strides and labels in model.spec, and data.*.images with data.*.annotations"
)
_BETTER = 0.05  # least gain of average precision for an exchange to be reported


def doubts(people: Everybody, labels: Skeleton, found_labels: Skeleton) -> list[str]:
    """Possible causes of unexpected figures, the most likely first.

    Args:
        people: the predictions and the ground truth.
        labels: the skeleton of the ground truth.
        found_labels: the skeleton of the network.
    """
    said = []
    counted = ~people.never
    flat = int((counted & (people.areas <= _FLAT * people.boxes[:, 2:].prod(axis=1))).sum())
    if flat:
        said.append(
            f"area is 0 for {flat} of {int(counted.sum())} people, or far below that of their box, so that their OKS is 0: "
            "correct the areas, or drop 'area' from the annotations to use the boxes' areas"
        )
    lacking = [name for name in labels.names if name not in found_labels.names]
    if lacking:
        few = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        said.append(
            f"the network has no keypoint named like {len(lacking)} of {len(labels.names)} of the annotations ({few}): "
            "keypoints are matched by name; compare model.spec.labels with the category in the annotation file"
        )
    ap = people.matches().figures(None, ["ap"])["ap"]
    if not 0 <= ap < IMPLAUSIBLE:
        return said
    return [
        f"AP is {ap:.3f}, implausible for a trained network; possible causes:",
        *said,
        *(_causes(people, labels, ap) or ([] if said else [_UNKNOWN])),
    ]


def _causes(people: Everybody, labels: Skeleton, ap: float) -> list[str]:
    """Causes of an average precision near 0."""
    wanted, found = int((~people.never).sum()), len(people.scores)
    said = []
    if found < _FEW * wanted:
        said.append(
            f"{found} people are predicted, {wanted} are labelled: lower the decoder's thresholds (decoder.*), and compare "
            "the input's order, range, mean and std in model.spec with the network's training"
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
