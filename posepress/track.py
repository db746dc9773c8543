"""Tracking of people through a video: ids that stay the same over time, and keypoints without jitter.

Each person has a track: a position with a constant velocity (Kalman 1960, doi:10.1115/1.3662552) and a shape, the offsets of
the keypoints from the position. A track predicts the keypoints of the next image, as in SORT (Bewley et al. 2016,
arXiv:1602.00763). OKS compares them with the poses, and an exact assignment chooses the pairs. People who cross keep their ids,
because their tracks move through each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from posepress.checks import MOST_VALUE, number, shown
from posepress.results import Poses

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]

SURE = 1 / 3  # least score of a person who starts a track, as a share of the best score
LEAST_SIDE = 32.0  # shortest long side of a person's box, in pixels
NARROW = 0.25  # shortest side of a person's box, as a share of the long side

# Sizes are roots of areas. The values had the fewest switches of ids in benchmarks/tracking.py.
AGITATION = 0.25  # variance that the velocity gains in a second, in squared sizes a second
SPEED = 2.0  # standard deviation of the velocity of a new person, in sizes a second
SWAY = 0.02  # standard deviation of a person's position that no average removes, as the whole body moves; in sizes
SHAPE_SECONDS = 0.05  # time in which a shape takes on most of a change
DOUBT = 0.15  # power of the share of certainty by which a similarity is lowered
ROUNDING = 1e-9  # seconds; n / 30 is not exact


@dataclass(frozen=True)
class FilterState:
    """What a `OneEuro` filter knows about the keypoints of some people.

    Attributes:
        points: float64 [N, K, 2], the smooth x and y in pixels.
        speeds: float64 [N, K, 2], the smooth speeds in pixels a second.
        seconds: float64 [N, K], the time of the last visible value; -inf before the first one.
    """

    points: F64
    speeds: F64
    seconds: F64

    @classmethod
    def empty(cls, people: int, keypoints: int) -> "FilterState":
        """The state before the first image.

        Args:
            people: number of people, N.
            keypoints: number of keypoints of each person, K.
        """
        nothing = np.zeros((people, keypoints, 2))
        return cls(nothing, nothing.copy(), np.full((people, keypoints), -np.inf))


@dataclass(frozen=True)
class OneEuro:
    """The One Euro filter of keypoints (Casiez et al. 2012, doi:10.1145/2207676.2208639).

    A low-pass filter whose cutoff grows with the speed: a still person does not jitter, and a moving person lags little. Speeds
    are in percent of the person's size a second, so that the parameters do not depend on the resolution. The size is the square
    root of the area of the keypoints' box.

    Attributes:
        minimum_cutoff: cutoff of a still keypoint, in Hz; lower values remove more jitter.
        beta: growth of the cutoff, in Hz for each percent of the size a second; higher values lag less.
        derivative_cutoff: cutoff of the speed, in Hz.
    """

    minimum_cutoff: float = 1.0
    beta: float = 0.05
    derivative_cutoff: float = 1.0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: a cutoff is not above 0, or beta is negative.
        """
        number("smoothing.minimum_cutoff", self.minimum_cutoff, 1e-6, 1e6)
        number("smoothing.beta", self.beta, 0, 1e6)
        number("smoothing.derivative_cutoff", self.derivative_cutoff, 1e-6, 1e6)

    def step(self, state: FilterState, points: F64, visible: Mask, sizes: F64, seconds: float) -> FilterState:
        """Filter the keypoints of one image: algorithm 1 of the paper, with the length of the speed's vector as the speed.

        Args:
            state: the state after the image before.
            points: [N, K, 2], x and y in pixels; values of keypoints that are not visible do not count.
            visible: [N, K], whether a keypoint is there; the state of a missing one stays.
            sizes: [N], the people's sizes in pixels, above 0.
            seconds: time of the image.

        Returns:
            The new state; its `points` are the smooth keypoints.

        Raises:
            ValueError: the time is not finite, or is not later than a keypoint's last one.
        """
        _growing(seconds, float(state.seconds.max(initial=-np.inf)))
        steps = (seconds - state.seconds)[..., None]  # inf for a new keypoint: its share is 1, and its speed 0
        speeds = (points - state.points) / steps
        speeds = state.speeds + _share(self.derivative_cutoff, steps) * (speeds - state.speeds)
        percent = 100 * np.hypot(speeds[..., :1], speeds[..., 1:]) / sizes[:, None, None]
        share = _share(self.minimum_cutoff + self.beta * percent, steps)
        there = visible[..., None]
        return FilterState(
            np.where(there, state.points + share * (points - state.points), state.points),
            np.where(there, speeds, state.speeds),
            np.where(visible, seconds, state.seconds),
        )


