"""Recordings of the operators that a network runs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
# Operators whose second argument is a shape; the resizes only where factors stand behind it.
_SHAPES = (_ATEN.view.default, _ATEN._unsafe_view.default, _ATEN.reshape.default)  # noqa: SLF001 - autograd's own
_RESIZES = (_ATEN.upsample_nearest2d.default, _ATEN.upsample_bilinear2d.default)


@dataclass(frozen=True)
class Recording:
    """A recording of one forward pass at one shape.

    Attributes:
        digest: digest of the operators, the constants and the names of the weights, without the values of the weights. Two
            networks with equal digests run the same operators at this shape.
        norms: pairs of names: the weight of a convolution, and the weight of the batch norm that alone reads its output.
    """

    digest: str
    norms: list[tuple[str, str]]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a line for each operator. It names tensors after weights, or numbers them in the order of their creation."""

    def __init__(self, names: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(tensor): name for name, tensor in names.items()}
        self.alive: list[Tensor] = list(names.values())  # keeps tensors alive, since ids are unique only among live objects
        self.lines: list[str] = []
        self.reads: Counter[str] = Counter()
        self.given: dict[str, tuple[str, str | None]] = {}  # weight and bias of a convolution, by its output
        self.norms: list[tuple[str, str]] = []  # input and weight of each batch norm

    def read(self, tensor: Tensor) -> str:
        name = self.names.get(id(tensor))
        if name is None:
            content = sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            name = f"{tensor.dtype} {tuple(tensor.shape)} {content}"
        self.reads[name] += 1
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:  # noqa: SLF001
            raise ValueError("the operators depend on values of tensors")
        given = tree_map_only(Tensor, self.read, (args, kwargs or {}))
        if func in _SHAPES or (func in _RESIZES and len(args) > 2):  # the exported graph is compared at both shapes
            given = ((given[0][0], len(args[1]), *given[0][2:]), given[1])
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(tensor) not in self.names:
                self.names[id(tensor)] = f"%{len(self.alive)}"
                self.alive.append(tensor)
        names = tree_map_only(Tensor, lambda tensor: self.names[id(tensor)], made)
        self.lines.append(f"{names} = {func}{given}")
        if func is _ATEN.convolution.default:
            self.given[names] = given[0][1:3]
        elif func is _ATEN.native_batch_norm.default and not args[5] and args[1] is not None:
            self.norms.append((given[0][0], given[0][1]))
        return made


def record(network: nn.Module, images: NDArray[np.float32]) -> Recording | None:
    """Record a network in evaluation mode.

    Args:
        network: a network that takes images [B, 3, H, W].
        images: images with the shape to record.

    Returns:
        The recording, or None if operators depend on values or the network's code raises under the recorder.
    """
    given, weights = torch.from_numpy(images.copy()), tensors(network)
    with torch.no_grad(), _Recorder(weights | {"images": given}) as recorder:
        try:
            outputs = network(given)
            ends = tree_map_only(Tensor, recorder.read, outputs)
        except Exception:  # noqa: BLE001 - the network's code may raise anything
            return None
    pairs = [
        (recorder.given[made][0], scale)
        for made, scale in recorder.norms
        if made in recorder.given
        and {recorder.given[made][0], scale} <= weights.keys()
        # Folding changes the convolution's output, weight and bias, so no other operator may read them.
        and all(recorder.reads[name] == 1 for name in (made, scale, *recorder.given[made]) if name is not None)
    ]
    return Recording(sha256("\n".join([*recorder.lines, str(ends)]).encode()).hexdigest(), pairs)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name. A tensor with several names is listed under each."""
    return {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers(remove_duplicate=False))}
