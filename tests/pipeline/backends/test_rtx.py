"""What the real parser and builder of TensorRT for RTX take: our typed files, and a table of what they refuse.

Building needs no GPU. The networks are small ONNX files, so that no export runs here.
"""

from dataclasses import dataclass
from functools import cache

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.contracts import CalibrationFeed
from pipeline.onnx_files.files import ModelFiles
from pipeline.quantization import half
from pipeline.quantization.graph import load
from pipeline.quantization.place import place
from pipeline.quantization.precisions import bf16 as bfloat16
from pipeline.quantization.precisions.bf16 import Bf16
from pipeline.quantization.precisions.fp8 import Fp8
from pipeline.quantization.precisions.fp16 import Fp16
from pipeline.quantization.precisions.fp32 import Fp32
from pipeline.quantization.precisions.int8 import Int8
from posepress.skeletons import COCO_17
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec
from tests import conftest

rtx = pytest.mark.rtx
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


class RefusedError(Exception):
    """The parser or the builder does not take a file."""


@dataclass(frozen=True)
class Plan:
    """A serialized engine, and the types of what its network computes."""

    size: int
    types: frozenset[str]


@cache
def logger():
    """The one logger of the process: the library keeps the first that it is given, which must therefore stay."""
    import tensorrt_rtx_bindings as trt

    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors = []

        def log(self, severity, message):
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Log()


