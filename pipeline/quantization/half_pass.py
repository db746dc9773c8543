"""Run a network in half precision in torch, to find the nodes that return infinity or NaN."""

from collections.abc import Iterable

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from pipeline.models.onnx_graph import RoundedToHalf
from pipeline.quantization.graph import Graph
from posepress.errors import UserError


class NotRunError(Exception):
    """Torch lacks something that a network needs."""


def overflowing(model: onnx.ModelProto, made: onnx.ModelProto, feed: Iterable[NDArray[np.float32]]) -> list[str]:
    """Nodes that return infinity or NaN when torch computes a half-precision network in half precision.

    On a CPU, ONNX Runtime computes such files in float32, so it would not show an overflow.

    Args:
        model: the float network.
        made: its half-precision network, from `convert`.
        feed: batches of images [B, 3, H, W].

    Raises:
        NotRunError: torch cannot run the network.

    Returns:
        Names of nodes of `model`, only the first one of each image, because it makes the following ones infinite or NaN. For an
        inserted cast, these are the nodes that read its input or its output.
    """
    own = {node.name for node in model.graph.node}
    graph = Graph(made)
    broken: dict[str, None] = {}
    try:
        network = _FirstBroken(made).eval()
    except (UserError, KeyError, TypeError) as error:
        raise NotRunError(str(error)) from error
    with torch.inference_mode():
        for images in feed:
            try:
                network(torch.from_numpy(images))
            except Exception as error:  # the pass does not support some attributes and shapes
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                raise NotRunError(str(error) if isinstance(error, UserError) else words) from error
            if network.first is not None:
                node = graph.producer[network.first]
                around = [graph.producer.get(node.input[0]), *graph.consumers.get(node.output[0], [])]
                some = [node.name] if node.name in own else [one.name for one in around if one is not None and one.name in own]
                broken |= dict.fromkeys(some)
            network.first = None
    return list(broken)


class _FirstBroken(RoundedToHalf):
    """Remembers the first tensor that is not finite."""

    first: str | None = None

    def seen(self, name: str, value: torch.Tensor) -> torch.Tensor:
        value = super().seen(name, value)
        if self.first is None and value.is_floating_point() and not torch.isfinite(value).all():
            self.first = name
        return value