def _share(cutoff: F64 | float, steps: F64) -> F64:
    """The share of the new value in a low-pass filter, from its cutoff in Hz and the time step in seconds."""
    share: F64 = 1 / (1 + 1 / (2 * np.pi * cutoff * steps))
    return share


def _growing(seconds: float, before: float) -> None:
    """Make sure that times grow.

    Raises:
        ValueError: the time is not finite, or is not later than the one before.
    """
    number("seconds", seconds)
    if seconds <= before:
        raise ValueError(f"seconds={seconds:g}: not later than the image before, {before:g}; give times that grow, or reset")


class _People(NamedTuple):
    """The poses of an image, or the predictions of tracks.

    Attributes:
        points: [N, K, 2], in pixels; 0 where missing.
        visible: [N, K].
        areas: [N], of the boxes, in squared pixels.
    """

    points: F64
    visible: Mask
    areas: F64


@dataclass(frozen=True)
class _Tracks:
    """The tracks of T people.

    Attributes:
        ids: [T].
        scores: [T], each person's last score.
        seconds: [T], the time at which the person was last in an image.
        positions: [T, 2], in pixels.
        velocities: [T, 2], in pixels a second.
        variances: [T, 3], of the position, of position with velocity, and of the velocity; x and y have the same.
        shapes: [T, K, 2], offsets of the keypoints from the position, in pixels.
        times: [T, K], the time at which each keypoint was last visible; -inf for never, or too long ago.
        smooth: [T, K, 2], the smooth keypoints.
        speeds: [T, K, 2], their smooth speeds.
    """

    ids: I64
    scores: F64
    seconds: F64
    positions: F64
    velocities: F64
    variances: F64
    shapes: F64
    times: F64
    smooth: F64
    speeds: F64

    def rows(self, rows: Mask) -> "_Tracks":
        """Copies of some tracks."""
        return _Tracks(*(getattr(self, one.name)[rows] for one in fields(self)))

    def joined(self, others: "_Tracks") -> "_Tracks":
        """Copies of these tracks, and of others behind them."""
        return _Tracks(*(np.concatenate([getattr(self, one.name), getattr(others, one.name)]) for one in fields(self)))


