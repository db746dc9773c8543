"""Inputs and outputs of every form that a description knows, and the tail of a network that stays in float."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxconverter_common import float16

from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.adopt import adopt
from pipeline.onnx_files.compare import compare, onnx_reference
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.export import simplify, stamp
from pipeline.onnx_files.files import ModelFiles, Shapes
from pipeline.quantization.graph import Graph
from pipeline.quantization.place import tail
from pipeline.quantization.precisions.fp16 import Fp16
from pipeline.quantization.precisions.int8 import Int8
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.resolution import Resolution
from posepress.spec import InputSpec

FLOAT = TensorProto.FLOAT
SIZE = Resolution(64, 96)


def image_network(layout, dtype, channels, size=None, batch="n"):
    """A network whose heatmaps are the means of its input's channels, in any form of input."""
    height, width = (size.height, size.width) if size else ("h", "w")
    sides = {"N": batch, "C": channels, "H": height, "W": width}
    kind = {"float32": FLOAT, "float16": TensorProto.FLOAT16, "uint8": TensorProto.UINT8}[dtype]
    pixels = helper.make_tensor_value_info("pixels", kind, [sides[letter] for letter in layout])
    nodes = [helper.make_node("Cast", ["pixels"], ["floats"], to=FLOAT)]
    if layout == "NHWC":
        nodes.append(helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]))
    source = nodes[-1].output[0]
    nodes += [
        helper.make_node("Conv", [source, "w"], ["heatmaps"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Conv", [source, "v"], ["middle"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("ReduceMean", ["middle"], ["line"], axes=[2], keepdims=0),
        helper.make_node("ArgMax", ["middle"], ["classes"], axis=1, keepdims=0),
        helper.make_node("Reshape", ["middle", "flat"], ["entries"]),
    ]
    draw = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(draw.normal(size=(count, channels, 8, 8)).astype(np.float32), name)
        for name, count in (("w", 2), ("v", 4))
    ]
    outputs = [
        helper.make_tensor_value_info("heatmaps", FLOAT, ["n", 2, "a", "b"]),
        helper.make_tensor_value_info("line", FLOAT, ["n", 4, "b"]),
        helper.make_tensor_value_info("classes", TensorProto.INT64, ["n", "a", "b"]),
        helper.make_tensor_value_info("entries", FLOAT, ["n", 4, "e"]),
    ]
    flat = numpy_helper.from_array(np.array([0, 4, -1], np.int64), "flat")
    graph = helper.make_graph(nodes, "forms", [pixels], outputs, [*weights, flat])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def forms(layout="NCHW", dtype="float32", channels=3, **more):
    plain = {"range": 255.0} if dtype == "uint8" else {"range": 1.0, "mean": 0.5, "std": 0.25}
    return {
        "input": {"name": "pixels", "layout": layout, "dtype": dtype, "channels": channels, **plain, **more},
        "fields": [
            {"name": "heatmaps", "stride": 8, "channels": 2},
            {"name": "simcc_x", "stride": 8, "channels": 4, "axes": "CX", "tensor": "line"},
            {"name": "mask", "stride": 8, "channels": 1, "axes": "HW", "dtype": "int64", "tensor": "classes"},
            {"name": "boxes", "stride": 1, "channels": 4, "axes": "CN", "tensor": "entries"},
        ],
        "labels": {"names": ["a", "b"], "sigmas": [0.1, 0.1]},
    }


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("fixed", [None, Resolution(40, 48)])
def test_inputs_and_outputs_of_every_form_are_adopted_and_run(tmp_path, layout, dtype, channels, fixed):
    given, ours = tmp_path / "given.onnx", tmp_path / "model.onnx"
    onnx.save(image_network(layout, dtype, channels, fixed, 1 if fixed else "n"), given)
    made = adopt(given, forms(layout, dtype, channels), None, Resolution(64, 80))
    assert made.size == (fixed or Resolution(64, 80))
    assert made.spec.input.size == fixed
    assert made.spec.dynamic == (frozenset() if fixed else {"batch", "height", "width"})
    assert [output.name for output in made.model.graph.output] == ["heatmaps", "simcc_x", "mask", "boxes"]
    onnx.save(made.model, ours)
    stamp(ours, made.spec)
    images = np.random.default_rng(1).integers(0, 256, (1, made.size.height, made.size.width, 3), dtype=np.uint8)
    inputs = normalise(images, made.spec.input)
    assert inputs.shape == made.spec.input.shape(1, made.size)
    assert inputs.dtype == dtype
    compare(ours, made.spec, onnx_reference(given, made.spec, made.sources), [inputs], 1e-6)
    shapes = Shapes((made.size,) * 3, (1, 1, 1))
    engine = OnnxRuntime().build(ModelFiles(dict.fromkeys(("tensorrt", "onnxruntime"), ours)), shapes, tmp_path)
    with OnnxRuntime().load(engine) as runner:
        fields = runner.download(runner(runner.upload(images)))
    cells = made.spec.field("heatmaps").cells(made.size)
    assert {name: values.shape for name, values in fields.items()} == {
        "heatmaps": (1, 2, cells.height, cells.width),
        "simcc_x": (1, 4, cells.width),
        "mask": (1, cells.height, cells.width),
        "boxes": (1, 4, cells.height * cells.width),
    }
    macs = 6 * channels * 64 * cells.height * cells.width
    assert sum(layer["macs"] for layer in OnnxRuntime().audit(engine, made.size)) == macs


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            ("fields", 1, "stride"),
            4,
            r"'line' is \[1, 4, 6\]|48 pixels at stride 4 are 12 cells, the file gives 6; set its stride: 8",
        ),
        (("fields", 1, "axes"), "CHW", r"no \[n, C, h, w\]; a field is made of maps"),
        (("fields", 1, "channels"), 6, "4 channels, and model.spec says 6"),
        (("fields", 2, "dtype"), "int32", "is int64; expected is int32: set its dtype: int64"),
        (("fields", 3, "axes"), "NC", "another order of axes than NC fits"),
        (("input", "channels"), 1, r"expected are images \[n, 1, h, w\]; set model.spec.input.channels=3"),
        (("input", "size"), "64x64", "takes 40x48, and model.spec.input.size=64x64; leave it out"),
    ],
)
def test_forms_that_differ_from_the_description_are_said(tmp_path, place, value, message):
    given, raw = tmp_path / "given.onnx", forms()
    onnx.save(image_network("NCHW", "float32", 3, Resolution(40, 48), 1), given)
    part = raw
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(UserError, match=message):
        adopt(given, raw, None, Resolution(40, 48))


