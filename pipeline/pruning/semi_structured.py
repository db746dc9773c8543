"""2:4 sparsity: of every four neighbouring input channels two weights are zero, as NVIDIA's sparse tensor cores need it."""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pipeline.models.contract import fold
from pipeline.pruning.groups import History
from posepress.errors import UserError

KIND = "2:4"  # marks sparsity in a pruning history; a channel pruning has the side of the layer in this place


def smaller(weight: Tensor) -> Tensor:
    """The two of every four weights along the input channels [O, I, kh, kw] that have the least magnitude."""
    outputs, inputs, *kernel = weight.shape
    fours = weight.detach().abs().reshape(outputs, inputs // 4, 4, *kernel)
    least = fours.argsort(dim=2, stable=True)[:, :, :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(2, least, value=True).reshape(weight.shape)


def apply(network: nn.Module, history: History) -> None:
    """Zero the smaller weights of the layers that a pruning history marks as 2:4 sparse, and store the layers' names."""
    names = [str(name) for name, kind, _ in history if kind == KIND]
    if not names:
        return
    fold(network)
    layers: dict[str, Any] = dict(network.named_modules())
    for name in names:
        if not isinstance(layers.get(name), nn.Conv2d):
            raise UserError(
                f"architecture.json makes the layer {name} 2:4 sparse, but {type(network).__name__} lacks it; prune again"
            )
        with torch.no_grad():
            layers[name].weight.masked_fill_(smaller(layers[name].weight), 0)
    network.sparse24 = names  # type: ignore[assignment]


def check(network: nn.Module) -> None:
    """Check that every layer that is marked as 2:4 sparse has such weights.

    Raises:
        UserError: a marked layer is not sparse.
    """
    layers = dict(network.named_modules())
    for name in getattr(network, "sparse24", []):
        weight: Any = layers[name].weight
        if not is_sparse(weight.detach().numpy()):
            raise UserError(f"the weights of {name} are not 2:4 sparse, though architecture.json says so; prune again")


def zeros(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The weights with zeros that training must preserve, each with a mask of these zeros."""
    own: dict[str, Any] = dict(network.named_parameters())
    weights = [own[name] if name in own else own[f"{name}.weight"] for name in getattr(network, "sparse24", [])]
    return [(weight.data, weight.data == 0) for weight in weights]


def is_sparse(weight: np.ndarray[Any, Any]) -> bool:
    """Whether at most two weights of every four neighbouring input channels [O, I, kh, kw] are not zero."""
    if weight.shape[1] % 4:
        return False
    fours = weight.reshape(weight.shape[0], weight.shape[1] // 4, 4, -1)
    return bool(((fours != 0).sum(axis=2) <= 2).all())


def sparse_layers(graph: onnx.GraphProto) -> list[str]:
    """The names of the convolutions of an ONNX graph whose weights are 2:4 sparse."""
    weights = {i.name: i for i in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "Conv" and node.input[1] in weights and is_sparse(numpy_helper.to_array(weights[node.input[1]]))
    ]
