"""The objective of bottom-up networks: Gaussian heatmaps and part affinity fields (arXiv:1812.08008)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from numpy.typing import NDArray
from torch import Tensor

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.objectives import keypoints
from posepress.errors import UserError
from posepress.geometry import input_to_cells
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec, OutputSpec


@dataclass(frozen=True)
class HeatmapPafObjective:
    """Squared error of heatmaps and PAFs, at every stage of the network.

    Attributes:
        sigma: standard deviation of a keypoint's Gaussian, in cells.
        paf_width: distance from a limb up to which its PAF is not zero, in cells.
        foreground: additional weight of cells with a target that is not zero.
    """

    needs: ClassVar[Mapping[str, str]] = {"heatmaps": "CHW", "pafs": "CHW"}
    sigma: Annotated[float, Interval(gt=0, le=100)] = 0.9
    paf_width: Annotated[float, Interval(gt=0, le=100)] = 1.0
    foreground: Annotated[float, Ge(0)] = 4.0

    def capacity(self, truth: People) -> int:
        """Number of people with labelled keypoints in an image."""
        return int(keypoints.labelled(truth).sum())

    def labels(self, truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's labels; see `pipeline.objectives.keypoints.kept`."""
        return keypoints.kept(truth, stored, capacity)

    def targets(
        self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec, source: Skeleton | Palette
    ) -> dict[str, Tensor]:
        """Fields of a perfect network for a batch of views.

        Args:
            labels: what `labels` kept [B, ...], "matrix" [B, 2, 3] from stored image to view, "flipped" [B] and "labelled" [B].
            size: size of the views, in pixels.
            spec: description of the network.
            source: skeleton of the data.

        Returns:
            "heatmaps" [B, K, h, w], or [B, K + 1, h, w] where the network has a map of the background, the last one. "pafs"
            [B, 2 L, h, w]. "background" [B, K or K + 1]: 1 for the background's map, else 0. "mask" [B, 1, h, w]: 0 on crowds,
            on people without labels and on images without labels, else 1.

        Raises:
            UserError: the network's fields differ, or the data does not label its keypoints.
        """
        heat, paf = _fields(spec)
        points, seen = keypoints.joined(labels, source, spec.skeleton)
        cells, K = heat.cells(size), len(spec.skeleton.names)
        return {
            "heatmaps": self._heatmaps(input_to_cells(points, heat, size), seen, cells, heat.channels > K),
            "pafs": self._pafs(input_to_cells(points, paf, size), seen, spec.skeleton, cells),
            "background": (torch.arange(heat.channels, device=points.device) >= K).float().expand(len(points), -1),
            "mask": keypoints.mask(labels, cells, heat),
        }

    def _heatmaps(self, cells: Tensor, seen: Tensor, size: Resolution, background: bool) -> Tensor:
        far = torch.where(seen[..., None], cells, -1e3)
        xs, ys = (torch.arange(n, device=cells.device) for n in (size.width, size.height))
        gx = torch.exp(-0.5 / self.sigma**2 * (xs - far[..., :1]) ** 2)  # [B, P, K, w]
        gy = torch.exp(-0.5 / self.sigma**2 * (ys - far[..., 1:]) ** 2)  # [B, P, K, h]
        B, P, K = seen.shape
        out = torch.zeros(B, K + background, size.height, size.width, device=cells.device)
        for person in range(P):  # computing all people at once would need P times the memory
            joints = gy[:, person, :, :, None] * gx[:, person, :, None, :]
            out[:, :K] = torch.maximum(out[:, :K], joints)
        out[out < 0.01] = 0
        if background:
            out[:, K] = 1 - out[:, :K].amax(dim=1)
        return out

    def _pafs(self, cells: Tensor, seen: Tensor, skeleton: Skeleton, size: Resolution) -> Tensor:
        """Unit vectors along each limb, near the limb. Where limbs of one kind overlap, the mean is taken."""
        limbs = torch.tensor(skeleton.limbs, device=cells.device)
        a, b = cells[:, :, limbs[:, 0]], cells[:, :, limbs[:, 1]]  # [B, P, L, 2]
        length = (b - a).norm(dim=-1)
        there = seen[:, :, limbs[:, 0]] & seen[:, :, limbs[:, 1]] & (length >= 1e-3)
        unit = (b - a) / length.clamp(min=1e-3)[..., None]
        B, P, L = there.shape
        xs = torch.arange(size.width, device=cells.device, dtype=torch.float32)
        ys = torch.arange(size.height, device=cells.device, dtype=torch.float32)
        total = torch.zeros(B, L, 2, size.height, size.width, device=cells.device)
        count = torch.zeros(B, L, 1, size.height, size.width, device=cells.device)
        for person in range(P):
            u = unit[:, person, :, :, None, None]  # [B, L, 2, 1, 1]
            px = xs - a[:, person, :, 0, None, None]  # [B, L, 1, w]
            py = ys[:, None] - a[:, person, :, 1, None, None]  # [B, L, h, 1]
            along = px * u[:, :, 0] + py * u[:, :, 1]
            across = (px * u[:, :, 1] - py * u[:, :, 0]).abs()
            reach = length[:, person, :, None, None] + self.paf_width
            near = (across <= self.paf_width) & (along >= -self.paf_width) & (along <= reach)
            covered = (near & there[:, person, :, None, None])[:, :, None].float()
            total += covered * u
            count += covered
        return (total / count.clamp(min=1)).flatten(1, 2)

    def imitation(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        """Squared error of a student's fields to its teacher's, of all stages."""
        return keypoints.imitation(fields, expected)

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Squared errors, summed over channels and stages and averaged over cells and images.

        Args:
            fields: "heatmaps", "pafs" and the fields of earlier stages, "heatmaps.0", ..., each [B, C, h, w].
            targets: the targets "heatmaps", "pafs", "background" and "mask".

        Returns:
            One loss for "heatmaps" and one for "pafs".
        """
        losses: dict[str, Tensor] = {}
        for name, field in fields.items():
            kind = name.partition(".")[0]
            target = targets[kind]
            foreground = self.foreground * (target.abs() > 0.01)
            if kind == "heatmaps":  # the background's target is positive nearly everywhere, so it would all be foreground
                foreground = foreground * (1 - targets["background"][:, :, None, None])
            weight = targets["mask"] * (1 + foreground)
            error = ((field.float() - target).square() * weight).sum(dim=1).mean()
            losses[kind] = losses[kind] + error if kind in losses else error
        return losses


def _fields(spec: NetworkSpec) -> tuple[OutputSpec, OutputSpec]:
    """The fields of heatmaps and PAFs, after a check that they fit the skeleton."""
    named, skeleton = {field.name: field for field in spec.fields}, spec.skeleton
    K, L = len(skeleton.names), len(skeleton.limbs)
    wanted = {
        "heatmaps": ((K, K + 1), f"{K} keypoints, and one map more for the background where the network has it"),
        "pafs": ((2 * L,), f"two channels a limb ({L})"),
    }
    for name, (channels, why) in wanted.items():
        if name not in named:
            raise UserError(f"spec has no field '{name}', which training needs; it has {', '.join(named)}")
        if named[name].channels not in channels:
            raise UserError(f"spec says {named[name].channels} channels of '{name}', but its labels need {channels[-1]}: {why}")
    if len({named[name].stride for name in wanted}) > 1:
        raise UserError("spec says different strides for 'heatmaps' and 'pafs'; give both the same stride for training")
    return named["heatmaps"], named["pafs"]