# ---------- the tail ----------


def tailed(*tail, constants=None):
    """Two convolutions of trained weights, called "first" and "last", and further nodes after "mid"."""
    draw = np.random.default_rng(0)
    weights = {"w": draw.normal(size=(4, 3, 3, 3)), "v": draw.normal(size=(4, 4, 1, 1)), **(constants or {})}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["mid"], name="last"),
        *tail,
    ]
    end = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "tailed",
        [helper.make_tensor_value_info("image", FLOAT, [1, 3, 16, 16])],
        [helper.make_tensor_value_info(end, FLOAT, None)],
        [
            numpy_helper.from_array(np.asarray(value, np.int64 if name == "flat" else np.float32), name)
            for name, value in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


BILINEAR = np.tile(np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 16, (4, 1, 1, 1))


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([], {}),
        ([helper.make_node("Sigmoid", ["mid"], ["out"])], {}),
        ([helper.make_node("ConvTranspose", ["mid", "up"], ["out"], strides=[2, 2], group=4)], {"up": BILINEAR}),
        (
            [helper.make_node("ConvTranspose", ["mid", "up"], ["out"], strides=[2, 2])],
            {"up": np.einsum("io,hw->iohw", np.eye(4), BILINEAR[0, 0])},
        ),
        (
            [helper.make_node("Softmax", ["mid"], ["p"], axis=3), helper.make_node("MatMul", ["p", "bins"], ["out"])],
            {"bins": np.linspace(0, 1, 16)[:, None]},
        ),
        (
            [helper.make_node("Reshape", ["mid", "flat"], ["r"]), helper.make_node("MatMul", ["r", "grid"], ["out"])],
            {"flat": np.array([1, 4, 256]), "grid": np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(256, 2)},
        ),
        ([helper.make_node("Conv", ["mid", "mean"], ["out"], kernel_shape=[2, 2])], {"mean": np.full((1, 4, 2, 2), 1 / 16)}),
    ],
    ids=["nothing", "sigmoid", "bilinear resize", "dense resize", "expectation over bins", "over a grid", "mean"],
)
def test_fixed_weights_are_passed_over_on_the_way_to_the_tail(nodes, constants):
    graph = Graph(tailed(*nodes, constants=constants))
    assert "last" in tail(graph)
    assert "first" not in tail(graph)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "MatMul", "Gemm"])
