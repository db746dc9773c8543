"""Torch to ONNX: exported, simplified, described and compared with what it came from."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import onnxscript
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluation.types import NetworkSpec
from pipeline.errors import UserError, first_line
from pipeline.models.contract import duplicate
from pipeline.models.recording import record, tensors
from pipeline.specs import SPEC_KEY

_SAME = 1e-3  # of a field's range, between torch and a graph that was kept from a network of the same structure
_AXES = {0: "batch", 2: "height", 3: "width"}
# Runs a module as a program without torch, which the simplifiers import and do not use: that took most of their time.
_TOOL = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__')"

Reference = Callable[[NDArray[np.float32]], Mapping[str, NDArray[np.float32]]]


class _Ordered(nn.Module):
    """A network whose fields come as a tuple in the order of its description."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.spec: NetworkSpec = network.spec  # type: ignore[assignment]

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

    Args:
        network: in evaluation mode, with a `spec`.
        example: images [B, 3, H, W].
        opset: of the file.
        out: the file.
        any_shape: leave free what the description calls dynamic; False exports for the example's shape alone.
        graphs: a folder that keeps graphs without weights. A network of the same structure takes its graph from there,
            and what comes of it is compared with torch. None exports anew.
    """
    spec: NetworkSpec = network.spec  # type: ignore[assignment]
    names = [field.name for field in spec.fields]
    free = {axis: name for axis, name in _AXES.items() if any_shape and name in spec.dynamic}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision's operators, which nobody asked for
    ordered = _Ordered(network, names).eval()
    images = [example]
    if free:
        step = {0: 1, 2: spec.input.multiple, 3: spec.input.multiple}
        larger = [size + (step[axis] if axis in free else 0) for axis, size in enumerate(example.shape)]
        images.append(np.random.default_rng(0).random(larger, np.float32))
    recorded = [one for one in (record(ordered, some) for some in images) if one is not None]
    kept, graph, lighter = None, None, ordered
    if len(recorded) == len(images):
        digests = [one.digest for one in recorded]
        lighter = _without_batch_norms(ordered, recorded[0].norms)
        if graphs is not None:
            kept = graphs / f"{_key(ordered, [opset, free, spec.to_json(), *digests])}.onnx"
            if kept.exists():
                if _written(lambda: _filled(onnx.load(kept), lighter), network, images[:1], out) is not None:
                    return
                print(f"{kept}: this kept graph is damaged or does not fit; it is made anew", file=sys.stderr)
        if free and len(set(digests)) == 1:  # the same operators with the same constants: of one shape, in half the time
            graph = _written(lambda: _freed(_graph(lighter, images[-1], opset, {}), free), network, images, out)
        graph = graph or _written(lambda: _graph(lighter, example, opset, free), network, images, out)
    if graph is None:
        lighter = ordered
        graph = _graph(ordered, example, opset, free)
        _optimized(graph).save(out, external_data=False)
    if kept is not None:
        _keep(graph, lighter, kept)


def _graph(ordered: _Ordered, example: NDArray[np.float32], opset: int, free: Mapping[int, str]) -> onnx.ModelProto:
    """What torch's exporter makes of a network, not optimised."""
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
        )
    assert program is not None
    return program.model_proto


def _freed(model: onnx.ModelProto, free: Mapping[int, str]) -> onnx.ModelProto:
    """A graph that was exported for one shape, with axes that may have any size."""
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in free.items():
            of_input = axis == 0 or value in model.graph.input
            value.type.tensor_type.shape.dim[axis].dim_param = name if of_input else f"{value.name}_{name}"
    return model


def _written(
    make: Callable[[], onnx.ModelProto], network: nn.Module, images: Sequence[NDArray[np.float32]], out: Path
) -> onnx.ModelProto | None:
    """A graph, optimised and written; None where it computes something else than the network, or cannot be made."""
    try:
        graph = make()
        _optimized(graph).save(out, external_data=False)
        compare(out, network.spec, torch_reference(network), images, _SAME)  # type: ignore[arg-type]
    except Exception:  # noqa: BLE001 - of torch, protobuf, ONNX Runtime and ours; another graph is made, whatever it was
        return None
    return graph


