"""Checks of a torch network: its construction, its description, and the outputs of its forward pass."""

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pipeline.contracts import Objective, Stored
from posepress.errors import UserError, first_line, nearest
from posepress.labels import Palette, Skeleton
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec, OutputSpec

_SEE = "see docs/guides/own-network.md"
_IMAGES = 2  # batch size of a forward pass; batch norm in training needs more than one image


def spec_of(network: nn.Module) -> NetworkSpec:
    """Return the description of a network, which `created` has checked."""
    return cast("NetworkSpec", network.spec)


def title(kind: Any) -> str:
    """Return the full name of a class or function."""
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', kind)}"


def created(make: "partial[nn.Module]") -> nn.Module:
    """Make a network from its class and options, and check that it has `spec` and `ignored_layers`.

    Raises:
        UserError: the network is made already, the class is no network, does not take the options or fails, or the network
            lacks an attribute.
    """
    given: Any = make
    if isinstance(given, nn.Module):
        raise UserError(f"model: add `_partial_: true` to the yaml of {title(type(given))}; stages make the network ({_SEE})")
    kind: Any = make.func
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(f"model: {title(kind)} is no torch.nn.Module; give a network's class as model._target_ ({_SEE})")
    _check_options(kind, make.keywords)
    try:
        network = make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model: {title(kind)} cannot be made: {_told(error)}") from error
    _check_description(network, kind)
    return network


def _check_options(kind: type, options: Mapping[str, Any]) -> None:
    signature = inspect.signature(kind)
    taken = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        taken += [name for name in options if name not in taken]
    for name, value in options.items():
        if name not in taken:
            raise UserError(
                f"model.{name}={value}: {title(kind)} has no option '{name}'{nearest(name, taken)} "
                f"(it has {', '.join(taken) or 'none'}); where an experiment sets it, add ~model.{name}"
            )
    missing = [name for name in taken if name not in options and signature.parameters[name].default is inspect.Parameter.empty]
    if missing:
        raise UserError(f"model: {title(kind)} needs the option '{missing[0]}'; give model.{missing[0]}=VALUE, or a default")


def _check_description(network: nn.Module, kind: type) -> None:
    spec = getattr(network, "spec", None)
    if not isinstance(spec, NetworkSpec):
        has = "has no `spec`" if spec is None else f"has a {type(spec).__name__} as `spec`"
        raise UserError(f"model: {title(kind)} {has}; describe input, fields and labels in a NetworkSpec ({_SEE})")
    if (spec.input.layout, spec.input.dtype) != ("NCHW", "float32"):
        raise UserError(
            f"model: {title(kind)}.spec.input has layout={spec.input.layout} dtype={spec.input.dtype}; networks in torch take "
            "NCHW and float32, other forms are for model=onnx alone"
        )
    heads = getattr(network, "ignored_layers", None)
    if heads is None or inspect.ismethod(heads) or not isinstance(heads, Iterable):
        has = "has no `ignored_layers`" if heads is None else "has `ignored_layers` that are no list (is @property missing?)"
        raise UserError(f"model: {title(kind)} {has}; list the layers that compute the outputs ({_SEE})")
    own = set(network.modules())
    for head in heads:
        if not isinstance(head, nn.Module) or head not in own:
            raise UserError(f"model: {title(kind)}.ignored_layers holds {_short(head)}, which is no layer of the network")


def check(
    network: nn.Module,
    resolution: Resolution,
    objective: Objective[Any] | None = None,
    source: Callable[[], Skeleton | Palette] | None = None,
) -> None:
    """Compare a network's outputs with its `spec`, in evaluation and in training mode, before any data are read.

    Args:
        network: the network, which is not changed.
        resolution: size of the images, in pixels.
        objective: training objective; its loss is computed for images without labels. None skips this check.
        source: reads the labels of the data that it is trained on; needed with `objective`, and called last.

    Raises:
        UserError: the forward pass fails, the objective does not fit, or a field is missing or has another shape than
            expected. The message states both shapes.
    """
    spec = spec_of(network)
    name = title(type(network))
    if not spec.input.fits(resolution):
        raise UserError(
            f"training_resolution={resolution}: {name} takes multiples of {spec.input.multiple}"
            f"{f' plus {spec.input.offset}' if spec.input.offset else ''} (its spec.input); choose "
            f"{spec.input.fit(resolution.height)}x{spec.input.fit(resolution.width)}"
        )
    images = torch.zeros(_IMAGES, len(spec.input.mean), resolution.height, resolution.width)
    copy, wrong, fields = duplicate(network).cpu(), [], {}
    for training in (False, True):
        fields = forward(copy.train(training), images)
        if not isinstance(fields, Mapping):
            raise UserError(
                f"model: {name}.forward returns {_short(fields)}; return a dict with "
                f"{', '.join(repr(field.name) for field in spec.fields)}, the names in its spec"
            )
        wrong += _differences(fields, spec, resolution, training)
    if wrong:
        raise UserError(f"model: {name}.forward does not fit its spec: {'; '.join(dict.fromkeys(wrong))}")
    if objective is not None:
        assert source is not None
        _rehearse(name, spec, objective, resolution, fields, source())


