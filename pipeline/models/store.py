"""Saving and loading of networks: weights as safetensors, structure as JSON, without pickle."""

import difflib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from pipeline.models.contract import created, spec_of, tied
from pipeline.models.trust import network_class
from pipeline.progress import say
from pipeline.pruning import semi_structured
from pipeline.pruning.groups import History, replay
from pipeline.results.content import parse_json
from posepress.errors import UserError

_MOST_TIMES = 64  # largest ratio of a network's parameters to the bytes of its weights' file
WEIGHTS, ARCHITECTURE = "model.safetensors", "architecture.json"
_GIVEN_AS = {
    ".onnx": "model=onnx model.onnx", ".plan": "model=plan model.plan", ".engine": "model=plan model.plan",
}  # fmt: skip


def save(network: nn.Module, out: Path, make: "partial[nn.Module]", history: list[Any]) -> None:
    """Write model.safetensors and architecture.json.

    Args:
        network: the network to save; it has the structure of `make()` after a replay of `history`.
        out: an existing folder.
        make: the network's class with its options.
        history: the removed channels, in the form that `pipeline.pruning` records.
    """
    target = f"{make.func.__module__}.{make.func.__qualname__}"
    spec = spec_of(network)
    architecture = {
        "target": target,
        "options": make.keywords,
        "pruning": history,
        "spec": json.loads(spec.to_json()),
        "params": sum(p.numel() for p in network.parameters()),
    }
    (out / ARCHITECTURE).write_text(json.dumps(architecture))
    ties = tied(network)  # safetensors stores each tensor once
    state = {name: values.detach().cpu().contiguous() for name, values in network.state_dict().items() if name not in ties}
    places: dict[int, str] = {}
    for name, values in state.items():
        if places.setdefault(values.untyped_storage().data_ptr(), name) != name:
            state[name] = values.clone()  # safetensors refuses views of another tensor
    (out / WEIGHTS).write_bytes(to_bytes(state))  # unlike save_file, it names the file in errors


def load(folder: Path) -> tuple[nn.Module, "partial[nn.Module]", list[Any]]:
    """Read the files of `save` and return the network, its class with options, and its pruning history.

    Raises:
        UserError: the files do not fit each other, or the network's class is missing or in a module that is not trusted.
    """
    file = folder / ARCHITECTURE
    architecture = _architecture(file)
    make = partial(network_class(architecture["target"], file), **architecture["options"])
    history = architecture["pruning"]
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: damaged or missing ({error}); make it again") from error
    try:
        _check_size(make, folder / WEIGHTS)
        network = build(make, history)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError) as error:
        what = f"{architecture['target']} with its options and pruning"
        raise UserError(f"{file}: cannot make {what} ({type(error).__name__}: {error}); make it again") from error
    load_state(network, state, folder / WEIGHTS)
    semi_structured.check(network)
    return network, make, history