def _without_batch_norms(ordered: _Ordered, norms: Sequence[tuple[str, str]]) -> _Ordered:
    """A copy whose batch norms are folded into the convolutions before them: less than half as many operators to export."""
    lighter = _Ordered(duplicate(ordered.network), ordered.names).eval()
    for places in norms:
        layer, norm = (lighter.get_submodule(place) for place in places)
        if isinstance(layer, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            for place, new in zip(places, (fuse_conv_bn_eval(layer, norm), nn.Identity()), strict=True):
                parent, _, name = place.rpartition(".")
                setattr(lighter.get_submodule(parent), name, new)
    return lighter


def _optimized(model: onnx.ModelProto) -> Any:
    """An optimised graph; its weights are needed, because batch norms are folded into them."""
    program = torch.onnx.ONNXProgram(onnx_ir.from_proto(model), None)
    program.optimize()
    return program


def _keep(model: onnx.ModelProto, network: nn.Module, file: Path) -> None:
    """Write a graph without the network's weights, whole or not at all."""
    weights = tensors(network)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            initializer.ClearField("raw_data")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.tmp")
    part.write_bytes(model.SerializeToString())
    part.replace(file)


def _filled(model: onnx.ModelProto, network: nn.Module) -> onnx.ModelProto:
    """A kept graph with a network's weights."""
    weights = tensors(network)
    for initializer in model.graph.initializer:
        if initializer.name in weights:
            tensor = onnx.numpy_helper.from_array(weights[initializer.name].detach().cpu().numpy(), initializer.name)
            if (tensor.dims, tensor.data_type) != (initializer.dims, initializer.data_type):
                raise ValueError(f"{initializer.name} is {initializer.dims}, not {tensor.dims}")
            initializer.CopyFrom(tensor)
    return model


def _key(network: nn.Module, more: Sequence[Any]) -> str:
    """A digest of all that a network's graph follows from, but for its weights' values."""
    about: list[Any] = [torch.__version__, onnxscript.__version__, onnx_ir.__version__, *more]
    about += [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(network).items()]
    return sha256(repr(about).encode()).hexdigest()


def simplify(file: Path, seconds: float) -> str:
    """Simplify an ONNX file in place, in a process that may crash or hang.

    Args:
        file: the ONNX file.
        seconds: how long each simplifier may take.

    Returns:
        Which simplifier did it: "onnxsim", or "onnxslim" where onnxsim failed.

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


def torch_reference(network: nn.Module) -> Reference:
    """A network as a function of arrays."""

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        with torch.inference_mode():
            return {name: field.numpy() for name, field in network.eval()(torch.from_numpy(images)).items()}

    return run


def onnx_reference(file: Path, spec: NetworkSpec, sources: Mapping[str, str]) -> Reference:
    """A given ONNX file as a function of arrays; see `pipeline.adoption.Adopted` for `sources`."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        returned = dict(zip(names, session.run(names, {spec.input.name: images}), strict=True))
        if sources:
            return {field: returned[source] for field, source in sources.items()}
        ends = np.cumsum([field.channels for field in spec.fields])[:-1]
        parts = np.split(returned[names[0]], ends, axis=1)
        return {field.name: part for field, part in zip(spec.fields, parts, strict=True)}

    return run


def compare(
    file: Path, spec: NetworkSpec, reference: Reference, inputs: Sequence[NDArray[np.float32]], tolerance: float
) -> dict[str, Any]:
    """Compare an ONNX file with what it was made from, at several shapes.

    Args:
        file: the ONNX file.
        spec: its description.
        reference: what it must equal.
        inputs: images [B, 3, H, W] of several shapes.
        tolerance: greatest difference, as a part of a field's greatest magnitude.

    Returns:
        The largest relative difference and the shapes compared.

    Raises:
        UserError: a field differs by more, or has another shape.
    """
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [field.name for field in spec.fields]
    worst = 0.0
    for images in inputs:
        try:
            found = session.run(names, {spec.input.name: images})
        except Exception as error:
            first = first_line(error)
            shape = "x".join(map(str, images.shape))
            raise UserError(
                f"{file.name}: does not run at {shape} ({first}); the network's code depends on its input's size: make it "
                "of layers that take every size, or name the free axes in the spec's dynamic"
            ) from error
        expected = reference(images)
        for name, ours in zip(names, found, strict=True):
            theirs = expected[name]
            if ours.shape != theirs.shape:
                raise UserError(
                    f"{file.name}: '{name}' is {ours.shape} instead of {theirs.shape} for an input of {images.shape}"
                )
            difference = float(np.abs(ours - theirs).max() / max(float(np.abs(theirs).max()), 1e-12))
            worst = max(worst, difference)
            if not difference <= tolerance:
                raise UserError(
                    f"{file.name}: '{name}' differs from its source by {difference:.2g} of its range at {images.shape}; "
                    f"allowed is stages.export.tolerance={tolerance}"
                )
    return {"max_difference": worst, "shapes": [list(images.shape) for images in inputs]}
