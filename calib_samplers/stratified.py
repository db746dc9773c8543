"""Calibration images drawn from strata, so that a few images represent the whole data set."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

import numpy as np
from annotated_types import Interval, MinLen
from numpy.typing import NDArray

Allocation = Literal["proportional", "equal", "square_root"]
Bins = Mapping[str, Mapping[str, float]]  # for each column, the least value of each bin by its name, in rising order

UNKNOWN = -1  # value of "persons" for an image without labels
PEOPLE: Bins = {
    "persons": {"0": 0, "1": 1, "2-4": 2, "5+": 5},
    "area": {"small": 0.0, "medium": 32.0**2, "large": 96.0**2},  # COCO's ranges, in pixels
    "keypoints": {"few": 0.0, "some": 6.0, "most": 12.0},
    "coverage": {"part": 0.0, "much": 0.6, "all": 1.0},
}


@dataclass(frozen=True)
class CalibrationSet:
    """The chosen images.

    Attributes:
        ids: chosen images, in the table's order.
        file_names: file names of the chosen images, in the table's order.
        rows: row numbers of the chosen images in the table.
        strata: the stratum of each chosen image.
        quotas: for each stratum, the numbers of images that are eligible, asked for and chosen.
        seed: seed of the draw.
    """

    ids: tuple[str, ...]
    file_names: tuple[str, ...]
    rows: tuple[int, ...]
    strata: tuple[str, ...]
    quotas: dict[str, dict[str, int]]
    seed: int

    @classmethod
    def of(
        cls,
        table: Mapping[str, NDArray[Any]],
        names: NDArray[np.str_],
        eligible: NDArray[np.intp],
        chosen: Sequence[int],
        quota: Mapping[str, int],
        seed: int,
    ) -> "CalibrationSet":
        """The calibration set of the chosen rows of a table, with the quota of each stratum."""
        rows = sorted(chosen)
        available, met = (dict(zip(*np.unique(names[some], return_counts=True), strict=True)) for some in (eligible, rows))
        return cls(
            ids=tuple(str(table["id"][row]) for row in rows),
            file_names=tuple(str(table["file_name"][row]) for row in rows),
            rows=tuple(int(row) for row in rows),
            strata=tuple(str(names[row]) for row in rows),
            quotas={
                str(n): {"eligible": int(available[n]), "asked": int(quota.get(str(n), 0)), "met": int(met.get(n, 0))}
                for n in sorted(available)
            },
            seed=seed,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the choice."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def strata(table: Mapping[str, NDArray[Any]], columns: Sequence[str] = tuple(PEOPLE), bins: Bins = PEOPLE) -> NDArray[np.str_]:
    """The stratum of each image: the bin of each column, joined by "/"; "unlabelled" for an image without labels.

    Args:
        table: columns "persons" (-1 where unknown), "area" (median, pixels), "keypoints" (mean number of visible
            keypoints per person) and "coverage" (share, 0 to 1, of the keypoint types that are visible in the image).
        columns: columns that make the strata; with an empty list, all labelled images are in the stratum "all".
        bins: bins of each column.
    """
    count = len(table["persons"])
    parts = []
    for column in columns:
        places = np.searchsorted(list(bins[column].values()), table[column], side="right") - 1
        parts.append(np.array(list(bins[column]))[np.maximum(places, 0)])
    names = parts[0].astype(object) if parts else np.full(count, "all", object)
    for part in parts[1:]:
        names = names + "/" + part.astype(object)
    names[np.asarray(table["persons"]) == UNKNOWN] = "unlabelled"
    return names.astype(str)


def allocate(sizes: Mapping[str, int], count: int, allocation: Allocation = "proportional") -> dict[str, int]:
    """Share `count` among strata; the remainder goes to the largest fractions.

    No quota exceeds the size of its stratum, if `count` is at most the sum of sizes: other strata supply the rest.

    Args:
        sizes: number of images in each stratum.
        count: number of images to share.
        allocation: quotas in proportion to the sizes, in proportion to their square roots, or equal quotas.
    """
    power = {"proportional": 1.0, "square_root": 0.5, "equal": 0.0}[allocation]
    quota: dict[str, int] = {}
    left, rest = dict(sizes), count
    while left:
        weight = {name: size**power for name, size in left.items()}
        total = sum(weight.values())
        exact = {name: rest * w / total for name, w in weight.items()}
        full = [name for name in left if exact[name] > left[name]]
        if not full:
            break
        for name in full:
            quota[name] = left.pop(name)
            rest -= quota[name]
    else:
        return quota
    quota |= {name: int(share) for name, share in exact.items()}
    spare = count - sum(quota.values())
    by_fraction = sorted((n for n in left if quota[n] < left[n]), key=lambda name: (-(exact[name] - int(exact[name])), name))
    for name in by_fraction[:spare]:
        quota[name] += 1
    return quota


def label(options: Mapping[str, Any]) -> str:
    """A sampler's label: number and source of images, allocation to strata, bins, and seed."""
    images = list(options.get("images", ["train"]))
    where = "-dir" if options.get("image_dir") is not None else "" if images == ["train"] else f"-{'+'.join(images)}"
    allocation = options.get("allocation", "proportional")
    shares = "" if allocation == "proportional" else f"-{allocation}"
    own = {column: dict(words) for column, words in options.get("bins", PEOPLE).items()}
    kept = json.dumps(own, sort_keys=True).encode()
    bins = "" if own == PEOPLE else f"-b.{hashlib.sha256(kept).hexdigest()[:6]}"
    return f"{options['num_images']}{where}{shares}{bins}-s{options['seed']}"


