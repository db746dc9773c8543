"""Where the average precision of keypoints is lost: by keypoint, by stratum, by kind of error."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics.oks import Everybody, oks
from posepress.compiled import compiled
from posepress.labels import Skeleton

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

# Ronchi and Perona, "Benchmarking and Error Diagnosis in Multi-Instance Pose Estimation" (arXiv:1707.05388), section 3.
KINDS = ("good", "jitter", "inversion", "swap", "miss")
_GOOD, _NEAR, _MATCHED = 0.85, 0.5, 0.1  # least similarity of good and of jittered keypoints; least OKS of a match

PERSONS = {"persons_1": (1, 1), "persons_2-4": (2, 4), "persons_5+": (5, 10**9)}  # least and most labelled people in an image
HIDDEN = {"hidden_0": (-1.0, 0.0), "hidden_to_.25": (0.0, 0.25), "hidden_above_.25": (0.25, 1.0)}  # share of hidden keypoints


@compiled
def _partners(similarity: F64, never: NDArray[np.bool_]) -> I64:
    """The ground-truth person of each prediction, highest score first, or -1; `similarity` is [D, G]."""
    partners = np.full(similarity.shape[0], -1, np.int64)
    taken = never.copy()
    for d in range(similarity.shape[0]):
        best = _MATCHED
        for g in range(similarity.shape[1]):
            if not taken[g] and similarity[d, g] >= best:
                best, partners[d] = similarity[d, g], g
        if partners[d] >= 0:
            taken[partners[d]] = True
    return partners


@compiled
def _kinds(
    found: F64, partners: I64, truth: F64, areas: F64, never: NDArray[np.bool_], sigmas: F64, flip: I64
) -> NDArray[np.uint8]:
    """The kind of each predicted keypoint [D, K] of an image, an index into KINDS; 255 for unlabelled keypoints."""
    D, K = found.shape[0], found.shape[1]
    out = np.full((D, K), 255, np.uint8)
    for d in range(D):
        g = partners[d]
        if g < 0:
            continue
        for k in range(K):
            if truth[g, k, 2] <= 0:
                continue
            kind = 4
            for other in range(truth.shape[0]):
                if never[other]:
                    continue
                for name in (k, flip[k]):
                    if truth[other, name, 2] <= 0:
                        continue
                    dx, dy = found[d, k, 0] - truth[other, name, 0], found[d, k, 1] - truth[other, name, 1]
                    near = np.exp(-(dx * dx + dy * dy) / (2 * sigmas[name]) ** 2 / (areas[other] + np.spacing(1.0)) / 2)
                    if other == g and name == k:
                        if near >= _NEAR:
                            kind = 0 if near >= _GOOD else 1
                    elif near >= _NEAR and kind > 1:
                        kind = min(kind, 2 if other == g else 3)
            out[d, k] = kind
    return out


def errors(everybody: Everybody, labels: Skeleton) -> dict[str, float]:
    """How often each kind of error occurs, and how much AP would be gained without it.

    Predictions, the highest score first, are matched to the ground-truth person with the greatest OKS, at least 0.1. Each
    labelled keypoint of a match is one of: good (similarity 0.85 or more), jitter (0.5 to 0.85), inversion (near the
    person's mirrored keypoint), swap (near another person's keypoint) or miss.

    Returns:
        "error_<kind>": share of the labelled keypoints of matched people. "gain_<kind>": AP gained if these keypoints were
        correct. "background": share of predictions without a match. "gain_background": AP gained without these. "missed":
        share of ground-truth people without a match.
    """
    flip = np.array(labels.flip)
    partners = np.full(len(everybody.scores), -1, np.int64)
    kinds = np.full(everybody.found.shape[:2], 255, np.uint8)
    background = np.zeros(len(partners), bool)
    sides = (everybody.found_starts, everybody.true_starts)
    starts = zip(*(side for starts in sides for side in (starts[:-1], starts[1:])), strict=True)
    for d0, d1, g0, g1 in starts:
        if d0 == d1:
            continue
        found, truth, never = everybody.found[d0:d1], everybody.truth[g0:g1], everybody.never[g0:g1]
        areas = everybody.areas[g0:g1]
        similarity = oks(found, truth, everybody.boxes[g0:g1], areas, everybody.sigmas)
        own = _partners(similarity, never)
        kinds[d0:d1] = _kinds(found, own, truth, areas, never, everybody.sigmas, flip)
        absorbed = (similarity[:, never] >= _MATCHED).any(axis=1)
        background[d0:d1] = (own < 0) & ~absorbed
        partners[d0:d1] = np.where(own >= 0, own + g0, -1)
    before = everybody.matches().figures(None, ["ap"])["ap"]
    labelled = max(int((kinds != 255).sum()), 1)
    figures = {}
    true = everybody.truth[np.maximum(partners, 0), :, :2] if len(everybody.truth) else everybody.found
    for n, kind in enumerate(KINDS):
        figures[f"error_{kind}"] = float((kinds == n).sum() / labelled)
        if n:
            mended = replace(everybody, found=np.where((kinds == n)[..., None], true, everybody.found))
            figures[f"gain_{kind}"] = mended.matches().figures(None, ["ap"])["ap"] - before
    figures["background"] = float(background.mean()) if len(background) else 0.0
    figures["gain_background"] = _without(everybody, background).matches().figures(None, ["ap"])["ap"] - before
    matched = len(set(partners[partners >= 0].tolist()))
    figures["missed"] = 1 - matched / max(int((~everybody.never).sum()), 1)
    return figures


def _without(everybody: Everybody, gone: NDArray[np.bool_]) -> Everybody:
    """The data set without the predictions for which `gone` is true."""
    kept = np.concatenate([[0], np.cumsum(~gone)])
    return replace(
        everybody,
        found=everybody.found[~gone],
        scores=everybody.scores[~gone],
        found_starts=kept[everybody.found_starts].astype(np.int64),
    )


def by_keypoint(everybody: Everybody, labels: Skeleton) -> dict[str, float]:
    """AP of each keypoint alone: OKS uses only that keypoint, for the people in whom it is labelled."""
    figures = {}
    for k, name in enumerate(labels.names):
        truth = everybody.truth.copy()
        truth[:, np.arange(truth.shape[1]) != k, 2] = 0
        without = ~(truth[..., 2] > 0).any(axis=1)
        alone = replace(everybody, truth=truth, never=everybody.never | without)
        nobody = np.zeros(len(everybody.scores), bool)
        everyone = np.zeros(len(everybody.never), bool)
        figures[name] = alone.matches({"all": (everyone, nobody)}).figures(None, ["ap"])["ap"]
    return figures


def by_stratum(everybody: Everybody) -> dict[str, float]:
    """AP of images with few and many people, and of people with few and many hidden keypoints.

    People outside a stratum are ignored, as in COCO's area ranges. A false positive counts in every stratum.
    """
    figures = {}
    matches = everybody.matches()
    to_find = np.add.reduceat(np.append((~everybody.never).astype(int), 0), everybody.true_starts[:-1])
    to_find[np.diff(everybody.true_starts) == 0] = 0
    for name, (least, most) in PERSONS.items():
        counts = (to_find >= least) & (to_find <= most)
        figures[name] = matches.figures(counts, ["ap"])["ap"]
    labelled = (everybody.truth[..., 2] > 0).sum(axis=1)
    hidden = (everybody.truth[..., 2] == 1).sum(axis=1) / np.maximum(labelled, 1)
    nobody = np.zeros(len(everybody.scores), bool)
    strata = {name: (~((hidden > low) & (hidden <= high)), nobody) for name, (low, high) in HIDDEN.items()}
    divided = everybody.matches(strata)
    for name in strata:
        figures[name] = float(np.mean(divided.curves(name)[0]))
    return figures


def details(everybody: Everybody, labels: Skeleton) -> dict[str, dict[str, float]]:
    """AP by keypoint and by stratum, and the kinds of error."""
    return {
        "keypoints": by_keypoint(everybody, labels),
        "strata": by_stratum(everybody),
        "errors": errors(everybody, labels),
    }
