"""What a network computes, operator by operator."""

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


@dataclass(frozen=True)
class Recording:
    """One forward pass at one shape.

    Attributes:
        digest: of all operators with their arguments: names of weights, numbers, and the content of other constants. The
            weights' values are left out. So code of other files, closures and hooks count as far as they compute.
        norms: the names of layers, a convolution and the batch norm that alone reads what it gives.
    """

    digest: str
    norms: list[tuple[str, str]]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes a line for each operator; tensors are called by the names of weights, or by when they were made."""

    def __init__(self, names: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(tensor): name for name, tensor in names.items()}
        self.alive: list[Tensor] = list(names.values())  # ids are only unique while the tensors live
        self.lines: list[str] = []
        self.reads: Counter[str] = Counter()
        self.weights: dict[str, str] = {}  # of convolutions, by what they give
        self.norms: list[tuple[str, str]] = []  # what a batch norm reads, and its weight

    def read(self, tensor: Tensor) -> str:
        name = self.names.get(id(tensor))
        if name is None:
            content = sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
            name = f"{tensor.dtype} {tuple(tensor.shape)} {content}"
        self.reads[name] += 1
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:  # noqa: SLF001
            raise ValueError("what is computed follows from values")
        given = tree_map_only(Tensor, self.read, (args, kwargs or {}))
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and id(tensor) not in self.names:
                self.names[id(tensor)] = f"%{len(self.alive)}"
                self.alive.append(tensor)
        names = tree_map_only(Tensor, lambda tensor: self.names[id(tensor)], made)
        self.lines.append(f"{names} = {func}{given}")
        if func is _ATEN.convolution.default:
            self.weights[names] = given[0][1]
        elif func is _ATEN.native_batch_norm.default and not args[5] and args[1] is not None:
            self.norms.append((given[0][0], given[0][1]))
        return made


def record(network: nn.Module, images: NDArray[np.float32]) -> Recording | None:
    """Record a network in evaluation mode.

    Args:
        network: of images [B, 3, H, W].
        images: of the shape to record at.

    Returns:
        The recording; None where operators follow from values, or the network's code raises under the recorder.
    """
    given = torch.from_numpy(images)
    with torch.no_grad(), _Recorder(tensors(network) | {"images": given}) as recorder:
        try:
            outputs = network(given)
            ends = tree_map_only(Tensor, recorder.read, outputs)
        except Exception:  # noqa: BLE001 - whatever a network's code raises under the recorder
            return None
    pairs = [
        (weight.rpartition(".")[0], scale.rpartition(".")[0])
        for made, scale in recorder.norms
        if (weight := recorder.weights.get(made)) is not None
        and recorder.reads[made] == recorder.reads[weight] == recorder.reads[scale] == 1
    ]
    return Recording(sha256("\n".join([*recorder.lines, str(ends)]).encode()).hexdigest(), pairs)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has several names comes under each."""
    return {**dict(network.named_parameters(remove_duplicate=False)), **dict(network.named_buffers(remove_duplicate=False))}
