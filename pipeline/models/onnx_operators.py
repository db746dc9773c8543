"""Operators of ONNX, computed by torch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

from posepress.errors import UserError

_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
}

DOMAINS = ("", "ai.onnx")


def _ints(value: Any) -> list[int]:
    return [int(v) for v in (value.tolist() if isinstance(value, Tensor) else value)]


def _padded(x: Tensor, pads: list[int], value: float = 0.0, mode: str = "constant") -> Tensor:
    """Pad the last axes of a tensor. ONNX lists all pads at the beginnings first, then those at the ends."""
    n = len(pads) // 2
    flat = [p for axis in reversed(range(n)) for p in (pads[axis], pads[n + axis])]
    if mode == "constant":
        return F.pad(x, flat, value=value)
    while len(flat) > 4 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(x, flat, mode={"edge": "replicate", "reflect": "reflect"}[mode])


def _same(x: Tensor, kernel: list[int], strides: list[int], dilations: list[int], upper: bool) -> list[int]:
    begins, ends = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def _window(x: Tensor, kernel: list[int], a: Mapping[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Return strides, dilations and pads of a convolution or pooling."""
    n = len(kernel)
    strides, dilations = list(a.get("strides", [1] * n)), list(a.get("dilations", [1] * n))
    auto = a.get("auto_pad", b"NOTSET").decode()
    pads = (
        _same(x, kernel, strides, dilations, auto == "SAME_UPPER")
        if auto.startswith("SAME")
        else list(a.get("pads", [0] * 2 * n))
    )
    return strides, dilations, pads


