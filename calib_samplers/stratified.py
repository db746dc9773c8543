"""Calibration images drawn from strata of people, so that the few that are used look like the many."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PERSONS = ((1, "1"), (2, "2-4"), (5, "5+"))
_AREAS = ((0.0, "small"), (32.0**2, "medium"), (96.0**2, "large"))  # COCO's
_KEYPOINTS = ((0.0, "few"), (6.0, "some"), (12.0, "most"))


@dataclass(frozen=True)
class CalibrationSet:
    """The chosen images.

    Attributes:
        ids: chosen images, in the data set's order.
        file_names: likewise.
        strata: the stratum of each, "persons/size/keypoints".
        quotas: for each stratum: images eligible, asked for and met.
        seed: of the draw.
    """

    ids: tuple[str, ...]
    file_names: tuple[str, ...]
    strata: tuple[str, ...]
    quotas: dict[str, dict[str, int]]
    seed: int

    @property
    def digest(self) -> str:
        """SHA-256 of the choice."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def strata(table: Mapping[str, NDArray[Any]]) -> NDArray[np.str_]:
    """The stratum of each image: persons an image x median person size x mean visible keypoints a person.

    Args:
        table: columns "persons", "area" (pixels) and "keypoints".
    """

    def named(values: NDArray[Any], bounds: tuple[tuple[float, str], ...]) -> list[str]:
        places = np.searchsorted([low for low, _ in bounds], values, side="right") - 1
        return [bounds[max(int(place), 0)][1] for place in places]

    columns = (
        named(table["persons"], _PERSONS),
        named(table["area"], _AREAS),
        named(table["keypoints"], _KEYPOINTS),
    )
    return np.array(["/".join(parts) for parts in zip(*columns, strict=True)])


def allocate(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Share `count` among strata in proportion to their sizes; the remainder goes to the largest fractions.

    No stratum is asked for more than it has, as long as `count` is at most their sum.
    """
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    quota = {name: int(share) for name, share in exact.items()}
    by_fraction = sorted(sizes, key=lambda name: (-(exact[name] - quota[name]), name))
    for name in by_fraction[: count - sum(quota.values())]:
        quota[name] += 1
    return quota


@dataclass(frozen=True)
class Stratified:
    """Draws images in proportion to their strata.

    Attributes:
        num_images: how many.
        min_persons_per_image: images with fewer labelled people are not eligible.
        min_kpts_per_person: images whose people have fewer labelled keypoints on average are not eligible.
        seed: of the draw.
    """

    num_images: int = 64
    min_persons_per_image: int = 1
    min_kpts_per_person: float = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the count.

        Raises:
            ValueError: it is below 1.
        """
        if self.num_images < 1:
            raise ValueError(f"sampler.num_images={self.num_images}: choose at least 1")

    def sample(self, table: Mapping[str, NDArray[Any]]) -> CalibrationSet:
        """Choose rows of a table.

        Args:
            table: columns "id", "file_name", "persons", "area", "keypoints", one row an image.

        Raises:
            ValueError: fewer images are eligible than asked for; the strata are listed.
        """
        enough = (table["persons"] >= self.min_persons_per_image) & (table["keypoints"] >= self.min_kpts_per_person)
        eligible = np.flatnonzero(enough)
        names = strata(table)
        found, sizes = np.unique(names[eligible], return_counts=True)
        available = {str(name): int(size) for name, size in zip(found, sizes, strict=True)}
        if self.num_images > len(eligible):
            listed = ", ".join(f"{name}: {size}" for name, size in available.items()) or "none"
            raise ValueError(
                f"sampler.num_images={self.num_images}: only {len(eligible)} images are eligible ({listed}); "
                f"ask for at most {len(eligible)}"
            )
        quota = allocate(available, self.num_images)
        draw = np.random.default_rng(self.seed)
        chosen: list[int] = []
        for name in sorted(available):
            members = eligible[names[eligible] == name]
            chosen += draw.permutation(members)[: quota[name]].tolist()
        chosen.sort()
        met = {name: int((names[chosen] == name).sum()) for name in available}
        return CalibrationSet(
            ids=tuple(str(table["id"][row]) for row in chosen),
            file_names=tuple(str(table["file_name"][row]) for row in chosen),
            strata=tuple(str(names[row]) for row in chosen),
            quotas={n: {"eligible": available[n], "asked": quota[n], "met": met[n]} for n in sorted(available)},
            seed=self.seed,
        )
