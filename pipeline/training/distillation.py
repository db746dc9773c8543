"""Distillation: a pruned network learns the fields, and on request the features, of the dense one."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.contracts import Splits
from pipeline.training.augment import layout
from posepress.errors import UserError, nearest


@dataclass(frozen=True)
class Distillation:
    """What is learnt from the teacher, beside or instead of the labels.

    Attributes:
        fields: weight of the squared error to the teacher's fields, of every stage, everywhere in the image.
        labels: weight of the objective on labelled images.
        features: weight of the squared error to the teacher's features, relative to their power, through a 1x1 convolution a
            layer that is trained along and thrown away (arXiv:1412.6550).
        layers: name patterns of the layers whose outputs are features.
        unlabelled: learn from the images without labels too.
    """

    fields: Annotated[float, Ge(0)] = 1.0
    labels: Annotated[float, Ge(0)] = 1.0
    features: Annotated[float, Ge(0)] = 0.0
    layers: Sequence[str] = ()
    unlabelled: bool = True

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: a weight is negative, nothing is learnt, or features have no layers, or layers no weight.
        """
        for option in ("fields", "labels", "features"):
            if not getattr(self, option) >= 0:
                raise UserError(f"distillation.{option}={getattr(self, option)}: choose 0 or more")
        if not self.fields and not self.features:
            raise UserError("distillation: fields=0 and features=0 learn nothing from the teacher; choose distillation=null")
        if self.features and not self.layers:
            raise UserError("distillation.features needs distillation.layers=[NAME], the layers whose outputs are compared")
        if self.layers and not self.features:
            raise UserError("distillation.layers are compared with a weight of 0; give distillation.features too, as 0.1")


def splits(data: Splits, how: Distillation | None) -> list[str]:
    """What a network is trained on: the train images, and with a teacher those without labels."""
    unlabelled = how is not None and how.unlabelled and "unlabelled" in data
    return ["train", "unlabelled"] if unlabelled else ["train"]


class Teacher:
    """The dense network, which only looks, and what is compared with it.

    Args:
        network: the dense network.
        student: the network that learns, whose layers have the same names.
        how: what is learnt.
        example: a network input, to size the adapters.

    Raises:
        UserError: a pattern matches no layer of both networks.
    """

    def __init__(self, network: nn.Module, student: nn.Module, how: Distillation, example: Tensor) -> None:
        self.how = how
        self.network = network.to(example.device, memory_format=layout(example.device)).eval().requires_grad_(False)  # type: ignore[call-overload]
        self.network.training = True  # it alone: the fields of earlier stages, with the batch norms' statistics as they are
        self.seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self.adapters = nn.ModuleDict()
        if not how.features:
            return
        for side, module in zip(self.seen, (network, student), strict=True):
            layers = dict(module.named_modules())
            for pattern in how.layers:
                names = fnmatch.filter(layers, pattern)
                if not names:
                    raise UserError(
                        f"distillation.layers={pattern}: matches no layer{nearest(pattern, list(layers))}; choose from "
                        f"{', '.join(name for name in layers if name.count('.') == 0 and name)}, or below"
                    )
                for name in names:
                    layers[name].register_forward_hook(_keep(side, name))
        with torch.no_grad():
            modes = {module: module.training for module in student.modules()}
            self.network(example)
            student.eval()(example)
            for module, training in modes.items():
                module.training = training
        for name, theirs in self.seen[0].items():
            ours = self.seen[1][name]
            self.adapters[name.replace(".", "/")] = nn.Conv2d(ours.shape[1], theirs.shape[1], 1).to(example.device)

    @torch.no_grad()
    def fields(self, images: Tensor) -> Mapping[str, Tensor]:
        """The teacher's fields of all stages; its features are kept for `loss`."""
        made: Mapping[str, Tensor] = self.network(images)
        return made

    def loss(self, fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Named losses of a batch, weighted; the student's features are those of its last call."""
        losses: dict[str, Any] = {}
        if self.how.fields:
            errors = [
                (field.float() - expected[name].float()).square().sum(1).mean()
                for name, field in fields.items()
                if name in expected
            ]
            losses["teacher"] = self.how.fields * torch.stack(errors).sum()
        for name, adapter in self.adapters.items():
            theirs, ours = (side[name.replace("/", ".")] for side in self.seen)
            power = theirs.float().square().mean().clamp(min=1e-12)
            error = F.mse_loss(adapter(ours.float()), theirs.float()) / power
            losses["features"] = losses.get("features", 0) + self.how.features * error
        return losses


def _keep(side: dict[str, Tensor], name: str) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        side[name] = output

    return hook
