import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pipeline.contracts import CalibrationFeed
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.onnx_files import export
from pipeline.onnx_files.files import ModelFiles, read_spec
from pipeline.quantization import calibration, graph, transposed, writers
from pipeline.quantization import place as place_module
from pipeline.quantization.precisions.bf16 import Bf16
from pipeline.quantization.precisions.fp8 import Fp8
from pipeline.quantization.precisions.fp16 import Fp16
from pipeline.quantization.precisions.fp32 import Fp32
from pipeline.quantization.precisions.int8 import Int8
from pipeline.quantization.weights import quantized
from posepress.errors import UserError
from posepress.spec import SPEC_KEY
from tests.conftest import FAKES, forget_doubles


@pytest.fixture(scope="module")
def refusals():
    """What TensorRT refuses, from its double."""
    sys.path.insert(0, str(FAKES))
    try:
        import tensorrt
    finally:
        sys.path.remove(str(FAKES))
        forget_doubles()
    return tensorrt.refusals


def network(nodes, outputs, weights=(), shape=(1, 3, 8, 8)):
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def conv(source, out, name=None):
    return helper.make_node("Conv", [source, f"{out}_w", f"{out}_b"], [out], name=name or out, pads=[1, 1, 1, 1])


def kernel(out, outputs, inputs, seed=0):
    draw = np.random.default_rng(seed)
    return [
        (f"{out}_w", draw.normal(0, 0.3, (outputs, inputs, 3, 3)).astype(np.float32)),
        (f"{out}_b", draw.normal(0, 0.1, outputs).astype(np.float32)),
    ]


@pytest.fixture(scope="module")
def branches():
    """Convolutions, ReLU, ReLU6, a residual add and a concatenation."""
    nodes = [
        conv("image", "a"),
        helper.make_node("Relu", ["a"], ["ra"], name="ra"),
        conv("ra", "b"),
        helper.make_node("Add", ["b", "ra"], ["sum"], name="sum"),
        helper.make_node("Clip", ["sum", "low", "high"], ["six"], name="six"),
        conv("six", "c"),
        helper.make_node("Clip", ["c", "low", "high"], ["c6"], name="c6"),
        helper.make_node("Concat", ["c6", "b2", "image"], ["joined"], name="joined", axis=1),
        conv("joined", "out"),
    ]
    nodes.insert(7, conv("ra", "b2"))
    weights = kernel("a", 8, 3) + kernel("b", 8, 8, 1) + kernel("c", 8, 8, 2) + kernel("b2", 8, 8, 3) + kernel("out", 4, 19, 4)
    weights += [("low", np.float32(0)), ("high", np.float32(6))]
    return network(nodes, ["out"], [(n, np.asarray(v)) for n, v in weights])


def feed(count=8, shape=(1, 3, 8, 8), scale=3.0):
    draw = np.random.default_rng(5)
    return [draw.normal(0, scale, shape).astype(np.float32) for _ in range(count)]


def fed(images):
    return CalibrationFeed(lambda most: iter(images[:most]), iter, "images", "preprocessing")


def written(model, flavour, exclude=(), method="minmax"):
    placement = place_module.place(model, exclude)
    histograms = calibration.observe(model, placement.tensors, feed())
    thresholds = {t: h.threshold(method) for t, h in histograms.items()}
    scales = writers.Scales.of(thresholds, {t: h.least for t, h in histograms.items()}, placement)
    return writers.insert(model, placement, scales, flavour), scales.activations, placement


def run(model, images, simulate=False, output=0):
    options = onnxruntime.SessionOptions()
    if simulate:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images})[output]


def relative_rms(a, b):
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=6), st.integers(0, 1000))
def test_a_histogram_grows_without_losing_a_value(scales, seed):
    draw = np.random.default_rng(seed)
    parts = [draw.normal(0, scale, 300).astype(np.float32) for scale in scales]
    histogram = calibration.Histogram()
    for part in parts:
        histogram.add(part)
    values = np.abs(np.concatenate(parts))
    assert histogram.counts.sum() == values.size
    assert histogram.most == max(p.max() for p in parts)
    assert histogram.least == min(p.min() for p in parts)
    assert histogram.threshold("minmax") == pytest.approx(values.max())
    assert histogram.limit >= values.max()
    width = histogram.limit / len(histogram.counts)
    exact = np.sort(values)[int(np.ceil(0.9 * values.size)) - 1]
    assert histogram.threshold("percentile", 90) == pytest.approx(exact, abs=2 * width)


def test_thresholds_of_a_known_tensor():
    histogram = calibration.Histogram()
    histogram.add(np.r_[np.full(99_990, 1.0), np.full(10, 100.0)].astype(np.float32))
    assert histogram.threshold("minmax") == 100
    assert histogram.threshold("percentile", 99.9) == pytest.approx(1, abs=0.1)
    normal = calibration.Histogram()
    normal.add(np.random.default_rng(0).normal(0, 1, 400_000).astype(np.float32))
    assert 3.0 < normal.threshold("mse") < normal.threshold("minmax")  # clipping some tail is worth finer steps


