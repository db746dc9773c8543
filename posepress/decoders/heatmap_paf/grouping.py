"""Grouping of limbs into people: which pairs of peaks are limbs, and which limbs belong together."""

import numpy as np
from numpy.typing import NDArray

from posepress.compiled import compiled

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


@compiled
def _greedy(scores: F32, pairs: I32, nA: int, nB: int) -> I32:
    """Choose pairs [n, 2] greedily: the highest score comes first, and each peak is used at most once.

    The result holds the pairs' indices in falling order of score.
    """
    used_a, used_b = np.zeros(nA, np.bool_), np.zeros(nB, np.bool_)
    kept = np.empty(min(nA, nB), np.int32)
    n = 0
    for c in np.argsort(-scores, kind="mergesort"):
        a, b = pairs[c, 0], pairs[c, 1]
        if not (used_a[a] or used_b[b]):
            used_a[a], used_b[b] = True, True
            kept[n] = c
            n += 1
    return kept[:n]


@compiled
def _shortest_path(cost: F64, u: F64, v: F64, owner: I32, before: I32) -> int:
    """The free column at the end of the shortest augmenting path of the row in owner[0]; potentials and path are written.

    Args:
        cost: [rows, columns].
        u: potentials of the rows, which count from 1, [rows + 1].
        v: potentials of the columns, [columns + 1].
        owner: the row of each column, 0 for a free one, [columns + 1].
        before: the column before each column on the path, [columns + 1].
    """
    columns = cost.shape[1]
    least = np.full(columns + 1, np.inf)
    done = np.zeros(columns + 1, np.bool_)
    at = 0
    while True:
        done[at] = True
        step, following = np.inf, 0
        for s in range(1, columns + 1):
            if done[s]:
                continue
            reduced = cost[owner[at] - 1, s - 1] - u[owner[at]] - v[s]
            if reduced < least[s]:
                least[s], before[s] = reduced, at
            if least[s] < step:
                step, following = least[s], s
        for s in range(columns + 1):
            if done[s]:
                u[owner[s]] += step
                v[s] -= step
            else:
                least[s] -= step
        at = following
        if owner[at] == 0:
            return at


@compiled
def _hungarian(scores: F32, pairs: I32, nA: int, nB: int) -> I32:
    """Choose the pairs [n, 2] with the greatest sum of scores; each peak is used at most once.

    The result holds the pairs' indices in falling order of score.

    It is the method of shortest augmenting paths (Kuhn 1955, Munkres 1957; potentials as in Jonker and Volgenant 1987).
    """
    rows, columns = min(nA, nB), max(nA, nB)
    turned = nA > nB
    cost = np.zeros((rows, columns))
    index = np.full((rows, columns), -1, np.int32)
    for c in range(scores.shape[0]):
        r, s = (pairs[c, 1], pairs[c, 0]) if turned else (pairs[c, 0], pairs[c, 1])
        cost[r, s], index[r, s] = -scores[c], c
    u, v = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.zeros(columns + 1, np.int32)  # the row of each column, counted from 1; column 0 holds the row being placed
    before = np.zeros(columns + 1, np.int32)
    for row in range(1, rows + 1):
        owner[0] = row
        at = _shortest_path(cost, u, v, owner, before)
        while at != 0:
            owner[at] = owner[before[at]]
            at = before[at]
    kept = np.empty(rows, np.int32)
    n = 0
    for s in range(1, columns + 1):
        if owner[s] > 0 and index[owner[s] - 1, s - 1] >= 0:
            kept[n] = index[owner[s] - 1, s - 1]
            n += 1
    values, ordered = np.empty(n, np.float32), np.empty(n, np.int32)
    for c in range(n):
        values[c] = -scores[kept[c]]
    order = np.argsort(values, kind="mergesort")
    for c in range(n):  # numba takes a second to compile an array as index
        ordered[c] = kept[order[c]]
    return ordered


@compiled
def _join(members: I32, owner: I32, limb_scores: F32, alive: NDArray[np.bool_], p: int, q: int) -> bool:
    """Merge the people p and q, unless both have a keypoint of the same name; tell whether they were merged."""
    for k in range(members.shape[1]):
        if members[p, k] >= 0 and members[q, k] >= 0:
            return False
    for k in range(members.shape[1]):
        if members[q, k] >= 0:
            members[p, k] = members[q, k]
            owner[k, members[q, k]] = p
    limb_scores[p] += limb_scores[q]
    alive[q] = False
    return True


@compiled
def _attach(members: I32, owner: I32, person: int, keypoint: int, peak: int) -> bool:
    """Give a person a keypoint, unless it has one of this name; tell whether it was given."""
    if members[person, keypoint] >= 0:
        return False
    members[person, keypoint] = peak
    owner[keypoint, peak] = person
    return True


