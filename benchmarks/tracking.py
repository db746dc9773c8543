"""Ids of people who cross, and the time of an update, on one thread: `taskset -c 0 python benchmarks/tracking.py`.

It prints the sums of id switches and the means of IDF1 and HOTA over ten generated videos of 300 images, 30 a second. Five
people walk to and fro and hide each other. The row "generator's ids" has the ids that the people really have. No tracker can
have more, as missed people and noise lower the figures, too. The row "last pose" knows no motion.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from posepress.results import Poses
from posepress.skeletons import COCO_17
from posepress.track import OneEuro, Tracker

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

HEIGHT, WIDTH, RATE = 720, 1280, 30
NOISE = 0.02  # standard deviation of a keypoint's x and y, as a share of the person's height
MISSED = 0.03  # share of people that are not found
LEAST_KEYPOINTS = 4  # a person with fewer visible keypoints is hidden
THRESHOLDS = np.arange(0.05, 0.99, 0.05)
SEEDS = range(10)

_REST = {  # forwards, sideways and down from the top of the head, as shares of the height
    "nose": (0.06, 0, 0.08), "left_eye": (0.045, 0.03, 0.06), "right_eye": (0.045, -0.03, 0.06),
    "left_ear": (0, 0.06, 0.07), "right_ear": (0, -0.06, 0.07), "left_shoulder": (0, 0.12, 0.2),
    "right_shoulder": (0, -0.12, 0.2), "left_elbow": (0, 0.15, 0.36), "right_elbow": (0, -0.15, 0.36),
    "left_wrist": (0.02, 0.16, 0.5), "right_wrist": (0.02, -0.16, 0.5), "left_hip": (0, 0.08, 0.52),
    "right_hip": (0, -0.08, 0.52), "left_knee": (0, 0.085, 0.75), "right_knee": (0, -0.085, 0.75),
    "left_ankle": (0, 0.09, 0.97), "right_ankle": (0, -0.09, 0.97),
}  # fmt: skip
_SWING = {"elbow": -0.06, "wrist": -0.16, "knee": 0.09, "ankle": 0.2}  # of the left side, forwards, as shares of the height
_SIGMAS = np.array(COCO_17.oks_sigmas)


class Frame(NamedTuple):
    """One image of a generated video.

    Attributes:
        seconds: time of the image.
        truth: the people, with their ids from 1 and the boxes of all their keypoints. Hidden keypoints have the score 0, hidden
            people are left out.
        found: what a network would find.
        owners: the true id of each found person, [N].
    """

    seconds: float
    truth: Poses
    found: Poses
    owners: I64


@dataclass(frozen=True)
class Walker:
    """A person who walks to and fro.

    Attributes:
        height: in pixels; a taller person is nearer.
        middle: x of the middle of the way, in pixels.
        reach: half the length of the way, in pixels.
        period: time of both ways, in seconds.
        phase: place on the way at the time 0, in radians.
    """

    height: float
    middle: float
    reach: float
    period: float
    phase: float

    def pose(self, seconds: float) -> F64:
        """The keypoints [17, 2] in pixels at a time."""
        angle = 2 * np.pi * seconds / self.period + self.phase
        ahead = -np.sin(angle)  # from -1 to 1; a person who turns round shows the front or the back
        sideways = np.sqrt(max(1 - ahead**2, 0.1)) * np.sign(np.cos(angle) or 1)
        x = self.middle + self.reach * np.cos(angle)
        steps = 2 * np.pi * (1.6 * seconds + self.phase)
        points = np.empty((17, 2))
        for k, name in enumerate(COCO_17.names):
            forwards, aside, down = _REST[name]
            side, _, part = name.partition("_")
            forwards += _SWING.get(part, 0) * np.sin(steps) * (1 if side == "left" else -1) * abs(ahead)
            points[k] = ahead * forwards + sideways * aside, down + 0.01 * np.cos(2 * steps)
        feet = 0.55 * HEIGHT + 0.4 * self.height
        return np.array([x, feet - self.height]) + self.height * points


def _hidden(points: F64, nearer: F64, height: float) -> NDArray[np.bool_]:
    """Which points [K, 2] are behind a person with keypoints [17, 2]: behind the head, the trunk or a limb."""
    shoulders, hips = nearer[5:7].mean(axis=0), nearer[11:13].mean(axis=0)
    head = nearer[:5].mean(axis=0)
    parts = [(head, head, 0.08), (shoulders, hips, 0.1)] + [(nearer[a], nearer[b], 0.04) for a, b in COCO_17.limbs]
    hidden = np.zeros(len(points), np.bool_)
    for start, end, width in parts:
        along = end - start
        share = np.clip((points - start) @ along / max(along @ along, 1e-9), 0, 1)
        hidden |= np.hypot(*(points - start - share[:, None] * along).T) < width * height
    return hidden


def crossing(people: int = 5, frames: int = 300, seed: int = 0) -> list[Frame]:
    """A video of people who walk to and fro in front of each other, 1280x720, 30 images a second.

    A network finds them with noise, misses some of them, and does not see keypoints behind people who are nearer.
    """
    draw = np.random.default_rng(seed)
    heights = np.sort(draw.uniform(240, 460, people))[::-1]  # nearest first
    walkers = [
        Walker(height, draw.uniform(540, 740), draw.uniform(350, 520), draw.uniform(8, 14), draw.uniform(0, 2 * np.pi))
        for height in heights.tolist()
    ]
    video = []
    for frame in range(frames):
        poses = np.stack([walker.pose(frame / RATE) for walker in walkers])
        visible = np.ones((people, 17), np.bool_)
        for n in range(people):
            for nearer in range(n):
                visible[n] &= ~_hidden(poses[n], poses[nearer], walkers[nearer].height)
        there = np.flatnonzero(visible.sum(axis=1) >= LEAST_KEYPOINTS)
        truth = np.dstack([poses, visible])[there]
        truth = np.where(truth[..., 2:] > 0, truth, 0).astype(np.float32)
        found = draw.permutation(there[draw.random(len(there)) >= MISSED])
        noise = draw.normal(0, NOISE, (len(found), 17, 2)) * heights[found, None, None]
        certainty = draw.uniform(0.6, 0.95, (len(found), 17)) * visible[found]
        keypoints = np.dstack([(poses[found] + noise) * visible[found, :, None], certainty]).astype(np.float32)
        scores = certainty.mean(axis=1).astype(np.float32)
        ids = there.astype(np.int64) + 1
        boxes = np.hstack([poses.min(axis=1), np.ptp(poses, axis=1)])[there].astype(np.float32)
        labels = Poses(truth, np.ones(len(there), np.float32), boxes=boxes, ids=ids)
        video.append(Frame(frame / RATE, labels, Poses(keypoints, scores), found.astype(np.int64) + 1))
    return video


def similarity(truth: Poses, found: Poses) -> F64:
    """OKS [G, P] of the people of an image and the found ones, with the areas of the people's boxes."""
    values = np.zeros((len(truth.scores), len(found.scores)))
    for g, person in enumerate(truth.keypoints.astype(np.float64)):
        labelled = person[:, 2] > 0
        area = (np.ptp(person[labelled, :2], axis=0) if truth.boxes is None else truth.boxes[g, 2:]).prod()
        away = ((found.keypoints[:, labelled, :2] - person[labelled, :2]) ** 2).sum(axis=2)
        values[g] = np.exp(-away / (2 * (2 * _SIGMAS[labelled]) ** 2 * (area + np.spacing(1)))).mean(axis=1)
    return values