def test_an_all_zero_tensor_gets_scale_one():
    histogram = calibration.Histogram()
    histogram.add(np.zeros(10, np.float32))
    assert histogram.threshold("mse") == histogram.threshold("minmax") == 0
    placement = place_module.Placement(("t",), ("t",), {}, ())
    assert writers.Scales.of({"t": 0.0}, {"t": 0.0}, placement).activations == {"t": 1.0}
    weights = np.zeros((2, 3, 1, 1), np.float32)
    weights[1] = 127
    for method in ("max", "mse", "least_squares"):
        assert quantized(weights, 0, method)[1].tolist() == [1, 1], method
    tiny = np.full((1, 1, 1, 1), 1e-9, np.float32)
    assert quantized(tiny, 0)[1][0] == pytest.approx(1e-9 / 127)
    assert quantized(tiny, 0, least=2.0**-14)[1][0] == 2.0**-14


def test_values_that_are_not_finite_are_named(branches):
    broken = onnx.ModelProto()
    broken.CopyFrom(branches)
    bias = next(i for i in broken.graph.initializer if i.name == "b_b")
    bias.CopyFrom(numpy_helper.from_array(np.full(8, np.nan, np.float32), "b_b"))
    with pytest.raises(UserError, match="NaN or infinity in the activation"):
        written(broken, "tensorrt")
    with pytest.raises(UserError, match="no images"):
        calibration.observe(branches, ["a"], [])


def test_scales_of_a_known_tensor(branches):
    model, scales, _ = written(branches, "tensorrt")
    peak = max(np.abs(images).max() for images in feed())
    assert scales["image"] >= np.float32(peak / 127)  # shared with the concatenation it goes into
    stored = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    kernel_ = next(v for n, v in kernel("a", 8, 3) if n == "a_w")
    assert np.allclose(stored["a_w_scale"], np.abs(kernel_).max(axis=(1, 2, 3)) / 127)
    assert stored["a_w_int8"].dtype == np.int8
    assert np.abs(stored["a_w_int8"]).max() == 127
    restored = stored["a_w_int8"] * stored["a_w_scale"][:, None, None, None]
    assert np.abs(restored - kernel_).max() <= stored["a_w_scale"].max() / 2 + 1e-7
    assert stored["a_b"].dtype == np.float32


def test_a_concatenation_shares_one_scale(branches):
    _model, scales, placement = written(branches, "tensorrt")
    assert placement.shared == (frozenset({"c6", "b2", "image", "joined"}),)
    assert len({scales[t] for t in placement.shared[0]}) == 1


def test_groups_that_touch_are_one():
    assert place_module.joined([{"a", "b"}, {"c"}, {"b", "c"}, {"d"}]) == [frozenset("abc"), frozenset("d")]


@pytest.mark.parametrize("flavour", ["tensorrt", "onnxruntime"])
def test_quantized_networks_compute_nearly_the_same(branches, flavour):
    model, _, _ = written(branches, flavour)
    images = feed(1)[0]
    assert relative_rms(run(model, images), run(branches, images)) < 0.06


def test_both_flavours_share_their_scales_and_their_error(branches):
    trt, _, _ = written(branches, "tensorrt")
    ort, _, _ = written(branches, "onnxruntime")
    ours, theirs = ({i.name: i for i in m.graph.initializer} for m in (trt, ort))
    shared = [n for n in ours if n.endswith("_scale") and n in theirs]
    assert len(shared) >= 8
    assert all(ours[n].raw_data == theirs[n].raw_data for n in shared)
    images, expected = feed(1)[0], run(branches, feed(1)[0])
    errors = [relative_rms(run(m, images, simulate=True), expected) for m in (trt, ort)]
    assert 0.5 < errors[0] / errors[1] < 2, "ONNX Runtime's convolution over the image is in float"


