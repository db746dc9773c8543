"""Options of a training."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from pipeline.training.sparsity import TYPES
from posepress.errors import UserError

PRECISIONS = ("auto", "32-true", "bf16-mixed")

ACCELERATORS = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Training:
    """The options of a training.

    Attributes:
        steps: number of optimiser steps; 0 keeps the weights.
        batch_size: number of images in a step, over all devices and accumulated parts.
        lr: largest learning rate.
        weight_decay: weight decay of AdamW.
        warmup: number of steps with a linearly growing learning rate. A cosine down to 1 % of `lr` follows.
        ema: decay of the averaged weights, which are the result. The decay grows from 0 to this value.
        regularization_type: penalty on the folded weights of the prunable groups: l1, l2 or group_lasso. None: no penalty.
        kernel_regularization_factor: factor of the penalty `regularization_type`.
        clip: largest norm of the gradient; None: gradients are not clipped.
        precision: precision of Lightning Fabric: "32-true" or "bf16-mixed". "auto" is bf16-mixed if the hardware multiplies
            bfloat16 (a GPU since Ampere, or a CPU with AMX), else 32-true.
        accumulate: number of parts of a batch that each device computes one after another.
        patience: number of checks without a better loss on the tune images after which training stops; None: all steps.
        check_every: number of steps between the checks of `patience`.
        checkpoint_every: number of steps between checkpoints.
        accelerator: accelerator of Lightning Fabric: "auto", "cpu" or "cuda".
        devices: number of processes on CPUs, or of GPUs, on this machine.
        num_nodes: number of machines. Each runs the same command with NODE_RANK, MASTER_ADDR and MASTER_PORT set, and has
            its own outputs.
        cuda_graph: record a step on one GPU, and replay it. Decisions of the network's Python code (like a random number or a
            count of calls) are frozen at the recording.
        compile: let torch.compile fuse the network's operators. On a GPU it takes about 30 s, which pays from a few thousand
            steps on.
    """

    steps: Annotated[int, Interval(ge=0, le=10**9)] = 1000
    batch_size: Annotated[int, Interval(ge=1, le=65536)] = 16
    lr: Annotated[float, Interval(ge=0, le=100)] = 2e-3
    weight_decay: Annotated[float, Interval(ge=0, le=100)] = 1e-4
    warmup: Annotated[int, Interval(ge=0, le=10**9)] = 100
    ema: Annotated[float, Interval(ge=0, lt=1)] = 0.998
    regularization_type: Literal["l1", "l2", "group_lasso"] | None = None
    kernel_regularization_factor: Annotated[float, Ge(0)] = 0.0
    clip: Annotated[float, Gt(0)] | None = 5.0
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    accumulate: Annotated[int, Interval(ge=1, le=65536)] = 1
    patience: Annotated[int, Ge(1)] | None = None
    check_every: Annotated[int, Ge(1)] = 200
    checkpoint_every: Annotated[int, Ge(1)] = 200
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: Annotated[int, Interval(ge=1, le=1024)] = 1
    num_nodes: Annotated[int, Interval(ge=1, le=1024)] = 1
    cuda_graph: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a number is out of range, or the batch cannot be divided among the devices.
        """
        for name, least in (
            ("steps", 0), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1), ("check_every", 1), ("accumulate", 1),
            ("devices", 1), ("num_nodes", 1),
        ):  # fmt: skip
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise UserError(f"training.{name}={getattr(self, name)}: must be a whole number, at least {least}")
        for name in ("lr", "weight_decay", "ema", "kernel_regularization_factor", *(["clip"] if self.clip is not None else [])):
            if not isinstance(getattr(self, name), int | float) or not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.{name}={getattr(self, name)}: must be a number, 0 or more")
        if self.clip == 0:
            raise UserError("training.clip=0: would make every gradient 0; choose more, or null for no clipping")
        if self.regularization_type not in (None, *TYPES):
            raise UserError(f"training.regularization_type={self.regularization_type}: choose null, {', '.join(TYPES)}")
        if (self.regularization_type is None) != (self.kernel_regularization_factor == 0):
            raise UserError(
                f"training.regularization_type={self.regularization_type or 'null'} with kernel_regularization_factor="
                f"{self.kernel_regularization_factor}: one does nothing without the other; give a type and a factor above 0, "
                "or neither"
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"training.precision={self.precision}: choose {', '.join(PRECISIONS)}")
        if self.accelerator not in ACCELERATORS:
            raise UserError(f"training.accelerator={self.accelerator}: choose {', '.join(ACCELERATORS)}")
        if self.patience is not None and (type(self.patience) is not int or self.patience < 1):
            raise UserError(f"training.patience={self.patience}: must be at least 1, or null to train all steps")
        if self.batch_size % self.parts:
            raise UserError(
                f"batch_size={self.batch_size}: cannot be shared by devices={self.devices} x num_nodes={self.num_nodes} x "
                f"accumulate={self.accumulate}; choose a multiple of {self.parts}"
            )

    @property
    def parts(self) -> int:
        """The number of parts of a batch, over all devices and accumulation."""
        return self.devices * self.num_nodes * self.accumulate


def learning_rate(step: int, training: Training) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine down to a hundredth."""
    if step < training.warmup:
        return training.lr * (step + 1) / training.warmup
    done = (step - training.warmup) / max(training.steps - training.warmup, 1)
    return training.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
