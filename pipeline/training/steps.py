"""The steps of a training on one device: forward, backward, averages, checkpoints."""

import math
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.progress import TrainingProgress
from pipeline.pruning.groups import example
from pipeline.pruning.semi_structured import zeros
from pipeline.training.augment import layout
from pipeline.training.cuda_graph import Recorded
from pipeline.training.distillation import Distillation, Teacher
from pipeline.training.options import Training, learning_rate
from pipeline.training.sparsity import Penalty
from pipeline.training.views import Batch, Views
from posepress.errors import UserError, first_line

_LOOK_EVERY = 20  # number of steps between readings of the losses, since each reading waits for the device


class NotFiniteError(Exception):
    """A loss is not finite."""


@dataclass(frozen=True)
class Task:
    """What every device trains.

    Attributes:
        network: a network with a `spec` and `ignored_layers`.
        views: the views for training.
        training: the options of the training.
        checkpoint: the file to write, and to resume from if it exists.
        teacher: the dense network; None without distillation.
        distillation: the options of distillation from the teacher.
        tune: the views for early stopping; None without it.
    """

    network: nn.Module
    views: Views
    training: Training
    checkpoint: Path
    teacher: nn.Module | None
    distillation: Distillation | None
    tune: Views | None


class Run:
    """The training on one of the devices: the state that a checkpoint holds, and the steps between two checkpoints."""

    def __init__(self, fabric: Any, task: Task) -> None:
        views, training = task.views, task.training
        fabric.seed_everything(views.seed, verbose=False)
        self.fabric, self.views, self.training, self.checkpoint, self.tune = fabric, views, training, task.checkpoint, task.tune
        on_gpu = fabric.device.type == "cuda"
        network = task.network.to(fabric.device, memory_format=layout(fabric.device)).train()  # type: ignore[call-overload]
        kind = training.regularization_type
        self.penalty = Penalty(network, kind, training.kernel_regularization_factor) if kind else None
        if on_gpu and fabric.world_size > 1:  # computes the statistics of the whole batch, as on one device
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.network = network
        self.teacher = None
        if task.teacher is not None:
            assert task.distillation is not None
            self.teacher = Teacher(task.teacher, network, task.distillation, example(network))
        adapters = [*self.teacher.adapters.parameters()] if self.teacher else []
        trained = [*network.parameters(), *adapters]
        self.rate = torch.tensor(training.lr, device=fabric.device)
        rate: Any = self.rate if on_gpu else training.lr  # a recorded step reads the rate from this tensor
        optimiser = torch.optim.AdamW(
            trained, lr=rate, weight_decay=training.weight_decay, fused=on_gpu or None, capturable=on_gpu
        )
        if fabric.world_size > 1:  # Fabric then wraps the network on another stream
            warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        with warnings.catch_warnings():  # the new name of the option, from torch 2.13 on, is unknown to earlier versions
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            self.model, self.optimiser = fabric.setup(torch.compile(network) if training.compile else network, optimiser)
        self.zeros = zeros(network)
        live = network.state_dict()
        self.averaged = {name: value.detach().clone() for name, value in live.items()}
        floats = [name for name, value in live.items() if value.is_floating_point()]
        self.means, self.values = [self.averaged[name] for name in floats], [live[name] for name in floats]
        self.half = effective_precision(training, fabric.device.type) == "bf16-mixed"
        self.bad = torch.zeros((), device=fabric.device)
        self.recorded = self._recorder()
        self.state: dict[str, Any] = {
            "step": 0, "stopped": False, "losses": {}, "curve": [], "lr_factor": 1.0, "returns": 0, "best": None,
            "best_loss": math.inf, "checks": 0,
        }  # fmt: skip
        found = self._agreed(float(self.checkpoint.exists()))  # checked before any process writes a checkpoint
        if found:
            self._load()
        else:
            self._save()  # fails early if the disk is full

    def _recorder(self) -> Recorded | None:
        one_gpu = self.fabric.device.type == "cuda" and self.training.parts == 1
        return Recorded() if one_gpu and self.training.cuda_graph else None

    def _agreed(self, own: float) -> float:
        """Check that a number is equal on all devices, and return it. It is the existence of a checkpoint, or its step.

        Raises:
            UserError: the number differs between machines.
        """
        most = float(self.fabric.all_reduce(torch.tensor(own, device=self.fabric.device), reduce_op="max"))
        least = -float(self.fabric.all_reduce(torch.tensor(-own, device=self.fabric.device), reduce_op="max"))
        if most != least:
            raise UserError(
                f"{self.checkpoint}: the machines have checkpoints of different steps, or one has none; copy one of them to "
                "all machines, or run again with force=true on all"
            )
        return own

    def _average_statistics(self) -> None:
        """Average the batch norms' statistics over CPU processes. On GPUs, they already belong to the whole batch."""
        if self.fabric.world_size > 1 and self.fabric.device.type != "cuda":
            live = self.network.state_dict()
            for name, _ in self.network.named_buffers():
                if live[name].is_floating_point():
                    for value in (live[name], self.averaged[name]):
                        value.copy_(self.fabric.all_reduce(value, reduce_op="mean"))

    def _save(self) -> None:
        self._average_statistics()
        if self.fabric.local_rank == 0:  # every machine writes a checkpoint, since it resumes from its own
            for name, value in self.network.state_dict().items():
                if not value.is_floating_point():
                    self.averaged[name].copy_(value)
            live = {
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "adapters": self.teacher.adapters.state_dict() if self.teacher else {},
                "averaged": self.averaged,
            }
            _save(self.checkpoint, {**self.state, **live})
        self.fabric.barrier()

    def _load(self) -> None:
        try:
            found = torch.load(self.checkpoint, "cpu", weights_only=True)
            self.network.load_state_dict(found["network"])
            on_gpu = self.fabric.device.type == "cuda"
            for group in found["optimiser"][
                "param_groups"
            ]:  # these options depend on the device, and the checkpoint may come from another one
                group.update(fused=on_gpu or None, capturable=on_gpu)
            self.optimiser.load_state_dict(found["optimiser"])
        except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
            what = first_line(error)
            raise UserError(f"{self.checkpoint}: no checkpoint of this training ({what}); run again with force=true") from error
        if self.teacher:
            self.teacher.adapters.load_state_dict(found["adapters"])
        for name, value in found["averaged"].items():
            self.averaged[name].copy_(value)
        self.state.update({key: found[key] for key in self.state})
        for group in self.optimiser.param_groups if on_gpu else []:
            group["lr"] = self.rate
        self._agreed(self.state["step"])
        self.recorded = self._recorder()  # an earlier recording uses the optimiser's old tensors

    def fit(self) -> None:
        """Train until the last step is in the checkpoint."""
        training, state = self.training, self.state
        shown = self.fabric.global_rank == 0
        with TrainingProgress(shown, training.steps, training.batch_size, state["step"]) as self.progress:
            if 0 < state["step"] < training.steps:
                self.progress.say(f"training resumes at step {state['step']} of {training.steps}")
            while state["step"] < training.steps and not state["stopped"]:
                try:
                    self._go_on()
                except NotFiniteError:
                    self._go_back()
                else:
                    self.progress.say_rate(state["step"])

    def _go_on(self) -> None:
        """Train from the current step to the end.

        Raises:
            NotFiniteError: a loss is not finite.
        """
        training, state = self.training, self.state
        self.bad.zero_()
        self._seed()
        self.progress.begin(state["step"])
        items = _items(training, self.fabric.global_rank, state["step"])
        own = training.batch_size // (training.devices * training.num_nodes)
        many = (training.steps - state["step"]) * own >= len(self.views.shard)
        with closing(self.views.batches(items, self.fabric.device, many)) as batches:
            while state["step"] < training.steps:
                losses = self._step(batches)
                state["step"] += 1
                done = state["step"]
                saves = done % training.checkpoint_every == 0 or done == training.steps
                checks = training.patience is not None and (done % training.check_every == 0 or done == training.steps)
                if done % _LOOK_EVERY == 1 or saves or checks:
                    self._look(losses)
                if checks and self._no_longer_better():
                    self.progress.say(f"stopped after {done} steps: the loss on the tune images rises")
                    state["stopped"] = saves = True
                if saves:
                    self._save()
                    self._seed()
                if state["stopped"]:
                    return

    def _seed(self) -> None:
        """Seed the network's random numbers on CPUs (dropout) by the step, so that a resumed training draws equal ones."""
        steps = self.views.seed * self.training.steps + self.state["step"]
        torch.default_generator.manual_seed(steps * self.fabric.world_size + self.fabric.global_rank)

    def _step(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Take one step, and return this device's losses."""
        training, step = self.training, self.state["step"]
        rate = learning_rate(step, training) * self.state["lr_factor"]
        self.rate.fill_(rate)
        if self.fabric.device.type != "cuda":
            for group in self.optimiser.param_groups:
                group["lr"] = rate
        if self.recorded is None:
            losses = self._learn(batches)
        else:
            known = self.recorded.waits
            losses = self.recorded(self._learn, next(batches))
            if self.recorded.waits and not known:
                self.progress.say("steps are not recorded as a CUDA graph: this network waits for the device")
        for weight, gone in self.zeros:
            weight.masked_fill_(gone, 0)
        decay = min(training.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.means, self.values, 1 - decay)
        self.progress.update(step + 1)
        return losses

    def _learn(self, batches: Iterator[Batch]) -> dict[str, Tensor]:
        """Compute the gradients of a batch, part by part, and take the optimiser's step."""
        training = self.training
        losses: dict[str, Any] = {}
        for part in range(training.accumulate):
            images, targets = next(batches)
            with self.fabric.no_backward_sync(self.model, enabled=part + 1 < training.accumulate):
                named = self._losses(images, targets)
                total = torch.stack([*named.values()]).sum() / training.accumulate
                if self.penalty is not None and part == 0:
                    total = total + self.penalty()
                self.fabric.backward(total)
            self.bad += ~torch.isfinite(total.detach())
            for name, value in named.items():
                losses[name] = losses.get(name, 0) + value.detach() / training.accumulate
        if self.teacher is not None and self.fabric.world_size > 1:  # the adapters are not part of the shared model
            own = [p.grad for p in self.teacher.adapters.parameters() if p.grad is not None]
            if own:  # one reduction for all gradients, since each reduction waits for all devices
                mean = self.fabric.all_reduce(torch.cat([grad.flatten() for grad in own]), reduce_op="mean")
                for grad, part in zip(own, mean.split([grad.numel() for grad in own]), strict=True):
                    grad.copy_(part.view_as(grad))
        greatest = math.inf if training.clip is None else training.clip
        norm = self.fabric.clip_gradients(self.model, self.optimiser, max_norm=greatest, error_if_nonfinite=False)
        self.bad += ~torch.isfinite(norm.detach())
        self.optimiser.step()
        self.optimiser.zero_grad()
        return losses

    def _losses(self, images: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        fields = self.model(images)
        if self.teacher is None:
            learnt: dict[str, Tensor] = dict(self.views.objective.loss(fields, targets))
            return learnt
        how = self.teacher.how
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.half):
            expected = self.teacher.fields(images)
        labels = self.views.objective.loss(fields, targets) if how.labels else {}
        return {name: how.labels * value for name, value in labels.items()} | self.teacher.loss(
            self.views.objective, fields, expected
        )

    def _look(self, losses: Mapping[str, Tensor]) -> None:
        """Wait for the device, and record the mean losses of all devices."""
        if float(self.fabric.all_reduce(self.bad, reduce_op="sum")) > 0:
            raise NotFiniteError
        means = self.fabric.all_reduce(torch.stack([*losses.values()]), reduce_op="mean").tolist()
        self.state["losses"] = dict(zip(losses, means, strict=True))
        self.state["curve"].append([self.state["step"], sum(means)])
        self.progress.show_losses(self.state["step"], self.state["losses"], 2 * _LOOK_EVERY)

    def _go_back(self) -> None:
        """Return to the last checkpoint with half the learning rate.

        Raises:
            UserError: too many returns did not help.
        """
        at, returns = self.state["step"], self.state["returns"] + 1
        self._load()
        if returns > RETURNS:
            raise UserError(
                f"the loss is not finite after {at} steps, also with lr={self.training.lr * self.state['lr_factor']:g}; "
                f"lower training.lr={self.training.lr:g}, or "
                + ("give training.clip=5" if self.training.clip is None else f"lower training.clip={self.training.clip:g}")
            )
        self.fabric.barrier()  # all processes must have read the checkpoint before it is overwritten
        self.state["returns"], self.state["lr_factor"] = returns, self.state["lr_factor"] / 2
        self._save()
        self.progress.say(
            f"the loss is not finite after {at} steps: back to step {self.state['step']}, "
            f"with {self.state['lr_factor']:g} times the learning rate"
        )

    @torch.no_grad()
    def _no_longer_better(self) -> bool:
        """Check the averaged weights on the tune images, and keep them if they are the best so far."""
        assert self.tune is not None
        self._average_statistics()
        network, training, state = self.network, self.training, self.state
        live = {name: value.clone() for name, value in network.state_dict().items()}
        network.load_state_dict(self.averaged)
        found = loss_on(network.eval(), self.tune, training.batch_size // training.parts)
        found = float(self.fabric.broadcast(found))  # either all processes stop, or none
        network.load_state_dict(live)
        network.train()
        if found < state["best_loss"]:
            best = {name: value.cpu().clone() for name, value in self.averaged.items()}
            state.update(best=best, best_loss=found, checks=0)
        else:
            state["checks"] += 1
        return bool(state["checks"] >= training.patience)


def loss_on(network: nn.Module, views: Views, batch_size: int) -> float:
    """The objective's loss of a network on every image of some views, on the network's device and in its current mode."""
    device = next(network.parameters()).device
    total, count = 0.0, len(views.shard)
    parts = iter([range(n, min(n + batch_size, count)) for n in range(0, count, batch_size)])
    with torch.no_grad():
        for images, targets in views.batches(parts, device):
            losses = views.objective.loss(network(images), targets)
            total += float(torch.stack([*losses.values()]).sum()) * len(images)
    return total / count


def effective_precision(training: Training, accelerator: str) -> str:
    """The precision of a training, with "auto" decided by what the hardware multiplies fast."""
    if training.precision != "auto":
        return training.precision
    if accelerator == "cpu":
        multiplies = torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    else:
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if multiplies else "32-true"


def _save(checkpoint: Path, state: Mapping[str, Any]) -> None:
    unfinished = checkpoint.with_suffix(".tmp")
    try:
        torch.save(dict(state), unfinished)
    except (RuntimeError, OSError) as error:  # torch's writer raises RuntimeError if the disk is full
        unfinished.unlink(missing_ok=True)
        raise UserError(
            f"{checkpoint}: cannot write the checkpoint ({first_line(error)}); is the disk full? "
            "The last one is kept: free some space and run the same command again"
        ) from error
    unfinished.replace(checkpoint)


def _items(training: Training, rank: int, first: int) -> Iterator[range]:
    """The items of a device: its part of each step's images, divided further for accumulation."""
    size = training.batch_size // training.parts
    for step in range(first, training.steps):
        for part in range(training.accumulate):
            start = step * training.batch_size + (part * training.devices * training.num_nodes + rank) * size
            yield range(start, start + size)


RETURNS = 3  # largest number of returns to the checkpoint after a loss that is not finite