def optimised(model, folder):
    """The operators of a model as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


def test_onnx_runtime_computes_all_convolutions_in_integers(branches, tmp_path):
    ops = optimised(written(branches, "onnxruntime")[0], tmp_path)
    assert ops.count("QLinearConv") == 3
    assert ops.count("QLinearAdd") == 1
    assert ops.count("QLinearConcat") == 1
    assert ops.count("Conv") + ops.count("FusedConv") == 2, "the one over the image and the one that gives a float field"


def test_what_is_left_in_float_runs_in_float(branches, tmp_path):
    """ONNX Runtime quantizes weights of a float convolution between a DQ and a Q by itself."""
    every = place_module.place(branches)
    for node in every.quantized(branches):
        model, _, placement = written(branches, "onnxruntime", exclude=(node.name,))
        integer = {n.name for n in placement.quantized(branches)} - placement.slow
        assert optimised(model, tmp_path).count("QLinearConv") == len(integer), node.name


def test_tensorrt_would_take_its_flavour_and_not_the_other(branches, refusals):
    assert refusals(written(branches, "tensorrt")[0]) == []
    reasons = " ".join(refusals(written(branches, "onnxruntime")[0]))
    assert "only INT8 is supported" in reasons


def test_excluded_nodes_stay_in_float(branches, refusals):
    model, _, _ = written(branches, "tensorrt", exclude=("a", "out"))
    by_name = {n.name: n for n in model.graph.node}
    assert by_name["a"].input[1] == "a_w"
    assert by_name["out"].input[1] == "out_w"
    assert by_name["c"].input[1] == "c_w_dequantized"
    assert refusals(model) == []


def test_arithmetic_on_shapes_is_left_alone():
    nodes = [
        conv("image", "a"),
        helper.make_node("Shape", ["a"], ["shape"], name="shape"),
        helper.make_node("Add", ["shape", "shape"], ["twice"], name="twice"),
        helper.make_node("Expand", ["a", "shape"], ["out"], name="out"),
    ]
    placement = place_module.place(network(nodes, ["out", "twice"], [(n, np.asarray(v)) for n, v in kernel("a", 8, 3)]))
    assert placement.skips == {}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    network = LightweightOpenPose(stages=2, width=0.125).eval()
    export.export(network, np.zeros((1, 3, 64, 80), np.float32), 20, file)
    export.simplify(file, 120)
    export.stamp(file, network.spec)
    return file


EVERY = [Fp32(), Fp16(), Int8(), *(Int8(method) for method in calibration.METHODS), Int8(reduce_range=True)]
EVERY += [Int8(weight_scale="mse"), Int8(weight_scale="least_squares")]


@pytest.mark.parametrize("quantizer", EVERY)
def test_every_precision_writes_both_flavours_with_the_description(exported, quantizer, tmp_path, refusals):
    images = feed(4, (1, 3, 64, 80), 0.5)
    quantizer.quantize(exported, fed(images), None, tmp_path)
    expected = onnxruntime.InferenceSession(str(exported)).run(None, {"image": images[0]})
    for flavour, file in ModelFiles.in_folder(tmp_path).onnx.items():
        assert read_spec(file) == read_spec(exported)
        found = onnxruntime.InferenceSession(str(file)).run(None, {"image": images[0]})
        limit = 0.25 if isinstance(quantizer, Int8) else 0.01  # random weights: nothing is redundant
        assert [relative_rms(a, b) < limit for a, b in zip(found, expected, strict=True)] == [True, True], flavour
    assert refusals(onnx.load(ModelFiles.in_folder(tmp_path).onnx["tensorrt"])) == []


def test_calibrating_twice_gives_the_same_bytes(exported, tmp_path):
    images = feed(4, (1, 3, 64, 80), 0.5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Int8().quantize(exported, fed(images), None, tmp_path / name)
    for file in ("scales.json", "model.tensorrt.onnx", "model.onnxruntime.onnx"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    table = json.loads((tmp_path / "a" / "scales.json").read_text())
    assert all(scale > 0 for row in table["tensors"].values() for scale in row["scale"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"equalize_layers": "maybe"}, "equalize_layers=maybe: choose true or false"),
        ({"percentile": "x"}, "percentile=x"),
        ({"calibration_method": "entropie"}, "calibration_method=entropie"),
        ({"percentile": 20}, "percentile=20"),
    ],
)
def test_impossible_quantizations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Int8(**options)


def test_excluding_a_node_that_is_not_there_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="nodes_to_exclude: no node matches 'node_con2d'; did you mean 'node_Conv"):
        Int8(nodes_to_exclude=("node_con2d",)).quantize(exported, fed(feed(1, (1, 3, 64, 80))), None, tmp_path)
    with pytest.raises(UserError, match="no layer is left to quantize"):
        Int8(nodes_to_exclude=("*",)).quantize(exported, fed(feed(1, (1, 3, 64, 80))), None, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def described(branches, tmp_path):
    """The network of `branches` as an exported file."""
    from posepress.skeletons import COCO_17
    from posepress.spec import InputSpec, NetworkSpec, OutputSpec

    spec = NetworkSpec(InputSpec("image", multiple=1), (OutputSpec("out", 1, 4),), COCO_17)
    model = onnx.ModelProto()
    model.CopyFrom(branches)
    onnx.helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save(model, tmp_path / "given.onnx")
    return tmp_path / "given.onnx"


def files(quantizer, source, out, images=None, probe=None):
    out.mkdir()
    report = quantizer.quantize(source, fed(feed() if images is None else images), probe, out)
    return report, ModelFiles.in_folder(out).onnx


def test_the_rest_in_half_precision_has_half_precision_scales(described, branches, tmp_path, refusals):
    report, made = files(Int8(high_precision_dtype="fp16"), described, tmp_path / "out")
    model = onnx.load(made["tensorrt"])
    scales = [i for i in model.graph.initializer if i.name.endswith("_scale")]
    assert {i.data_type for i in scales} == {TensorProto.FLOAT16}
    assert min(numpy_helper.to_array(i).min() for i in scales) >= 2.0**-14
    assert report["clamped_scales"] == 0
    assert refusals(model) == []
    images = feed(1)[0]
    assert relative_rms(run(model, images), run(branches, images)) < 0.06
    assert all(i.data_type != TensorProto.FLOAT16 for i in onnx.load(made["onnxruntime"]).graph.initializer)


def test_scales_below_half_precisions_normal_numbers_are_raised_and_counted():
    placement = place_module.Placement(("t", "u"), ("t", "u"), {}, ())
    scales = writers.Scales.of({"t": 1e-6, "u": 1.0}, {"t": 0.0, "u": 0.0}, placement, least=2.0**-14)
    assert scales.activations == {"t": 2.0**-14, "u": float(np.float32(1 / 127))}
    assert scales.clamped == ["t"]


def test_layers_that_cannot_be_int8_stay_in_float_and_are_named(described, tmp_path):
    report, made = files(Int8(), described, tmp_path / "out")
    assert report["float_layers"] == ["out"], "the head, whose rounding nothing averages"
    by_name = {n.name: n for n in onnx.load(made["onnxruntime"]).graph.node}
    assert by_name["a"].input[1] == "a_w", "three channels: slower in integers"
    assert {n.name: n for n in onnx.load(made["tensorrt"]).graph.node}["a"].input[1] == "a_w_dequantized"


def test_scales_that_differ_at_a_concatenation_are_found(branches):
    model, _, _ = written(branches, "tensorrt")
    place_module.check_shared(model)
    for initializer in model.graph.initializer:
        if initializer.name == "c6_scale":
            initializer.CopyFrom(numpy_helper.from_array(np.float32(0.5), "c6_scale"))
    with pytest.raises(
        ValueError, match=r"the Concat 'joined' has inputs and output of different scales \(.*c6_dequantized 0.5"
    ):
        place_module.check_shared(model)


def test_a_pooling_returns_the_scale_it_takes():
    nodes = [
        conv("image", "a"),
        helper.make_node("Relu", ["a"], ["ra"], name="ra"),
        helper.make_node("MaxPool", ["ra"], ["p"], name="p", kernel_shape=[2, 2], strides=[2, 2]),
        conv("p", "b"),
        conv("b", "out"),
    ]
    weights = [(n, np.asarray(v)) for n, v in kernel("a", 8, 3) + kernel("b", 8, 8, 1) + kernel("out", 4, 8, 2)]
    model = network(nodes, ["out"], weights)
    made, scales, placement = written(model, "tensorrt")
    assert frozenset({"ra", "p"}) in placement.shared
    assert scales["ra"] == scales["p"]
    place_module.check_shared(made)


def types(model, folder):
    """The types of the values that each operator reads first, as ONNX Runtime runs a model."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    session.run(None, {"image": feed(1)[0]})
    found = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and (shapes := event["args"].get("input_type_shape")):
            found.setdefault(event["args"]["op_name"], set()).add(next(iter(shapes[0])))
    return found


