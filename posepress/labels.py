"""What the outputs of a network speak of: keypoints of a skeleton, or classes of a palette."""

from collections.abc import Sequence
from dataclasses import dataclass

from posepress.checks import (
    listed,
    number,
    shown,
    unique,
    whole,
)

SIGMA = 0.05  # OKS standard deviation of a keypoint without a known one; COCO's lie between .025 and .107
_LISTED = 20  # most names in a message


def enumerated(names: Sequence[str]) -> str:
    """The names in one line for a message, at most 20, and the number of the others."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class Skeleton:
    """Names of keypoints, and the limbs that join them.

    Attributes:
        names: one for each keypoint; the prefixes `left_` and `right_` mark mirrored keypoints, unless `mirror` is given.
        limbs: index pairs, counted from 0; a PAF field holds two channels (x, y) for each, in this order.
        sigmas: OKS standard deviations, one for each keypoint (COCO's `sigmas`); empty if they are unknown.
        mirror: index pairs of keypoints that change places in a mirrored image; empty: the names tell.
    """

    names: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()
    sigmas: tuple[float, ...] = ()
    mirror: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Check the values; compiled code relies on limbs that join existing keypoints.

        Raises:
            ValueError: a name occurs twice, a limb joins an unknown keypoint, the sigmas do not match the keypoints, or a sigma
                is not above 0. The message begins with the option.
        """
        for option in ("names", "limbs", "sigmas", "mirror"):
            if not isinstance(getattr(self, option), tuple):
                raise ValueError(f"{option}={shown(getattr(self, option))}: give a list")  # noqa: TRY004
        unique("names", self.names)
        K = len(self.names)
        if not K:
            raise ValueError("names=[]: give the name of each keypoint")
        object.__setattr__(self, "limbs", self._pairs("limbs"))
        object.__setattr__(self, "mirror", self._pairs("mirror"))
        ends = [end for pair in self.mirror for end in pair]
        if twice := [self.names[end] for end in ends if ends.count(end) > 1]:
            raise ValueError(f"mirror: '{twice[0]}' is in two pairs; give each keypoint one mirror image")
        for place, sigma in enumerate(self.sigmas):
            number(f"sigmas[{place}]", sigma, 1e-6, 1e3)
        if len(self.sigmas) not in (0, K):
            raise ValueError(f"sigmas: {len(self.sigmas)} numbers for {K} keypoints; give one for each")

    def _pairs(self, option: str) -> tuple[tuple[int, int], ...]:
        """The index pairs of an option.

        Raises:
            ValueError: a pair is none, names an unknown keypoint, or one keypoint twice.
        """
        K, pairs = len(self.names), []
        for place, given in enumerate(getattr(self, option)):
            pair = listed(given)
            if len(pair) != 2 or not all(isinstance(end, int) and not isinstance(end, bool) for end in pair):
                raise ValueError(f"{option}[{place}]={shown(given)}: give two indices of keypoints, counted from 0")
            if not all(0 <= end < K for end in pair):
                raise ValueError(
                    f"{option}[{place}]={list(pair)}: there are {K} keypoints, 0 to {K - 1}; count from 0 (COCO counts from 1)"
                )
            if pair[0] == pair[1]:
                raise ValueError(
                    f"{option}[{place}]={list(pair)}: joins '{self.names[pair[0]]}' with itself; give two keypoints"
                )
            pairs.append((pair[0], pair[1]))
        return tuple(pairs)

    @property
    def flip(self) -> tuple[int, ...]:
        """Index of each keypoint's mirror image; its own index if it has none."""
        if self.mirror:
            other = {a: b for pair in self.mirror for a, b in (pair, pair[::-1])}
            return tuple(other.get(n, n) for n in range(len(self.names)))
        at = {name: n for n, name in enumerate(self.names)}
        return tuple(at.get(_mirrored(name), n) for n, name in enumerate(self.names))

    @property
    def oks_sigmas(self) -> tuple[float, ...]:
        """OKS standard deviations, one for each keypoint; `SIGMA` for all if they are unknown."""
        return self.sigmas or (SIGMA,) * len(self.names)

    @property
    def limb_flip(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Index of each limb's mirror image, and a sign: -1 if the mirror image runs in the opposite direction, else 1.

        Raises:
            ValueError: a limb has no mirror image.
        """
        at = {limb: n for n, limb in enumerate(self.limbs)}
        indices, signs = [], []
        for a, b in self.limbs:
            mirror = (self.flip[a], self.flip[b])
            straight = mirror in at
            if not straight and mirror[::-1] not in at:
                raise ValueError(f"the limb {self.names[a]} - {self.names[b]} has no mirror image; choose flip=false")
            indices.append(at[mirror if straight else mirror[::-1]])
            signs.append(1 if straight else -1)
        return tuple(indices), tuple(signs)


def _mirrored(name: str) -> str:
    for side, other in (("left_", "right_"), ("right_", "left_")):
        if name.startswith(side):
            return other + name.removeprefix(side)
    return name


def distinct(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that differ from their neighbours, red, green and blue of 0 to 255."""
    return tuple((37 * n % 256, (91 * n + 80) % 256, (151 * n + 160) % 256) for n in range(count))


@dataclass(frozen=True)
class Palette:
    """The classes of a segmentation network.

    Attributes:
        names: one for each class, in the order of the class indices.
        colours: red, green and blue of each class in pictures, 0 to 255; none gives colours that differ from their neighbours.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a name occurs twice, or a class does not have one colour of three numbers. The message begins with the
                option.
        """
        for option in ("names", "colours"):
            if not isinstance(getattr(self, option), tuple):
                raise ValueError(f"{option}={shown(getattr(self, option))}: give a list")  # noqa: TRY004
        unique("names", self.names)
        colours = tuple(listed(colour) for colour in self.colours) or distinct(len(self.names))
        for place, colour in enumerate(colours):
            if len(colour) != 3:
                raise ValueError(f"colours[{place}]={shown(self.colours[place])}: give red, green and blue, 0 to 255")
            for value in colour:
                whole(f"colours[{place}]", value, 0, 255)
        if not self.names or len(colours) != len(self.names):
            raise ValueError(f"colours: {len(colours)} for {len(self.names)} classes; give one for each")
        object.__setattr__(self, "colours", colours)
