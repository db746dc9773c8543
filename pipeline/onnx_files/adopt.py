"""Adopt a given ONNX file: compare it with its description by a forward pass, and bring it into the form of our exports."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper, inliner

from pipeline.onnx_files.files import described, named
from pipeline.onnx_files.given import check_form, free_axes, one_image, read
from pipeline.onnx_files.outputs import (
    Outputs,
    check_field,
    chosen_outputs,
    declared,
    ending_at,
    fields_of,
    name_outputs,
    shape_of,
    shape_words,
    sources_of,
    suppression,
)
from posepress.errors import UserError, first_line
from posepress.pixels import normalise
from posepress.resolution import Resolution
from posepress.spec import NetworkSpec

_LEAST_OPSET = 13  # the first opset with one quantization scale for each channel

_OPSETS = (20, _LEAST_OPSET)  # older files are raised to one of them

_SAME = 1e-3  # largest accepted difference of two equal passes, relative to the greatest value


@dataclass(frozen=True)
class Adopted:
    """A given file in the form of our own exports.

    Attributes:
        model: the network. Its outputs are the fields, by name and in order.
        spec: the description, completed with properties that were read from the file.
        sources: for each field, the name of its output or inner tensor in the given file; several fields may share one.
        size: the input size of the trial run.
        notes: sentences on properties that were read from the file and are not in `model.spec`.
    """

    model: onnx.ModelProto
    spec: NetworkSpec
    sources: Mapping[str, str]
    size: Resolution
    notes: Sequence[str]


def adopt(file: Path, raw: object, outputs: Mapping[str, Any] | None, resolution: Resolution) -> Adopted:
    """Read a given ONNX file, run it once, and compare its input and outputs with its description.

    Args:
        file: an ONNX file; its weights may lie in further files beside it.
        raw: `model.spec`.
        outputs: `model.outputs`: the file's output for each field that has another name there.
        resolution: size of the trial image. A file with a fixed input size is tried at that size.

    Raises:
        UserError: the file cannot be read or run, or does not fit its description. The message says what was expected and
            what the file has.
    """
    where = f"model.onnx={file}"
    wanted, own = named(described(raw))
    given = {**own, **(outputs if isinstance(outputs, Mapping) else {})}
    model = ending_at(read(file), {f.name: str(given.get(f.name, f.tensor)) for f in wanted.fields}, where)
    notes = [f"'{old}' is taken as {new}, in the order of model.spec.fields" for new, old in own.items()]
    notes += suppression(model, [field.name for field in wanted.fields])
    spec, size = _input(model, where, wanted, raw, resolution, notes)
    images = _images(spec, size)
    model, returned = _run_as_it_is(model, where, spec, images[:1], notes)
    sources = sources_of(spec, {**own, **chosen_outputs(spec, outputs, returned, where)}, returned, where, notes)
    for name, values in fields_of(spec, sources, returned).items():
        check_field(spec.field(name), values, declared(model, sources.get(name, name), values), size, where)
    _check_freedom(model, where, spec, sources, images, returned)
    name_outputs(model, spec, sources, returned)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise UserError(
            f"{where}: its outputs cannot be named as the fields ({first_line(error)}); name them so at export"
        ) from error
    return Adopted(model, spec, sources, size, notes)


def _input(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, raw: object, resolution: Resolution, notes: list[str]
) -> tuple[NetworkSpec, Resolution]:
    """The description with the file's input name and free axes, and the size for the trial run.

    Raises:
        UserError: the file's input does not fit its description.
    """
    graph = model.graph
    constants = {i.name for i in graph.initializer}
    inputs = [i for i in graph.input if i.name not in constants]
    if len(inputs) != 1:
        raise UserError(
            f"{where}: its inputs are {', '.join(i.name for i in inputs) or 'none'}; give a network whose one input is images"
        )
    tensor, called = inputs[0], inputs[0].name
    if one_image(shape_of(tensor)):
        notes.append(f"its input {shape_words(shape_of(tensor))} has no batch axis, so a batch of one image is put in front")
        _add_batch(model, tensor)
    shape = shape_of(tensor)
    check_form(tensor, shape, spec.input, where)
    axes = free_axes(model, spec.input)
    if axes["batch"] > 1:
        raise UserError(f"{where}: its batch is fixed at {axes['batch']}; export it with a free batch, or with batch 1")
    free = {name for name, fixed in axes.items() if not fixed}
    given = raw.get("dynamic") if isinstance(raw, Mapping) else None
    missing = sorted(spec.dynamic - free) if given is not None else []
    if missing:
        raise UserError(
            f"{where}: model.spec.dynamic holds '{missing[0]}', but its input is {shape_words(shape)}; leave dynamic out, or "
            "export the network with free axes"
        )
    if called != spec.input.name:
        notes.append(f"its input is called '{called}', not '{spec.input.name}' (model.spec.input.name)")
    try:
        spec = replace(spec, input=replace(spec.input, name=tensor.name), dynamic=spec.dynamic & free)
    except ValueError as error:
        raise UserError(f"{where}: its input and model.spec do not fit: {error}; correct model.spec") from error
    asked = spec.input.size or resolution
    size = Resolution(axes["height"] or asked.height, axes["width"] or asked.width)
    if spec.input.size not in (None, size):
        raise UserError(
            f"{where}: takes {size}, and model.spec.input.size={spec.input.size}; leave it out, or set it to {size}"
        )
    if not spec.input.fits(size):
        raise UserError(
            f"{where}: takes {size}, which are no multiples of {spec.input.multiple} plus {spec.input.offset}; set "
            "model.spec.input.multiple and offset to what the network takes"
        )
    if not {"height", "width"} & spec.dynamic:
        spec = replace(spec, input=replace(spec.input, size=size))
    _pin(tensor, spec, size)
    kept = [i for i in graph.input if i.name not in constants]
    del graph.input[:]
    graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 4)  # before version 4, constants had to be inputs
    return spec, size


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=_LEAST_OPSET)


def _add_batch(model: onnx.ModelProto, tensor: onnx.ValueInfoProto) -> None:
    """Make an input that is one image a batch of one image.

    The image keeps its name inside the network, so the batch gets another.
    """
    graph, image, batch, axes = model.graph, tensor.name, f"posepress_{tensor.name}", "posepress_batch_axis"
    if _opset(model) < 13:  # axes are an attribute
        squeeze = helper.make_node("Squeeze", [batch], [image], name="posepress_squeeze", axes=[0])
    else:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([0], np.int64), axes))
        squeeze = helper.make_node("Squeeze", [batch, axes], [image], name="posepress_squeeze")
    nodes = [squeeze, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    shape = [1, *(None if side == "?" else side for side in shape_of(tensor))]
    tensor.CopyFrom(helper.make_tensor_value_info(batch, tensor.type.tensor_type.elem_type, shape))


def _pin(tensor: onnx.ValueInfoProto, spec: NetworkSpec, size: Resolution) -> None:
    """Mark the free axes of a file's input according to the description."""
    dims, axes = tensor.type.tensor_type.shape.dim, spec.input.axes
    while len(dims) < 4:
        dims.add()
    dims[axes["channels"]].dim_value = spec.input.channels
    twice = len({dims[axes[name]].dim_param for name in spec.dynamic}) < len(spec.dynamic)
    for name, fixed in (("batch", 1), ("height", size.height), ("width", size.width)):
        dim = dims[axes[name]]
        if name not in spec.dynamic:
            dim.dim_value = fixed
        elif twice or not dim.dim_param:
            dim.dim_param = name


