import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.onnx_files import execute
from pipeline.quantization import alignment, calibration, equalization, graph, writers
from pipeline.quantization import place as place_module


def model_of(nodes, constants, outputs, channels=3):
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("batch", channels, "height", "width"))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    )


def run(model, images, optimise=True):
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"image": images})[0]


DRAW = np.random.default_rng(0)


def weights(name, outputs, inputs, size=3, spread=1.0):
    w = DRAW.normal(0, 0.4, (outputs, inputs, size, size)) * np.geomspace(1, spread, outputs)[:, None, None, None]
    return {f"{name}_w": w.astype(np.float32), f"{name}_b": DRAW.normal(0, 0.1, outputs).astype(np.float32)}


def conv(source, out, size=3, group=1):
    pads = [size // 2] * 4
    return helper.make_node("Conv", [source, f"{out}_w", f"{out}_b"], [out], name=out, pads=pads, group=group)


@pytest.fixture(scope="module")
def stages():
    """A branch of small maps and one of large ones, concatenated, read by depthwise and dense convolutions, with a skip."""
    nodes = [
        conv("image", "a"),
        helper.make_node("Clip", ["a", "low", "six"], ["features"], name="features"),
        conv("features", "maps", 1),
        helper.make_node("Concat", ["maps", "features"], ["joined"], name="joined", axis=1),
        conv("joined", "deep", 3, group=12),
        conv("deep", "wide", 1),
        helper.make_node("Relu", ["wide"], ["rectified"], name="rectified"),
        helper.make_node("MaxPool", ["rectified"], ["pooled"], name="pooled", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("PRelu", ["pooled", "slope"], ["sloped"], name="sloped"),
        conv("sloped", "again", 1),
        helper.make_node("Add", ["again", "sloped"], ["sum"], name="sum"),
        conv("joined", "dense", 3),
        helper.make_node("Concat", ["sum", "dense"], ["both"], name="both", axis=1),
        conv("both", "out", 1),
    ]
    constants = {
        **weights("a", 8, 3),
        **weights("maps", 4, 8, 1, 0.02),
        **weights("deep", 12, 1),
        **weights("wide", 8, 12, 1, 0.01),
        **weights("again", 8, 8, 1, 0.1),
        **weights("dense", 4, 12, 3, 0.05),
        **weights("out", 5, 12, 1),
        "low": np.float32(0),
        "six": np.float32(6),
        "slope": DRAW.uniform(0.1, 0.4, (8, 1, 1)).astype(np.float32),
    }
    return model_of(nodes, constants, ["out"])


def images(count=4):
    draw = np.random.default_rng(1)
    return [draw.normal(0, 2, (1, 3, 16, 20)).astype(np.float32) for _ in range(count)]


def peaks_of(model, placement):
    found = calibration.observe(model, placement.tensors, images(), histograms=False)
    return {name: one.peaks for name, one in found.items()}


@pytest.mark.parametrize(("concatenations", "layers"), [(True, False), (False, True), (True, True)])
def test_equalization_is_exact_in_float(stages, concatenations, layers):
    placement = place_module.place(stages)
    made, rescaled = equalization.equalize(stages, placement, peaks_of(stages, placement), concatenations, layers)
    assert rescaled["channels"] >= 4
    for one in images():
        expected = run(stages, one)
        assert np.abs(run(made, one) - expected).max() < 1e-5 * np.abs(expected).max()


def test_small_maps_fill_the_range_they_share(stages):
    placement = place_module.place(stages)
    before = peaks_of(stages, placement)
    made, _ = equalization.equalize(stages, placement, before, concatenations=True, layers=False)
    after = peaks_of(made, placement)
    assert before["maps"].min() < before["maps"].max() / 8
    assert np.allclose(after["maps"], before["joined"].max(), rtol=1e-3)
    assert np.array_equal(after["features"], before["features"]), "what a Clip bounds cannot be scaled"


def test_nothing_that_a_clip_an_input_or_an_output_holds_is_scaled(stages):
    placement = place_module.place(stages)
    made, _ = equalization.equalize(stages, placement, peaks_of(stages, placement))
    ours, theirs = ({i.name: numpy_helper.to_array(i) for i in m.graph.initializer} for m in (made, stages))
    assert np.array_equal(ours["a_w"], theirs["a_w"])
    assert np.array_equal(ours["out_b"], theirs["out_b"])
    assert not np.array_equal(ours["out_w"], theirs["out_w"]), "its inputs were scaled"


def test_equalization_lowers_the_error_of_int8(stages):
    placement = place_module.place(stages)

    def error(model):
        found = calibration.observe(model, placement.tensors, images())
        lows = {n: h.least for n, h in found.items()}
        scales = writers.Scales.of({n: h.threshold("minmax") for n, h in found.items()}, lows, placement)
        made = writers.insert(model, placement, scales, "tensorrt")
        differences = [run(made, one, optimise=False) - run(stages, one) for one in images()]
        return float(np.sqrt(np.mean(np.square(differences))))

    made, _ = equalization.equalize(stages, placement, peaks_of(stages, placement))
    assert error(made) < 0.8 * error(stages)


def test_weights_that_two_layers_share_are_left_alone():
    nodes = [conv("image", "a"), conv("a", "b", 3, 3), conv("b", "out", 1)]
    nodes[1].input[1], nodes[1].input[2] = "s_w", "s_b"
    nodes.insert(2, helper.make_node("Conv", ["b", "s_w", "s_b"], ["c"], name="c", pads=[1] * 4, group=3))
    nodes[3].input[0] = "c"
    constants = {**weights("a", 3, 3, 3, 0.1), **weights("s", 3, 1), **weights("out", 2, 3, 1)}
    model = model_of(nodes, constants, ["out"])
    placement = place_module.place(model)
    made, _ = equalization.equalize(model, placement, peaks_of(model, placement))
    ours, theirs = ({i.name: numpy_helper.to_array(i) for i in m.graph.initializer} for m in (made, model))
    assert np.array_equal(ours["s_w"], theirs["s_w"])
    assert np.allclose(run(made, images()[0]), run(model, images()[0]), rtol=1e-5)


def test_bias_correction_removes_the_mean_error():
    draw = np.random.default_rng(3)
    nodes = [conv("image", "a", 1), helper.make_node("Relu", ["a"], ["r"], name="r"), conv("r", "b", 1), conv("b", "out", 1)]
    constants = {**weights("a", 16, 3, 1), **weights("b", 8, 16, 1), **weights("out", 2, 8, 1)}
    model = model_of(nodes, constants, ["out"])
    feed = [np.abs(draw.normal(0, 1, (1, 3, 32, 32))).astype(np.float32) for _ in range(3)]
    placement = place_module.place(model)
    scales = writers.Scales.of(dict.fromkeys(placement.tensors, 3.0), dict.fromkeys(placement.tensors, 0.0), placement)
    shifts = equalization.mean_shifts(model, placement, dict.fromkeys(("tensorrt", "onnxruntime"), scales), feed)
    assert set(shifts["tensorrt"]) == set(shifts["onnxruntime"]) == {"a", "b"}
    corrected = equalization.corrected(model, shifts["tensorrt"])
    expected = dict.fromkeys(("a", "b"), 0.0)
    plain, mended = dict(expected), dict(expected)
    for source, sums in ((model, plain), (corrected, mended)):
        rounded = writers.insert(source, placement, scales, "tensorrt")
        for made in execute.computed_over(rounded, ["a", "b"], feed, optimise=False):
            for name in list(sums):
                sums[name] += made[name].mean(axis=(0, 2, 3)) / len(feed)
    for made in execute.computed_over(model, ["a", "b"], feed):
        for name in list(expected):
            expected[name] = expected[name] + made[name].mean(axis=(0, 2, 3)) / len(feed)
    assert np.abs(mended["a"] - expected["a"]).max() < 1e-4
    assert np.abs(plain["a"] - expected["a"]).max() > 1e-3
    assert np.abs(mended["b"] - expected["b"]).max() < 0.3 * np.abs(plain["b"] - expected["b"]).max()


def test_layers_that_share_a_bias_are_corrected_apart_and_one_without_gets_one():
    nodes = [conv("image", "a", 1), conv("image", "b", 1), conv("image", "c", 1), helper.make_node("Sum", list("abc"), ["out"])]
    nodes[1].input[2] = "a_b"
    del nodes[2].input[2:]
    constants = {**weights("a", 2, 3, 1), **weights("b", 2, 3, 1), **weights("c", 2, 3, 1)}
    model = model_of(nodes, {n: v for n, v in constants.items() if n not in ("b_b", "c_b")}, ["out"])
    made = equalization.corrected(model, {"a": np.array([1.0, 2]), "b": np.array([10.0, 20]), "c": np.array([100.0, 200])})
    difference = run(model, images(1)[0]) - run(made, images(1)[0])
    assert np.allclose(difference[0, :, 0, 0], [111, 222], rtol=1e-4)


def test_channels_of_zeros_change_nothing_and_make_whole_vectors():
    nodes = [
        conv("image", "a"),
        helper.make_node("Relu", ["a"], ["features"], name="features"),
        conv("features", "maps", 1),
        conv("features", "more", 1),
        helper.make_node("Concat", ["maps", "features", "more"], ["joined"], name="joined", axis=1),
        conv("joined", "deep", 3, group=13),
        helper.make_node("Relu", ["deep"], ["rectified"], name="rectified"),
        conv("joined", "other", 3, group=13),
        conv("rectified", "wide", 1),
        conv("other", "wider", 1),
        conv("joined", "dense", 1),
        helper.make_node("Concat", ["wide", "wider", "dense"], ["all"], name="all", axis=1),
        conv("all", "out", 1),
    ]
    constants = {}
    for name, outputs, inputs, size in (
        ("a", 8, 3, 3), ("maps", 3, 8, 1), ("more", 2, 8, 1), ("deep", 13, 1, 3), ("other", 13, 1, 3), ("wide", 6, 13, 1),
        ("wider", 5, 13, 1), ("dense", 6, 13, 1), ("out", 5, 17, 1),
    ):  # fmt: skip
        constants |= weights(name, outputs, inputs, size)
    model = model_of(nodes, constants, ["out"])
    made, added = alignment.align(model)
    assert added == 3, "the second concatenation has no depthwise reader"
    shapes = {i.name: list(i.dims) for i in made.graph.initializer}
    assert shapes["more_w"] == [5, 8, 1, 1]
    assert shapes["deep_w"] == shapes["other_w"] == [16, 1, 3, 3]
    assert shapes["wide_w"] == [6, 16, 1, 1]
    assert shapes["maps_w"] == [3, 8, 1, 1]
    onnx.checker.check_model(made, full_check=True)
    for one in images():
        assert np.allclose(run(made, one), run(model, one), atol=1e-5)
    placement = place_module.place(model)
    found = calibration.observe(model, placement.tensors, images())
    scales = writers.Scales.of({n: h.peak for n, h in found.items()}, {n: h.least for n, h in found.items()}, placement)
    plain, padded = (run(writers.insert(m, placement, scales, "onnxruntime"), images()[0], False) for m in (model, made))
    assert np.allclose(plain, padded, atol=1e-5)


def test_what_others_read_is_not_filled():
    nodes = [
        conv("image", "a"),
        conv("a", "maps", 1),
        helper.make_node("Concat", ["maps", "a"], ["joined"], name="joined", axis=1),
        conv("joined", "deep", 3, group=11),
        helper.make_node("Sigmoid", ["joined"], ["s"], name="s"),
        helper.make_node("Mul", ["deep", "s"], ["out"], name="out"),
    ]
    model = model_of(nodes, {**weights("a", 8, 3), **weights("maps", 3, 8, 1), **weights("deep", 11, 1)}, ["out"])
    made, added = alignment.align(model)
    assert added == 0
    assert [i.raw_data for i in made.graph.initializer] == [i.raw_data for i in model.graph.initializer]


def shared_biases():
    """Three convolutions whose biases a simplifier made one."""
    nodes = [
        conv("image", "a", 1),
        helper.make_node("Relu", ["a"], ["ra"], name="ra"),
        conv("ra", "b", 1),
        helper.make_node("Relu", ["b"], ["rb"], name="rb"),
        conv("rb", "c", 1),
        helper.make_node("Sigmoid", ["c"], ["s"], name="s"),
        conv("s", "out", 1),
    ]
    draw = np.random.default_rng(4)
    constants = {
        f"{name}_w": (draw.normal(0, 0.4, (6, given, 1, 1)) * np.geomspace(1, spread, 6)[:, None, None, None]).astype(
            np.float32
        )
        for name, given, spread in (("a", 3, 1), ("b", 6, 0.001), ("c", 6, 1), ("out", 6, 1))
    }
    for node in nodes:
        if node.op_type == "Conv":
            node.input[2] = "zeros"
    return model_of(nodes, {**constants, "zeros": np.zeros(6, np.float32)}, ["out"])


def test_constants_that_were_merged_do_not_keep_layers_from_equalization():
    model = shared_biases()
    placement = place_module.place(model)
    _, before = equalization.equalize(model, placement, peaks_of(model, placement))
    assert before["channels"] == 0
    own = graph.unshared(model)
    onnx.checker.check_model(own)
    readers = [name for node in own.graph.node for name in node.input]
    assert max(readers.count(i.name) for i in own.graph.initializer) == 1
    made, after = equalization.equalize(own, placement, peaks_of(own, placement))
    assert after["channels"] >= 8
    assert np.allclose(run(made, images()[0]), run(model, images()[0]), rtol=1e-4, atol=1e-5)
    assert graph.unshared(own) == own


def test_weights_in_constant_nodes_are_weights(tmp_path):
    model = shared_biases()
    for tensor in list(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], name=f"make {tensor.name}", value=tensor))
        model.graph.initializer.remove(tensor)
    onnx.save(model, tmp_path / "m.onnx")
    held = graph.load(tmp_path / "m.onnx")
    assert len(place_module.place(held).quantized(held)) == 3
    assert np.array_equal(run(held, images()[0]), run(shared_biases(), images()[0]))


def test_what_equalization_leaves_out_is_named_with_its_reason(stages):
    model = graph.unshared(shared_biases())
    assert equalization.left_out(model, place_module.place(model)) == {"c": "6 of 6 channels, read by Sigmoid 's'"}
    held = equalization.left_out(stages, place_module.place(stages))
    assert held["a"] == "8 of 8 channels, read by Clip 'features'"
    assert "wide" not in held


def test_equal_biases_cost_int8_nothing(tmp_path):
    from pipeline.quantization.precisions.int8 import Int8
    from tests.pipeline.quantization.test_half import with_spec
    from tests.pipeline.quantization.test_quantization import fed

    model = shared_biases()
    onnx.save(with_spec(model, 6), tmp_path / "m.onnx")
    made = Int8("minmax").calibrate(tmp_path / "m.onnx", fed(images()))
    assert made.summary()["equalized_channels"] >= 8
    assert set(made.summary()["equalization_left_out"]) == {"c"}
    wanted = [run(model, one) for one in images()]
    found = [run(made.written().models["tensorrt"], one, optimise=False) for one in images()]
    assert np.linalg.norm(np.array(found) - wanted) < 0.02 * np.linalg.norm(wanted)