def test_a_carrier_beside_a_concatenation_has_its_scale():
    """A channel split: one half is read by a convolution and the other by the concatenation alone."""
    nodes = [conv("image", "a"), helper.make_node("Relu", ["a"], ["ra"], name="ra"), conv("ra", "b")]
    nodes += [helper.make_node("Add", ["b", "ra"], ["sum"], name="sum"), helper.make_node("Relu", ["sum"], ["r"], name="r")]
    nodes += [helper.make_node("Slice", ["r", f"{n}0", f"{n}1", "axis"], [f"s{n}"], name=f"s{n}") for n in (1, 2)]
    nodes += [conv("s1", "c"), helper.make_node("Concat", ["c", "s2"], ["joined"], name="joined", axis=1)]
    nodes += [conv("joined", "d"), conv("d", "out")]
    weights = [*kernel("a", 8, 3), *kernel("b", 8, 8, 1), *kernel("c", 4, 4, 2), *kernel("d", 8, 8, 3), *kernel("out", 4, 8, 4)]
    ends = {"10": [0], "11": [4], "20": [4], "21": [8], "axis": [1]}
    weights += [(name, np.array(value)) for name, value in ends.items()]
    model = network(nodes, ["out"], weights)
    for flavour in ("tensorrt", "onnxruntime"):
        made, _, _ = written(model, flavour)
        place_module.check_shared(made)
        assert relative_rms(run(made, feed(1)[0]), run(model, feed(1)[0])) < 0.1


def test_a_pooling_behind_a_clipped_concatenation_reads_what_is_there(tmp_path):
    nodes = [conv("image", "a"), conv("image", "a2"), helper.make_node("Concat", ["a", "a2"], ["cat"], name="cat", axis=1)]
    nodes += [helper.make_node("Clip", ["cat", "low", "high"], ["six"], name="six"), conv("six", "b")]
    nodes += [helper.make_node("MaxPool", ["six"], ["p"], name="p", kernel_shape=[2, 2], strides=[2, 2]), conv("p", "c")]
    nodes += [helper.make_node("MaxPool", ["b"], ["q"], name="q", kernel_shape=[2, 2], strides=[2, 2])]
    nodes += [helper.make_node("Add", ["q", "c"], ["sum"], name="sum"), conv("sum", "out")]
    weights = [
        *kernel("a", 8, 3),
        *kernel("a2", 8, 3, 1),
        *kernel("b", 8, 16, 2),
        *kernel("c", 8, 16, 3),
        *kernel("out", 4, 8, 4),
    ]
    weights += [("low", np.float32(0)), ("high", np.float32(6))]
    model = network(nodes, ["out"], [(n, np.asarray(v)) for n, v in weights])
    for flavour in ("tensorrt", "onnxruntime"):
        assert relative_rms(run(written(model, flavour)[0], feed(1)[0]), run(model, feed(1)[0])) < 0.1