def _rehearse(
    name: str,
    spec: NetworkSpec,
    objective: Objective[Any],
    size: Resolution,
    fields: Mapping[str, Tensor],
    source: Skeleton | Palette,
) -> None:
    stored = Stored(size, size, size, source)
    kept = {key: np.stack([value] * _IMAGES) for key, value in objective.labels(None, stored, 1).items()}
    labels = {key: torch.from_numpy(value) for key, value in kept.items()}
    labels |= {"matrix": torch.eye(2, 3).repeat(_IMAGES, 1, 1)}
    labels |= {key: torch.zeros(_IMAGES, dtype=torch.bool) for key in ("flipped", "labelled")}
    labels |= {"base": torch.zeros(_IMAGES, dtype=torch.int64)}
    try:
        spec.offers(objective.needs)
    except ValueError as error:
        raise UserError(
            f"model: {name} cannot be trained here, because its outputs are not those of {type(objective).__name__} ({error}); "
            "choose the family of this network, for example family=topdown"
        ) from error
    try:
        objective.loss(fields, objective.targets(labels, size, spec, source))
    except UserError as error:
        raise UserError(f"model: {name} cannot be trained here: {error}") from error
    except Exception as error:
        raise UserError(
            f"model: {name} cannot be trained here: {type(objective).__name__} does not fit its spec ({_told(error)})"
        ) from error


def forward(network: nn.Module, images: Tensor) -> Any:
    """Run a network in its current mode without gradients, and return its outputs.

    Args:
        network: any network.
        images: [N, C, H, W] on the network's device.

    Raises:
        UserError: the forward pass fails.
    """
    mode = "training" if network.training else "evaluation"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return network(images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"model: {title(type(network))}.forward fails on images {[*images.shape]} in {mode}: {_told(error)}"
        ) from error


def _differences(fields: Mapping[Any, Any], spec: NetworkSpec, size: Resolution, training: bool) -> list[str]:
    """Describe fields that are missing, unknown or of a wrong shape. In training, fields of earlier stages are allowed."""
    own = {field.name: field for field in spec.fields}
    missing = [name for name in own if name not in fields]
    extra = [name for name in fields if name not in own and not (training and str(name).partition(".")[0] in own)]
    wrong = []
    if missing or extra:
        wrong.append(f"expected {', '.join(map(repr, own))}, found {', '.join(map(repr, fields)) or 'nothing'}")
        if not missing:
            hint = f"{next(iter(own))}.0"
            wrong[-1] += f" (in training only, a further output is allowed if its name marks an earlier stage, as '{hint}')"
    for name, found in fields.items():
        field = own.get(str(name).partition(".")[0])
        if field is not None and name not in extra and (text := _difference(name, field, found, size)):
            wrong.append(text)
    return wrong


def _difference(name: str, field: OutputSpec, found: Any, size: Resolution) -> str | None:
    shape = field.shape(size)
    expected = [_IMAGES, *("N" if side is None else side for side in shape)]
    if isinstance(found, Tensor) and found.is_floating_point() == field.dtype.startswith("float"):
        sides = [*found.shape]
        if len(sides) == len(expected) and all(side in ("N", own) for side, own in zip(expected, sides, strict=True)):
            return None
    listed = ", ".join(map(str, expected))
    text = f"{name}: expected [{listed}] ({field.channels} channels, stride {field.stride}), found {_short(found)}"
    if field.is_map and isinstance(found, Tensor) and found.dim() == 4 and found.shape[2] and size.height % found.shape[2] == 0:
        stride = size.height // found.shape[2]
        if found.shape[3] == size.width // stride:
            text += f", which is {found.shape[1]} channels, stride {stride}"
    return text


def duplicate(network: nn.Module) -> nn.Module:
    """Return a deep copy. Unlike deepcopy, it also works for weights that a hook computes, as the older weight_norm does."""
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                vars(module)[name] = value.detach()  # the next forward pass computes it again
    copy = deepcopy(network)
    for module in copy.modules():
        if parametrize.is_parametrized(module):  # `fold` removes a property of this class
            kind = type(module)
            members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, members)
    return copy


def fold(network: nn.Module) -> list[str]:
    """Replace computed weights (weight_norm, spectral_norm, masks, parametrizations) by plain ones in place.

    Returns:
        The names of the layers that had computed weights.
    """
    folded = []
    for name, module in network.named_modules():
        hooks = [*module._forward_pre_hooks.values()]  # noqa: SLF001
        before = len(hooks)
        for hook in hooks:
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]  # noqa: SLF001
        computed = parametrize.is_parametrized(module)
        if computed:
            for tensor in list(module.parametrizations):
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
        if computed or len(module._forward_pre_hooks) < before:  # noqa: SLF001
            folded.append(name)
    return folded


def tied(network: nn.Module) -> dict[str, str]:
    """Return further names of parameters and buffers that have several, each with the tensor's first name."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name != first.setdefault(id(tensor), name):
            found[name] = first[id(tensor)]
    return found


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
        return f"a tensor {[*value.shape]}{kind}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _told(error: Exception) -> str:
    """Return an error's first line, with the file and line of the network's own code that raised it."""
    text = first_line(error)
    if not isinstance(error, (ValueError, UserError)):
        text = f"{type(error).__name__}: {text}"
    libraries = ("site-packages", "dist-packages", str(Path(__file__)))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in libraries)]
    return f"{text} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else text
