"""The training loop: steps, AdamW, warm-up and cosine, EMA, checkpoints that a killed run goes on from."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from evaluation.pixels import normalise
from evaluation.types import NetworkSpec, Resolution
from pipeline.errors import UserError
from pipeline.pruning import folded_weights, normalised
from pipeline.specs import Dataset, Objective
from pipeline.training.augment import Augmentation


@dataclass(frozen=True)
class Training:
    """How long and how fast.

    Attributes:
        steps: optimiser steps; 0 keeps the weights.
        batch_size: images a step.
        lr: greatest learning rate.
        weight_decay: AdamW's.
        warmup: steps of linearly growing learning rate; a cosine to a hundredth follows.
        ema: decay of the averaged weights, which are the result; it grows to this from 0.
        l1: factor of the L1 norm of the weights that pruning will judge, added to the loss.
        clip: greatest norm of the gradient.
        precision: Lightning Fabric's: "32-true", "bf16-mixed", "16-mixed"; "auto" is bfloat16 where the hardware
            multiplies it (a GPU, or a CPU with AMX), else 32-true.
        workers: processes that read and augment; None is one less than the cores, 16 at most.
        checkpoint_every: steps between checkpoints.
        accelerator: Lightning Fabric's: "auto", "cpu", "cuda"; one device is used.
    """

    steps: int = 1000
    batch_size: int = 16
    lr: float = 2e-3
    weight_decay: float = 1e-4
    warmup: int = 100
    ema: float = 0.998
    l1: float = 0.0
    clip: float = 5.0
    precision: str = "auto"
    workers: int | None = None
    checkpoint_every: int = 200
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a number is out of range.
        """
        for name, least in (("steps", 0), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")


class _Views(TorchDataset[dict[str, Tensor]]):
    """Random views; item n is the same whichever process makes it, so a resumed run sees what it would have seen."""

    def __init__(
        self,
        data: Dataset[Any],
        objective: Objective[Any],
        spec: NetworkSpec,
        resolution: Resolution,
        augment: Augmentation,
        seed: int,
    ) -> None:
        self.data, self.objective, self.spec, self.resolution = data, objective, spec, resolution
        self.augment, self.seed = augment, seed

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        import cv2

        epoch, place = divmod(n, len(self.data))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        draw = np.random.default_rng([self.seed, 1, n])
        sample = self.data[int(order[place])]
        truth = sample.truth
        assert truth is not None, "train images have labels"
        view = self.augment.view(draw, sample.size, self.resolution, truth)
        pad = (self.spec.input.pad,) * 3
        size = (view.size.width, view.size.height)
        image = cv2.warpAffine(sample.read(), view.matrix, size, flags=cv2.INTER_LINEAR, borderValue=pad)
        pixels = self.augment.pixels(draw, np.asarray(image, np.uint8))
        fields: dict[str, NDArray[np.float32]] = dict(self.objective.targets(truth, view, self.spec))
        fields["image"] = normalise(pixels, self.spec.input)
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in fields.items()}


