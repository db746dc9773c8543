"""Export a torch network to ONNX, simplify the file, and describe it."""

import logging
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxscript
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.models.contract import duplicate, spec_of
from pipeline.models.recording import Recording, record, tensors
from pipeline.onnx_files.compare import compare, torch_reference
from pipeline.onnx_files.shapes import free_shapes
from pipeline.progress import say
from posepress.errors import UserError, first_line
from posepress.spec import SPEC_KEY, NetworkSpec

_SAME = 1e-3  # largest accepted difference between torch and a file that was exported by a shorter way, relative to the range
_SMALL = 320  # longer side of the input below which the second shape is the larger one, in pixels
_OWN_FROM = 19  # the opset of the ONNX forms of our own operators
_AXES = {0: "batch", 2: "height", 3: "width"}
_SIDES = {
    "H": "height",
    "Y": "height",
    "W": "width",
    "X": "width",
    "N": "entries",
}  # axes of an output whose size follows from the input's
# This program runs a module without torch. The simplifiers import torch without using it, which took most of their time.
_TOOL = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__')"


class _Ordered(nn.Module):
    """A network whose fields come as a tuple in the order of its description."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.spec = spec_of(network)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fields = self.network(images)
        return tuple(fields[name] for name in self.names)


def export(
    network: nn.Module,
    example: NDArray[np.float32],
    opset: int,
    out: Path,
    any_shape: bool = True,
    graphs: Path | None = None,
) -> None:
    """Write a network as ONNX with torch's dynamo exporter.

    Faster ways are tried first: a kept graph, and batch norms folded before the export. If the operators are equal at every
    shape, a single shape is exported. The results are compared with torch at two shapes, on random images. The plain export
    is the last resort.

    Args:
        network: a network in evaluation mode, with a `spec`.
        example: images [B, 3, H, W]; only their shape matters.
        opset: opset version of the file.
        out: path of the file.
        any_shape: whether the axes that the description calls dynamic stay free. False exports for the example's shape only.
        graphs: folder that keeps graphs without weights, for networks of the same structure. None keeps no graphs.

    Raises:
        UserError: the opset lacks an operator of the network.
    """
    spec = spec_of(network)
    names = [field.name for field in spec.fields]
    free = {axis: name for axis, name in _AXES.items() if any_shape and name in spec.dynamic}
    if opset < _OWN_FROM and _own_operators(network):
        raise UserError(
            f"stages.export.opset={opset}: the network's deformable convolutions need {_OWN_FROM} or later; set that"
        )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision's operators, which are not used
    ordered = _Ordered(network, names).eval()
    images = [np.random.default_rng(0).standard_normal(shape, np.float32) for shape in _shapes(example, free, spec)]
    recorded = _recorded(ordered, images)
    kept, graph, folded, why = None, None, ordered, list[str]()
    if recorded:
        folded = _without_batch_norms(ordered, recorded[0].norms)
        if graphs is not None:
            fixed = [size for axis, size in enumerate(example.shape) if axis not in free]
            kept = graphs / _key(ordered, [opset, free, fixed, spec.to_json(), *recorded])
            for file, filled in ((_kept(kept, "folded"), folded), (_kept(kept, "plain"), ordered)):
                if file.exists():
                    if _written(partial(_filled, file, filled), network, images[:1], out, why) is not None:
                        return
                    print(f"{file}: this kept graph is damaged or does not fit ({why[-1]}); exporting again", file=sys.stderr)
        if free and len({one.digest for one in recorded}) == 1:
            graph = _written(lambda: _freed(_graph(folded, images[1], opset, {}), free, spec), network, images, out, why)
        if graph is None:
            graph = _written(lambda: _graph(folded, example, opset, free), network, images, out, why)
    if graph is None:
        reason = why[-1] if why else "its operators cannot be recorded"
        say(f"The network is exported with torch's exporter, which takes longer: {reason}")
        graph, folded = _graph(ordered, example, opset, free), ordered
        _optimized(graph).save(out, external_data=False)
    if kept is not None:
        _keep(graph, folded, _kept(kept, "plain" if folded is ordered else "folded"))


def _shapes(example: NDArray[np.float32], free: Mapping[int, str], spec: NetworkSpec) -> list[list[int]]:
    """The example's shape, and a shape of twice or half its size, at which coarse maps have other sizes, too."""
    shape, step = list(example.shape), spec.input.multiple
    if not free:
        return [shape]
    larger = max(shape[2:]) < _SMALL
    other = [shape[0] + 1, shape[1]]
    other += [2 * size + (n + 1) * step if larger else max(size // 2 // step, 1) * step for n, size in enumerate(shape[2:])]
    return [shape, [new if axis in free else size for axis, (size, new) in enumerate(zip(shape, other, strict=True))]]


def _recorded(ordered: _Ordered, images: Sequence[NDArray[np.float32]]) -> list[Recording]:
    """A recording at each shape. The list is empty if the network cannot be recorded at one of them."""
    recorded = []
    for one in images:
        if (recording := record(ordered, one)) is None:
            return []
        recorded.append(recording)
    return recorded


def _kept(name: Path, kind: str) -> Path:
    """The path of a kept graph. Its `kind` says whether batch norms were folded before the export."""
    return name.with_suffix(f".{kind}.onnx")


def _graph(ordered: _Ordered, example: NDArray[np.float32], opset: int, free: Mapping[int, str]) -> onnx.ModelProto:
    """The graph that torch's exporter makes of a network, not optimised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            ordered,
            (torch.from_numpy(example),),
            dynamo=True,
            opset_version=opset,
            input_names=[ordered.spec.input.name],
            output_names=ordered.names,
            dynamic_shapes=(dict(free),) if free else None,
            verbose=False,
            optimize=False,
            custom_translation_table=_own_operators(ordered),
        )
    assert program is not None
    return program.model_proto


def _own_operators(network: nn.Module) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ONNX forms of a network's own operators, from the attribute `onnx_forms` of its modules."""
    return {operator: form for module in network.modules() for operator, form in getattr(module, "onnx_forms", {}).items()}


def _freed(model: onnx.ModelProto, free: Mapping[int, str], spec: NetworkSpec) -> onnx.ModelProto:
    """Give free axes to a graph that was exported for one shape."""
    free_shapes(model)
    del model.graph.value_info[:]
    for axis, name in free.items():
        for given in model.graph.input:
            given.type.tensor_type.shape.dim[axis].dim_param = name
        for output, field in zip(model.graph.output, spec.fields, strict=True):
            for place, side in enumerate(("batch", *(_SIDES.get(letter, "") for letter in field.axes))):
                if side == name or (side == "entries" and name != "batch"):
                    output.type.tensor_type.shape.dim[place].dim_param = name if place == 0 else f"{output.name}_{side}"
    return model


def _written(
    make: Callable[[], onnx.ModelProto],
    network: nn.Module,
    images: Sequence[NDArray[np.float32]],
    out: Path,
    why: list[str],
) -> onnx.ModelProto | None:
    """Optimise and write a graph; None if it cannot be made, or computes something else than the network.

    Args:
        make: function that returns the graph.
        network: the network that the graph must equal.
        images: images for the comparison.
        out: path of the file.
        why: list of reasons. On failure, a reason is appended.
    """
    try:
        graph = make()
        _optimized(graph).save(out, external_data=False)
        compare(out, spec_of(network), torch_reference(network), images, _SAME)
    except Exception as error:  # noqa: BLE001 - torch, protobuf and ONNX Runtime raise many types; the next way is tried
        why.append(first_line(error))
        return None
    return graph


def _without_batch_norms(ordered: _Ordered, norms: Sequence[tuple[str, str]]) -> _Ordered:
    """A copy with batch norms folded into the convolutions before them. This more than halves the operators to export.

    Args:
        ordered: the network.
        norms: see `Recording`.

    Returns:
        The copy, or the network itself if nothing can be folded. Subclasses with behaviour of their own are not folded.
    """
    copy, any_folded = _Ordered(duplicate(ordered.network), ordered.names).eval(), False
    owners = defaultdict(list)
    for module in copy.modules():
        for tensor in module.parameters(recurse=False):
            owners[id(tensor)].append(module)
    found = tensors(copy)
    for weight, scale in norms:
        layers, after = owners[id(found[weight])], owners[id(found[scale])]
        if len(layers) == len(after) == 1 and _foldable(layers[0], after[0]):
            _replace(copy, layers[0], fuse_conv_bn_eval(layers[0], after[0]))  # type: ignore[type-var, arg-type]
            _replace(copy, after[0], nn.Identity())
            any_folded = True
    return copy if any_folded else ordered


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    """Whether two layers are a plain convolution and a plain batch norm, without hooks or changes of behaviour."""
    plain = type(norm).forward is nn.BatchNorm2d.forward and not norm._forward_hooks and not norm._forward_pre_hooks  # noqa: SLF001
    return isinstance(layer, nn.Conv2d) and plain and not layer.training and not norm.training


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a layer by another, everywhere it is registered."""
    for place, module in list(network.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, name = place.rpartition(".")
            setattr(network.get_submodule(parent), name, new)


def _optimized(model: onnx.ModelProto) -> Any:
    """Optimise a graph. It must have its weights, because the remaining batch norms are folded into them."""
    program = torch.onnx.ONNXProgram(onnx_ir.from_proto(model), None)
    program.optimize()
    return program


def _keep(model: onnx.ModelProto, network: nn.Module, file: Path) -> None:
    """Write a graph without the network's weights, atomically."""
    weights = tensors(network)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            initializer.ClearField("raw_data")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.tmp")
    part.write_bytes(model.SerializeToString())
    part.replace(file)


def _filled(file: Path, network: nn.Module) -> onnx.ModelProto:
    """A kept graph with a network's weights."""
    model = onnx.load(file)
    weights = tensors(network)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            tensor = onnx.numpy_helper.from_array(weights[initializer.name].detach().cpu().numpy(), initializer.name)
            if (tensor.dims, tensor.data_type) != (initializer.dims, initializer.data_type):
                raise ValueError(f"{initializer.name} is {initializer.dims}, not {tensor.dims}")
            initializer.CopyFrom(tensor)
    return model


def _key(network: nn.Module, more: Sequence[Any]) -> str:
    """A digest of everything that a network's graph depends on. The values of the weights do not count."""
    about: list[Any] = [torch.__version__, onnxscript.__version__, onnx_ir.__version__, *more]
    about += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(network).items()]
    return sha256(repr(about).encode()).hexdigest()


def simplify(file: Path, seconds: float) -> str:
    """Simplify an ONNX file in place, in a process that may crash or hang.

    Args:
        file: the ONNX file.
        seconds: time limit of each simplifier, in seconds.

    Returns:
        The name of the simplifier that succeeded: "onnxsim", or "onnxslim" if onnxsim failed.

    Raises:
        UserError: both failed.
    """
    complaints = []
    for tool in ("onnxsim", "onnxslim"):
        out = file.with_suffix(f".{tool}.onnx")
        try:
            done = subprocess.run(
                [sys.executable, "-c", _TOOL, tool, str(file), str(out)],
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            out.unlink(missing_ok=True)
            complaints.append(f"{tool} took more than {seconds:.0f} s")
            continue
        if done.returncode == 0 and out.exists():
            out.replace(file)
            return tool
        out.unlink(missing_ok=True)
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        complaints.append(f"{tool} ended with {done.returncode} ({last[0]})")
    raise UserError(f"{file.name}: cannot be simplified: {'; '.join(complaints)}; raise stages.export.simplify_seconds")


def stamp(file: Path, spec: NetworkSpec) -> None:
    """Write a network's description into the metadata of its ONNX file."""
    model = onnx.load(file)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != SPEC_KEY}
    onnx.helper.set_model_props(model, {**kept, SPEC_KEY: spec.to_json()})
    onnx.checker.check_model(model)
    onnx.save(model, file)