def _architecture(file: Path) -> dict[str, Any]:
    """Read architecture.json, check the types of its values, and return "target", "options" and "pruning".

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
    """Whether a value is an entry of a pruning history: a layer, one of its sides, and channels."""
    if len(entry) != 3 or not isinstance(entry[0], str) or not isinstance(entry[2], list):
        return False
    numbers = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in entry[2])
    return numbers and (isinstance(entry[1], bool) or entry[1] == semi_structured.KIND)


def _check_size(make: "partial[nn.Module]", weights: Path) -> None:
    """Check, before memory is allocated, that a network is not far larger than its file of weights.

    Pruning explains a moderate difference only.

    Raises:
        UserError: the network is far larger.
    """
    try:
        with torch.device("meta"):
            many = sum(p.numel() for p in make().parameters())
    except (RuntimeError, NotImplementedError):  # the constructor reads values of weights
        return
    if many > _MOST_TIMES * weights.stat().st_size:
        raise UserError(f"a network of {many:.3g} parameters, far more than {weights.name} holds; its options are damaged")


def build(make: "partial[nn.Module]", history: History) -> nn.Module:
    """Make a network with random weights and the structure after a pruning history.

    Raises:
        UserError: the history belongs to another network.
    """
    network = created(make)
    replay(network, [entry for entry in history if entry[1] != semi_structured.KIND])
    semi_structured.apply(network, history)
    return network


def read_weights(file: Path) -> dict[str, Any]:
    """Read a .safetensors, .pt or .pth file for `load_state`. No code in it is executed.

    Returns:
        Tensors by name, or a mapping that contains such tensors ("state_dict", "ema", ...) and other values.

    Raises:
        UserError: the file is missing, or holds no tensors by name.
    """
    if (option := _GIVEN_AS.get(file.suffix.lower())) is not None:
        raise UserError(f"weights={file}: not a state file; give {option}={file} instead of weights=")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an archive that causes warnings is refused below
            raw: Any = load_file(file) if _is_safetensors(file) else torch.load(file, "cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"weights={file}: cannot read the file ({error.strerror or error}); give a readable one") from error
    except Exception as error:
        raise UserError(f"weights={file}: {_no_state(file, str(error).strip() or type(error).__name__)}") from error
    if isinstance(raw, (list, tuple)):
        raw = {str(n): value for n, value in enumerate(raw)}
    if not isinstance(raw, Mapping) or not any(True for _ in _wrapped(raw)):
        raise UserError(f"weights={file}: not a state dict of tensors; save network.state_dict()")
    return dict(raw)


def _is_safetensors(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return True
    with file.open("rb") as stream:
        start = stream.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size


def _no_state(file: Path, complaint: str) -> str:
    """Return the reason why a file is no state file, and the fix."""
    with file.open("rb") as stream:
        start = stream.read(64).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of git-lfs, not the file; fetch it with git lfs pull"
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, not the file; download the file itself"
    found = re.search(r"WeightsUnpickler error: ([^\n]+)", complaint)  # torch's first lines suggest to execute the file
    first = found[1] if found else complaint.splitlines()[0]
    first = "no pickle of tensors" if "weights_only" in first else first[:240]
    if (kind := re.search(r"GLOBAL ([\w.]+)", complaint)) is not None:
        return (
            f"a pickle of more than tensors ({kind[1]}), which would run code when it is read; save "
            "network.state_dict() alone, where the file was made"
        )
    if "TorchScript" in complaint:
        return "a TorchScript archive; save torch.jit.load(FILE).state_dict() with torch.save"
    if _is_onnx(file):
        return f"an ONNX file; give model=onnx model.onnx={file} instead of weights="
    return f"not a state file of tensors ({first}); save a state_dict or .safetensors"


def _is_onnx(file: Path) -> bool:
    import onnx

    try:
        return len(onnx.load(file, load_external_data=False).graph.node) > 0
    except Exception:  # noqa: BLE001 - protobuf raises several classes of errors for other files
        return False


def _wrapped(raw: Mapping[Any, Any], place: str = "", depth: int = 3) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield every mapping in a file that holds tensors by name, with the keys that lead to it."""
    tensors = {key: value for key, value in raw.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield place, tensors
    for key, value in raw.items() if depth else ():
        if isinstance(value, Mapping):
            yield from _wrapped(value, f"{place}.{key}".strip("."), depth - 1)


@dataclass(frozen=True)
class _Reading:
    """One way to assign the tensors of a file to the names of a network.

    Attributes:
        place: keys of the file that lead to the tensors.
        prefix: prefix that was removed from the tensors' names.
        added: prefix that was added to the tensors' names.
        state: the tensors, by name.
        beside: number of other tensors in the mapping.
        missing: names of the network that the file lacks.
        extra: names that the network does not have.
        wrong: descriptions of wrong shapes, and of tied weights that differ.
    """

    place: str
    prefix: str
    added: str
    state: Mapping[str, torch.Tensor]
    beside: int
    missing: Sequence[str]
    extra: Sequence[str]
    wrong: Sequence[str]

    @property
    def fits(self) -> bool:
        return not (self.missing or self.extra or self.wrong)

    @property
    def plain(self) -> bool:
        return not (self.place or self.prefix or self.added)

    def words(self) -> str:
        parts = [f"'{self.place}'"] if self.place else []
        parts += [f"names without '{self.prefix}'"] if self.prefix else []
        parts += [f"names with '{self.added}' before them"] if self.added else []
        return ", ".join(parts)


def _read_as(
    network: nn.Module, place: str, tensors: Mapping[str, torch.Tensor], prefix: str = "", added: str = ""
) -> _Reading:
    own, ties = network.state_dict(), tied(network)
    inside = {added + name[len(prefix) :]: values for name, values in tensors.items() if name.startswith(prefix)}
    state: dict[str, torch.Tensor] = dict(getattr(network, "public_names", dict)(inside))
    wrong = []
    for name, first in ties.items():
        one, two = state.get(name), state.get(first)
        if one is not None and two is not None and not _same(one, two):
            wrong.append(f"{name} differs from {first}, although both are one weight of the network")
        elif one is None and two is not None:
            state[name] = two
        elif two is None and one is not None:
            state[first] = one
    wrong += [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    extra = [name for name in state if name not in own]
    return _Reading(place, prefix, added, state, len(tensors) - len(inside), missing, extra, wrong)


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one is two or (_unlike_weights(one) == _unlike_weights(two) == "" and torch.equal(one, two))


def _unlike_weights(tensor: torch.Tensor) -> str:
    """Return why a tensor cannot be read as weights, or an empty text if it can."""
    if tensor.is_meta:
        return "has no values (it is on the device 'meta')"
    if tensor.layout != torch.strided:
        return "is sparse"
    if tensor.is_quantized or tensor.is_complex():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}"
    return ""


def _check_values(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], file: Path) -> None:
    """Check that tensors can replace a network's own.

    Raises:
        UserError: a tensor holds no floating-point numbers although the network's does, or a value is not finite.
    """
    for name, tensor in state.items():
        unlike = _unlike_weights(tensor)
        if not unlike and own[name].is_floating_point() and not tensor.is_floating_point():
            unlike = f"holds {str(tensor.dtype).removeprefix('torch.')}"
        if unlike:
            raise UserError(f"{file}: {name} {unlike}; save the network's weights as plain floating-point tensors")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{file}: {name} holds values that are not finite; give a checkpoint from before they arose")