def switches(owners: Iterable[I64], ids: Iterable[I64]) -> int:
    """How often a person's id is another than the one before, where the true ids of the found people are known."""
    last: dict[int, int] = {}
    count = 0
    for true, given in zip(owners, ids, strict=True):
        for owner, one in zip(true.tolist(), given.tolist(), strict=True):
            if one:
                count += last.get(owner, one) != one
                last[owner] = one
    return count


class Pairs(NamedTuple):
    """People and similarities of one image: the true ids [G], the given ids [P], and OKS [G, P]."""

    truth: I64
    given: I64
    oks: F64


def pairs_of(truth: Poses, found: Poses) -> Pairs:
    """The comparison of an image's people with the found ones. Found people without an id (0) are left out."""
    assert truth.ids is not None
    assert found.ids is not None
    return Pairs(truth.ids, found.ids[found.ids > 0], similarity(truth, found)[:, found.ids > 0])


def idf1(images: Sequence[Pairs], threshold: float = 0.5) -> float:
    """The F1 score of ids (Ristani et al. 2016, arXiv:1609.01775), with the best one-to-one matching of whole tracks.

    The matching has the greatest number of pairs with the similarity `threshold` or more. This is the least cost of the paper,
    where a pair that is not matched costs one miss and one false positive.
    """
    overlaps: Counter[tuple[int, int]] = Counter()
    people = 0
    for image in images:
        people += len(image.truth) + len(image.given)
        for g, p in np.argwhere(image.oks >= threshold).tolist():
            overlaps[int(image.truth[g]), int(image.given[p])] += 1
    true, given = (sorted({pair[side] for pair in overlaps}) for side in (0, 1))
    hits = np.array([[overlaps[t, p] for p in given] for t in true]).reshape(len(true), len(given))
    rows, columns = linear_sum_assignment(-hits)
    return float(2 * hits[rows, columns].sum() / max(people, 1))