def _images(spec: NetworkSpec, size: Resolution) -> NDArray[Any]:
    """Two images of noise in the network's input form."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, size.height, size.width, 3), dtype=np.uint8)
    return normalise(pixels, spec.input)


def _run(model: onnx.ModelProto, images: NDArray[Any]) -> Outputs:
    """All outputs of a network, computed by ONNX Runtime without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    returned = zip(names, session.run(names, {session.get_inputs()[0].name: images}), strict=True)
    return {name: values for name, values in returned if isinstance(values, np.ndarray)}  # not sequences and maps


def _complaint(error: Exception, model: onnx.ModelProto, images: NDArray[Any]) -> str:
    """ONNX Runtime's message on a network that does not run, with the name of the node that failed."""
    unknown = re.search(r"(\S+?):(\w+)\(-?\d+\) is not a registered function/op", str(error))
    if unknown or (unknown := re.search(r"()No Op registered for (\w+)", str(error))):
        domain = f"{unknown[1]}:" if unknown[1] else ""
        return f"{domain}{unknown[2]} is not known to ONNX Runtime; export the network with operators of ONNX alone"
    failed = re.search(r"while running (\w+) node\. Name:'(.*?)' Status Message: ", str(error))
    if failed and not failed[2]:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for node in copy.graph.node:
            node.name = node.name or node.output[0]
        try:
            _run(copy, images)
        except Exception as again:  # noqa: BLE001 - this run fails with the same error, but the message names the node
            failed = re.search(r"while running (\w+) node\. Name:'(.*?)' Status Message: ", str(again)) or failed
    return (
        f"its node '{failed[2]}' ({failed[1]}): {first_line(error)}"
        if failed
        else f"ONNX Runtime cannot run it ({first_line(error)})"
    )