def _readings(network: nn.Module, state: Mapping[str, Any]) -> Iterator[_Reading]:
    """Yield all ways to read each mapping of a file: unchanged, without each prefix of its names, or with a prefix added."""
    first, *others = dict.fromkeys(name.partition(".")[0] for name in network.state_dict())
    for place, found in _wrapped(state):
        tensors = {name.replace("_orig_mod.", ""): values for name, values in found.items()}  # torch.compile's
        parts = [name.split(".")[:-1] for name in tensors]
        prefixes = dict.fromkeys(".".join(own[:n]) + "." for n in range(1, 4) for own in parts if len(own) >= n)
        for prefix in ("", *prefixes):
            yield _read_as(network, place, tensors, prefix)
        if not others:
            yield _read_as(network, place, tensors, added=f"{first}.")


def load_state(network: nn.Module, state: Mapping[str, Any], file: Path) -> None:
    """Load tensors into a network. Every name must fit.

    Tensors may be in an inner mapping ("state_dict", "ema"), and their names may have a prefix ("module.", "model."), if
    only one reading fits. A message then states this reading.

    Args:
        network: the network that receives the weights.
        state: result of `read_weights`.
        file: file of the tensors, for messages.

    Raises:
        UserError: names are missing, unknown or of another shape (the message lists them), several readings fit, or a tensor
            holds values other than finite numbers.
    """
    plain = _read_as(network, "", {name: values for name, values in state.items() if isinstance(values, torch.Tensor)})
    readings = [plain] if plain.fits else list(_readings(network, state))
    fitting = [reading for reading in readings if reading.fits]
    if not fitting:
        raise UserError(f"{file}: {_no_reading(network, readings)}")
    chosen = fitting[0]
    others = [r for r in fitting if not all(_same(v, r.state[name]) for name, v in chosen.state.items())]
    if others:
        which = "; ".join(reading.words() for reading in (chosen, *others))
        raise UserError(f"{file}: several states in it fit {type(network).__name__}: {which}; save the one that is meant alone")
    _check_values(chosen.state, network.state_dict(), file)
    if not chosen.plain:
        beside = f"; {chosen.beside} tensors beside them are not the network's" if chosen.beside else ""
        say(f"{file}: read {chosen.words()}{beside}")
    network.load_state_dict(chosen.state, strict=False)


def _no_reading(network: nn.Module, readings: Sequence[_Reading]) -> str:
    """Describe the differences between the network and the reading that fits best."""
    best = min(readings, key=lambda reading: (len(reading.missing) + len(reading.wrong), len(reading.extra)))
    parts = [
        f"{len(names)} {what}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        for what, names in (("missing", best.missing), ("left over", best.extra), ("of another shape", best.wrong))
        if names
    ]
    own = network.state_dict()
    alike = [name for name in best.extra if best.missing and best.state[name].shape == own[best.missing[0]].shape]
    close = difflib.get_close_matches(best.missing[0], alike, n=1, cutoff=0.5) if alike else []
    hint = f"; nearest to {best.missing[0]} there is {close[0]}" if close else ""
    read = "" if best.plain else f" (read as {best.words()})"
    return f"a checkpoint of another network than {type(network).__name__}{read}: {'; '.join(parts)}{hint}"