class Tracker:
    """Gives the people of a video ids that stay the same over time.

    The images come in the order of time, one `update` each. A person who enters gets an id at once. Two kinds of poses start no
    track, as they would use up ids; without a track they have the id 0:

    - poses with less than a third of the best score, among the people of the image and the people with tracks;
    - poses that resemble a person with an id, or a better new person, with an OKS of `least_oks` or more.

    Both kinds can continue a track: a person who is partly hidden keeps the id. Poses with a good score choose their tracks
    first, as in ByteTrack (Zhang et al. 2022, arXiv:2110.06864).
    """

    def __init__(
        self, sigmas: Sequence[float], least_oks: float = 0.2, lost_seconds: float = 2.0, smoothing: OneEuro | None = None
    ) -> None:
        """Take the options.

        Args:
            sigmas: OKS standard deviations, one for each keypoint (`Skeleton.oks_sigmas`).
            least_oks: least OKS of a pose and the prediction of its track, above 0 to 1.
            lost_seconds: time for which the track of a missing person is kept, in seconds. A person who comes back later gets a
                new id. Images that are further apart than this share no ids.
            smoothing: filter of the keypoints; None leaves them as they are.

        Raises:
            ValueError: there are no sigmas, or an option is out of range. The message begins with the option.
        """
        for place, sigma in enumerate(sigmas):
            number(f"sigmas[{place}]", sigma, 1e-6, 1e3)
        if not len(sigmas):
            raise ValueError("sigmas=[]: give the OKS standard deviation of each keypoint")
        number("least_oks", least_oks, 1e-6, 1)
        number("lost_seconds", lost_seconds, 0)
        if not isinstance(smoothing, OneEuro | None):
            raise ValueError(f"smoothing={shown(smoothing)}: give a OneEuro filter, or None")  # noqa: TRY004
        self._sigmas = np.array(sigmas, np.float64)
        self._least_oks, self._lost_seconds, self._smoothing = least_oks, lost_seconds, smoothing
        self.reset()

    def reset(self) -> None:
        """Forget all people and the time: the next image begins another video, whose ids begin at 1."""
        none = np.zeros((0, len(self._sigmas)))
        self._tracks = self._begun(_People(none[..., None].repeat(2, 2), none > 0, none[:, 0]), none[:, 0], -np.inf, 0)
        self._last = 0
        self._seconds = -np.inf

    def update(self, found: Poses, seconds: float) -> Poses:
        """Give the people of the next image their ids.

        Args:
            found: the poses of the image. Keypoints that a decoder filled in do not count when people are compared. Keypoints
                that are not finite are missing.
            seconds: time of the image.

        Returns:
            The same poses in the same order with `ids`, int64 [N], from 1; 0 for people without a track. With smoothing, the
            keypoints of people with a track are smooth. Keypoints that are not finite have become (0, 0, 0).

        Raises:
            ValueError: the time is not finite or not later than the one before, or the poses have another number of keypoints
                than there are sigmas. The tracks are as before.
        """
        K = len(self._sigmas)
        if found.keypoints.ndim != 3 or found.keypoints.shape[1:] != (K, 3):
            raise ValueError(f"keypoints: shape {list(found.keypoints.shape)}; give [N, {K}, 3], as there are {K} sigmas")
        _growing(seconds, self._seconds)
        finite: Mask = np.asarray(np.isfinite(found.keypoints).all(axis=2), np.bool_)
        if not finite.all():
            found = replace(found, keypoints=np.where(finite[..., None], found.keypoints, 0))
        people = _people(found.as_found().keypoints.astype(np.float64))
        scores = np.where(np.isfinite(found.scores), found.scores, -MOST_VALUE).astype(np.float64)

        recent = seconds - self._tracks.seconds <= self._lost_seconds + ROUNDING
        tracks = self._predicted(self._tracks.rows(recent), seconds)
        best = max(scores.max(initial=-np.inf), tracks.scores.max(initial=-np.inf))
        sure = (scores >= (SURE * best if best > 0 else best)) & people.visible.any(axis=1)
        rows = self._matches(tracks, people, sure)
        self._correct(tracks, people, scores, rows, seconds)
        starts = self._starts(people, scores, rows, sure)
        begun = self._begun(
            _People(people.points[starts], people.visible[starts], people.areas[starts]), scores[starts], seconds, self._last
        )
        rows[starts] = len(tracks.ids) + np.arange(len(starts))
        tracks = tracks.joined(begun)
        owned = rows >= 0
        found = self._smooth(tracks, found, people, rows, seconds)
        tracks.times[rows[owned]] = np.where(people.visible[owned], seconds, tracks.times[rows[owned]])
        self._tracks, self._seconds, self._last = tracks, seconds, self._last + len(starts)
        ids = np.zeros(len(rows), np.int64)
        ids[owned] = tracks.ids[rows[owned]]
        return replace(found, ids=ids)

    def _predicted(self, tracks: _Tracks, seconds: float) -> _Tracks:
        """The tracks at the time of an image: all move on with their velocities, and forget what they did not see for long."""
        step = seconds - self._seconds if len(tracks.ids) else 0.0
        tracks.times[seconds - tracks.times > self._lost_seconds + ROUNDING] = -np.inf
        tracks.positions[:] += step * tracks.velocities
        agitation = AGITATION * _expected(tracks).areas
        position, both, velocity = tracks.variances.T
        position += 2 * step * both + step**2 * velocity + agitation * step**3 / 3
        both += step * velocity + agitation * step**2 / 2
        velocity += agitation * step
        return tracks

    def _matches(self, tracks: _Tracks, people: _People, sure: Mask) -> I64:
        """The track of each person, [N]; -1 for none. Sure people choose first."""
        similarity = _oks(_expected(tracks), people, self._sigmas, tracks.variances[:, 0])
        similarity[similarity < self._least_oks] = 0
        rows = np.full(len(sure), -1)
        for group in (np.flatnonzero(sure), np.flatnonzero(~sure)):
            rows[group] = _assignment(similarity[:, group].T)
            similarity[rows[group][rows[group] >= 0]] = 0
        return rows

    def _correct(self, tracks: _Tracks, people: _People, scores: F64, rows: I64, seconds: float) -> None:
        """Correct the tracks of an image's people: the Kalman filter's update of positions, and an average of shapes.

        The measured displacement is the mean of the keypoints' displacements, with the weights 1 / sigma^2 of OKS.
        """
        there = np.flatnonzero(rows >= 0)
        at = rows[there]
        points, visible = people.points[there], people.visible[there]
        every = _expected(tracks)
        old = _People(every.points[at], every.visible[at], every.areas[at])
        residuals = points - old.points
        weights = (old.visible & visible) / self._sigmas**2
        offsets = (weights[..., None] * residuals).sum(axis=1) / weights.sum(axis=1)[:, None]
        noise = old.areas * (1 / weights.sum(axis=1) + SWAY**2)
        position, both, velocity = tracks.variances[at].T
        gain, push = position / (position + noise), both / (position + noise)
        measured = tracks.positions[at] + offsets
        tracks.positions[at] += gain[:, None] * offsets
        tracks.velocities[at] += push[:, None] * offsets
        tracks.variances[at] = np.stack([(1 - gain) * position, (1 - gain) * both, velocity - push * both], axis=1)
        # The shape has no part in the displacement. Otherwise it would take motion from the velocity.
        share = np.where(visible, 1 - np.exp(-(seconds - tracks.times[at]) / SHAPE_SECONDS), 0)
        shapes = tracks.shapes[at]
        tracks.shapes[at] = shapes + share[..., None] * (points - measured[:, None] - shapes)
        tracks.scores[at], tracks.seconds[at] = scores[there], seconds

    def _starts(self, people: _People, scores: F64, rows: I64, sure: Mask) -> I64:
        """The people who start a track: sure ones who do not resemble a person with a track, or a better new one."""
        candidates = np.flatnonzero(sure & (rows < 0))
        if not len(candidates):
            return candidates
        resembles = _oks(people, people, self._sigmas) >= self._least_oks
        chosen = rows >= 0
        starts = []
        for n in candidates[np.argsort(-scores[candidates], kind="stable")]:
            if not resembles[chosen, n].any():
                chosen[n] = True
                starts.append(n)
        return np.array(starts, np.int64)

    def _begun(self, people: _People, scores: F64, seconds: float, last: int) -> _Tracks:
        """New tracks of people, with the ids after `last`."""
        N = len(scores)
        weights = people.visible / self._sigmas**2
        positions = (weights[..., None] * people.points).sum(axis=1) / weights.sum(axis=1)[:, None]
        noise = people.areas * (1 / weights.sum(axis=1) + SWAY**2)
        state = FilterState.empty(N, len(self._sigmas))
        return _Tracks(
            ids=last + 1 + np.arange(N, dtype=np.int64),
            scores=scores,
            seconds=np.full(N, seconds),
            positions=positions,
            velocities=np.zeros((N, 2)),
            variances=np.stack([noise, np.zeros(N), SPEED**2 * people.areas], axis=1),
            shapes=np.where(people.visible[..., None], people.points - positions[:, None], 0),
            times=state.seconds,
            smooth=state.points,
            speeds=state.speeds,
        )

    def _smooth(self, tracks: _Tracks, found: Poses, people: _People, rows: I64, seconds: float) -> Poses:
        """The poses of an image, those of people with tracks smooth."""
        if self._smoothing is None:
            return found
        there = np.flatnonzero(rows >= 0)
        at, visible = rows[there], people.visible[there]
        state = FilterState(tracks.smooth[at], tracks.speeds[at], tracks.times[at])
        sizes = np.sqrt(_expected(tracks).areas[at])
        state = self._smoothing.step(state, people.points[there], visible, sizes, seconds)
        tracks.smooth[at], tracks.speeds[at] = state.points, state.speeds
        keypoints = found.keypoints.copy()
        keypoints[there, :, :2] = np.where(visible[..., None], state.points, keypoints[there, :, :2])
        return replace(found, keypoints=keypoints)


