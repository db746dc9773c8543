"""Distillation: a pruned network learns the fields of the dense one, and optionally its features."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.contracts import Objective, Splits
from pipeline.progress import say
from pipeline.training.augment import layout
from posepress.contracts import Framing
from posepress.errors import UserError, nearest
from posepress.framing import unframed
from posepress.resolution import Resolution


@dataclass(frozen=True)
class Distillation:
    """The losses to the teacher's outputs, in addition to the labels or instead of them.

    Attributes:
        fields: weight of the squared error to the teacher's fields, at every stage and everywhere in the image.
        labels: weight of the objective on labelled images.
        features: weight of the squared error to the teacher's features, relative to their power. For each layer, a 1x1
            convolution adapts the student's features. It is trained with the network and then removed (arXiv:1412.6550).
        layers: name patterns of the layers that return the features.
        unlabelled: whether the network also learns from images without labels. None: if the framing does not need boxes that
            these images lack.
    """

    fields: Annotated[float, Ge(0)] = 1.0
    labels: Annotated[float, Ge(0)] = 1.0
    features: Annotated[float, Ge(0)] = 0.0
    layers: Sequence[str] = ()
    unlabelled: bool | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: a weight is negative, nothing is learnt, or only one of `features` and `layers` is given.
        """
        for option in ("fields", "labels", "features"):
            if not getattr(self, option) >= 0:
                raise UserError(f"distillation.{option}={getattr(self, option)}: choose 0 or more")
        if not self.fields and not self.features:
            raise UserError("distillation: fields=0 and features=0 learn nothing from the teacher; choose distillation=null")
        if self.features and not self.layers:
            raise UserError("distillation.features needs distillation.layers=[NAME], the layers whose outputs are compared")
        if self.layers and not self.features:
            raise UserError("distillation.layers are compared with a weight of 0; give distillation.features too, like 0.1")


def splits(data: Splits, how: Distillation | None, framing: Framing, size: Resolution) -> list[str]:
    """The splits for training: the train images, and with a teacher also the images without labels.

    Args:
        data: the data set.
        how: options of distillation; None without a teacher.
        framing: framing of the images.
        size: size of the network's input.
    """
    if how is None or how.unlabelled is False or "unlabelled" not in data:
        return ["train"]
    why = unframed(data.open("unlabelled"), framing, size) if how.unlabelled is None else ""
    if why:
        say(f"the images without labels are left out of the distillation: {why}")
    return ["train"] if why else ["train", "unlabelled"]


class Teacher:
    """The dense network, which is not trained, and the losses that compare the student with it.

    Args:
        network: the dense network.
        student: the network that is trained. Its layers have equal names.
        how: the options of distillation.
        example: an input of the network, which determines the size of the adapters.

    Raises:
        UserError: a pattern matches no layer of both networks.
    """

    def __init__(self, network: nn.Module, student: nn.Module, how: Distillation, example: Tensor) -> None:
        self.how = how
        self.network = network.to(example.device, memory_format=layout(example.device)).eval().requires_grad_(False)  # type: ignore[call-overload]
        self.network.training = True  # only the top module: earlier stages return fields, batch norms stay fixed
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
        """The teacher's fields of all stages. Its features are kept for `loss`."""
        made: Mapping[str, Tensor] = self.network(images)
        return made

    def loss(
        self, objective: Objective[Any], fields: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The weighted losses of a batch, by name. The student's features come from its last call."""
        losses: dict[str, Any] = {}
        if self.how.fields:
            losses["teacher"] = self.how.fields * objective.imitation(fields, expected)
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
