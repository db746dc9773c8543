"""Calibration images that cover the statistics of a network's activations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Interval, MinLen
from numpy.typing import NDArray

from calib_samplers.stratified import CalibrationSet, check_options, eligible_rows, label, strata


@dataclass(frozen=True)
class Coverage:
    """Draws images whose activation statistics lie far apart: the greedy k-centre of Gonzalez (1985).

    Attributes:
        num_images: number of images to choose.
        max_candidates: largest number of eligible images, drawn at random, whose activations are computed.
        min_persons_per_image: images with fewer labelled people are not eligible.
        min_kpts_per_person: images whose people have fewer visible keypoints on average are not eligible.
        seed: seed of the draw and of the first image.
        images: splits to choose from: train, unlabelled.
        image_dir: a folder of images without labels to choose from instead.
    """

    num_images: Annotated[int, Interval(ge=1, le=10**7)] = 64
    max_candidates: Annotated[int, Interval(ge=1, le=10**7)] = 1000
    min_persons_per_image: Annotated[int, Interval(ge=0, le=10**6)] = 1
    min_kpts_per_person: Annotated[float, Interval(ge=0, le=10**6)] = 1
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    images: Annotated[Sequence[Literal["train", "unlabelled"]], MinLen(1)] = ("train",)
    image_dir: str | None = None

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The sampler's label: number and source of images, and seed."""
        return label(options)

    def __post_init__(self) -> None:
        """Check the counts.

        Raises:
            ValueError: a count is below 1, or `num_images` exceeds `max_candidates`.
        """
        check_options(self.min_persons_per_image, self.min_kpts_per_person, self.seed)
        if not isinstance(self.max_candidates, int):
            raise ValueError(f"sampler.max_candidates={self.max_candidates}: choose a whole number")  # noqa: TRY004
        if not isinstance(self.num_images, int) or not 1 <= self.num_images <= self.max_candidates:  # type: ignore[redundant-expr]
            raise ValueError(f"sampler.num_images={self.num_images}: choose 1 to sampler.max_candidates={self.max_candidates}")

    def candidates(self, table: Mapping[str, NDArray[Any]]) -> NDArray[np.intp]:
        """The rows whose features are needed.

        Raises:
            ValueError: fewer images are eligible than asked for.
        """
        eligible = eligible_rows(table, self.min_persons_per_image, self.min_kpts_per_person, self.num_images)
        return np.sort(np.random.default_rng(self.seed).permutation(eligible)[: self.max_candidates])

    def sample(self, table: Mapping[str, NDArray[Any]]) -> CalibrationSet:
        """Choose rows of a table.

        Args:
            table: columns "id", "file_name", those of `strata`, and "features" float [rows, D]; NaN in rows that are not
                candidates.
        """
        rows = self.candidates(table)
        features = np.asarray(table["features"], np.float64)[rows]
        spread = features.std(axis=0)
        features = (features - features.mean(axis=0)) / np.where(spread > 0, spread, 1)
        first = int(np.random.default_rng(self.seed).integers(len(rows)))
        chosen, away = [first], ((features - features[first]) ** 2).sum(axis=1)
        while len(chosen) < self.num_images:
            away[chosen] = -1
            chosen.append(int(away.argmax()))
            away = np.minimum(away, ((features - features[chosen[-1]]) ** 2).sum(axis=1))
        names = strata(table)
        taken = [int(rows[n]) for n in chosen]
        met = {str(name): int(count) for name, count in zip(*np.unique(names[taken], return_counts=True), strict=True)}
        return CalibrationSet.of(table, names, rows, taken, met, self.seed)  # strata have no quotas here
