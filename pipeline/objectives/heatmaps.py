"""The objective of top-down networks: a Gaussian heatmap for each keypoint of the person in the view (arXiv:1804.06208)."""

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
from posepress.errors import UserError
from posepress.geometry import input_to_cells
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec


@dataclass(frozen=True)
class HeatmapObjective:
    """Squared error of the heatmaps of labelled keypoints; the maps of unlabelled keypoints do not count.

    Attributes:
        sigma: standard deviation of a keypoint's Gaussian, in cells.
    """

    needs: ClassVar[Mapping[str, str]] = {"heatmaps": "CHW"}
    sigma: Annotated[float, Interval(gt=0, le=100)] = 2.0

    def capacity(self, truth: People) -> int:
        """Number of people with labelled keypoints in an image."""
        return int(keypoints.labelled(truth).sum())

    def labels(self, truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's labels; see `pipeline.objectives.keypoints.kept`."""
        return keypoints.kept(truth, stored, capacity)

    def targets(
        self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec, source: Skeleton | Palette
    ) -> dict[str, Tensor]:
        """Heatmaps of a perfect network for a batch of views.

        Args:
            labels: what `labels` kept [B, ...], and "matrix", "flipped", "labelled" and "base" of the views.
            size: size of the views, in pixels.
            spec: description of the network.
            source: skeleton of the data.

        Returns:
            "heatmaps" [B, K, h, w], and "weight" [B, K]: 1 for a keypoint that is labelled and lies inside the view, else 0.

        Raises:
            UserError: the number of maps is not that of the keypoints, or the data does not label the network's keypoints.
        """
        heat, K = spec.field("heatmaps"), len(spec.skeleton.names)
        if heat.channels != K:
            raise UserError(
                f"spec says {heat.channels} channels of 'heatmaps', but its labels name {K} keypoints; make them equal"
            )
        points, seen = keypoints.of_view(labels, source, spec.skeleton)
        cells, at = heat.cells(size), input_to_cells(points, heat, size)
        xs, ys = (torch.arange(n, device=at.device) for n in (cells.width, cells.height))
        gx = torch.exp(-0.5 / self.sigma**2 * (xs - at[..., :1]) ** 2)  # [B, K, w]
        gy = torch.exp(-0.5 / self.sigma**2 * (ys - at[..., 1:]) ** 2)  # [B, K, h]
        weight = seen & keypoints.inside(points, size)
        return {"heatmaps": gy[..., None] * gx[:, :, None], "weight": weight.float()}

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared error, averaged over the cells of each labelled map and over these maps."""
        error = (fields["heatmaps"].float() - targets["heatmaps"]).square().mean(dim=(2, 3))
        weight = targets["weight"]
        return {"heatmaps": 1e3 * (error * weight).sum() / weight.sum().clamp(min=1)}

    def imitation(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        """Squared error of a student's maps to its teacher's, averaged as in `loss`."""
        wanted = keypoints.expected(expected, "heatmaps")
        return 1e3 * (fields["heatmaps"].float() - wanted).square().mean()
