"""The objective of one-stage networks: task-aligned assignment (arXiv:2108.07755) and a loss of OKS (arXiv:2204.06806)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from evaluation.truth import People
from pipeline.contracts import Stored
from pipeline.objectives import keypoints
from posepress.errors import UserError
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec, OutputSpec

_TINY = 1e-6
_AREA = 0.53  # area of a person's mask relative to its box, with which OKS is compared


@dataclass(frozen=True)
class OneStageObjective:
    """Scores, boxes and keypoints of the cells that are assigned to people.

    A person is learnt by the cells inside its box with the best score and box together. A score's target is the overlap of the
    predicted box with the person's, relative to the best.

    Attributes:
        strides: sizes of the network's cells, in the order of its entries, in pixels.
        candidates: number of cells that learn a person.
        score: weight of the scores' loss.
        box: weight of the boxes' loss, 1 - GIoU.
        pose: weight of the keypoints' loss, 1 - OKS.
        visible: weight of the loss of the keypoints' scores.
    """

    needs: ClassVar[Mapping[str, str]] = {"boxes": "NC", "scores": "NC", "keypoints": "NC"}
    strides: Sequence[Annotated[int, Interval(ge=1, le=1024)]] = (8, 16, 32)
    candidates: Annotated[int, Interval(ge=1, le=1000)] = 10
    score: Annotated[float, Ge(0)] = 1.0
    box: Annotated[float, Ge(0)] = 2.5
    pose: Annotated[float, Ge(0)] = 12.0
    visible: Annotated[float, Ge(0)] = 0.5

    def capacity(self, truth: People) -> int:
        """Number of people with labelled keypoints in an image."""
        return int(keypoints.labelled(truth).sum())

    def labels(self, truth: People | None, stored: Stored, capacity: int) -> dict[str, NDArray[Any]]:
        """What a training shard keeps of an image's labels; see `pipeline.objectives.keypoints.kept`."""
        return keypoints.kept(truth, stored, capacity)

    def targets(
        self, labels: Mapping[str, Tensor], size: Resolution, spec: NetworkSpec, source: Skeleton | Palette
    ) -> dict[str, Tensor]:
        """The people in a batch of views, and where their absence counts.

        Args:
            labels: what `labels` kept [B, ...], and "matrix", "flipped" and "labelled" of the views.
            size: size of the views, in pixels.
            spec: description of the network.
            source: skeleton of the data.

        Returns:
            In pixels of the views: "people" [B, P, 4], corners of the boxes, 0 where there are fewer; "points" [B, P, K, 2];
            "seen" [B, P, K], which are labelled and inside. "middles" [N, 2] of the cells, and "counted" [B, N]: 0 where an
            unlabelled person or crowd is, and in images without labels, else 1. "variances" [K] of OKS.

        Raises:
            UserError: the network's input is no multiple of its strides, or the data does not label its keypoints.
        """
        points, seen = keypoints.joined(labels, source, spec.skeleton)
        seen = seen & keypoints.inside(points, size)
        middles, counted = [], []
        for step in self.strides:
            if size.height % step or size.width % step:
                raise UserError(f"training_resolution={size}: no multiple of the objective's stride {step}; choose one")
            ys, xs = torch.meshgrid(
                *(torch.arange(side // step, device=points.device) for side in (size.height, size.width)), indexing="ij"
            )
            middles.append((torch.stack((xs, ys), dim=-1).reshape(-1, 2) + 0.5) * step - 0.5)
            grid = OutputSpec("cells", step, 1)
            counted.append(keypoints.mask(labels, grid.cells(size), grid).flatten(1))
        people = _boxes(labels, size)
        alive = seen.any(dim=-1) & ((people[..., 2:] - people[..., :2]).amin(dim=-1) > 1)
        return {
            "people": people * alive[..., None],
            "points": points,
            "seen": (seen & alive[..., None]).float(),
            "middles": torch.cat(middles),
            "counted": torch.cat(counted, dim=1),
            "variances": (2 * torch.tensor(spec.skeleton.oks_sigmas, device=points.device)) ** 2,
        }

    def loss(self, fields: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of scores, boxes, keypoints and the keypoints' scores, relative to the sum of the scores' targets."""
        boxes, points = fields["boxes"].float(), fields["keypoints"].float()
        scores = fields["scores"].float()[..., 0]
        if boxes.shape[1] != len(targets["middles"]):
            raise UserError(
                f"the network returns {boxes.shape[1]} entries, but objective.strides={list(self.strides)} make "
                f"{len(targets['middles'])} cells; correct objective.strides"
            )
        with torch.no_grad():
            owner, wanted = self._assigned(boxes, scores, targets)
        losses = {"scores": self.score * _cross_entropy(fields, wanted, targets["counted"])}
        total = wanted.sum().clamp(min=1)
        true = _of(targets["people"], owner)  # one shape for every batch, so that a GPU need not wait
        losses["boxes"] = self.box * ((1 - _giou(boxes, true)) * wanted).sum() / total
        found, seen = _each(points, 3), _of(targets["seen"], owner)
        area = ((true[..., 2] - true[..., 0]) * (true[..., 3] - true[..., 1]) * _AREA).clamp(min=1)
        away = (found[..., :2] - _each(_of(targets["points"].flatten(2), owner), 2)).square().sum(dim=-1)
        oks = torch.exp(-away / (targets["variances"] * area[..., None] * 2))
        each = ((1 - oks) * seen).sum(dim=-1) / seen.sum(dim=-1).clamp(min=1)
        losses["keypoints"] = self.pose * (each * wanted).sum() / total
        visible = F.binary_cross_entropy(found[..., 2].clamp(_TINY, 1 - _TINY), seen, reduction="none").mean(dim=-1)
        losses["visible"] = self.visible * (visible * wanted).sum() / total
        return losses

    def _assigned(self, boxes: Tensor, scores: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The person that each cell learns, and the target of its score.

        Args:
            boxes: predicted corners, [B, N, 4].
            scores: predicted scores, [B, N].
            targets: what `targets` returned.

        Returns:
            Index of the person [B, N], and the target [B, N], 0 where a cell learns none.
        """
        people, middles = targets["people"], targets["middles"]
        overlap = _iou(boxes[:, None], people[:, :, None])  # [B, P, N]
        ends = torch.cat((middles - people[..., None, :2], people[..., None, 2:] - middles), dim=-1)  # [B, P, N, 4]
        inside = (ends.amin(dim=-1) > 0).float()
        fit = scores[:, None].sqrt() * overlap**6 * inside
        best = fit.topk(min(self.candidates, fit.shape[-1]), dim=-1)
        chosen = torch.zeros_like(fit).scatter(-1, best.indices, (best.values > 1e-12).float())
        # A cell inside several boxes learns the person whose box it predicts best.
        mine = overlap * chosen
        owner = mine.argmax(dim=1)
        kept = chosen * (torch.arange(fit.shape[1], device=fit.device)[:, None] == owner[:, None])
        own, near = fit * kept, overlap * kept
        share = own / own.amax(dim=-1, keepdim=True).clamp(min=1e-12) * near.amax(dim=-1, keepdim=True)
        return owner, share.amax(dim=1) * (targets["counted"].amax(dim=1, keepdim=True) > 0)

    def imitation(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        """Distance of a student's sets from its teacher's, where the teacher finds people.

        Scores by their cross entropy, boxes and points relative to the size of the teacher's box.
        """
        wanted = keypoints.expected(expected, "scores")
        losses = _cross_entropy(fields, wanted[..., 0], torch.ones_like(wanted[..., 0]))
        weight = wanted[..., 0] / wanted.sum().clamp(min=1)
        box, point = (keypoints.expected(expected, name) for name in ("boxes", "keypoints"))
        size = (box[..., 2:] - box[..., :2]).clamp(min=1).mean(dim=-1, keepdim=True)
        away = ((fields["boxes"].float() - box) / size).abs().mean(dim=-1)
        ours, theirs = (_each(values, 3) for values in (fields["keypoints"].float(), point))
        apart = ((ours[..., :2] - theirs[..., :2]) / size[..., None]).abs().mean(dim=(-1, -2))
        seen = (ours[..., 2] - theirs[..., 2]).square().mean(dim=-1)
        total: Tensor = losses + (weight * (self.box * away + self.pose * apart + self.visible * seen)).sum()
        return total


def _boxes(labels: Mapping[str, Tensor], size: Resolution) -> Tensor:
    """Corners of the people's boxes in the views, cut at their edges, [B, P, 4]; a turned box gets an upright one around it."""
    box, matrix = labels["anchors"], labels["matrix"]
    left, top = box[..., 0] - 0.5, box[..., 1] - 0.5  # COCO counts from the corner of the first pixel
    right, bottom = left + box[..., 2], top + box[..., 3]
    ends = torch.stack(
        [torch.stack(end, dim=-1) for end in ((left, top), (right, top), (right, bottom), (left, bottom))], dim=2
    )
    ends = ends @ matrix[:, None, :, :2].transpose(-1, -2) + matrix[:, None, None, :, 2]
    most = torch.tensor([size.width - 0.5, size.height - 0.5], device=box.device)
    low, high = (torch.minimum(end, most).clamp(min=-0.5) for end in (ends.amin(dim=2), ends.amax(dim=2)))
    return torch.cat((low, high), dim=-1) * (box[..., 2:3] > 0)


def _each(values: Tensor, size: int) -> Tensor:
    """The last axis divided into rows of a size, [..., M, size]."""
    return values.reshape(*values.shape[:-1], -1, size)


def _of(values: Tensor, owner: Tensor) -> Tensor:
    """The values [B, P, ...] of each cell's person, [B, N, ...]; `owner` [B, N]."""
    return values.gather(1, owner[..., None].expand(-1, -1, values.shape[-1]))


def _cross_entropy(fields: Mapping[str, Tensor], wanted: Tensor, counted: Tensor) -> Tensor:
    """Cross entropy of the scores [B, N], summed over cells and relative to the sum of the targets."""
    if "scores.0" in fields:  # the logits are more precise than the scores
        each = F.binary_cross_entropy_with_logits(fields["scores.0"].float()[..., 0], wanted, reduction="none")
    else:
        each = F.binary_cross_entropy(fields["scores"].float()[..., 0].clamp(_TINY, 1 - _TINY), wanted, reduction="none")
    return (each * torch.maximum(counted, (wanted > 0).float())).sum() / wanted.sum().clamp(min=1)


def _area(sides: Tensor) -> Tensor:
    """Areas of boxes from their sides [..., 2]; unlike `prod`, its gradient need not wait for a GPU."""
    return sides[..., 0] * sides[..., 1]


def _shared(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of the intersection and of the union of boxes."""
    sides = (torch.minimum(ours[..., 2:], theirs[..., 2:]) - torch.maximum(ours[..., :2], theirs[..., :2])).clamp(min=0)
    areas = [_area((box[..., 2:] - box[..., :2]).clamp(min=0)) for box in (ours, theirs)]
    shared = _area(sides)
    return shared, areas[0] + areas[1] - shared


def _iou(ours: Tensor, theirs: Tensor) -> Tensor:
    shared, union = _shared(ours, theirs)
    return shared / union.clamp(min=_TINY)


def _giou(ours: Tensor, theirs: Tensor) -> Tensor:
    """Generalised intersection over union (arXiv:1902.09630)."""
    shared, union = _shared(ours, theirs)
    around = _area(torch.maximum(ours[..., 2:], theirs[..., 2:]) - torch.minimum(ours[..., :2], theirs[..., :2]))
    return shared / union.clamp(min=_TINY) - (around - union) / around.clamp(min=_TINY)