def _conv(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    x, weight = i[0], i[1]
    strides, dilations, pads = _window(x, list(weight.shape[2:]), a)
    n = len(strides)
    if pads[:n] != pads[n:]:
        x, pads = _padded(x, pads), [0] * 2 * n
    bias = i[2] if len(i) > 2 else None
    return F.conv2d(x, weight, bias, strides, pads[:n], dilations, int(a.get("group", 1)))


def _conv_transpose(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    n = i[1].dim() - 2
    strides, pads = list(a.get("strides", [1] * n)), list(a.get("pads", [0] * 2 * n))
    extra = list(a.get("output_padding", [0] * n))
    if pads[:n] != pads[n:]:
        raise UserError("a ConvTranspose with unequal pads is not known to the torch pass")
    bias = i[2] if len(i) > 2 else None
    return F.conv_transpose2d(
        i[0], i[1], bias, strides, pads[:n], extra, int(a.get("group", 1)), list(a.get("dilations", [1] * n))
    )


def _max_pool(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    kernel = list(a["kernel_shape"])
    strides, dilations, pads = _window(i[0], kernel, a)
    x = _padded(i[0], pads, -math.inf) if any(pads) else i[0]
    return F.max_pool2d(x, kernel, strides, 0, dilations, bool(a.get("ceil_mode", 0)))


def _average_pool(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    kernel = list(a["kernel_shape"])
    strides, _, pads = _window(i[0], kernel, a)
    n, counted = len(kernel), bool(a.get("count_include_pad", 0))
    if pads[:n] == pads[n:]:
        return F.avg_pool2d(i[0], kernel, strides, pads[:n], bool(a.get("ceil_mode", 0)), counted)
    total = F.avg_pool2d(_padded(i[0], pads), kernel, strides)
    if counted:
        return total
    return total / F.avg_pool2d(_padded(torch.ones_like(i[0][:1, :1]), pads), kernel, strides)


def _resize(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    x = i[0]
    if len(i) > 3 and i[3] is not None and i[3].numel():
        size = _ints(i[3])[2:]
    else:
        size = [math.floor(n * float(f)) for n, f in zip(x.shape[2:], i[2].tolist()[2:], strict=True)]
    mode = a.get("mode", b"nearest").decode()
    how = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    if mode == "nearest":
        rounding = a.get("nearest_mode", b"round_prefer_floor").decode()
        known = {("asymmetric", "floor"): "nearest", ("half_pixel", "round_prefer_floor"): "nearest-exact"}
        if (how, rounding) not in known:
            raise UserError(f"Resize to the nearest with {how} and {rounding} is not known to the torch pass")
        return F.interpolate(x, size, mode=known[how, rounding])
    kind = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    if how == "asymmetric":  # output sample k is at input position k * step
        return _at_steps(x, size)
    return F.interpolate(x, size, mode=kind, align_corners=how == "align_corners")


def _at_steps(x: Tensor, size: list[int]) -> Tensor:
    for axis, n in zip((2, 3), size, strict=True):
        given = x.shape[axis]
        at = torch.arange(n, device=x.device, dtype=torch.float32) * (given / n)
        low = at.floor().long().clamp(0, given - 1)
        part = (at - low).to(x.dtype).reshape([-1 if k == axis else 1 for k in range(4)])
        high = (low + 1).clamp(max=given - 1)
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
    return x


def _slice(i: list[Any], a: Mapping[str, Any]) -> Tensor:  # noqa: ARG001
    x = i[0]
    starts, ends = _ints(i[1]), _ints(i[2])
    axes = _ints(i[3]) if len(i) > 3 and i[3] is not None else list(range(len(starts)))
    steps = _ints(i[4]) if len(i) > 4 and i[4] is not None else [1] * len(starts)
    where = [slice(None)] * x.dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise UserError(
                "a Slice that steps backwards is not known to the torch pass; choose backend=onnxruntime or tensorrt"
            )
        where[axis] = slice(start, end, step)
    made: Tensor = x[tuple(where)]
    return made


def _pad(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    pads = _ints(i[1])
    if len(i) > 3 and i[3] is not None:
        n, axes = i[0].dim(), _ints(i[3])
        full = [0] * 2 * n
        for k, axis in enumerate(axes):
            full[axis % n], full[n + axis % n] = pads[k], pads[len(axes) + k]
        pads = full
    value = float(i[2]) if len(i) > 2 and i[2] is not None else 0.0
    return _padded(i[0], pads, value, a.get("mode", b"constant").decode())


def _clip(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    given = (*i[1:3], None, None)[:2] if len(i) > 1 else (a.get("min"), a.get("max"))  # attributes before opset 11
    bounds = [None if b is None else float(b) for b in given]
    return torch.clamp(i[0], *bounds) if any(b is not None for b in bounds) else i[0]


def _reduce(function: Callable[..., Tensor]) -> Callable[[list[Any], Mapping[str, Any]], Tensor]:
    def run(i: list[Any], a: Mapping[str, Any]) -> Tensor:
        axes = _ints(i[1]) if len(i) > 1 and i[1] is not None else list(a.get("axes", range(i[0].dim())))
        return function(i[0], axes, bool(a.get("keepdims", 1)))

    return run


def _reshape(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    shape = _ints(i[1])
    if not a.get("allowzero", 0):
        shape = [i[0].shape[k] if n == 0 else n for k, n in enumerate(shape)]
    made: Tensor = i[0].reshape(shape)
    return made


def _unsqueeze(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    x: Tensor = i[0]
    for axis in sorted(_ints(i[1]) if len(i) > 1 else a["axes"]):
        x = x.unsqueeze(axis)
    return x


def _squeeze(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    axes = _ints(i[1]) if len(i) > 1 and i[1] is not None else list(a.get("axes", []))
    made: Tensor = i[0].squeeze(tuple(axes)) if axes else i[0].squeeze()
    return made


def _split(i: list[Any], a: Mapping[str, Any]) -> tuple[Tensor, ...]:
    axis = int(a.get("axis", 0))
    if len(i) > 1 and i[1] is not None:
        return i[0].split(_ints(i[1]), axis)  # type: ignore[no-any-return]
    return i[0].chunk(int(a["num_outputs"]), axis)  # type: ignore[no-any-return]


def _along(x: Tensor, parameter: Tensor, axis: int) -> Tensor:
    return parameter if parameter.dim() == 0 else parameter.reshape([-1 if k == axis else 1 for k in range(x.dim())])


def _quantize(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    axis = int(a.get("axis", 1))
    scale, zero = _along(i[0], i[1], axis), _along(i[0], i[2], axis)
    bounds = torch.iinfo(i[2].dtype)
    return (torch.round(i[0] / scale) + zero).clamp(bounds.min, bounds.max).to(i[2].dtype)


def _dequantize(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    axis = int(a.get("axis", 1))
    zero = _along(i[0], i[2], axis).to(i[1].dtype) if len(i) > 2 else 0
    made: Tensor = (i[0].to(i[1].dtype) - zero) * _along(i[0], i[1], axis)
    return made


def _gather(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    axis = int(a.get("axis", 0)) % i[0].dim()
    index = i[1].long().to(i[0].device)
    flat = torch.where(index < 0, index + i[0].shape[axis], index).reshape(-1)
    made: Tensor = i[0].index_select(axis, flat).reshape(i[0].shape[:axis] + index.shape + i[0].shape[axis + 1 :])
    return made


def _batch_norm(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    return F.batch_norm(i[0], i[3], i[4], i[1], i[2], False, 0.0, float(a.get("epsilon", 1e-5)))


def _gemm(i: list[Any], a: Mapping[str, Any]) -> Tensor:
    one, other = (x.T if a.get(f"trans{k}") else x for x, k in zip(i[:2], "AB", strict=True))
    made: Tensor = a.get("alpha", 1.0) * (one @ other)
    return made + a.get("beta", 1.0) * i[2] if len(i) > 2 else made


OPERATORS: Mapping[str, Callable[[list[Any], Mapping[str, Any]], Any]] = {
    "Add": lambda i, _: i[0] + i[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": lambda i, a: i[0].to(_TYPES[a["to"]]),
    "Clip": _clip,
    "Concat": lambda i, a: torch.cat(i, int(a["axis"])),
    "Constant": lambda _, a: torch.from_numpy(np.array(numpy_helper.to_array(a["value"]))),
    "ConstantOfShape": lambda i, a: torch.full(_ints(i[0]), numpy_helper.to_array(a["value"]).item() if "value" in a else 0.0),
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": lambda i, _: i[0].cumsum(int(i[1])),
    "DequantizeLinear": _dequantize,
    "Div": lambda i, _: torch.div(i[0], i[1], rounding_mode=None if i[0].is_floating_point() else "trunc"),
    "Elu": lambda i, a: F.elu(i[0], a.get("alpha", 1.0)),
    "Exp": lambda i, _: i[0].exp(),
    "Expand": lambda i, _: i[0].expand(np.broadcast_shapes(tuple(i[0].shape), tuple(_ints(i[1])))),
    "Flatten": lambda i, a: i[0].flatten(int(a.get("axis", 1))),
    "Floor": lambda i, _: i[0].floor(),
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda i, _: i[0].mean((2, 3), keepdim=True),
    "HardSigmoid": lambda i, a: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda i, _: F.hardswish(i[0]),
    "Identity": lambda i, _: i[0],
    "LeakyRelu": lambda i, a: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "MatMul": lambda i, _: i[0] @ i[1],
    "MaxPool": _max_pool,
    "Mul": lambda i, _: i[0] * i[1],
    "Sum": lambda i, _: sum(i[1:], i[0]),
    "PRelu": lambda i, _: torch.where(i[0] < 0, i[0] * i[1], i[0]),
    "Pad": _pad,
    "Pow": lambda i, _: i[0] ** i[1],
    "QuantizeLinear": _quantize,
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "Relu": lambda i, _: F.relu(i[0]),
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda i, a: torch.tensor(i[0].shape[a.get("start", 0) : a.get("end")]),
    "Sigmoid": lambda i, _: i[0].sigmoid(),
    "Slice": _slice,
    "Softmax": lambda i, a: i[0].softmax(int(a.get("axis", -1))),
    "Split": _split,
    "Sqrt": lambda i, _: i[0].sqrt(),
    "Squeeze": _squeeze,
    "Sub": lambda i, _: i[0] - i[1],
    "Tanh": lambda i, _: i[0].tanh(),
    "Transpose": lambda i, a: i[0].permute(*a.get("perm", range(i[0].dim())[::-1])),
    "Unsqueeze": _unsqueeze,
}