def _run_as_it_is(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, image: NDArray[Any], notes: list[str]
) -> tuple[onnx.ModelProto, Outputs]:
    """The outputs for one image, and the model. An older model is raised to an opset that supports INT8.

    Raises:
        UserError: the model does not run.
    """
    try:
        returned = _run(model, image)
    except Exception as error:
        if spec.input.layout == "NCHW" and _takes_channels_last(model, image):
            raise UserError(
                f"{where}: its input '{spec.input.name}' has its channels last, [n, h, w, 3]; set model.spec.input.layout=NHWC"
            ) from error
        shape = f"{spec.input.name} {list(image.shape)}"
        raise UserError(f"{where}: does not run at {shape}: {_complaint(error, model, image)}") from error
    opset = _opset(model)
    if opset >= _LEAST_OPSET:
        return model, returned
    reason = "the raised model would return other values"
    for target in _OPSETS:
        try:
            source = inliner.inline_local_functions(model) if model.functions else model
            raised = onnx.version_converter.convert_version(source, target)
            raised.ir_version = max(raised.ir_version, helper.find_min_ir_version_for(list(raised.opset_import)))
            onnx.checker.check_model(raised)
            same = _run(raised, image)
        except Exception as error:  # noqa: BLE001 - the converter does not support every operator
            reason = first_line(error)
            continue
        if all(name in same and _close(same[name], values) for name, values in returned.items()):
            notes.append(f"raised from opset {opset} to {target}")
            return raised, same
    notes.append(f"stays at opset {opset} ({reason}): INT8 needs opset {_LEAST_OPSET} or newer; for INT8, export it with that")
    return model, returned


def _takes_channels_last(model: onnx.ModelProto, image: NDArray[Any]) -> bool:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.input[0].type.tensor_type.ClearField("shape")
    try:
        _run(copy, image.transpose(0, 2, 3, 1))
    except Exception:  # noqa: BLE001 - any error means that the order of the axes is not the cause
        return False
    return True


def _close(ours: NDArray[Any], theirs: NDArray[Any]) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if ours.dtype.kind != "f":
        return bool(np.array_equal(ours, theirs))
    least = _SAME * max(float(np.abs(theirs).max(initial=0)), 1e-6)
    return bool(np.allclose(ours, theirs, rtol=0, atol=least, equal_nan=True))


def _check_freedom(
    model: onnx.ModelProto, where: str, spec: NetworkSpec, sources: Mapping[str, str], images: NDArray[Any], returned: Outputs
) -> None:
    """Run two images at once, and another size, if the description calls batch, height and width free.

    Raises:
        UserError: the network takes only one image at once, or only one size.
    """
    kept = sorted(spec.dynamic)
    if "batch" in spec.dynamic:
        words = ",".join(name for name in kept if name != "batch")
        fix = f"set 'model.spec.dynamic=[{words}]' and batch=1, or export it with a free batch"
        try:
            several = _run(model, images)
            differs = any(
                not _close(several[name][:1], values) for name, values in returned.items() if values.ndim and len(values) == 1
            )
            said = "two images at once give other values than one" if differs else ""
        except Exception as error:  # noqa: BLE001 - any error means that the network does not take two images
            said = _complaint(error, model, images)
        if said:
            node = _of_one_image(model)
            raise UserError(f"{where}: {f'its node {node!r} is for batch 1' if node else f'takes one image: {said}'}; {fix}")
    if {"height", "width"} <= spec.dynamic:
        step, own = spec.input.multiple, spec.input.size_of(images.shape)
        size = Resolution(own.height + step, own.width + 2 * step)
        words = ",".join(name for name in kept if name == "batch")
        fix = f"set 'model.spec.dynamic=[{words}]' and resolution={own}, or export it with free sizes"
        other = _images(spec, size)[:1]
        try:
            fields = fields_of(spec, sources, _run(model, other))
            for field in spec.fields:
                check_field(
                    field, fields[field.name], f"'{field.name}' is {shape_words(fields[field.name].shape)}", size, where
                )
        except UserError as error:
            raise UserError(f"{error}, at {size}; {fix}") from error
        except Exception as error:
            raise UserError(f"{where}: does not run at {size}: {_complaint(error, model, other)}; {fix}") from error


def _of_one_image(model: onnx.ModelProto) -> str:
    """The first node that returns a tensor for one image, regardless of the batch size; empty if there is none."""
    constants = {i.name: i for i in model.graph.initializer}
    constants |= {n.output[0]: n.attribute[0].t for n in model.graph.node if n.op_type == "Constant" and n.attribute}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            shape = onnx.numpy_helper.to_array(constants[node.input[1]])
            if shape.size > 2 and int(shape.flat[0]) == 1:
                return node.name or str(node.output[0])
    return ""
