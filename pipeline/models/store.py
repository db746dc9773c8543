"""Saving and loading networks: weights as safetensors, structure as JSON, no pickle."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from evaluation.types import NetworkSpec
from pipeline.artifacts import parse_json
from pipeline.errors import UserError
from pipeline.models.trust import network_class
from pipeline.pruning import sparse24
from pipeline.pruning.graph import History, replay

_MOST_TIMES = 64  # parameters to bytes
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
        UserError: the files do not belong together, or the network's class is gone or of a module that is not trusted.
    """
    file = folder / ARCHITECTURE
    architecture = _architecture(file)
    make = partial(network_class(architecture["target"], file), **architecture["options"])
    history = architecture["pruning"]
    try:
        _check_size(make, folder / WEIGHTS)
        network = build(make, history)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = f"{architecture['target']} with its options and pruning"
        raise UserError(f"{file}: cannot make {what} ({type(error).__name__}: {error}); it is of another version") from error
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: damaged or missing ({error}); make it again") from error
    load_state(network, state, folder / WEIGHTS)
    sparse24.check(network)
    return network, make, history


def _architecture(file: Path) -> dict[str, Any]:
    """What architecture.json says, of the right types: "target", "options" and "pruning".

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no description of a network ({error}); make it again") from error
    named = isinstance(found, dict) and isinstance(found.get("options"), dict) and isinstance(found.get("pruning"), list)
    if not named or not all(isinstance(entry, list) and _removal(entry) for entry in found["pruning"]):
        raise UserError(f"{file}: no description of a network: options or pruning are missing; make it again")
    return {"target": found.get("target"), "options": found["options"], "pruning": found["pruning"]}


def _removal(entry: list[Any]) -> bool:
    """Whether an entry is one of a pruning history: a layer, which of its sides, and channels."""
    if len(entry) != 3 or not isinstance(entry[0], str) or not isinstance(entry[2], list):
        return False
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entry[2])
    return numbers and (isinstance(entry[1], bool) or entry[1] == sparse24.KIND)


def _check_size(make: "partial[nn.Module]", weights: Path) -> None:
    """Check, before any memory is taken, that a network is not far larger than its weights: pruning leaves more of it.

    Raises:
        UserError: it is.
    """
    try:
        with torch.device("meta"):
            many = sum(p.numel() for p in make().parameters())
    except (RuntimeError, NotImplementedError):  # it looks at its weights while it is made
        return
    if weights.is_file() and many > _MOST_TIMES * weights.stat().st_size:
        raise UserError(f"a network of {many:.3g} parameters, far more than {weights.name} holds; its options are damaged")


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