def test_a_pooling_of_float_values_stays_in_float_on_a_cpu(tmp_path):
    """ONNX Runtime pools integers 40 times slower than floats, unless a convolution computes these integers."""
    pool = [helper.make_node("MaxPool", ["ra"], ["p"], name="p", kernel_shape=[2, 2], strides=[2, 2])]
    first = [conv("image", "a"), helper.make_node("Relu", ["a"], ["ra"], name="ra")]
    weights = [*kernel("a", 8, 3), *kernel("b", 8, 8, 1), *kernel("c", 8, 8, 2), *kernel("out", 4, 8, 3)]
    after = network([*first, *pool, conv("p", "b"), conv("b", "c"), conv("c", "out")], ["out"], weights)
    made, _, placement = written(after, "onnxruntime")
    assert "p" in placement.slow
    assert optimised(made, tmp_path).count("MaxPool") == 1
    assert types(made, tmp_path)["MaxPool"] == {"float"}
    pool = [helper.make_node("MaxPool", ["b"], ["p"], name="p", kernel_shape=[2, 2], strides=[2, 2])]
    between = network([*first, conv("ra", "b"), *pool, conv("p", "c"), conv("c", "out")], ["out"], weights)
    made, _, placement = written(between, "onnxruntime")
    assert "p" not in placement.slow
    assert optimised(made, tmp_path).count("NhwcMaxPool") == 1


@pytest.mark.parametrize(
    ("size", "stride", "pads", "more"),
    [(4, 2, [1] * 4, 0), (2, 2, [0] * 4, 0), (3, 2, [1] * 4, 1), (5, 3, [1, 0, 2, 1], 0), (3, 2, [0] * 4, 0)],
)
@pytest.mark.parametrize("activation", [[], ["Relu"], ["Relu", "Clip"]])
def test_a_transposed_convolution_becomes_a_convolution_with_equal_results(size, stride, pads, more, activation):
    draw = np.random.default_rng(size)
    how = {"strides": [stride] * 2, "pads": pads, "output_padding": [more] * 2}
    nodes = [conv("image", "a"), helper.make_node("ConvTranspose", ["a", "up_w", "up_b"], ["up"], name="up", **how)]
    last = "up"
    for op in activation:
        nodes.append(helper.make_node(op, [last, *(["low", "high"] if op == "Clip" else [])], [op], name=op))
        last = op
    nodes += [conv(last, "b"), conv(last, "c"), helper.make_node("Add", ["b", "c"], ["out"], name="sum")]
    weights = [*kernel("a", 8, 3), *kernel("b", 4, 6, 1), *kernel("c", 4, 6, 2)]
    weights += [("up_w", draw.normal(0, 0.3, (8, 6, size, size)).astype(np.float32)), ("up_b", np.arange(6, dtype=np.float32))]
    weights += [("low", np.float32(0)), ("high", np.float32(6))]
    model = network(nodes, ["out"], [(n, np.asarray(v)) for n, v in weights], shape=(1, 3, 7, 9))
    made, same = transposed.as_convolutions(model, {"up"})
    onnx.checker.check_model(made, full_check=True)
    assert [node.op_type for node in made.graph.node if node.name == "up"] == ["Conv"]
    assert set(same.values()) == {last}
    images = feed(1, (1, 3, 7, 9))[0]
    assert np.allclose(run(made, images), run(model, images), atol=1e-4)


def test_onnx_runtime_computes_a_transposed_convolution_in_integers(tmp_path):
    up = helper.make_node("ConvTranspose", ["ra", "up_w"], ["up"], name="up", strides=[2, 2], pads=[1] * 4)
    nodes = [conv("image", "a"), helper.make_node("Relu", ["a"], ["ra"], name="ra"), up]
    nodes += [helper.make_node("Relu", ["up"], ["r"], name="r"), conv("r", "b"), conv("b", "out")]
    draw = np.random.default_rng(1)
    weights = [*kernel("a", 8, 3), *kernel("b", 8, 6, 1), *kernel("out", 4, 8, 2)]
    model = network(nodes, ["out"], [*weights, ("up_w", draw.normal(0, 0.3, (8, 6, 4, 4)).astype(np.float32))])
    made, _, placement = written(model, "onnxruntime")
    assert "up" not in placement.slow
    ops = optimised(made, tmp_path)
    assert (ops.count("QLinearConv"), ops.count("ConvTranspose"), ops.count("DepthToSpace")) == (2, 0, 1)
    ran = types(made, tmp_path)
    assert ran["DepthToSpace"] == ran["Slice"] == {"uint8"}
    images = feed(1)[0]
    assert relative_rms(run(made, images), run(model, images)) < 0.05
    assert "ConvTranspose" in [node.op_type for node in written(model, "tensorrt")[0].graph.node]
    assert optimised(written(model, "onnxruntime", exclude=("up",))[0], tmp_path).count("ConvTranspose") == 1


def test_what_reads_a_transposed_convolution_keeps_its_placement(tmp_path):
    """Sums of two of them, shared weights, a pooling behind them, and one that is an output."""
    how = {"strides": [2, 2], "pads": [1] * 4}
    nodes = [conv("image", "a"), helper.make_node("Relu", ["a"], ["ra"], name="ra")]
    nodes += [helper.make_node("ConvTranspose", ["ra", "up_w"], [name], name=name, **how) for name in ("u1", "u2", "u3")]
    nodes += [helper.make_node("Add", ["u1", "u2"], ["s"], name="s")]
    nodes += [helper.make_node("MaxPool", ["s"], ["p"], name="p", kernel_shape=[2, 2], strides=[2, 2])]
    nodes += [conv("p", "b"), conv("b", "out")]
    draw = np.random.default_rng(1)
    weights = [*kernel("a", 8, 3), *kernel("b", 8, 6, 1), *kernel("out", 4, 8, 2)]
    model = network(nodes, ["out", "u3"], [*weights, ("up_w", draw.normal(0, 0.3, (8, 6, 4, 4)).astype(np.float32))])
    made, _, placement = written(model, "onnxruntime")
    assert not {"s", "p", "u1", "u2"} & placement.slow
    ops = optimised(made, tmp_path)
    assert (ops.count("QLinearAdd"), ops.count("DepthToSpace"), ops.count("ConvTranspose")) == (1, 2, 1)
    assert relative_rms(run(made, feed(1)[0]), run(model, feed(1)[0])) < 0.05


