"""The training loop: AdamW, warm-up and cosine, EMA, distillation, CUDA graphs, checkpoints for resuming, several GPUs."""

import logging
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from pipeline.models.contract import duplicate
from pipeline.pruning.costs import macs
from pipeline.training.distillation import Distillation
from pipeline.training.options import Training
from pipeline.training.steps import Run, Task, effective_precision
from pipeline.training.views import Views
from posepress.errors import UserError

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # its child processes import it before this file


def train(
    network: nn.Module,
    views: Views,
    training: Training,
    checkpoint: Path,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    tune: Views | None = None,
) -> dict[str, Any]:
    """Train a network in place. Its final weights are the averaged ones; with early stopping, the best averaged ones.

    Args:
        network: a network with a `spec` and `ignored_layers`.
        views: the views for training.
        training: the options of the training.
        checkpoint: the file to write, and to resume from if it exists.
        teacher: the dense network, for `distillation`.
        distillation: the options of distillation from `teacher`.
        tune: the views for early stopping.

    Returns:
        The last losses by name, their sum "loss", "steps", "curve" with (step, loss) every few steps, and "train_macs". For
        each image, the latter counts three times the MACs (forward and both gradients), and the teacher's MACs once.

    Raises:
        UserError: the loss repeatedly is not finite, the disk is full, or there are fewer devices than asked for.
    """
    if training.steps == 0:
        return {"steps": 0, "train_macs": 0, "curve": []}
    if training.patience is not None and tune is None:
        raise UserError(f"patience={training.patience}: stopping early needs tune images; choose patience=null")
    if training.compile and shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        raise UserError("training.compile=true: torch.compile needs a C++ compiler; install g++ (or set CXX), or compile=false")
    fabric = _fabric(network, training, distillation)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    task = Task(network, views, training, checkpoint, teacher, distillation, tune)
    _launch(task, fabric)
    state = torch.load(checkpoint, "cpu", weights_only=True)
    network.load_state_dict(state["best"] or state["averaged"])
    network.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    losses: dict[str, float] = state["losses"]
    each = 3 * macs(network, views.resolution) + (macs(teacher, views.resolution) if teacher is not None else 0)
    return {
        **losses,
        "loss": sum(losses.values()),
        "steps": state["step"],
        "train_macs": state["step"] * training.batch_size * each,
        "curve": state["curve"],
    }


def _fabric(network: nn.Module, training: Training, distillation: Distillation | None) -> Any:
    """The devices of a training.

    Raises:
        UserError: there are fewer devices than asked for, or the network or the distillation cannot be shared by several.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # set again, because importing it has set INFO
    several = training.devices * training.num_nodes > 1
    accelerator = training.accelerator
    if accelerator == "auto":
        accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("training.accelerator=cuda: no GPU is found here; choose training.accelerator=cpu, or auto")
    if several and distillation is not None and not distillation.fields and not distillation.labels:
        raise UserError(
            f"distillation: features alone leave the heads without gradients, which devices={training.devices} x num_nodes="
            f"{training.num_nodes} cannot share; give distillation.fields or labels too, or one device"
        )
    if several and any(parametrize.is_parametrized(module) for module in network.modules()):
        raise UserError(
            f"training.devices={training.devices} x num_nodes={training.num_nodes}: networks with computed weights "
            "(weight_norm) can only be trained on one device; set devices=1 and num_nodes=1"
        )
    if accelerator == "cuda" and training.devices > torch.cuda.device_count():
        raise UserError(f"devices={training.devices}: this machine has {torch.cuda.device_count()} GPUs; choose that or fewer")
    return Fabric(
        accelerator=accelerator,
        devices=training.devices,
        num_nodes=training.num_nodes,
        strategy=DDPStrategy(start_method="spawn", broadcast_buffers=False) if several else "auto",
        precision=effective_precision(training, accelerator),  # type: ignore[arg-type]
    )


def _launch(task: Task, fabric: Any) -> None:
    """Train on every device.

    Raises:
        UserError: what a process raised; between processes it travels in a file.
    """
    if task.training.devices * task.training.num_nodes == 1:
        _fit(task, fabric)
        return
    complaint = task.checkpoint.with_suffix(".error")
    complaint.unlink(missing_ok=True)
    try:
        fabric.launch(partial(_fit, task))
    except Exception as error:  # an error of another process arrives as text
        if not complaint.exists():
            raise
        text = complaint.read_text()
        complaint.unlink()
        raise UserError(text) from error


def _fit(task: Task, fabric: Any) -> None:
    training = task.training
    try:
        try:  # the processes of this machine share the network's memory
            Run(fabric, replace(task, network=duplicate(task.network))).fit()
        except torch.OutOfMemoryError as error:
            devices = training.devices * training.num_nodes
            own = training.batch_size // devices
            finer = next((parts for parts in range(training.accumulate + 1, own + 1) if own % parts == 0), None)
            raise UserError(
                f"training.batch_size={training.batch_size}: does not fit into the GPU's memory; "
                + (f"compute it in parts with training.accumulate={finer}, or " if finer is not None else "")
                + "choose a smaller batch_size or training_resolution"
            ) from error
    except UserError as error:
        if fabric.world_size > 1:  # between processes, the error would become the text of a traceback
            task.checkpoint.with_suffix(".error").write_text(str(error))
        raise
