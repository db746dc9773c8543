"""A family that the project does not know: a network whose output is a line, with its objective, decoder and metric.

The network says how likely a nose is in each column of the image.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaluation.contracts import MetricInfo
from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.objectives import keypoints
from posepress.geometry import View, cells_to_input, input_to_cells
from posepress.labels import Skeleton
from posepress.resolution import Resolution
from posepress.spec import InputSpec, NetworkSpec, OutputSpec

NOSE = Skeleton(("nose",), (), (0.026,))


class NoseLines(nn.Module):
    """Returns one line [B, 1, W / 8]."""

    spec = NetworkSpec(
        InputSpec("image", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), multiple=8),
        (OutputSpec("lines", 8, 1, axes="CX"),),
        NOSE,
    )

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        sides = [3, channels, 2 * channels, 2 * channels]
        blocks = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(sides)]
        self.body = nn.Sequential(*(layer for block in blocks for layer in (block, nn.ReLU())))
        self.head = nn.Conv2d(2 * channels, 1, 1)

    @property
    def ignored_layers(self) -> list[nn.Module]:
        return [self.head]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"lines": torch.sigmoid(self.head(self.body(images)).mean(dim=2))}


@dataclass(frozen=True)
class LineObjective:
    """Squared error of lines with a bump at each nose."""

    needs: ClassVar[Mapping[str, str]] = {"lines": "CX"}
    sigma: float = 1.0

    def capacity(self, truth: People) -> int:
        return int(keypoints.labelled(truth).sum())

    def labels(self, truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
        return keypoints.kept(truth, stored, capacity)

    def targets(self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec, source: Any) -> dict[str, Tensor]:
        points, seen = keypoints.joined(labels, source, spec.skeleton)
        line = spec.field("lines")
        cells = input_to_cells(points[..., 0], line)
        at = torch.arange(line.shape(size)[1], device=cells.device)
        bumps = torch.exp(-0.5 * ((at - cells[..., None]) / self.sigma) ** 2) * seen[..., None]
        return {"lines": bumps.amax(dim=1), "counted": labels["labelled"].float()}

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        error = (fields["lines"].float() - targets["lines"]).square().mean(dim=(1, 2))
        return {"lines": (error * targets["counted"]).mean()}

    def imitation(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        return keypoints.imitation(fields, expected)


@dataclass(frozen=True)
class Columns:
    """Where noses are: x float64 [N] in image pixels, and their scores [N]."""

    x: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class ColumnDecoder:
    """Peaks of the line above a threshold."""

    spec: NetworkSpec
    needs: ClassVar[Mapping[str, str]] = {"lines": "CX"}
    result: ClassVar[type] = Columns
    threshold: float = 0.3

    def __post_init__(self) -> None:
        self.spec.offers(self.needs)

    def decode(self, fields: Mapping[str, Any], views: Sequence[View]) -> list[Columns]:
        return [self._columns(np.asarray(line[0], np.float64), view) for line, view in zip(fields["lines"], views, strict=True)]

    def _columns(self, line: NDArray[np.float64], view: View) -> Columns:
        left, right = np.r_[-np.inf, line[:-1]], np.r_[line[1:], -np.inf]
        cells = np.flatnonzero((line >= left) & (line > right) & (line > self.threshold))
        columns = cells_to_input(cells.astype(np.float64), self.spec.field("lines"))
        x = view.to_image(np.column_stack((columns, np.zeros(len(cells)))))[:, 0]
        return Columns(x, line[cells])

    def merge(self, parts: Sequence[Columns], views: Sequence[View]) -> Columns:
        nothing = np.zeros(0)
        return Columns(
            np.concatenate([nothing, *(part.x for part in parts)]), np.concatenate([nothing, *(part.scores for part in parts)])
        )

    def draw(self, image: NDArray[np.uint8], found: Columns) -> NDArray[np.uint8]:
        drawn = image.copy()
        drawn[:, np.clip(found.x.round().astype(int), 0, image.shape[1] - 1)] = (255, 0, 0)
        return drawn

    def readings(self, found: Columns) -> dict[str, Columns]:
        return {}

    def plain(self, found: Columns) -> Columns:
        return found

    def mirror(self, name: str, field: NDArray[np.float32]) -> NDArray[np.float32]:
        return field


@dataclass(frozen=True)
class Hits:
    """Hits, predictions and noses of each image, [I, 3]."""

    images: tuple[str, ...]
    counted: NDArray[np.float64]

    def resampled(self, counts: NDArray[Any]) -> NDArray[np.float64]:
        hits, found, true = (np.asarray(counts, np.float64) @ self.counted).T
        total = found + true
        return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


@dataclass
class ColumnF1:
    """F1 of columns: a nose is hit by a prediction within a tenth of its person's height."""

    labels: Skeleton
    found_labels: Skeleton
    info: ClassVar[MetricInfo] = MetricInfo("f1", "F1 of nose columns", "F1", -1.0, ("recall",))
    _rows: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    _found: dict[str, Columns] = field(default_factory=dict)

    def reset(self) -> None:
        self._rows.clear()
        self._found.clear()

    def process(self, id: str, truth: People, found: Columns) -> None:  # noqa: A002
        nose = truth.keypoints[:, self.labels.names.index("nose")]
        known = nose[:, 2] > 0
        far = np.abs(found.x[:, None] - nose[known, 0]) if len(found.x) else np.zeros((0, int(known.sum())))
        hits = float((far <= np.maximum(truth.boxes[known, 3] / 10, 1)).any(axis=0).sum())
        self._rows[id] = (min(hits, len(found.x)), len(found.x), float(known.sum()))
        self._found[id] = found

    def matches(self) -> Hits:
        return Hits(tuple(self._rows), np.array([*self._rows.values()]).reshape(-1, 3))

    def evaluate(self, images: NDArray[Any] | None = None) -> dict[str, float]:
        counts = np.ones((1, len(self._rows))) if images is None else np.bincount(images, minlength=len(self._rows))[None]
        (f1,) = self.matches().resampled(counts)
        hits, _, true = (counts @ self.matches().counted)[0]
        return {"f1": float(f1) if np.isfinite(f1) else -1.0, "recall": float(hits / true) if true else -1.0}

    def counts(self) -> dict[str, int]:
        return {}

    def write(self, file: Path, named: Callable[[str], Mapping[str, Any]]) -> None:
        rows = [{**named(image), "x": found.x.tolist()} for image, found in self._found.items()]
        file.write_text(json.dumps(rows))

    def doubts(self) -> list[str]:
        return []

    def details(self) -> dict[str, dict[str, float]]:
        return {}