NO_GRID = {
    "groups": {"strides": [2, 2], "group": 2},
    "unequal strides": {"strides": [2, 1]},
    "no stride": {"strides": [1, 1]},
    "dilated": {"strides": [2, 2], "dilations": [2, 2]},
    "automatic pads": {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "a given shape": {"strides": [2, 2], "output_shape": [16, 16]},
    "a long end": {"strides": [2, 2], "output_padding": [1, 1], "kernel_shape": [2, 2]},
}


@pytest.mark.parametrize("case", [*NO_GRID, "one axis", "a computed bias"])
def test_a_transposed_convolution_that_is_no_grid_of_convolutions_stays(case):
    how = NO_GRID.get(case, {"strides": [2] if case == "one axis" else [2, 2]})
    side = 2 if case == "a long end" else 3
    shape = (8, 4, side) if case == "one axis" else (8, 4, side, side)
    nodes, source, more, inputs = [conv("image", "a")], "a", [], []
    if case == "one axis":
        nodes.append(helper.make_node("Reshape", ["a", "flat"], ["line"], name="line"))
        source, more = "line", [("flat", np.array([1, 8, 64]))]
    if case == "a computed bias":
        nodes.append(helper.make_node("Identity", ["bias"], ["made"], name="made"))
        inputs, more = ["made"], [("bias", np.ones(4, np.float32))]
    nodes.append(helper.make_node("ConvTranspose", [source, "up_w", *inputs], ["up"], name="up", **how))
    if case != "one axis":
        nodes += [conv("up", "last")]
    end = nodes[-1].output[0]
    width = 8 if case == "groups" else 4
    weights = [*kernel("a", 8, 3), *kernel("last", 4, width), ("up_w", np.ones(shape, np.float32)), *more]
    model = network(nodes, [end], weights)
    made, same = transposed.as_convolutions(model, {"up"})
    assert made is model
    assert same == {}
    assert "up" in place_module.place(model).slow | place_module.place(model).excluded


def test_a_batch_norm_that_is_left_is_refused(tmp_path, branches):
    nodes = [conv("image", "a"), helper.make_node("BatchNormalization", ["a", "g", "z", "z", "g"], ["out"], name="norm")]
    constants = [*kernel("a", 8, 3), ("g", np.ones(8, np.float32)), ("z", np.zeros(8, np.float32))]
    onnx.save(network(nodes, ["out"], constants), tmp_path / "m.onnx")
    with pytest.raises(UserError, match="the batch norm 'norm' is not folded"):
        Int8().quantize(tmp_path / "m.onnx", fed(feed()), None, tmp_path)


def test_seven_bit_weights_never_pass_63(described, branches, tmp_path):
    _, made = files(Int8(reduce_range=True), described, tmp_path / "out")
    images = feed(1)[0]
    for file in made.values():
        model = onnx.load(file)
        integers = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.endswith("_int8")]
        assert len(integers) >= 3
        assert max(np.abs(w.astype(int)).max() for w in integers) == 63
        # the greatest sum of two products that such kernels keep in 16 bits
        assert 2 * 255 * 63 < 2**15
        assert relative_rms(run(model, images), run(branches, images)) < 0.08


def small(channels=6, spread=0.4):
    """Weights of a 1x1 convolution."""
    draw = np.random.default_rng(channels)
    return draw.normal(0, spread, (channels, channels, 1, 1)).astype(np.float32)


def stem(channels=6):
    draw = np.random.default_rng(9)
    return [
        ("a_w", draw.normal(0, 0.4, (channels, 3, 3, 3)).astype(np.float32)),
        ("a_b", draw.normal(0, 0.1, channels).astype(np.float32)),
    ]


def saved(nodes, constants, tmp_path, outputs=("out",), opset=20, channels=6):
    """A described file of nodes behind a convolution 'a' and its ReLU 'ra'."""
    from tests.pipeline.quantization.test_half import with_spec

    start = [conv("image", "a"), helper.make_node("Relu", ["a"], ["ra"], name="ra")]
    made = network([*start, *nodes], outputs, [*stem(), *constants], ("batch", 3, "height", "width"))
    made.opset_import[0].version = opset
    file = tmp_path / "given.onnx"
    onnx.save(with_spec(made, channels), file)
    return file


