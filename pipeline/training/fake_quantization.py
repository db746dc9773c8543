"""A network that simulates INT8's rounding during training."""

import numpy as np
import onnx
import torch
from torch import Tensor

from pipeline.models.onnx_graph import OnnxNetwork
from pipeline.pruning.semi_structured import is_sparse
from pipeline.quantization.graph import output_axis
from pipeline.quantization.place import Placement
from pipeline.quantization.writers import Scales


class FakeQuantized(OnnxNetwork):
    """An ONNX network with rounded activations and weights. Gradients pass wherever values are not clipped.

    Args:
        model: a float network that holds its description.
        placement: the tensors that are quantized.
        scales: the scales of activations, which stay fixed. The scales of weights are computed again from the weights.
    """

    def __init__(self, model: onnx.ModelProto, placement: Placement, scales: Scales) -> None:
        super().__init__(model)
        self.steps = {name: scales.activations[name] for name in placement.tensors}
        self.least = scales.least
        self.most = scales.most_weight
        self.axes = {node.input[1]: output_axis(node) for node in placement.quantized(model)}

    def seen(self, name: str, value: Tensor) -> Tensor:
        """The value of a tensor, rounded if the tensor is quantized."""
        if name not in self.steps:
            return value
        return torch.fake_quantize_per_tensor_affine(value.float(), self.steps[name], 0, -128, 127).to(value.dtype)

    def constant(self, name: str) -> Tensor:
        """The value of a parameter, rounded if the parameter is quantized."""
        value = super().constant(name)
        if name not in self.axes:
            return value
        axis = self.axes[name]
        peak = value.detach().abs().amax([k for k in range(value.dim()) if k != axis])
        step = torch.where(peak > 0, (peak / self.most).clamp(min=self.least), torch.ones_like(peak))
        zeros = torch.zeros(len(step), device=value.device)  # for integers, torch would check the range on the CPU
        return torch.fake_quantize_per_channel_affine(value, step, zeros, axis, -self.most, self.most)

    def sparse_constants(self) -> list[str]:
        """The parameters with 2:4 sparse weights. Training preserves this sparsity."""
        return [name for name, value in self.named_parameters() if value.dim() == 4 and is_sparse(value.detach().numpy())]

    def float_model(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """A copy of the model with the current weights, not rounded."""
        made = onnx.ModelProto()
        made.CopyFrom(model)
        own = dict(self.named_parameters())
        for constant in made.graph.initializer:
            if (trained := own.get(self.names.get(constant.name, ""))) is not None:
                values = trained.detach().cpu().numpy().astype(np.float32)
                constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))
        return made