def hota(images: Sequence[Pairs]) -> float:
    """Higher order tracking accuracy (Luiten et al. 2020, arXiv:2009.07736), the mean over thresholds from .05 to .95.

    The matching of an image maximises the similarity times the alignment of both tracks over the video, as in the authors'
    code.
    """
    truths = Counter(t for image in images for t in image.truth.tolist())
    givens = Counter(p for image in images for p in image.given.tolist())
    shared: defaultdict[tuple[int, int], float] = defaultdict(float)
    for image in images:
        total = image.oks.sum(axis=0) + image.oks.sum(axis=1, keepdims=True) - image.oks
        shares = np.divide(image.oks, total, out=np.zeros_like(total), where=total > 1e-12)
        for (g, p), share in np.ndenumerate(shares):
            shared[int(image.truth[g]), int(image.given[p])] += share
    alignment = {pair: value / (truths[pair[0]] + givens[pair[1]] - value) for pair, value in shared.items()}
    hits: list[Counter[tuple[int, int]]] = [Counter() for _ in THRESHOLDS]
    for image in images:
        scores = image.oks.copy()
        for g, p in np.ndindex(scores.shape):
            scores[g, p] *= alignment[int(image.truth[g]), int(image.given[p])]
        for g, p in zip(*linear_sum_assignment(-scores), strict=True):
            for n in np.flatnonzero(image.oks[g, p] >= THRESHOLDS - 1e-12):
                hits[n][int(image.truth[g]), int(image.given[p])] += 1
    people = sum(truths.values()) + sum(givens.values())
    values = []
    for counts in hits:
        found = sum(counts.values())
        association = sum(count * count / (truths[t] + givens[p] - count) for (t, p), count in counts.items())
        # sqrt(DetA AssA), with DetA = found / (people - found) and AssA = association / found
        values.append(np.sqrt(association / max(people - found, 1)))
    return float(np.mean(values))


class LastPose:
    """A tracker without motion: the pose with the greatest OKS to a person's last pose gets that person's id."""

    def __init__(self) -> None:
        self._last: dict[int, NDArray[np.float32]] = {}

    def update(self, found: Poses, seconds: float) -> Poses:
        """Give the people ids; the time does not count."""
        del seconds
        known = list(self._last)
        before = np.stack(list(self._last.values())) if known else np.zeros((0, 17, 3), np.float32)
        values = similarity(Poses(before, np.ones(len(known), np.float32)), found)
        ids = np.zeros(len(found.scores), np.int64)
        for row, column in zip(*linear_sum_assignment(-values), strict=True):
            ids[column] = known[row] if values[row, column] >= 0.3 else 0
        new = np.flatnonzero(ids == 0)
        ids[new] = max(known, default=0) + 1 + np.arange(len(new))
        self._last |= {int(one): pose for one, pose in zip(ids, found.keypoints, strict=True)}
        return replace(found, ids=ids)


def tracked(video: Sequence[Frame], tracker: Tracker | LastPose) -> tuple[list[Poses], list[float]]:
    """The poses of a video with ids, and the time of each update in ms."""
    poses, times = [], []
    for frame in video:
        start = time.perf_counter()
        poses.append(tracker.update(frame.found, frame.seconds))
        times.append(1e3 * (time.perf_counter() - start))
    return poses, times


def row(title: str, videos: Sequence[list[Frame]], tracker: Callable[[], Tracker | LastPose] | None) -> list[str]:
    """The figures of a tracker over some videos; None has the true ids."""
    count, identity, order, times = 0, list[float](), list[float](), list[float]()
    for video in videos:
        if tracker is None:
            poses, spent = [replace(frame.found, ids=frame.owners) for frame in video], list[float]()
        else:
            poses, spent = tracked(video, tracker())
        images = [pairs_of(frame.truth, found) for frame, found in zip(video, poses, strict=True)]
        count += switches((frame.owners for frame in video), (found.ids for found in poses if found.ids is not None))
        identity.append(idf1(images))
        order.append(hota(images))
        times += spent
    speed = [f"{np.median(times):.2f}", f"{np.percentile(times, 95):.2f}"] if times else ["", ""]
    return [title, str(count), f"{np.mean(identity):.3f}", f"{np.mean(order):.3f}", *speed]


def main() -> None:
    """Print the table."""
    videos = [crossing(seed=seed) for seed in SEEDS]
    table = Table("five people, 10 videos", "id switches", "IDF1", "HOTA", "p50, ms", "p95, ms")
    table.add_row(*row("generator's ids", videos, None))
    table.add_row(*row("last pose", videos, LastPose))
    table.add_row(*row("Tracker", videos, lambda: Tracker(COCO_17.oks_sigmas)))
    table.add_row(*row("Tracker with OneEuro", videos, lambda: Tracker(COCO_17.oks_sigmas, smoothing=OneEuro())))
    Console(width=90).print(table)


if __name__ == "__main__":
    main()