def _single_threaded(_: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _averaging(most: float) -> Callable[[Any, Any, Any], None]:
    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        decay = min(most, (1 + float(count)) / (10 + float(count)))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            for mean, value in zip(averaged, current, strict=True):
                mean.copy_(value)

    return update


def learning_rate(step: int, training: Training) -> float:
    """The learning rate of a step: a linear warm-up, then a cosine down to a hundredth."""
    if step < training.warmup:
        return training.lr * (step + 1) / training.warmup
    done = (step - training.warmup) / max(training.steps - training.warmup, 1)
    return training.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def train(
    network: nn.Module,
    data: Dataset[Any],
    objective: Objective[Any],
    resolution: Resolution,
    augment: Augmentation,
    training: Training,
    checkpoint: Path,
    seed: int = 0,
) -> Mapping[str, float]:
    """Train a network in place; its final weights are the averaged ones.

    Args:
        network: with a `spec` and `ignored_layers`.
        data: labelled images.
        objective: of the network's family.
        resolution: of the views.
        augment: how views are drawn.
        training: how long and how fast.
        checkpoint: the file to go on from, if it exists, and to write.
        seed: of the order and the views.

    Returns:
        The last losses by name, "loss" their sum, "steps".

    Raises:
        UserError: the loss is no longer finite.
    """
    if training.steps == 0:
        return {"steps": 0.0}
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=training.accelerator, devices=1, precision=_precision(training))  # type: ignore[arg-type]
    fabric.launch()
    fabric.seed_everything(seed, verbose=False)
    torch.backends.cudnn.benchmark = fabric.device.type == "cuda"
    network.train()
    pairs = normalised(network)
    model, optimiser = fabric.setup(
        network.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        torch.optim.AdamW(network.parameters(), lr=training.lr, weight_decay=training.weight_decay),
    )
    averaged = AveragedModel(network, multi_avg_fn=_averaging(training.ema), use_buffers=True)
    state: dict[str, Any] = {"network": network, "optimiser": optimiser, "averaged": averaged, "step": 0, "losses": {}}
    if checkpoint.exists():
        fabric.load(checkpoint, state)
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    views = _Views(data, objective, spec, resolution, augment, seed)
    with _bar() as progress:
        task = progress.add_task("training", total=training.steps, completed=state["step"], losses="")
        for batch in _batches(fabric, views, training, state["step"]):
            step = int(state["step"])
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, training)
            images = batch.pop("image")
            named = objective.loss(model(images.to(memory_format=torch.channels_last)), batch)
            total: Any = sum(named.values())
            if training.l1:
                total = total + training.l1 * sum(weight.abs().sum() for weight in folded_weights(network, pairs))
            fabric.backward(total)
            fabric.clip_gradients(model, optimiser, max_norm=training.clip, error_if_nonfinite=False)
            optimiser.step()
            optimiser.zero_grad()
            averaged.update_parameters(network)
            state["step"] = step + 1
            if step % 20 == 0 or step + 1 == training.steps:
                state["losses"] = {name: float(value.detach()) for name, value in named.items()}
                if not math.isfinite(sum(state["losses"].values())):
                    raise UserError(f"the loss is {state['losses']} after {step} steps; lower lr={training.lr}")
            progress.update(task, advance=1, losses=" ".join(f"{k} {v:.3f}" for k, v in state["losses"].items()))
            if (step + 1) % training.checkpoint_every == 0:
                _save(fabric, checkpoint, state)
    _save(fabric, checkpoint, state)
    network.load_state_dict(averaged.module.state_dict())
    network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    losses: dict[str, float] = state["losses"]
    return {**losses, "loss": sum(losses.values()), "steps": float(training.steps)}


def _precision(training: Training) -> str:
    if training.precision != "auto":
        return training.precision
    on_gpu = training.accelerator != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu or torch.cpu._is_amx_tile_supported() else "32-true"  # noqa: SLF001


def _save(fabric: Any, checkpoint: Path, state: Mapping[str, Any]) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = checkpoint.with_suffix(".tmp")
    try:
        fabric.save(unfinished, dict(state))
    except RuntimeError as error:  # torch's writer says so when the disk is full
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"{checkpoint}: cannot write the checkpoint ({str(error).splitlines()[0]}); is the disk full?"
        ) from error
    unfinished.replace(checkpoint)


def _batches(fabric: Any, views: _Views, training: Training, first: int) -> Iterator[dict[str, Tensor]]:
    workers = training.workers
    if workers is None:
        workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        views,
        batch_size=training.batch_size,
        sampler=range(first * training.batch_size, training.steps * training.batch_size),
        num_workers=workers,
        worker_init_fn=_single_threaded,
        pin_memory=fabric.device.type == "cuda",
        prefetch_factor=4 if workers else None,
    )
    try:
        yield from fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    except UserError as error:  # from a worker it comes with the worker's traceback in its message
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("pipeline.errors.UserError: ")) from error


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[losses]}"))