def test_the_last_trained_weights_are_the_tail_of_whatever_operator(kind):
    weights = np.random.default_rng(1).normal(size=(4, 4, 1, 1) if kind.startswith("Conv") else (16, 16))
    node = helper.make_node(kind, ["mid", "head"], ["out"], name="head")
    graph = Graph(tailed(node, constants={"head": weights}))
    assert "last" not in tail(graph)
    assert "head" in tail(graph)


@pytest.mark.parametrize(
    "weights",
    [
        np.zeros((4, 4, 1, 1)),
        np.where(np.arange(16).reshape(4, 4, 1, 1) == 5, 0.3, 0),
        np.where(np.random.default_rng(2).random((4, 4, 1, 1)) < 0.5, -0.2, 0.2),
        np.random.default_rng(3).integers(-7, 8, (4, 4, 1, 1)) * 0.01,
        np.random.default_rng(4).integers(-127, 128, (4, 4, 3, 3)) * 0.01,
    ],
    ids=["zeros", "one weight left", "binary", "4 bits", "8 bits"],
)
def test_weights_that_are_few_or_rounded_are_trained_ones(weights):
    node = helper.make_node("Conv", ["mid", "head"], ["out"], name="head", pads=[weights.shape[2] // 2] * 4)
    assert "last" not in tail(Graph(tailed(node, constants={"head": weights})))


@pytest.mark.parametrize("quantizer", [Int8(), Fp16()], ids=["int8", "fp16"])
def test_a_class_map_of_integers_is_quantized_around(quantizer, tmp_path):
    given, ours = tmp_path / "given.onnx", tmp_path / "model.onnx"
    onnx.save(image_network("NCHW", "float32", 3), given)
    made = adopt(given, forms(), None, SIZE)
    onnx.save(made.model, ours)
    stamp(ours, made.spec)
    frames = np.random.default_rng(0).integers(0, 256, (4, 1, SIZE.height, SIZE.width, 3), dtype=np.uint8)
    feed = CalibrationFeed(
        lambda most: (normalise(f, made.spec.input) for f in frames[:most]), lambda most: iter(frames), "i", "p"
    )
    if isinstance(quantizer, Int8):
        with pytest.raises(UserError, match="no layer is left to quantize|this network has none"):
            quantizer.quantize(ours, feed, None, tmp_path)
        return
    assert quantizer.quantize(ours, feed, None, tmp_path)["precision"] == "fp16"
    images = [normalise(frame, made.spec.input) for frame in frames]
    for fields in computed_over(onnx.load(ours), ["mask", "heatmaps"], images):
        assert fields["mask"].dtype == np.int64
        assert fields["heatmaps"].dtype == np.float32


@pytest.mark.parametrize("quantizer", [Int8(), Fp16()], ids=["int8", "fp16"])
def test_a_network_of_half_precision_is_no_source_of_another(quantizer, tmp_path):
    file = tmp_path / "half.onnx"
    model = float16.convert_float_to_float16(tailed())
    onnx.save(model, file)
    feed = CalibrationFeed(lambda most: iter(()), lambda most: iter(()), "i", "p")
    with pytest.raises(UserError, match="computes in 16 bits .* export it in float32, or choose precision=fp32"):
        quantizer.quantize(file, feed, None, tmp_path)


def test_a_network_of_bytes_with_its_channels_last_is_written_in_int8(tmp_path):
    given, ours = tmp_path / "given.onnx", tmp_path / "model.onnx"
    draw = np.random.default_rng(0)
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", "h", "w", 3])
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["planes", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "w"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Conv", ["d", "u"], ["e"]),
        helper.make_node("ReduceMean", ["e"], ["line"], axes=[2], keepdims=0),
    ]
    shapes = {"w": (8, 3, 3, 3), "v": (8, 8, 3, 3), "u": (4, 8, 1, 1)}
    weights = [
        numpy_helper.from_array((draw.normal(size=shape) / 5).astype(np.float32), name) for name, shape in shapes.items()
    ]
    weights.append(numpy_helper.from_array(np.array(1 / 255, np.float32), "scale"))
    outputs = [helper.make_tensor_value_info("line", FLOAT, ["n", 4, "x"])]
    graph = helper.make_graph(nodes, "bytes", [pixels], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), given)
    raw = {
        "input": {"name": "pixels", "layout": "NHWC", "dtype": "uint8", "range": 255.0},
        "fields": [{"name": "simcc_x", "stride": 4, "channels": 4, "axes": "CX", "tensor": "line"}],
        "labels": {"names": ["a", "b", "c", "d"], "sigmas": [0.1] * 4},
    }
    made = adopt(given, raw, None, SIZE)
    onnx.save(made.model, ours)
    simplify(ours, 120)
    stamp(ours, made.spec)
    frames = draw.integers(0, 256, (8, 1, SIZE.height, SIZE.width, 3), dtype=np.uint8)
    feed = CalibrationFeed(
        lambda most: (normalise(frame, made.spec.input) for frame in frames[:most]), lambda most: iter(frames[:most]), "i", "p"
    )
    report = Int8().quantize(ours, feed, None, tmp_path)
    assert report["int8_layers"] == 2
    (tmp_path / "half").mkdir()
    assert Fp16().quantize(ours, feed, None, tmp_path / "half")["precision"] == "fp16"
    fields = {}
    plain = dict.fromkeys(("tensorrt", "onnxruntime"), ours)
    half = ModelFiles.in_folder(tmp_path / "half").onnx
    for name, source in (("fp32", plain), ("int8", ModelFiles.in_folder(tmp_path).onnx), ("fp16", half)):
        (tmp_path / name).mkdir()
        engine = OnnxRuntime().build(ModelFiles(source), Shapes((SIZE,) * 3, (1, 1, 1)), tmp_path / name)
        with OnnxRuntime().load(engine) as runner:
            fields[name] = runner(runner.upload(frames[0]))["simcc_x"]
    for name, most in (("int8", 0.05), ("fp16", 0.01)):
        error = np.abs(fields[name] - fields["fp32"]).max() / np.abs(fields["fp32"]).max()
        assert 0 < error < most, name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 40, 48, 1), "channels last; set model.spec.input.layout=NHWC and model.spec.input.channels=1"),
        ((1, 1, 40, 48), r"expected are images \[n, 3, h, w\]; set model.spec.input.channels=1"),
        (("n", "h", "w", 1), "channels last; set model.spec.input.layout=NHWC and model.spec.input.channels=1"),
    ],
)
def test_grey_files_are_told_from_channels_last(shape, message, tmp_path):
    model = image_network("NCHW", "float32", 3)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("pixels", FLOAT, shape))
    onnx.save(model, tmp_path / "given.onnx")
    with pytest.raises(UserError, match=message):
        adopt(tmp_path / "given.onnx", forms(), None, Resolution(40, 48))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channels": 3.0}, "channels=3.0: choose 3"),
        ({"channels": True}, "channels=True: choose 3"),
        ({"size": {"height": 1.5, "width": 8}}, "size=.*: give HEIGHTxWIDTH"),
        ({"size": {"height": -8, "width": 8}}, "size=.*: give HEIGHTxWIDTH"),
        ({"size": "65x64"}, "size=65x64: both sides must be multiples of multiple=8"),
    ],
)
def test_values_of_an_input_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        InputSpec("image", **values)


def test_grey_of_no_image_is_no_image():
    assert normalise(np.zeros((0, 8, 8, 3), np.uint8), InputSpec("image", channels=1)).shape == (0, 1, 8, 8)
