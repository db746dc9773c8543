"""Saving and loading networks: weights as safetensors, structure as JSON, no pickle."""

import importlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from evaluation.types import NetworkSpec
from pipeline.errors import UserError
from pipeline.pruning import sparse24
from pipeline.pruning.graph import History, replay

WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"


def save(network: nn.Module, out: Path, make: "partial[nn.Module]", history: list[Any]) -> None:
    """Write model.safetensors and architecture.json.

    Args:
        network: what `make()` returns after `history` was replayed on it, with its weights.
        out: an existing folder.
        make: the network's class and its options.
        history: channels removed, as `pipeline.pruning` records them.
    """
    target = f"{make.func.__module__}.{make.func.__qualname__}"
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    architecture = {
        "target": target,
        "options": make.keywords,
        "pruning": history,
        "spec": json.loads(spec.to_json()),
        "params": sum(p.numel() for p in network.parameters()),
    }
    (out / ARCHITECTURE).write_text(json.dumps(architecture))
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    (out / WEIGHTS).write_bytes(to_bytes(state))  # whose failure names the file


def load(folder: Path) -> tuple[nn.Module, "partial[nn.Module]", list[Any]]:
    """Read what `save` wrote: the network, its class with options, and its pruning history.

    Raises:
        UserError: the files do not belong together, or the network's class is gone.
    """
    architecture = json.loads((folder / ARCHITECTURE).read_text())
    module, _, name = architecture["target"].rpartition(".")
    try:
        make = partial(getattr(importlib.import_module(module), name), **architecture["options"])
    except (ImportError, AttributeError) as error:
        raise UserError(f"{folder / ARCHITECTURE}: cannot import {architecture['target']} ({error})") from error
    history = architecture["pruning"]
    try:
        network = build(make, history)
    except UserError as error:
        raise UserError(f"{folder / ARCHITECTURE}: {error}") from error
    load_state(network, load_file(folder / WEIGHTS), folder / WEIGHTS)
    sparse24.check(network)
    return network, make, history


def build(make: "partial[nn.Module]", history: History) -> nn.Module:
    """A network of random weights with the structure that a pruning history leaves.

    Raises:
        UserError: the history is of another network.
    """
    network = make()
    replay(network, [entry for entry in history if entry[1] != sparse24.KIND])
    sparse24.apply(network, history)
    return network


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file, or of a .pt / .pth state dict (read without executing anything).

    Raises:
        UserError: the file is missing or holds no state dict.
    """
    try:
        raw: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"weights={file}: cannot read the file ({error.strerror or error})") from error
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"weights={file}: not a state file of tensors ({first}); save a state_dict or .safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
    if not isinstance(raw, Mapping) or not all(isinstance(v, torch.Tensor) for v in raw.values()):
        raise UserError(f"weights={file}: not a state dict of tensors; save network.state_dict()")
    return dict(raw)


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], file: Path) -> None:
    """Load tensors into a network; every key must fit.

    Raises:
        UserError: keys are missing, left over or of another shape; they are listed.
    """
    rename = getattr(network, "public_names", dict)
    state = rename(state)
    own = network.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            for what, keys in (("missing", missing), ("left over", extra), ("of another shape", shapes))
            if keys
        ]
        raise UserError(f"{file}: a checkpoint of another network than {type(network).__name__}: {'; '.join(parts)}")
    network.load_state_dict(state, strict=False)
