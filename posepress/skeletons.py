"""The skeletons that public pose networks and data sets use."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from posepress.checks import part, shown
from posepress.labels import Skeleton

# Names, limbs and sigmas of COCO keypoints: https://cocodataset.org/#keypoints-eval and person_keypoints_val2017.json.
COCO_17 = Skeleton(
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    limbs=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
        (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
    sigmas=(
        0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089,
        0.089,
    ),
)  # fmt: skip

# The 18 keypoints of OpenPose's COCO model (arXiv:1812.08008), limbs in the order of its PAF channels. The neck is the
# middle of the shoulders and is no COCO keypoint; it gets the shoulders' sigma.
OPENPOSE_18 = Skeleton(
    names=(
        "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist",
        "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye",
        "right_ear", "left_ear",
    ),
    limbs=(
        (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 2), (2, 3), (3, 4), (2, 16), (1, 5), (5, 6), (6, 7),
        (5, 17), (1, 0), (0, 14), (0, 15), (14, 16), (15, 17),
    ),
    sigmas=(
        0.026, 0.079, 0.079, 0.072, 0.062, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.107, 0.087, 0.089, 0.025, 0.025,
        0.035, 0.035,
    ),
)  # fmt: skip

_FINGERS = ("thumb", "index", "middle", "ring", "little")

# A hand: the wrist, and four points of each finger from its root to its tip. Sigmas of the left hand of COCO-WholeBody
# (arXiv:2007.11858). A mirrored left hand is a right one, whose points have the same names, so that no pairs change places.
HAND_21 = Skeleton(
    names=("wrist", *(f"{finger}_{n}" for finger in _FINGERS for n in range(1, 5))),
    limbs=tuple((0 if n == 0 else 4 * f + n, 4 * f + n + 1) for f in range(5) for n in range(4)),
    sigmas=(
        0.029, 0.022, 0.035, 0.037, 0.047, 0.026, 0.025, 0.024, 0.035, 0.018, 0.024, 0.022, 0.026, 0.017, 0.021, 0.021,
        0.032, 0.02, 0.019, 0.022, 0.031,
    ),
    mirror=(),
)  # fmt: skip

SKELETONS: Mapping[str, Skeleton] = {"coco_17": COCO_17, "openpose_18": OPENPOSE_18, "hand_21": HAND_21}


def skeleton_of(given: str | Mapping[str, Any] | Skeleton) -> Skeleton:
    """A skeleton, from a name, the content of a file, or itself.

    Args:
        given: "coco_17", "openpose_18", "hand_21", or a mapping in one of two forms. Ours: {names, limbs, sigmas, mirror},
            indices from 0; `edges` stands for limbs. A COCO category, which trt_pose's topology files have, too: {keypoints,
            skeleton, sigmas}, whose pairs count from 1.

    Raises:
        ValueError: the name is unknown, a key is unknown, or a value is wrong.
    """
    if isinstance(given, Skeleton):
        return given
    if isinstance(given, str):
        if given not in SKELETONS:
            raise ValueError(f"skeleton={given}: choose {', '.join(SKELETONS)}, or give a file FILE.json")
        return SKELETONS[given]
    content = dict(given)
    if "keypoints" in content:
        pairs = content.get("skeleton") or []
        if not isinstance(pairs, (list, tuple)) or not all(_whole(pair) for pair in pairs):
            raise ValueError(f"skeleton={shown(pairs)}: give pairs of keypoints, counted from 1")
        edges = [[end - 1 for end in pair] for pair in pairs]
        content = {"names": content["keypoints"], "limbs": edges, **{k: content[k] for k in _MORE if k in content}}
    if "edges" in content:
        content["limbs"] = content.pop("edges")
    return part(Skeleton, "skeleton", content, ("names", "limbs", "sigmas", "mirror"))


_MORE = ("sigmas", "mirror")  # keys that a category may have beside COCO's


def _whole(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and all(isinstance(end, int) for end in pair)


def completed(own: Skeleton, known: Skeleton) -> Skeleton:
    """The skeleton of a category with what a known skeleton adds, by the names of the keypoints.

    Args:
        own: skeleton of the category.
        known: gives mirror pairs to the keypoints that it names; names decide about the others. Gives limbs if the category
            has none, and sigmas if the category has none and both have the same names.
    """
    at = {name: place for place, name in enumerate(own.names)}

    def placed(pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        names = [(known.names[a], known.names[b]) for a, b in pairs]
        return tuple((at[a], at[b]) for a, b in names if a in at and b in at)

    mirror = placed(known.mirror)
    if mirror:
        rest = {place for name, place in at.items() if name not in known.names}
        mirror += tuple((a, b) for a, b in enumerate(own.flip) if a < b and {a, b} <= rest)
    sigmas = own.sigmas
    if not sigmas and known.sigmas and at.keys() == set(known.names):
        sigmas = tuple(known.sigmas[known.names.index(name)] for name in own.names)
    return replace(own, sigmas=sigmas, limbs=own.limbs or placed(known.limbs), mirror=mirror or own.mirror)