def test_a_channel_shuffle_whose_shape_is_computed_is_quantized(tmp_path):
    nodes = [
        helper.make_node("Shape", ["ra"], ["s"], name="s"),
        helper.make_node("Gather", ["s", "hw"], ["d"], name="d", axis=0),
        helper.make_node("Gather", ["s", "zero"], ["n"], name="n", axis=0),
        helper.make_node("Concat", ["n", "groups", "d"], ["s1"], name="s1", axis=0),
        helper.make_node("Concat", ["n", "six", "d"], ["s2"], name="s2", axis=0),
        helper.make_node("Reshape", ["ra", "s1"], ["r1"], name="r1"),
        helper.make_node("Transpose", ["r1"], ["r2"], name="r2", perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", ["r2", "s2"], ["r3"], name="r3"),
        helper.make_node("Conv", ["r3", "b_w"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["rb"], name="rb"),
        helper.make_node("Conv", ["rb", "o_w"], ["out"], name="out"),
    ]
    integers = {"hw": [2, 3], "zero": [0], "groups": [2, 3], "six": [6]}
    constants = [(name, np.array(value, np.int64)) for name, value in integers.items()]
    file = saved(nodes, [*constants, ("b_w", small()), ("o_w", small())], tmp_path)
    report, made = files(Int8(), file, tmp_path / "out")
    assert report["int8_layers"] == 2
    for flavour, written_file in made.items():
        model = onnx.load(written_file)
        error = relative_rms(run(model, feed(1)[0], simulate=True), run(onnx.load(file), feed(1)[0]))
        assert error < 0.06, flavour


def test_an_opset_that_is_too_low_is_named(tmp_path):
    file = saved([helper.make_node("Conv", ["ra", "o_w"], ["out"], name="out")], [("o_w", small())], tmp_path, opset=12)
    for quantizer, words in (
        (Int8(), "INT8 begins at opset 13"),
        (Int8(high_precision_dtype="fp16"), "high_precision_dtype=fp16 needs opset 19"),
        (Fp8(), "FP8 needs opset 19"),
        (Bf16(), "BF16 needs opset 13"),
    ):
        with pytest.raises(UserError, match=f"the network is of opset 12, and {words}"):
            files(quantizer, file, tmp_path / words.replace(" ", "-"))
    _, made = files(Fp16(), file, tmp_path / "fp16")
    assert relative_rms(run(onnx.load(made["onnxruntime"]), feed(1)[0]), run(onnx.load(file), feed(1)[0])) < 0.01


def test_scales_in_half_precision_raise_the_opset(tmp_path, refusals):
    nodes = [
        helper.make_node("Conv", ["ra", "b_w"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "o_w"], ["out"], name="out"),
    ]
    file = saved(nodes, [("b_w", small()), ("o_w", small())], tmp_path, opset=17)
    _, made = files(Int8(high_precision_dtype="fp16"), file, tmp_path / "out")
    model = onnx.load(made["tensorrt"])
    assert model.opset_import[0].version >= 19
    assert refusals(model) == []
    assert read_spec(made["tensorrt"]) == read_spec(file)
    assert relative_rms(run(model, feed(1)[0]), run(onnx.load(file), feed(1)[0])) < 0.06


def test_a_network_with_nothing_to_quantize_is_refused_in_one_line(tmp_path):
    file = saved([helper.make_node("Sigmoid", ["ra"], ["out"], name="out")], [], tmp_path)
    with pytest.raises(
        UserError, match="INT8 takes convolutions and linear layers .* this network has none; choose precision=fp16 or fp32"
    ) as said:
        files(Int8(), file, tmp_path / "out")
    assert "\n" not in str(said.value)


def test_all_behind_the_last_convolutions_stays_in_float(tmp_path):
    nodes = [
        helper.make_node("Conv", ["ra", "b_w"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "c_w"], ["c"], name="c"),
        helper.make_node("Conv", ["b", "d_w"], ["d"], name="d"),
        helper.make_node("Sigmoid", ["d"], ["sd"], name="sd"),
        helper.make_node("Concat", ["c", "sd"], ["joined"], name="joined", axis=1),
        helper.make_node("Shape", ["a"], ["shape"], name="shape"),
        helper.make_node("Slice", ["shape", "two", "four"], ["hw"], name="hw"),
        helper.make_node("Concat", ["sizes", "hw"], ["size"], name="size", axis=0),
        helper.make_node("Resize", ["joined", "", "", "size"], ["out"], name="out", mode="linear"),
    ]
    constants = [("b_w", small()), ("c_w", small()), ("d_w", small())]
    integers = {"two": [2], "four": [4], "sizes": [1, 12]}
    constants += [(name, np.array(value, np.int64)) for name, value in integers.items()]
    file = saved(nodes, constants, tmp_path, channels=12)
    report, made = files(Int8(), file, tmp_path / "out")
    assert report["float_layers"] == ["c", "d", "joined"]
    for written_file in made.values():
        by_name = {n.name: n for n in onnx.load(written_file).graph.node}
        assert by_name["b"].input[1] == "b_w_dequantized"
        assert list(by_name["joined"].input) == ["c", "sd"]


def test_bounds_of_a_clip_may_be_lists_of_one_number(tmp_path):
    nodes = [
        helper.make_node("Conv", ["ra", "b_w"], ["b"], name="b"),
        helper.make_node("Clip", ["b", "least", "most"], ["c"], name="c"),
        helper.make_node("Conv", ["c", "o_w"], ["out"], name="out"),
    ]
    bounds = [("least", np.zeros(1, np.float32)), ("most", np.full(1, 6, np.float32))]
    assert graph.Graph(network(nodes[1:2], ["c"], bounds)).bounds("c") == (0.0, 6.0)


@pytest.fixture(scope="module")
def lines():
    """Two heads over a convolution: linear layers over each map (MatMul, as RTMPose has), and over the whole (Gemm)."""
    draw = np.random.default_rng(5)
    weights = [("map_w", (64, 32)), ("bias_w", (32, 32)), ("x_w", (32, 16)), ("flat_w", (24, 8 * 64)), ("y_w", (16, 24))]
    constants = [(name, draw.normal(0, 0.15, shape).astype(np.float32)) for name, shape in weights]
    constants += [(name, draw.normal(0, 0.2, size).astype(np.float32)) for name, size in (("bias_b", 32), ("flat_b", 24))]
    constants += [("rows", np.array([0, 8, 64])), ("row", np.array([0, 8 * 64]))]
    nodes = [
        conv("image", "a"),
        helper.make_node("Relu", ["a"], ["ra"]),
        helper.make_node("Reshape", ["ra", "rows"], ["maps"], name="maps"),
        helper.make_node("MatMul", ["maps", "map_w"], ["m"], name="m"),
        helper.make_node("Relu", ["m"], ["rm"], name="rm"),
        helper.make_node("MatMul", ["rm", "bias_w"], ["n"], name="n"),
        helper.make_node("Add", ["n", "bias_b"], ["nb"], name="nb"),
        helper.make_node("MatMul", ["nb", "x_w"], ["out_x"], name="x"),
        helper.make_node("Reshape", ["ra", "row"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "flat_w", "flat_b"], ["g"], name="g", transB=1),
        helper.make_node("Relu", ["g"], ["rg"], name="rg"),
        helper.make_node("Gemm", ["rg", "y_w"], ["out_y"], name="y", transB=1),
    ]
    return network(nodes, ["out_x", "out_y"], [*kernel("a", 8, 3), *constants])


def test_linear_layers_compute_in_integers_on_a_cpu(lines, tmp_path):
    made, _, placement = written(lines, "onnxruntime")
    assert {node.name for node in placement.quantized(lines)} == {"a", "m", "n", "g"}
    ops = optimised(made, tmp_path)
    assert (ops.count("QLinearMatMul"), ops.count("QGemm")) == (2, 1), ops
    assert (ops.count("MatMul"), ops.count("Gemm")) == (1, 1)  # the last layers, behind which nothing averages their error
    images = feed(1)[0]
    for output in range(2):
        assert relative_rms(run(made, images, output=output), run(lines, images, output=output)) < 0.05


def test_tensorrt_gets_a_scale_for_each_output_of_a_linear_layer(lines, refusals):
    made, *_ = written(lines, "tensorrt")
    assert refusals(made) == []
    found = graph.Graph(made)
    axes = {node.name: graph.attribute(node, "axis") for node in made.graph.node if node.name.endswith("_w_DQ")}
    assert axes == {"a_w_DQ": 0, "map_w_DQ": 1, "bias_w_DQ": 1, "flat_w_DQ": 0}
    assert {name: found.value(f"{name}_w_scale").shape for name in ("map", "bias", "flat")} == {
        "map": (32,), "bias": (32,), "flat": (24,),
    }  # fmt: skip
    images = feed(1)[0]
    for output in range(2):
        assert relative_rms(run(made, images, output=output), run(lines, images, output=output)) < 0.05


def test_a_type_of_operators_stays_in_float(lines, tmp_path):
    onnx.save(lines, tmp_path / "network.onnx")
    images = fed(feed(4))
    calibrated = Int8(op_types_to_exclude=("MatMul", "Gemm")).calibrate(tmp_path / "network.onnx", images)
    assert {node.name for node in calibrated.placement.quantized(calibrated.model)} == {"a"}
    ops = optimised(calibrated.written().models["onnxruntime"], tmp_path)
    assert not {"QLinearMatMul", "QGemm"} & set(ops)
    with pytest.raises(UserError, match=r"op_types_to_exclude: 'Matmul' is no ONNX operator; did you mean 'MatMul'"):
        Int8(op_types_to_exclude=("Matmul",)).calibrate(tmp_path / "network.onnx", images)
    with pytest.raises(UserError, match=r"no layer is left to quantize with precision.op_types_to_exclude="):
        Int8(op_types_to_exclude=("MatMul", "Gemm", "Conv")).calibrate(tmp_path / "network.onnx", images)


@pytest.mark.parametrize("how", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_matrix_product_that_is_no_linear_layer_stays_in_float(how):
    nodes = [
        helper.make_node("Reshape", ["image", "square"], ["x"], name="x"),
        helper.make_node("Gemm", ["x", "g_w", "g_b"], ["g"], name="g", **how),
        helper.make_node("MatMul", ["g", "o_w"], ["out"], name="out"),
    ]
    draw = np.random.default_rng(0)
    constants = [(name, draw.normal(size=(8, 8)).astype(np.float32)) for name in ("g_w", "o_w")]
    constants += [("g_b", np.ones(8, np.float32)), ("square", np.array([8, 8]))]
    model = network(nodes, ["out"], constants, (1, 1, 8, 8))
    assert place_module.place(model).quantized(model) == []
