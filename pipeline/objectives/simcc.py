"""The objective of SimCC networks: for each keypoint a distribution over columns and one over rows (arXiv:2107.03332)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.objectives import keypoints
from posepress.geometry import input_to_cells
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec

_LINES = ("simcc_x", "simcc_y")


@dataclass(frozen=True)
class SimccObjective:
    """Kullback-Leibler divergence of both lines from Gaussians around labelled keypoints.

    Attributes:
        sigma: standard deviation of the Gaussians, in pixels of the input.
        beta: factor of outputs and of Gaussians before the softmax, as in RTMPose (arXiv:2303.07399). A good network's greatest
            value is therefore about 1, and serves as the score.
    """

    needs: ClassVar[Mapping[str, str]] = {"simcc_x": "CX", "simcc_y": "CY"}
    sigma: Annotated[float, Interval(gt=0, le=100)] = 5.0
    beta: Annotated[float, Interval(gt=0, le=100)] = 10.0

    def capacity(self, truth: People) -> int:
        """Number of people with labelled keypoints in an image."""
        return int(keypoints.labelled(truth).sum())

    def labels(self, truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's labels; see `pipeline.objectives.keypoints.kept`."""
        return keypoints.kept(truth, stored, capacity)

    def targets(
        self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec, source: Skeleton | Palette
    ) -> dict[str, Tensor]:
        """Distributions of a perfect network for a batch of views.

        Args:
            labels: what `labels` kept [B, ...], and "matrix", "flipped", "labelled" and "base" of the views.
            size: size of the views, in pixels.
            spec: description of the network.
            source: skeleton of the data.

        Returns:
            "simcc_x" [B, K, X] and "simcc_y" [B, K, Y], Gaussians of height 1; "weight" [B, K]: 1 for a keypoint that
            is labelled and lies inside the view, else 0.
        """
        points, seen = keypoints.of_view(labels, source, spec.skeleton)
        made = {"weight": (seen & keypoints.inside(points, size)).float()}
        for axis, name in enumerate(_LINES):
            line = spec.field(name)
            at = input_to_cells(points[..., axis], line, size)
            cells = torch.arange(int(line.shape(size)[1] or 1), device=at.device)
            sigma = self.sigma / line.stride
            made[name] = torch.exp(-0.5 / sigma**2 * (cells - at[..., None]) ** 2)
        return made

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The divergence of each line, averaged over labelled keypoints."""
        weight = targets["weight"]
        count = weight.sum().clamp(min=1)
        losses = {}
        for name in _LINES:
            losses[name] = (self._divergence(fields[name], targets[name]) * weight).sum() / count
        return losses

    def imitation(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        """The divergence of a student's distributions from its teacher's, averaged over keypoints and both lines."""
        parts = [self._divergence(fields[name], keypoints.expected(expected, name)).mean() for name in _LINES]
        return torch.stack(parts).sum()

    def _divergence(self, lines: Tensor, wanted: Tensor) -> Tensor:
        """The Kullback-Leibler divergence of the distributions over cells, [B, K]."""
        ours, theirs = (torch.log_softmax(self.beta * values.float(), dim=-1) for values in (lines, wanted))
        return (theirs.exp() * (theirs - ours)).sum(dim=-1)
