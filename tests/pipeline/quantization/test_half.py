"""The torch pass over ONNX files, and half precision found wanting by it."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from pipeline.models.onnx_graph import OnnxNetwork, RoundedToHalf
from pipeline.quantization import calibration, half, half_pass
from pipeline.quantization.precisions.fp16 import Fp16
from pipeline.stages import quantize
from posepress.errors import UserError
from posepress.skeletons import COCO_17
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec
from tests.pipeline.quantization.test_equalization import conv, images, model_of, run, stages, weights  # noqa: F401
from tests.pipeline.quantization.test_quantization import branches, described, fed, feed, files  # noqa: F401


def with_spec(model, channels):
    made = onnx.ModelProto()
    made.CopyFrom(model)
    spec = NetworkSpec(InputSpec("image", multiple=1), (OutputSpec("out", 1, channels),), COCO_17)
    onnx.helper.set_model_props(made, {SPEC_KEY: spec.to_json()})
    return made


def in_torch(model, given):
    with torch.inference_mode():
        return OnnxNetwork(model).eval()(torch.from_numpy(given))["out"].numpy()


def node(op, *inputs, out, **attributes):
    return helper.make_node(op, list(inputs), [out], name=out, **attributes)


OPERATORS = {
    "a network": None,
    "transposed convolution": [
        node("ConvTranspose", "image", "w", out="out", strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])
    ],
    "unequal pads": [node("Conv", "image", "k", out="out", pads=[0, 1, 2, 0], strides=[2, 2])],
    "same upper": [node("Conv", "image", "k", out="out", auto_pad="SAME_UPPER", strides=[2, 2])],
    "max pool with pads": [node("MaxPool", "image", out="out", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)],
    "average pool without pads counted": [node("AveragePool", "image", out="out", kernel_shape=[3, 3], pads=[1] * 4)],
    "average pool, unequal": [node("AveragePool", "image", out="out", kernel_shape=[2, 2], pads=[0, 0, 1, 1])],
    "resize half pixel": [
        node("Resize", "image", "", "twice", out="out", mode="linear", coordinate_transformation_mode="half_pixel")
    ],
    "resize asymmetric": [
        node("Resize", "image", "", "twice", out="out", mode="linear", coordinate_transformation_mode="asymmetric")
    ],
    "resize corners": [
        node("Resize", "image", "", "twice", out="out", mode="linear", coordinate_transformation_mode="align_corners")
    ],
    "resize nearest": [
        node(
            "Resize",
            "image",
            "",
            "twice",
            out="out",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    ],
    "pad edge and slice": [
        node("Pad", "image", "pads", out="padded", mode="edge"),
        node("Slice", "padded", "one", "minus", "two", out="out"),
    ],
    "shapes": [
        node("Shape", "image", out="shape"),
        node("Gather", "shape", "two", out="height"),
        node("Concat", "three", "height", "rest", out="target", axis=0),
        node("Reshape", "image", "target", out="flat"),
        node("Transpose", "flat", out="out", perm=[0, 2, 1]),
    ],
    "softmax of means": [node("ReduceMean", "image", "axes", out="m", keepdims=1), node("Softmax", "m", out="out", axis=1)],
    "split": [node("Split", "image", "parts", out="first", axis=1)],
    "activations": [
        node("Sigmoid", "image", out="s"),
        node("Tanh", "s", out="t"),
        node("LeakyRelu", "t", out="l", alpha=0.2),
        node("Clip", "l", "", "half", out="c"),
        node("Elu", "c", out="e"),
        node("Exp", "e", out="out"),
    ],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_torch_pass_computes_what_onnx_runtime_does(name, stages):  # noqa: F811
    draw = np.random.default_rng(0)
    constants = {
        "w": draw.normal(size=(3, 4, 3, 3)).astype(np.float32),
        "k": draw.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "twice": np.array([1, 1, 2, 2], np.float32),
        "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "three": np.array([1, 3], np.int64)[:1],
        "minus": np.array([-1], np.int64),
        "rest": np.array([-1], np.int64),
        "axes": np.array([2, 3], np.int64),
        "parts": np.array([1, 2], np.int64),
        "half": np.float32(0.5),
    }
    if OPERATORS[name] is None:
        model = stages
    else:
        nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in OPERATORS[name]]
        if name == "split":
            nodes[0].output.append("out")
        used = {i for n in nodes for i in n.input}
        model = model_of(nodes, {n: v for n, v in constants.items() if n in used}, ["out"])
    given = images(1)[0]
    expected = run(model, given)
    found = in_torch(with_spec(model, 5), given)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_the_torch_pass_splits_in_equal_parts():
    split = node("Split", "image", out="first", axis=1)
    split.output[:] = ["first", "second", "out"]
    model = model_of([split], {}, ["out"])
    model.opset_import[0].version = 13
    assert np.array_equal(in_torch(with_spec(model, 1), images()[0]), run(model, images()[0]))


def test_the_torch_pass_rounds_as_q_and_dq_say(branches):  # noqa: F811
    from tests.pipeline.quantization.test_quantization import written

    for flavour in ("tensorrt", "onnxruntime"):
        model, _, _ = written(branches, flavour)
        expected = run(model, feed(1)[0], optimise=False)
        assert np.abs(in_torch(with_spec(model, 4), feed(1)[0]) - expected).max() < 0.02 * np.abs(expected).max()


def test_an_operator_that_is_not_known_is_named():
    model = model_of([node("Erf", "image", out="x"), node("Det", "x", out="out")], {}, ["out"])
    with pytest.raises(UserError, match="the operator Det of the ONNX file is not known"):
        OnnxNetwork(with_spec(model, 3))
    with pytest.raises(UserError, match="no network description"):
        OnnxNetwork(model)


@pytest.fixture
def large(tmp_path):
    """A network whose second convolution passes 65504, and comes back in the third."""
    draw = np.random.default_rng(0)
    constants = {**weights("a", 8, 3), **weights("b", 8, 8), **weights("c", 8, 8), **weights("out", 5, 8, 1)}
    constants["b_w"] = np.abs(draw.normal(3000, 300, (8, 8, 3, 3))).astype(np.float32)
    constants["c_w"] = (constants["c_w"] / 3e5).astype(np.float32)
    nodes = [conv("image", "a"), node("Relu", "a", out="r"), conv("r", "b"), conv("b", "c"), conv("c", "out", 1)]
    model = with_spec(model_of(nodes, constants, ["out"]), 5)
    onnx.save(model, tmp_path / "large.onnx")
    return tmp_path / "large.onnx"


def test_what_overflows_in_half_precision_is_found_kept_and_named(large, tmp_path):
    given = onnx.load(large)
    plain = half.convert(given)
    assert np.isfinite(run(plain, images()[0])).all(), "ONNX Runtime's processor kernels hide it"
    assert not np.isfinite(in_torch(plain, images()[0])).all(), "torch shows it"
    assert half_pass.overflowing(given, plain, images()) == ["b"]
    report, made = files(Fp16(), large, tmp_path / "out", images())
    assert set(report["kept_fp32"]) >= {"b", "c"}
    assert report["near_overflow"]["b"] > 65504
    found = in_torch(onnx.load(made["tensorrt"]), images()[0])
    expected = run(given, images()[0])
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


def test_a_network_within_range_is_all_half(described, tmp_path):  # noqa: F811
    report, made = files(Fp16(), described, tmp_path / "out")
    assert report["kept_fp32"] == []
    model = onnx.load(made["tensorrt"])
    assert {i.data_type for i in model.graph.initializer if i.name.endswith("_w")} == {TensorProto.FLOAT16}
    report, made = files(Fp16(("c", "b*")), described, tmp_path / "kept")
    kept = {i.name: i.data_type for i in onnx.load(made["tensorrt"]).graph.initializer}
    assert {kept["c_w"], kept["b_w"], kept["b2_w"]} == {TensorProto.FLOAT}
    with pytest.raises(UserError, match="nodes_to_exclude: no node matches 'z'"):
        files(Fp16(("z",)), described, tmp_path / "none")


def test_a_file_in_half_precision_is_in_order_and_checked(stages):  # noqa: F811
    made = half.convert(stages, ["joined", "pooled"])
    onnx.checker.check_model(made, full_check=True)
    known = {i.name for i in (*made.graph.input, *made.graph.initializer)} | {""}
    for one in made.graph.node:
        assert known.issuperset(one.input), one.name
        known |= set(one.output)
    assert np.allclose(run(made, images()[0]), run(stages, images()[0]), rtol=0.02, atol=0.05)


def test_ranges_of_every_activation_count(large):
    model = onnx.shape_inference.infer_shapes(onnx.load(large))
    found = calibration.observe(model, half.activations(model), images(), histograms=False)
    assert set(found) == {"a", "r", "b", "c", "out"}
    assert set(half.out_of_range(model, found)) == {"b", "c"}


def unknown(tmp_path, nodes, constants=None, opset=20):
    """A file of nodes between two convolutions."""
    draw = np.random.default_rng(0)
    given = {"a_w": draw.normal(0, 0.4, (8, 3, 3, 3)).astype(np.float32), "o_w": draw.normal(0, 0.4, (2, 8, 1, 1))}
    given = {name: value.astype(np.float32) for name, value in given.items()} | (constants or {})
    last = nodes[-1].output[0]
    every = [node("Conv", "image", "a_w", out="a", pads=[1] * 4), *nodes, node("Conv", last, "o_w", out="out")]
    onnx.save(with_spec(model_of(every, given, ["out"]), 2), tmp_path / "unknown.onnx")
    return tmp_path / "unknown.onnx"


class Bare:
    """A probe that must not be asked: torch would measure, which does not run the network."""

    def errors(self, candidate):
        raise AssertionError


ONES, ZEROS = np.ones(8, np.float32), np.zeros(8, np.float32)
UNKNOWN = {
    "Erf": ([node("Erf", "a", out="e"), node("Add", "e", "a", out="x")], {}),
    "DepthToSpace": (
        [node("DepthToSpace", "a", out="d", blocksize=2), node("SpaceToDepth", "d", out="x", blocksize=2)],
        {},
    ),
    "InstanceNormalization": ([node("InstanceNormalization", "a", "ones", "zeros", out="x")], {"ones": ONES, "zeros": ZEROS}),
    "Einsum": ([node("Einsum", "a", "mix", out="x", equation="bchw,cd->bdhw")], {"mix": np.eye(8, dtype=np.float32)}),
    "Mish": ([node("Mish", "a", out="x")], {}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operators_that_torch_does_not_run_are_half_by_ranges_alone(name, tmp_path):
    nodes, constants = UNKNOWN[name]
    file = unknown(tmp_path, nodes, constants)
    report, made = files(Fp16(), file, tmp_path / "out", images(), Bare())
    assert name in report["half_pass_left_out"]
    assert report["half_pass_images"] == 0
    assert not [key for key in report if key.startswith("error_")], "torch would measure it"
    model = onnx.load(made["onnxruntime"])
    onnx.checker.check_model(model, full_check=True)
    expected = run(onnx.load(file), images()[0])
    assert np.abs(run(model, images()[0]) - expected).max() < 0.02 * np.abs(expected).max()
    (note,) = quantize._notes(report)
    assert note.startswith("FP16 was decided only by the ranges of the calibration images, without the pass in torch: torch")
    assert "use the torch network" not in note


def test_a_normalisation_whose_squares_would_overflow_stays_in_fp32(tmp_path):
    constants = {"ones": ONES, "zeros": ZEROS}
    file = unknown(tmp_path, [node("InstanceNormalization", "a", "ones", "zeros", out="x")], constants)
    for scale, kept in ((1.0, []), (60.0, ["x"])):
        out = tmp_path / str(scale)
        report, _ = files(Fp16(), file, out, [scale * one for one in images()])
        assert report["kept_fp32"] == kept, "its values are far from 65504, their squares are not"


def test_what_torch_fails_at_is_no_failure(tmp_path):
    backwards = {"one": np.array([-1], np.int64), "end": np.array([-99], np.int64), "two": np.array([2], np.int64)}
    file = unknown(tmp_path, [node("Slice", "a", "one", "end", "two", "one", out="x")], backwards)
    report, _ = files(Fp16(), file, tmp_path / "out", images())
    assert "a Slice that steps backwards" in report["half_pass_left_out"]


def test_half_precision_is_computed_for_four_images_at_most(large, monkeypatch):
    model = onnx.shape_inference.infer_shapes(onnx.load(large))
    seen = []
    computed = half_pass.overflowing

    def counted(model, made, feed):
        seen.append([float(one.ravel()[0]) for one in feed])
        return computed(model, made, feed)

    monkeypatch.setattr(half_pass, "overflowing", counted)
    given = images(19)
    kept = half.kept_in_fp32(model, (), lambda: iter(given))
    assert kept.images == 4
    assert kept.nodes == {"b", "c"}
    assert seen[0] == [float(given[n].ravel()[0]) for n in (0, 6, 12, 18)]
    assert half.kept_in_fp32(model, (), lambda: iter(given[:2])).images == 2


def test_numbers_rounded_to_half_after_each_node_are_those_of_half_kernels(large, stages):  # noqa: F811
    for model in (
        with_spec(half.convert(stages), 5),
        half.convert(onnx.load(large)),
        half.convert(onnx.load(large), ["b", "c"]),
    ):
        with torch.inference_mode():
            given = torch.from_numpy(images()[0])
            ours, theirs = (kind(model).eval()(given)["out"].numpy() for kind in (RoundedToHalf, OnnxNetwork))
        finite = np.isfinite(theirs)
        assert (np.isfinite(ours) == finite).all()
        if finite.any():
            assert np.abs(ours - theirs)[finite].max() <= 0.004 * np.abs(theirs[finite]).max()
