"""People from heatmaps and part affinity fields (PAFs), decoded on the network's own grid.

The grouping follows OpenPose (Cao et al., arXiv:1812.08008): it finds the peaks of each keypoint's heatmap, scores limbs by
the line integral of their PAF, and assigns them limb by limb. Nothing is upsampled. Peaks get a sub-pixel position from a
parabola through the logarithms of three values, which is exact for a Gaussian. PAFs are sampled bilinearly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Interval, Len
from numpy.typing import NDArray

from posepress.checks import number, whole
from posepress.decoders.averaged import mirrored_heatmaps
from posepress.decoders.heatmap_paf.candidates import F32, I32, Candidates
from posepress.decoders.heatmap_paf.grouping import FEATURES, finish, join_limbs, kept_people
from posepress.decoders.heatmap_paf.limbs import score_limbs
from posepress.decoders.heatmap_paf.peaks import complete, find_peaks
from posepress.geometry import View, cells_to_input
from posepress.labels import Skeleton
from posepress.results import Poses
from posepress.spec import Array, NetworkSpec

_MOST = 10**6  # greatest value of a threshold

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


@cache
def limb_order(skeleton: Skeleton) -> tuple[I32, int]:
    """Order limbs for grouping: a spanning tree from the keypoint with most limbs, then the limbs that close cycles.

    Returns:
        [L, 3]: keypoint, keypoint, index in `skeleton.limbs`; and how many limbs the tree has.
    """
    degree = np.bincount(np.array(skeleton.limbs, np.int64).ravel(), minlength=len(skeleton.names))
    reached: set[int] = set()
    tree: list[int] = []
    while len(reached) < np.count_nonzero(degree):  # one tree for each connected part of the skeleton
        reached.add(max((k for k in range(len(degree)) if k not in reached), key=lambda k: degree[k]))
        while True:
            grown = []
            for index, (a, b) in enumerate(skeleton.limbs):
                if index not in tree and (a in reached) != (b in reached):
                    grown.append(index)
                    reached |= {a, b}
            if not grown:
                break
            tree += grown
    rest = [i for i in range(len(skeleton.limbs)) if i not in tree]
    order = [(*skeleton.limbs[i], i) for i in tree + rest]
    return np.array(order, np.int32).reshape(-1, 3), len(tree)


@cache
def _counted(skeleton: Skeleton) -> F32:
    """1 for keypoints that count in a person's score, [K]; 0 for the neck, because it follows from the shoulders."""
    counted = np.array([name != "neck" for name in skeleton.names], np.float32)
    return counted if counted.any() else np.ones_like(counted)