@compiled
def join_limbs(
    counts: I32, limbs: I32, tree: int, scores: F32, pairs: I32, starts: I32, optimal: bool
) -> tuple[I32, F32, NDArray[np.bool_]]:
    """Join pairs of peaks into people, limb by limb.

    Args:
        counts: peaks in each map, [K].
        limbs: [L, 3]: keypoint, keypoint, an unused number; limbs that close a cycle come last.
        tree: number of limbs that close no cycle. Only these limbs begin people; the others confirm and merge them.
        scores: scores of the candidate pairs, [n].
        pairs: indices of the two peaks of each candidate pair, [n, 2].
        starts: where each limb's candidates begin, [L + 1].
        optimal: whether to choose the pairs of each limb with the greatest sum of scores, instead of greedily.

    Returns:
        The index of each person's peaks [N, K], -1 where missing; sums of limb scores [N]; and whether the person still
        exists [N]. A person that was merged into another does not.
    """
    K, room, most = counts.shape[0], 1, 0
    for k in range(K):
        room += counts[k]
        most = max(most, counts[k])
    room = room // 2 + 1  # a person begins with two peaks
    owner, members = np.full((K, most), -1, np.int32), np.full((room, K), -1, np.int32)
    limb_scores, alive = np.zeros(room, np.float32), np.zeros(room, np.bool_)
    people = 0
    for at in range(limbs.shape[0]):
        A, B = limbs[at, 0], limbs[at, 1]
        values, candidates = scores[starts[at] : starts[at + 1]], pairs[starts[at] : starts[at + 1]]
        if values.shape[0] == 0:
            continue
        if optimal:
            kept = _hungarian(values, candidates, counts[A], counts[B])
        else:
            kept = _greedy(values, candidates, counts[A], counts[B])
        for c in kept:
            a, b = candidates[c, 0], candidates[c, 1]
            p, q = owner[A, a], owner[B, b]
            if p < 0 and q < 0:
                if at >= tree:
                    continue
                p = people
                people += 1
                alive[p] = True
                joined = _attach(members, owner, p, A, a) and _attach(members, owner, p, B, b)
            elif q < 0:
                joined = _attach(members, owner, p, B, b)
            elif p < 0:
                p = q
                joined = _attach(members, owner, p, A, a)
            else:
                joined = p == q or _join(members, owner, limb_scores, alive, p, q)
            if joined:
                limb_scores[p] += values[c]
    return members[:people], limb_scores[:people], alive[:people]


@compiled
def kept_people(
    peaks: F32, members: I32, limb_scores: F32, alive: NDArray[np.bool_], min_keypoints: int, min_score: float
) -> tuple[F32, F32]:
    """The people with enough keypoints and a sufficient score.

    Args:
        peaks: [K, P, 3] in cells.
        members: the index of each person's peaks, [N, K], -1 where missing.
        limb_scores: sums of limb scores, [N].
        alive: whether the person still exists, [N].
        min_keypoints: people with fewer keypoints are dropped.
        min_score: threshold of the sum of peak values and limb scores, divided by the keypoints; people below it are dropped.

    Returns:
        Keypoints [M, K, 3] in cells with their peak values, NaN where missing; and sums of limb scores [M].
    """
    N, K = members.shape
    keypoints, sums = np.full((N, K, 3), np.nan, np.float32), np.zeros(N, np.float32)
    n = 0
    for p in range(N):
        count, total = 0, limb_scores[p]
        for k in range(K):
            if members[p, k] >= 0:
                count += 1
                total += peaks[k, members[p, k], 2]
        if not (alive[p] and count >= min_keypoints and total >= min_score * count):
            continue
        sums[n] = limb_scores[p]
        for k in range(K):
            for c in range(3 if members[p, k] >= 0 else 0):
                keypoints[n, k, c] = peaks[k, members[p, k], c]
        n += 1
    return keypoints[:n], sums[:n]


FEATURES = ("peak_sum", "found", "peak_mean", "limb_mean", "guessed_sum", "size", "one")


@compiled
def finish(
    keypoints: F32, found: NDArray[np.bool_], limb_scores: F32, counted: F32, weights: F32, to_image: NDArray[np.float64]
) -> tuple[F32, F32, NDArray[np.bool_], F32]:
    """Poses in image pixels, with their scores and the features that scores are fitted to.

    Args:
        keypoints: [N, K, 3] in cells, NaN where missing.
        found: [N, K], whether a keypoint has a peak; others were filled in.
        limb_scores: sums over the person's limbs, [N].
        counted: 1 for keypoints that count in the score, else 0, [K]. A neck would count the shoulders twice.
        weights: weights of the score, one for each feature.
        to_image: [2, 3], from cells to image pixels.

    Returns:
        Keypoints [N, K, 3], (0, 0, 0) where missing; scores [N]; which keypoints were filled in [N, K]; and features [N, 7].
        The features, in the order of `FEATURES`, are: the sum of the peaks' values; the share of keypoints with a peak; the
        mean of the peaks' values; the limb scores' sum divided by the number of peaks; the sum of the filled-in values; the
        logarithm of the longer side, in cells, of the peaks' box; and the number 1.
    """
    N, K = found.shape
    features = np.empty((N, 7), np.float32)
    scores = np.zeros(N, np.float32)
    guessed = np.zeros((N, K), np.bool_)
    out = np.zeros((N, K, 3), np.float32)
    every = counted.sum()
    for p in range(N):
        total, values, guesses, some = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        x0, y0, x1, y1 = np.inf, np.inf, -np.inf, -np.inf
        count = 0
        for k in range(K):
            x, y, v = keypoints[p, k, 0], keypoints[p, k, 1], keypoints[p, k, 2]
            if np.isnan(x):
                continue
            out[p, k, 0] = to_image[0, 0] * x + to_image[0, 1] * y + to_image[0, 2]
            out[p, k, 1] = to_image[1, 0] * x + to_image[1, 1] * y + to_image[1, 2]
            out[p, k, 2] = v
            if not found[p, k]:
                guessed[p, k] = True
                guesses += v * counted[k]
                continue
            count += 1
            some += counted[k]
            total += v
            values += v * counted[k]
            x0, x1, y0, y1 = min(x0, x), max(x1, x), min(y0, y), max(y1, y)
        features[p, 0] = values
        features[p, 1] = some / every
        features[p, 2] = total / max(count, 1)
        features[p, 3] = limb_scores[p] / max(count, 1)
        features[p, 4] = guesses
        features[p, 5] = np.log1p(max(x1 - x0, y1 - y0)) if count > 0 else 0.0
        features[p, 6] = 1.0
        for f in range(7):
            scores[p] += features[p, f] * weights[f]
    return out, scores, guessed, features
