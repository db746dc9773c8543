"""What a network costs with fewer channels: parameters and multiply-accumulates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.contract import duplicate, fold
from pipeline.pruning.groups import LAYERS, Group, example, output_axis, watched
from posepress.resolution import Resolution


class Costs:
    """Parameters and multiply-accumulates of a network as a function of how many channels of each group are kept.

    Args:
        network: a network with `spec` and `ignored_layers`.
        of: the groups of this network.
        resolution: size of the input.
    """

    def __init__(self, network: nn.Module, of: Sequence[Group], resolution: Resolution) -> None:
        self.sizes = torch.tensor([g.size for g in of], dtype=torch.float64)
        positions: dict[nn.Module, int] = {}

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            positions[module] = seen[0].numel() // seen.shape[-1 if isinstance(module, nn.Linear) else 1]

        with watched(network, LAYERS, count, example(network, resolution)):
            pass
        layers: list[Any] = list(positions)
        at = {layer: n for n, layer in enumerate(layers)}
        self.fixed_out, self.fixed_in, self.kernel = (torch.zeros(len(layers), dtype=torch.float64) for _ in range(3))
        self.of_out = torch.zeros(len(layers), len(of), dtype=torch.float64)
        self.of_in = torch.zeros(len(layers), len(of), dtype=torch.float64)
        for n, layer in enumerate(layers):
            axis = output_axis(layer)
            self.fixed_out[n], self.fixed_in[n] = layer.weight.shape[axis], layer.weight.shape[1 - axis]
            self.kernel[n] = layer.weight[0, 0].numel()
        self.norms = torch.zeros(len(of), dtype=torch.float64)
        for g, group in enumerate(of):
            self.norms[g] = group.others
            for part in group.parts:
                if isinstance(part.layer, nn.BatchNorm2d):
                    self.norms[g] += 2 * part.layer.affine * len(part.channels) / group.size
                elif part.layer in at:
                    shares = self.of_out if part.outputs else self.of_in
                    shares[at[part.layer], g] += len(part.channels) / group.size
        self.fixed_out -= self.of_out @ self.sizes
        self.fixed_in -= self.of_in @ self.sizes
        self.biased = torch.tensor([layer.bias is not None for layer in layers], dtype=torch.float64)
        self.positions = torch.tensor([positions[layer] for layer in layers], dtype=torch.float64)
        self.rest = 0.0
        plain = duplicate(network)
        fold(plain)  # pruning also replaces computed weights by plain ones
        self.rest = sum(p.numel() for p in plain.parameters()) - self(self.sizes.tolist())["params"]

    def __call__(self, kept: Sequence[float]) -> dict[str, float]:
        """Return "params" and "macs" (for one image) if `kept` channels of each group stay."""
        counts = torch.tensor(kept, dtype=torch.float64)
        outputs, inputs = self.fixed_out + self.of_out @ counts, self.fixed_in + self.of_in @ counts
        weights = outputs * inputs * self.kernel
        params = float((weights + self.biased * outputs).sum() + self.norms @ counts) + self.rest
        return {"params": params, "macs": float((weights * self.positions).sum())}


def macs(network: nn.Module, resolution: Resolution) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one image at a resolution."""
    return round(Costs(network, [], resolution)([])["macs"])