@dataclass(frozen=True)
class HeatmapPafDecoder:
    """Decoder of bottom-up networks with the fields "heatmaps" and "pafs".

    For fields in GPU memory, the GPU computes peaks and limb scores. The CPU always does the grouping.

    Attributes:
        spec: the network's description.
        heatmap_threshold: threshold of the heatmap value of a keypoint.
        paf_threshold: threshold of the PAF, projected on the limb, at each sample.
        min_keypoints: people with fewer keypoints are dropped; filled-in keypoints do not count.
        min_score: threshold of the sum of peak and limb scores, divided by the keypoints; people below it are dropped.
        max_peaks: largest number of peaks kept in one heatmap, the highest first; dropped peaks are counted.
        assignment: "greedy" takes a limb's best pairs first, as OpenPose does; "hungarian" maximises their sum.
        complete_poses: whether to place a missing keypoint at its map's highest value in the person's box, instead of (0, 0).
        box_margin: margin of the person's box in complete_poses, added on each side, as a fraction of its longer side.
        score_weights: weights of a person's score, one for each of `grouping.FEATURES`. A logistic function maps the sum to
            0..1. None takes the sum of the person's peak values as score.
    """

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"heatmaps": "CHW", "pafs": "CHW"}
    result: ClassVar[type] = Poses
    heatmap_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.05
    paf_threshold: Annotated[float, Interval(ge=0, le=1)] = 0.05
    min_keypoints: Annotated[int, Interval(ge=1, le=1000)] = 3
    min_score: Annotated[float, Interval(ge=0, le=1)] = 0.2
    max_peaks: Annotated[int, Interval(ge=1, le=256)] = 128
    assignment: Literal["greedy", "hungarian"] = "greedy"
    complete_poses: bool = True
    box_margin: Annotated[float, Interval(ge=0, le=10)] = 0.0
    score_weights: Annotated[Sequence[float], Len(7, 7)] | None = None

    def __post_init__(self) -> None:
        """Check the options, and that the fields fit the skeleton; compiled code relies on it.

        Raises:
            ValueError: a number is out of range or not finite, the assignment is unknown, or the number of weights is wrong. Or
                a field has too few channels, or heatmaps and PAFs have different strides.
        """
        for option in ("heatmap_threshold", "paf_threshold", "min_score"):
            number(f"decoder.{option}", getattr(self, option), -_MOST, _MOST)
        number("decoder.box_margin", self.box_margin, 0, 10)
        whole("decoder.min_keypoints", self.min_keypoints, 0, _MOST)
        whole("decoder.max_peaks", self.max_peaks, 1, 256)
        if not isinstance(self.complete_poses, bool):
            raise ValueError(f"decoder.complete_poses={self.complete_poses}: choose true or false")  # noqa: TRY004
        for place, weight in enumerate(self.score_weights or ()):
            number(f"decoder.score_weights[{place}]", weight)
        if self.assignment not in ("greedy", "hungarian"):
            raise ValueError(f"decoder.assignment={self.assignment}: unknown; use greedy or hungarian")
        if self.score_weights is not None and len(self.score_weights) != len(FEATURES):
            raise ValueError(f"decoder.score_weights: {len(self.score_weights)} numbers; give {len(FEATURES)}: {FEATURES}")
        self.spec.offers(self.needs)
        heat, paf, skeleton = self.spec.field("heatmaps"), self.spec.field("pafs"), self.spec.skeleton
        if not skeleton.limbs:
            raise ValueError("labels.limbs is missing: PAFs hold two channels for each limb, so give the limbs in their order")
        if heat.channels < len(skeleton.names) or paf.channels != 2 * len(skeleton.limbs) or heat.stride != paf.stride:
            raise ValueError(
                f"{heat.channels} heatmaps (stride {heat.stride}) and {paf.channels} PAF channels (stride {paf.stride}) do "
                f"not fit a skeleton of {len(skeleton.names)} keypoints and {len(skeleton.limbs)} limbs; correct model.spec"
            )

    @property
    def _shift(self) -> float:
        return self.spec.field("heatmaps").shift - self.spec.field("pafs").shift

    def candidates(self, heatmaps: F32, pafs: F32) -> Candidates:
        """Peaks and scored limbs of one image's fields [C, h, w].

        Raises:
            ValueError: the fields have other channels than described.
        """
        self._check(heatmaps.shape, pafs.shape)
        limbs, _ = limb_order(self.spec.skeleton)
        K = len(self.spec.skeleton.names)
        peaks, counts, dropped, strange = find_peaks(heatmaps, K, self.heatmap_threshold, self.max_peaks)
        scores, pairs, starts = score_limbs(pafs, limbs, peaks, counts, self._shift, self.paf_threshold)
        return Candidates(peaks, counts, scores, pairs, starts, dropped, strange)

    def _check(self, heatmaps: Sequence[int], pafs: Sequence[int]) -> None:
        """Make sure that fields of shapes [C, h, w] have the channels that compiled code reads."""
        K, L = len(self.spec.skeleton.names), len(self.spec.skeleton.limbs)
        if not len(heatmaps) == len(pafs) == 3 or heatmaps[0] < K or pafs[0] != 2 * L or 0 in (*heatmaps, *pafs):
            raise ValueError(
                f"heatmaps {list(heatmaps)} and PAFs {list(pafs)} are not the maps [C, h, w] of {K} keypoints and {L} limbs; "
                "correct model.spec"
            )

    def people(self, found: Candidates, heatmaps: F32, view: View) -> Poses:
        """Group the candidates of one image into people."""
        skeleton = self.spec.skeleton
        limbs, tree = limb_order(skeleton)
        optimal = self.assignment == "hungarian"
        joined = join_limbs(found.counts, limbs, tree, found.scores, found.pairs, found.starts, optimal)
        keypoints, limb_scores = kept_people(found.peaks, *joined, self.min_keypoints, self.min_score)
        present = np.isfinite(keypoints[..., 0])
        if self.complete_poses:
            complete(heatmaps, keypoints, self.box_margin)
        to_image = self._to_image(view)
        points, scores, guessed, features = finish(keypoints, present, limb_scores, _counted(skeleton), self._weights, to_image)
        if self.score_weights is not None:  # a linear fit may be negative; AP depends on the order alone
            scores = (1 / (1 + np.exp(-scores))).astype(np.float32)
        counts = {"dropped_peaks": found.dropped, "images_not_finite": int(found.not_finite)}
        return Poses(points, scores, {"guessed": guessed, "features": features}, counts)

    @cached_property
    def _weights(self) -> F32:
        plain = np.eye(len(FEATURES), dtype=np.float32)[0]
        return plain if self.score_weights is None else np.asarray(self.score_weights, np.float32)

    def _to_image(self, view: View) -> NDArray[np.float64]:
        """The matrix [2, 3] from heatmap cells to image pixels."""
        origin, x, y = view.to_image(cells_to_input(_CORNERS, self.spec.field("heatmaps"), view.size))
        return np.column_stack((x - origin, y - origin, origin))

    def decode(self, fields: Mapping[str, Array], views: Sequence[View]) -> list[Poses]:
        """Predict the people in each view.

        Args:
            fields: "heatmaps" [B, K + 1, h, w] (background last) and "pafs" [B, 2 L, h, w]; numpy arrays or torch tensors.
            views: B views.

        Returns:
            Poses in image pixels, one object for each view, in the network's own skeleton.
        """
        return [self.people(found, heatmaps, view) for (found, heatmaps), view in zip(self._every(fields), views, strict=True)]

    def _every(self, fields: Mapping[str, Any]) -> Iterator[tuple[Candidates, F32]]:
        heatmaps, pafs = fields["heatmaps"], fields["pafs"]
        if getattr(heatmaps, "is_cuda", False):
            from posepress.decoders.heatmap_paf.on_gpu import candidates

            self._check(heatmaps.shape[1:], pafs.shape[1:])
            limbs, _ = limb_order(self.spec.skeleton)
            K = len(self.spec.skeleton.names)
            made = candidates(
                heatmaps[:, :K], pafs, limbs, self._shift, self.heatmap_threshold, self.paf_threshold, self.max_peaks
            )
            for n, (found, maps) in enumerate(made):
                yield found or self.candidates(maps, pafs[n].float().cpu().numpy()), maps
            return
        for n in range(len(heatmaps)):
            maps, limb_maps = (np.ascontiguousarray(field[n], np.float32) for field in (heatmaps, pafs))
            yield self.candidates(maps, limb_maps), maps

    def merge(self, parts: Sequence[Poses], views: Sequence[View]) -> Poses:  # noqa: ARG002
        """The result of the only view: a bottom-up network sees each image in one view."""
        (poses,) = parts
        return poses

    def draw(self, image: NDArray[np.uint8], found: Poses) -> NDArray[np.uint8]:
        """The people drawn over their image [H, W, 3]."""
        return found.draw(image, self.spec.skeleton, captions=False)

    def readings(self, found: Poses) -> dict[str, Poses]:
        """Alternative versions of a prediction: "as_found" has the plain score and no filled-in keypoints."""
        return {"as_found": found.as_found()} if self.complete_poses or self.score_weights is not None else {}

    def plain(self, found: Poses) -> Poses:
        """The prediction with the plain score and without filled-in keypoints."""
        return self.readings(found).get("as_found", found)

    def mirror(self, name: str, field: F32) -> F32:
        """A field [C, h, w] of a mirrored view with left and right exchanged; PAF vectors are mirrored, too."""
        if name == "heatmaps":
            return mirrored_heatmaps(field, self.spec.skeleton)
        limbs, signs = self.spec.skeleton.limb_flip
        turned = field.reshape(-1, 2, *field.shape[1:])[list(limbs)] * np.array(signs, np.float32)[:, None, None, None]
        turned[:, 0] *= -1
        straight: F32 = turned.reshape(field.shape)
        return straight