def _people(keypoints: F64) -> _People:
    """The poses of an image, from keypoints [N, K, 3]."""
    visible = keypoints[..., 2] > 0
    points = np.where(visible[..., None], keypoints[..., :2], 0)
    return _People(points, visible, _areas(points, visible))


def _expected(tracks: _Tracks) -> _People:
    """The poses that tracks predict."""
    points, visible = tracks.positions[:, None] + tracks.shapes, np.isfinite(tracks.times)
    return _People(points, visible, _areas(points, visible))


def _areas(points: F64, visible: Mask) -> F64:
    """The areas [N] of the boxes of visible keypoints.

    The keypoints of an arm or of one eye have a flat box. A side is at least a quarter of the other one, and `LEAST_SIDE`.
    """
    low = np.where(visible[..., None], points, np.inf).min(axis=1)
    high = np.where(visible[..., None], points, -np.inf).max(axis=1)
    sides = np.maximum(high - low, LEAST_SIDE)
    areas: F64 = np.maximum(sides, NARROW * sides.max(axis=1, keepdims=True)).prod(axis=1)
    return areas


def _oks(truth: _People, found: _People, sigmas: F64, spread: F64 | float = 0.0) -> F64:
    """Object keypoint similarity [T, N] as in COCO (https://cocodataset.org/#keypoints-eval), of keypoints visible in both.

    The area is that of the first person's box. People without common keypoints have the similarity 0.

    Args:
        truth: the first people.
        found: the second people.
        sigmas: standard deviations of the keypoints, [K].
        spread: variance of each first person's position, in squared pixels, [T]. It widens the tolerance, and lowers the
            similarity, so that a certain prediction wins.
    """
    common = truth.visible[:, None] & found.visible
    distances = ((truth.points[:, None] - found.points) ** 2).sum(axis=3)
    own = (2 * sigmas) ** 2 * truth.areas[:, None, None]
    variances = own + np.reshape(spread, (-1, 1, 1))
    values = np.exp(-distances / (2 * variances)) * (own / variances) ** DOUBT
    similarity: F64 = (values * common).sum(axis=2) / np.maximum(common.sum(axis=2), 1)
    return similarity