def built(model, lengths=(16, 32)):
    """Parse and build a model, strongly typed, for one GPU generation; free lengths range over `lengths`."""
    import tensorrt_rtx_bindings as trt

    log = logger()
    log.errors.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise RefusedError("parser: " + "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors)))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for value in (network.get_input(n) for n in range(network.num_inputs)):
        least, most = ([size if size > 0 else 1 if n == 0 else free for n, size in enumerate(value.shape)] for free in lengths)
        profile.set_shape(value.name, least, least, most)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError("builder: " + "; ".join(log.errors))
    layers = [network.get_layer(n) for n in range(network.num_layers)]
    return Plan(plan.nbytes, frozenset(layer.get_output(0).dtype.name for layer in layers))


def node(op, *inputs, out, **attributes):
    return helper.make_node(op, list(inputs), [out], name=out, **attributes)


def model_of(nodes, constants, outputs=("out",), given=FLOAT, shape=("batch", 3, "height", "width"), opset=20, out_type=FLOAT):
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", given, shape)],
        [helper.make_tensor_value_info(name, out_type, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("elsewhere", 1)]
    return helper.make_model(made, opset_imports=imports, ir_version=10)


class Config:
    """What pytest hands to conftest.py, with the warnings of its summary."""

    def __init__(self):
        self.warnings = []

    def issue_config_time_warning(self, warning, stacklevel):
        self.warnings.append(str(warning))


def test_without_the_wheel_the_tests_are_skipped_loudly_or_refused(monkeypatch, request):
    monkeypatch.setattr(conftest, "RTX", None)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.delenv("POSEPRESS_REQUIRE_RTX", raising=False)
    config = Config()
    conftest.pytest_configure(config)
    assert any("tests marked 'rtx' are skipped" in words and "make rtx" in words for words in config.warnings)
    marked = pytest.Function.from_parent(request.node.parent, name="marked", callobj=lambda: None)
    marked.add_marker("rtx")
    conftest.pytest_collection_modifyitems([marked, request.node])
    assert "TensorRT for RTX" in marked.get_closest_marker("skip").kwargs["reason"]
    assert request.node.get_closest_marker("skip") is None
    monkeypatch.setenv("POSEPRESS_REQUIRE_RTX", "1")
    with pytest.raises(pytest.UsageError, match="TensorRT for RTX is not installed; `make rtx`"):
        conftest.pytest_configure(config)


# --- our typed files -------------------------------------------------------------------------------------------------------


class Network:
    """Nodes and weights, one after the other."""

    def __init__(self):
        self.draw, self.nodes, self.constants = np.random.default_rng(0), [], {}

    def conv(self, source, out, outputs, inputs, size=3, op="Conv", **attributes):
        shape = (outputs, inputs, size, size) if op == "Conv" else (inputs, outputs, size, size)
        self.constants[f"{out}_w"] = self.draw.normal(0, 0.3, shape).astype(np.float32)
        self.constants[f"{out}_b"] = self.draw.normal(0, 0.1, outputs).astype(np.float32)
        attributes = {"pads": [size // 2] * 4, **attributes}
        self.nodes.append(node(op, source, f"{out}_w", f"{out}_b", out=out, **attributes))

    def add(self, op, *inputs, out, **attributes):
        self.nodes.append(node(op, *inputs, out=out, **attributes))

    def constant(self, name, value):
        self.constants[name] = np.asarray(value)

    def clip(self, source, out):
        self.constant("low", np.float32(0))
        self.constant("six", np.float32(6))
        self.add("Clip", source, "low", "six", out=out)


def residual():
    """Convolutions with ReLU and ReLU6, a residual add, and a concatenation with the image."""
    made = Network()
    made.conv("image", "a", 16, 3)
    made.add("Relu", "a", out="ra")
    made.conv("ra", "b", 16, 16)
    made.add("Add", "b", "ra", out="sum")
    made.clip("sum", "six_")
    made.conv("six_", "c", 16, 16)
    made.clip("c", "c6")
    made.add("Concat", "c6", "ra", "image", out="joined", axis=1)
    made.conv("joined", "out", 4, 35)
    return made


def mobile():
    """Depthwise and strided convolutions, pooling of both kinds, PReLU, and a global gate."""
    made = Network()
    made.conv("image", "a", 16, 3, strides=[2, 2])
    made.clip("a", "a6")
    made.conv("a6", "deep", 16, 1, group=16)
    made.add("HardSwish", "deep", out="swish")
    made.add("GlobalAveragePool", "swish", out="mean")
    made.conv("mean", "gate", 16, 16, 1)
    made.add("Sigmoid", "gate", out="opened")
    made.add("Mul", "swish", "opened", out="gated")
    made.conv("gated", "wide", 32, 16, 1)
    made.constant("slope", np.full((32, 1, 1), 0.2, np.float32))
    made.add("PRelu", "wide", "slope", out="sloped")
    made.add("MaxPool", "sloped", out="pooled", kernel_shape=[3, 3], pads=[1] * 4)
    made.add("AveragePool", "pooled", out="averaged", kernel_shape=[2, 2], strides=[2, 2])
    made.conv("averaged", "out", 5, 32, 1)
    return made


def decoding():
    """A transposed convolution, a bilinear enlargement, Swish by its parts, and two outputs."""
    made = Network()
    made.conv("image", "a", 16, 3, strides=[2, 2])
    made.add("Sigmoid", "a", out="sa")
    made.add("Mul", "a", "sa", out="silu")
    made.conv("silu", "up", 16, 16, 4, op="ConvTranspose", strides=[2, 2], pads=[1] * 4)
    made.add("LeakyRelu", "up", out="rup", alpha=0.1)
    made.conv("silu", "b", 16, 16)
    made.constant("twice", np.array([1, 1, 2, 2], np.float32))
    made.add("Resize", "b", "", "twice", out="larger", mode="linear", coordinate_transformation_mode="half_pixel")
    made.add("Concat", "rup", "larger", out="joined", axis=1)
    made.conv("joined", "c", 16, 32)
    made.conv("c", "out", 4, 16, 1)
    made.conv("joined", "second", 2, 32, 1)
    return made


def shuffled():
    """Channels split, computed apart and shuffled by Reshape and Transpose."""
    made = Network()
    made.conv("image", "a", 32, 3)
    made.add("Relu", "a", out="ra")
    made.constant("halves", np.array([16, 16], np.int64))
    made.nodes.append(helper.make_node("Split", ["ra", "halves"], ["left", "right"], name="split", axis=1))
    made.conv("right", "b", 16, 16)
    made.add("Relu", "b", out="rb")
    made.add("Concat", "left", "rb", out="joined", axis=1)
    made.constant("apart", np.array([0, 2, 16, 16, 16], np.int64))
    made.constant("together", np.array([0, 32, 16, 16], np.int64))
    made.add("Reshape", "joined", "apart", out="grouped")
    made.add("Transpose", "grouped", out="turned", perm=[0, 2, 1, 3, 4])
    made.add("Reshape", "turned", "together", out="shuffled")
    made.conv("shuffled", "c", 16, 32)
    made.conv("c", "out", 4, 16)
    return made


NETWORKS = {made.__name__: made for made in (residual, mobile, decoding, shuffled)}
PRECISIONS = {
    "fp32": Fp32(),
    "fp16": Fp16(),
    "fp16 with two layers in FP32": Fp16(("a", "out")),
    "bf16": Bf16(),
    "fp8": Fp8(),
    "fp8 with the rest in FP32": Fp8("fp32"),
    "int8": Int8("minmax"),
    "int8 with the rest in FP16": Int8("minmax", high_precision_dtype="fp16"),
    "int8 without equalization": Int8("minmax", equalize_concatenations=False, equalize_layers=False),
    "int8 of seven bits": Int8("percentile", weight_scale="mse", reduce_range=True),
}
TYPES = {"fp16": "HALF", "bf16": "BF16", "fp8": "FP8", "int8": "INT8"}


@pytest.fixture(scope="module", params=NETWORKS)
def described(request, tmp_path_factory):
    """A small network as an exported file."""
    made = NETWORKS[request.param]()
    outputs = tuple(name for name in ("out", "second") if any(name in one.output for one in made.nodes))
    fixed = request.param == "shuffled"  # its sizes are constants
    model = model_of(made.nodes, made.constants, outputs, shape=(1, 3, 16, 16) if fixed else ("batch", 3, "height", "width"))
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    spec = NetworkSpec(InputSpec("image", multiple=4), tuple(OutputSpec(name, 1, 4) for name in outputs), COCO_17)
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    file = tmp_path_factory.mktemp(request.param) / "model.onnx"
    onnx.save(model, file)
    return file


@pytest.fixture(scope="module")
def feed():
    draw = np.random.default_rng(5)
    images = [draw.normal(0, 2, (1, 3, 16, 16)).astype(np.float32) for _ in range(4)]
    return CalibrationFeed(lambda most: iter(images[:most]), iter, "images", "preprocessing")


@rtx
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_typed_file_of_ours_parses_and_builds(described, precision, feed, tmp_path):
    PRECISIONS[precision].quantize(described, feed, None, tmp_path)
    plan = built(onnx.load(ModelFiles.in_folder(tmp_path).onnx["tensorrt"]))
    assert plan.size > 0
    assert {TYPES[word] for word in precision.lower().split() if word in TYPES} <= plan.types
    assert precision == "fp32" or plan.types != {"FLOAT"}


@rtx
@pytest.mark.parametrize("rest", ["fp32", "fp16"])
def test_mixed_precision_builds_whatever_stays_in_float(described, rest, feed):
    """What `precision=mixed` measures: INT8 with units of the network in float, here each alone, and all but one."""
    calibrated = Int8("minmax", high_precision_dtype=rest).calibrate(described, feed)
    every = [one.name for one in place(load(described)).quantized(load(described))]
    for name in every:
        for apart in ({name}, set(every) - {name}):
            plan = built(calibrated.without(apart).models["tensorrt"])
            assert ("INT8" in plan.types) == (apart != set(every)), apart


OPERATORS = {
    "activations": [
        *(
            {"op_type": op}
            for op in ("Relu", "Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu", "Elu", "Celu", "Selu", "Gelu")
        ),
        *(
            {"op_type": op}
            for op in ("Tanh", "Mish", "Softplus", "Softsign", "ThresholdedRelu", "Abs", "Erf", "Neg", "Softmax")
        ),
    ],
    "windows": [
        {"op_type": "MaxPool", "kernel_shape": [3, 3], "pads": [1] * 4},
        {"op_type": "AveragePool", "kernel_shape": [3, 3], "pads": [1] * 4},
        {"op_type": "LpPool", "kernel_shape": [3, 3], "pads": [1] * 4},
        {"op_type": "LpNormalization", "axis": 1},
        {"op_type": "LRN", "size": 3},
        {"op_type": "DepthToSpace", "blocksize": 2},
        {"op_type": "SpaceToDepth", "blocksize": 2},
        {"op_type": "GlobalAveragePool"},
    ],
    "enlargements": [
        {"op_type": "Resize", "mode": mode, "coordinate_transformation_mode": how}
        for mode, how in [
            ("nearest", "asymmetric"),
            ("linear", "half_pixel"),
            ("linear", "align_corners"),
            ("cubic", "half_pixel"),
        ]
    ],
    "norms": [
        {"op_type": "InstanceNormalization"},
        {"op_type": "LayerNormalization"},
        {"op_type": "BatchNormalization"},
    ],
}
CONSTANT_INPUTS = {
    "Resize": ("", "twice"),
    "InstanceNormalization": ("ones", "zeros"),
    "LayerNormalization": ("ones", "zeros"),
    "BatchNormalization": ("ones", "zeros", "zeros", "ones"),
}


@rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_build_in_every_float_precision(kind, precision):
    made = Network()
    made.conv("image", "x", 16, 3)
    for name, value in {"ones": np.ones(16), "zeros": np.zeros(16), "twice": [1, 1, 1.5, 1.5]}.items():
        made.constant(name, np.asarray(value, np.float32))
    source = "x"
    for n, one in enumerate(OPERATORS[kind]):
        attributes = {key: value for key, value in one.items() if key != "op_type"}
        made.add(one["op_type"], source, *CONSTANT_INPUTS.get(one["op_type"], ()), out=f"x{n}", **attributes)
        source = f"x{n}"
    made.add("Identity", source, out="out")
    used = {name for one in made.nodes for name in one.input}
    model = model_of(made.nodes, {name: value for name, value in made.constants.items() if name in used}, shape=(1, 3, 16, 16))
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    plan = built({"fp32": lambda m: m, "fp16": half.convert, "bf16": bfloat16.convert}[precision](model))
    assert precision == "fp32" or TYPES[precision] in plan.types


# --- what the builder takes and refuses ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Nodes and constants of a small network around one convolution of 8 channels."""

    nodes: list
    constants: dict
    given: int = FLOAT
    out_type: int = FLOAT
    opset: int = 19

    @property
    def model(self):
        return model_of(
            self.nodes, self.constants, given=self.given, shape=(1, 8, 16, 16), opset=self.opset, out_type=self.out_type
        )


F32, KERNEL, BIAS = np.float32, (8, 8, 3, 3), np.zeros(8, np.float32)


def pair(source, out, dtype=np.int8, zero=0, scale=0.02, axis=None):
    """Q and DQ of a tensor, with their constants."""
    many = axis is not None
    parts = {
        f"{out}_s": np.full(8, scale, F32) if many else F32(scale),
        f"{out}_z": np.full(8, zero, dtype) if many else np.array(zero, dtype),
    }
    more = {"axis": axis} if many else {}
    nodes = [node("QuantizeLinear", source, *parts, out=f"{out}_q", **more)]
    return [*nodes, node("DequantizeLinear", f"{out}_q", *parts, out=out, **more)], parts


def weights(axis=0, dtype=np.int8, zero=0, scale=0.01, per_channel=True):
    """DQ of constant weights, with their constants."""
    integers = np.random.default_rng(0).normal(0, 40, KERNEL).astype(dtype)
    size = 8 if per_channel else ()
    constants = {"w_q": integers, "w_s": np.full(size, scale, F32), "w_z": np.full(size, zero, dtype)}
    return [node("DequantizeLinear", *constants, out="w", **({"axis": axis} if per_channel else {}))], constants


def quantized(given=None, kernel=None, op="Conv", bias=None):
    """A convolution between Q/DQ; `given` and `kernel` replace what is usual for its input and its weights."""
    first, constants = given or pair("image", "x")
    second, more = kernel or weights()
    third, bias_constants = bias or ([], {"b": BIAS})
    last = node(op, "x", "w", "b", out="out", pads=[1] * 4)
    return Part([*first, *second, *third, last], {**constants, **more, **bias_constants})


def int32_bias():
    constants = {"b_q": np.zeros(8, np.int32), "b_s": np.full(8, 2e-4, F32), "b_z": np.zeros(8, np.int32)}
    return [node("DequantizeLinear", *constants, out="b", axis=0)], constants


def by_casts(kind, opset):
    dtype = {HALF: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16}[kind]
    nodes = [
        node("Cast", "image", out="x", to=kind),
        node("Conv", "x", "w", "b", out="y", pads=[1] * 4),
        node("Cast", "y", out="out", to=FLOAT),
    ]
    return Part(nodes, {"w": np.ones(KERNEL, dtype), "b": np.zeros(8, dtype)}, opset=opset)


def unequal():
    one, a = pair("image", "x", scale=0.02)
    other, b = pair("image", "y", scale=0.03)
    return Part([*one, *other, node("Concat", "x", "y", out="out", axis=1)], {**a, **b})


def largest(*before, source="image", **constants):
    """The greatest 20 of a map, after some nodes."""
    shape = node("Reshape", source, "flat", out="row")
    top = helper.make_node("TopK", ["row", "k"], ["out", "where"], name="top")
    return Part([*before, shape, top], {"flat": np.array([1, -1]), "k": np.array([20]), **constants})


def peaks():
    return largest(
        node("MaxPool", "image", out="most", kernel_shape=[3, 3], pads=[1] * 4),
        node("Equal", "image", "most", out="same"),
        node("Cast", "same", out="here", to=FLOAT),
        node("Mul", "image", "here", out="peaks"),
        source="peaks",
    )


def deformed():
    constants = {"w": np.ones(KERNEL, F32), "offsets": np.zeros((1, 18, 16, 16), F32)}
    return Part([node("DeformConv", "image", "w", "offsets", out="out", pads=[1] * 4)], constants)


def suppressed():
    """The greatest of six boxes, scored by the image."""
    constants = {"boxes": np.random.default_rng(0).random((1, 6, 4)).astype(F32), "n": np.array([3]), "t": F32(0.5)}
    shapes = {
        "axes": np.array([2, 3]),
        "to": np.array([1, 1, 6]),
        "zero": np.array([0]),
        "six": np.array([6]),
        "one": np.array([1]),
    }
    nodes = [
        node("ReduceMax", "image", "axes", out="most", keepdims=0),
        node("Slice", "most", "zero", "six", "one", out="some"),
        node("Reshape", "some", "to", out="scores"),
        node("NonMaxSuppression", "boxes", "scores", "n", "t", out="out"),
    ]
    return Part(nodes, {**shapes, **constants}, out_type=TensorProto.INT64)


FP8 = ml_dtypes.float8_e4m3fn
TAKEN = {
    "int8 per channel, float bias": quantized(),
    "int8 per tensor": quantized(kernel=weights(per_channel=False)),
    "uint8 activations, zero point 0": quantized(given=pair("image", "x", np.uint8)),
    "weights per channel on axis 1": quantized(kernel=weights(axis=1)),
    "activations per channel": quantized(given=pair("image", "x", axis=1)),
    "ConvTranspose per channel on axis 0": quantized(op="ConvTranspose"),
    "ConvTranspose per channel on axis 1": quantized(kernel=weights(axis=1), op="ConvTranspose"),
    "fp8": quantized(given=pair("image", "x", FP8), kernel=weights(dtype=FP8, per_channel=False)),
    "fp16 by casts": by_casts(HALF, 19),
    "bf16 by casts": by_casts(TensorProto.BFLOAT16, 22),
    "a concatenation of unequal scales": unequal(),
    "uint8 images": Part([node("Cast", "image", out="out", to=FLOAT)], {}, given=TensorProto.UINT8),
    "TopK": largest(),
    "peak picking": peaks(),
    "GridSample": Part([node("GridSample", "image", "grid", out="out")], {"grid": np.zeros((1, 4, 4, 2), F32)}, opset=20),
}
NONZERO = "Non-zero zero point is not supported"
REFUSED = {
    "uint8 activations, zero point 128": (quantized(given=pair("image", "x", np.uint8, 128)), NONZERO),
    "int8 activations, zero point 5": (quantized(given=pair("image", "x", zero=5)), NONZERO),
    "weights with zero point 3": (quantized(kernel=weights(zero=3)), NONZERO),
    "INT32 bias": (quantized(bias=int32_bias()), "input has type Int32 but must have type FP8, FP4, Int4, Int8"),
    "scale 0": (quantized(given=pair("image", "x", scale=0)), "Scale coefficients must all be positive"),
    "a negative scale": (quantized(given=pair("image", "x", scale=-0.1)), "Scale coefficients must all be positive"),
    "an unknown operator": (
        Part([helper.make_node("Strange", ["image"], ["out"], name="s", domain="elsewhere")], {}),
        "Plugin not found, are the plugin name, version, and namespace correct",
    ),
    "DeformConv": (deformed(), "Plugin not found"),
    "Add of float and half": (
        Part([node("Cast", "image", out="x", to=HALF), node("Add", "image", "x", out="out")], {}),
        "must have same input types",
    ),
    "NonMaxSuppression": (suppressed(), "has no runners that implement it"),
}  # fmt: skip


@rtx
@pytest.mark.parametrize("name", TAKEN)
def test_the_builder_takes(name):
    assert built(TAKEN[name].model, lengths=(16, 16)).size > 0


@rtx
@pytest.mark.parametrize("name", REFUSED)
def test_the_parser_or_the_builder_refuses(name):
    part, message = REFUSED[name]
    with pytest.raises(RefusedError) as caught:
        built(part.model, lengths=(16, 16))
    assert message in str(caught.value)
    assert str(caught.value).startswith("builder" if name == "NonMaxSuppression" else "parser")


ELSEWHERE = {"Add of float and half", "NonMaxSuppression"}  # what concerns types, and what TensorRT itself runs


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - ELSEWHERE))
def test_the_double_of_tensorrt_refuses_what_the_real_parser_refuses(name, doubles):
    import tensorrt

    assert tensorrt.refusals(REFUSED[name][0].model)
    assert tensorrt.refusals(TAKEN["int8 per channel, float bias"].model) == []
