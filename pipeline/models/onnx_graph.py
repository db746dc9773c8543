"""An ONNX file as a torch module that runs node by node, for half precision and for quantization-aware training."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from pipeline.models.onnx_operators import DOMAINS, OPERATORS
from posepress.errors import UserError
from posepress.spec import SPEC_KEY, NetworkSpec


class OnnxNetwork(nn.Module):
    """The network of an ONNX file. Its parameters are the weights of convolutions and matrix products.

    Args:
        model: content of the file, with a network description in its metadata.

    Raises:
        UserError: the description is missing, or an operator is not supported.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if SPEC_KEY not in metadata:
            raise UserError("the ONNX file has no network description in its metadata; the stage 'export' writes it")
        self.spec = NetworkSpec.from_json(metadata[SPEC_KEY])
        self.nodes = list(model.graph.node)
        self.input = model.graph.input[0].name
        if unknown := unknown_operators(model):
            raise UserError(
                f"the operator {unknown[0]} of the ONNX file is not known to the torch pass; choose backend=onnxruntime or "
                "tensorrt, and precision=int8 or mixed instead of int8_qat"
            )
        self.names: dict[str, str] = {}
        self.shapes: dict[str, Tensor] = {}
        trained = {name for node in self.nodes if node.op_type in _TRAINED for name in node.input[1:]}
        for n, constant in enumerate(model.graph.initializer):
            value = torch.from_numpy(np.array(numpy_helper.to_array(constant)))
            if value.dtype == torch.int64:  # these are shapes, which are computed on the CPU
                self.shapes[constant.name] = value
                continue
            self.names[constant.name] = f"c{n}"
            if constant.name in trained and value.is_floating_point():
                self.register_parameter(f"c{n}", nn.Parameter(value))
            else:
                self.register_buffer(f"c{n}", value)
        last: dict[str, int] = {}
        for place, node in enumerate(self.nodes):
            last |= dict.fromkeys(node.input, place)
        kept = {field.name for field in self.spec.fields}
        self._done = [
            [n for n in dict.fromkeys(node.input) if last[n] == i and n not in kept] for i, node in enumerate(self.nodes)
        ]

    @classmethod
    def read(cls, file: Path) -> "OnnxNetwork":
        """Read the network of a file."""
        return cls(onnx.load(file))

    @property
    def ignored_layers(self) -> list[nn.Module]:
        """An empty list, because this network is never pruned."""
        return []

    def constant(self, name: str) -> Tensor:
        """Return a parameter or buffer by its name in the file."""
        made: Tensor = self.shapes[name] if name in self.shapes else getattr(self, self.names[name])
        return made

    def seen(self, name: str, value: Tensor) -> Tensor:  # noqa: ARG002
        """Return the value that later nodes read for a computed tensor. A subclass may replace it."""
        return value

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the fields of images [B, 3, H, W]. Each node computes in the type of its inputs."""
        known: dict[str, Tensor] = {self.input: self.seen(self.input, images)}
        for node, done in zip(self.nodes, self._done, strict=True):
            inputs = [known[i] if i in known else self.constant(i) if i else None for i in node.input]
            options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type == "Split":  # the number of outputs is the default
                options.setdefault("num_outputs", len(node.output))
            made = OPERATORS[node.op_type](inputs, options)
            outputs = made if isinstance(made, (tuple, list)) else (made,)
            known |= {name: self.seen(name, value) for name, value in zip(node.output, outputs, strict=False)}
            for name in done:
                known.pop(name, None)
        return {field.name: known[field.name] for field in self.spec.fields}


class RoundedToHalf(OnnxNetwork):
    """An `OnnxNetwork` that computes half-precision tensors in float32 and rounds them to half after every node.

    Torch's half-precision convolutions also add in float32 and round at the end. So overflows are equal, and other values
    differ in the last bit only. On a CPU without half-precision arithmetic, torch's own take several times as long.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        graph = onnx.shape_inference.infer_shapes(model).graph
        values = (*graph.value_info, *graph.output, *graph.input)
        self.halves = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16}
        self.float()

    def seen(self, name: str, value: Tensor) -> Tensor:
        """Return a computed tensor, rounded to half if it has half precision in the file."""
        return value.half().float() if name in self.halves else value


def unknown_operators(model: onnx.ModelProto) -> list[str]:
    """Return the types of operators in a file that this module does not support, in alphabetical order."""
    return sorted({node.op_type for node in model.graph.node if node.op_type not in OPERATORS or node.domain not in DOMAINS})


_TRAINED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
