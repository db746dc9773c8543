"""What a pruner learns from images: short trainings between two steps, and the gates of the criterion "taylor"."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from pipeline.pruning.criteria import taylor_gates
from pipeline.training.augment import NONE
from pipeline.training.distillation import Distillation
from pipeline.training.loop import train
from pipeline.training.options import Training
from pipeline.training.shard import Material
from pipeline.training.views import Views


@dataclass
class Lessons:
    """The short trainings, and what they cost.

    Attributes:
        material: data and objective.
        splits: splits to train on.
        seed: seed of the first step.
        training: options of a training.
        distillation: options of distillation; None without a teacher.
        teacher: the dense network; None without distillation.
        scratch: folder of the checkpoints.
        spent: multiply-accumulates of the trainings so far.
    """

    material: Material
    splits: Sequence[str]
    seed: int
    training: Training
    distillation: Distillation | None
    teacher: nn.Module | None
    scratch: Path
    spent: float = 0.0

    def gates(self, network: nn.Module) -> dict[nn.Module, Tensor]:
        """Return the gates of the criterion "taylor" for a network."""
        views = Views.of(self.material, ["train"], network, self.seed)
        return taylor_gates(network, replace(views, augment=NONE))

    def retrain(self, network: nn.Module, step: int) -> None:
        """Train a network in place after a step."""
        views = Views.of(self.material, self.splits, network, self.seed + step)
        checkpoint = self.scratch / f"step{step}.ckpt"
        self.spent += train(network, views, self.training, checkpoint, self.teacher, self.distillation)["train_macs"]