def check_options(min_persons: object, min_keypoints: object, seed: object) -> None:
    """Check the options that all samplers share.

    Raises:
        ValueError: an option is no number, or is negative.
    """
    for option, value, kinds in (
        ("min_persons_per_image", min_persons, (int,)),
        ("min_kpts_per_person", min_keypoints, (int, float)),
        ("seed", seed, (int,)),
    ):
        if not isinstance(value, kinds) or not value >= 0:
            raise ValueError(f"sampler.{option}={value}: choose 0 or more{', a whole number' if kinds == (int,) else ''}")


def eligible_rows(
    table: Mapping[str, NDArray[Any]], min_persons: int, min_keypoints: float, num_images: int
) -> NDArray[np.intp]:
    """Rows with enough people and keypoints; images without labels are always eligible.

    Raises:
        ValueError: fewer than `num_images` rows are eligible; the message lists the count of each stratum.
    """
    persons = np.asarray(table["persons"])
    enough = (persons >= min_persons) & (np.asarray(table["keypoints"]) >= min_keypoints)
    eligible = np.flatnonzero(enough | (persons == UNKNOWN))
    if num_images > len(eligible):
        names, counts = np.unique(strata(table)[eligible], return_counts=True)
        listed = ", ".join(f"{name}: {size}" for name, size in zip(names, counts, strict=True)) or "none"
        raise ValueError(
            f"sampler.num_images={num_images}: only {len(eligible)} images are eligible ({listed}); "
            f"{f'ask for at most {len(eligible)}, or ' if len(eligible) else ''}lower min_persons_per_image={min_persons} "
            f"or min_kpts_per_person={min_keypoints}, or give more images"
        )
    return eligible


@dataclass(frozen=True)
class Stratified:
    """Draws images from every stratum; without columns, from all images at random.

    Attributes:
        num_images: number of images to choose.
        columns: columns whose bins make the strata: "persons", "area", "keypoints", "coverage".
        allocation: quotas of the strata: "proportional" to their sizes, to the "square_root" of these, or "equal".
        min_persons_per_image: images with fewer labelled people are not eligible.
        min_kpts_per_person: images whose people have fewer visible keypoints on average are not eligible.
        seed: seed of the draw.
        images: splits to choose from: train, unlabelled.
        image_dir: a folder of images without labels to choose from instead.
        bins: for each column, the least value of each bin by its name, in rising order: {persons: {"0": 0, "1": 1, "2+": 2}}.
    """

    num_images: Annotated[int, Interval(ge=1, le=10**7)] = 64
    columns: Sequence[str] = tuple(PEOPLE)
    allocation: Allocation = "proportional"
    min_persons_per_image: Annotated[int, Interval(ge=0, le=10**6)] = 1
    min_kpts_per_person: Annotated[float, Interval(ge=0, le=10**6)] = 1
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    images: Annotated[Sequence[Literal["train", "unlabelled"]], MinLen(1)] = ("train",)
    image_dir: str | None = None
    bins: Bins = field(default_factory=lambda: {column: dict(words) for column, words in PEOPLE.items()})

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The sampler's label: number and source of images, allocation to strata, bins, and seed."""
        return label(options)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: one is out of range or unknown.
        """
        if not isinstance(self.num_images, int) or self.num_images < 1:  # type: ignore[redundant-expr] # YAML gives any type
            raise ValueError(f"sampler.num_images={self.num_images}: choose at least 1")
        check_options(self.min_persons_per_image, self.min_kpts_per_person, self.seed)
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"sampler.allocation={self.allocation}: choose {', '.join(get_args(Allocation))}")
        unknown = [column for column in self.columns if column not in self.bins]
        if unknown:
            raise ValueError(f"sampler.columns=[{','.join(self.columns)}]: choose some of {', '.join(self.bins)}")
        for column, words in self.bins.items():
            lows = list(words.values())
            if not lows or any(not low < high for low, high in pairwise(lows)):
                raise ValueError(f"sampler.bins.{column}={dict(words)}: give the least value of each bin, in rising order")

    def sample(self, table: Mapping[str, NDArray[Any]]) -> CalibrationSet:
        """Choose rows of a table.

        Args:
            table: columns "id", "file_name" and those of `strata`, one row an image.

        Raises:
            ValueError: fewer images are eligible than asked for; the message lists the strata.
        """
        eligible = eligible_rows(table, self.min_persons_per_image, self.min_kpts_per_person, self.num_images)
        names = strata(table, self.columns, self.bins)
        found, sizes = np.unique(names[eligible], return_counts=True)
        quota = allocate({str(n): int(s) for n, s in zip(found, sizes, strict=True)}, self.num_images, self.allocation)
        draw = np.random.default_rng(self.seed)
        chosen: list[int] = []
        for name in sorted(quota):
            members = eligible[names[eligible] == name]
            chosen += draw.permutation(members)[: quota[name]].tolist()
        return CalibrationSet.of(table, names, eligible, chosen, quota, self.seed)
