"""A network that rounds as INT8 does while it is trained."""

import numpy as np
import onnx
import torch
from torch import Tensor

from pipeline.models.onnx_graph import OnnxNetwork
from pipeline.pruning.semi_structured import is_sparse
from pipeline.quantization.graph import WEIGHTED, Placement
from pipeline.quantization.writers import Scales


class FakeQuantized(OnnxNetwork):
    """An ONNX network with its activations and weights rounded; gradients pass where nothing is clipped.

    Args:
        model: a float network, with the network's description.
        placement: what is quantized.
        scales: of activations; they stay as they are. Those of weights follow the weights.
    """

    def __init__(self, model: onnx.ModelProto, placement: Placement, scales: Scales) -> None:
        super().__init__(model)
        self.steps = {name: scales.activations[name] for name in placement.tensors}
        self.least = scales.least
        self.most = scales.most_weight
        self.axes = {node.input[1]: int(node.op_type == WEIGHTED[1]) for node in placement.quantized(model)}

    def seen(self, name: str, value: Tensor) -> Tensor:
        """A tensor, rounded if it is quantized."""
        if name not in self.steps:
            return value
        return torch.fake_quantize_per_tensor_affine(value.float(), self.steps[name], 0, -128, 127).to(value.dtype)

    def constant(self, name: str) -> Tensor:
        """A parameter, rounded if it is quantized."""
        value = super().constant(name)
        if name not in self.axes:
            return value
        axis = self.axes[name]
        peak = value.detach().abs().amax([k for k in range(value.dim()) if k != axis])
        step = torch.where(peak > 0, (peak / self.most).clamp(min=self.least), torch.ones_like(peak))
        zeros = torch.zeros(len(step), device=value.device)  # not integers, whose range is checked on the processor
        return torch.fake_quantize_per_channel_affine(value, step, zeros, axis, -self.most, self.most)

    def sparse_constants(self) -> list[str]:
        """The parameters whose weights are 2:4 sparse, which training keeps so."""
        return [name for name, value in self.named_parameters() if value.dim() == 4 and is_sparse(value.detach().numpy())]

    def float_model(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the model with the weights as they are now, not rounded."""
        made = onnx.ModelProto()
        made.CopyFrom(model)
        own = dict(self.named_parameters())
        for constant in made.graph.initializer:
            if (trained := own.get(self.names.get(constant.name, ""))) is not None:
                values = trained.detach().cpu().numpy().astype(np.float32)
                constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
        return made