def _assignment(values: F64) -> I64:
    """The column of each row, [R], with the greatest sum of values [R, C]; each column is used at most once.

    Pairs with values of 0 or less are not chosen; their rows have -1.
    """
    columns = np.full(len(values), -1)
    if not values.size:
        return columns
    best = values.argmax(axis=1)
    rows = np.flatnonzero(values.max(axis=1) > 0)
    if len(set(best[rows].tolist())) == len(rows):  # no two rows want the same column, which is so in most images
        columns[rows] = best[rows]
        return columns
    costs = -np.maximum(values, 0)
    if len(values) <= values.shape[1]:
        columns = _cheapest(costs)
    else:
        turned = _cheapest(costs.T)
        columns[turned] = np.arange(values.shape[1])
    chosen = columns >= 0
    chosen[chosen] = values[chosen, columns[chosen]] > 0
    return np.where(chosen, columns, -1)


def _cheapest(costs: F64) -> I64:
    """The column of each row with the least sum of costs [R, C], R <= C.

    It is the method of shortest augmenting paths (Kuhn 1955, Munkres 1957; potentials as in Jonker and Volgenant 1987).
    """
    R, C = costs.shape
    u, v = np.zeros(R + 1), np.zeros(C + 1)
    owner = np.zeros(C + 1, np.int64)  # the row of each column, counted from 1; column 0 holds the row that looks for one
    for row in range(1, R + 1):
        owner[0], at = row, 0
        length, before, visited = np.full(C + 1, np.inf), np.zeros(C + 1, np.int64), np.zeros(C + 1, np.bool_)
        while owner[at]:
            visited[at] = True
            free = np.flatnonzero(~visited)
            through = costs[owner[at] - 1, free - 1] - u[owner[at]] - v[free]
            shorter = through < length[free]
            length[free[shorter]], before[free[shorter]] = through[shorter], at
            at = int(free[length[free].argmin()])
            step = length[at]
            u[owner[visited]] += step
            v[visited] -= step
            length[free] -= step
        while at:
            owner[at], at = owner[before[at]], int(before[at])
    columns = np.empty(R, np.int64)
    columns[owner[1:][owner[1:] > 0] - 1] = np.flatnonzero(owner[1:])
    return columns
