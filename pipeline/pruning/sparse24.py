"""The pruner of 2:4 semi-structured sparsity."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.pruning.pruner import digest_in_label
from posepress.errors import UserError, nearest


@dataclass(frozen=True)
class Sparse24:
    """Zeroes the two smaller of every four weights along the input channels (arXiv:2104.08378).

    Layers need a multiple of four input channels. Depthwise convolutions and heads are not changed. Parameters and MACs stay
    equal; TensorRT uses the zeros with `backend.sparse_weights=true`.

    Attributes:
        excluded_layers: name patterns of layers that are not changed.
    """

    excluded_layers: Sequence[str] = ()

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """The label suffix, which names the difference from sparsity of all layers."""
        excluded = options.get("excluded_layers")
        return f"ex.{digest_in_label(excluded)}" if excluded else ""

    def prune(self, network: Any) -> list[Any]:
        """Zero the weights in place, and return the history for `replay`.

        Raises:
            UserError: a pattern matches no layer, or no layer can be made sparse.
        """
        import torch
        from torch import nn

        from pipeline.models.contract import fold
        from pipeline.pruning.groups import folded, heads, normalised
        from pipeline.pruning.semi_structured import KIND, smaller

        fold(network)
        kept = set(heads(network))
        layers: dict[str, Any] = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d) and module.groups == 1 and module.in_channels % 4 == 0 and module not in kept
        }
        if not layers:
            raise UserError("pruner=sparse24: no convolution of this network has a multiple of 4 input channels")
        excluded = set()
        for pattern in self.excluded_layers:
            matched = fnmatch.filter(layers, pattern)
            if not matched:
                raise UserError(
                    f"pruner.excluded_layers={pattern}: matches no layer that can be sparse{nearest(pattern, list(layers))}"
                )
            excluded |= {*matched}
        layers = {name: layer for name, layer in layers.items() if name not in excluded}
        if not layers:
            raise UserError("pruner.excluded_layers: no layer is left that can be sparse; exclude less")
        pairs = normalised(network)
        for layer in layers.values():
            with torch.no_grad():
                layer.weight.masked_fill_(smaller(folded(layer, pairs.get(layer))), 0)
        history = [[name, KIND, []] for name in layers]
        network.sparse24 = list(layers)
        return history
