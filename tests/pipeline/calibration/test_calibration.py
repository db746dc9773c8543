# ruff: noqa: F811
import json
import os
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.onnx_files import execute
from pipeline.quantization import caches, calibration
from pipeline.quantization.precisions.external import External
from pipeline.quantization.precisions.int8 import Int8
from posepress.errors import UserError
from tests.pipeline.quantization.test_equalization import conv, model_of, stages  # noqa: F401
from tests.pipeline.quantization.test_equalization import run as ran
from tests.pipeline.quantization.test_half import with_spec
from tests.pipeline.quantization.test_quantization import branches, described, fed, feed  # noqa: F401


def filled(values):
    histogram = calibration.Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def test_entropy_clips_a_long_thin_tail_and_keeps_a_uniform_range():
    draw = np.random.default_rng(0)
    assert filled(draw.uniform(0, 1, 200_000)).threshold("entropy") > 0.95
    tailed = filled(np.concatenate([draw.normal(0, 1, 400_000), [60.0, 55.0, 50.0]]))
    assert 3 < tailed.threshold("entropy") < 30
    assert tailed.threshold("minmax") == 60


def test_entropy_does_not_mind_how_many_values_a_relu_cut_off():
    draw = np.random.default_rng(0)
    positive = np.abs(draw.normal(0, 1, 100_000))
    with_zeros = np.concatenate([positive, np.zeros(900_000)])
    assert filled(with_zeros).threshold("entropy") == pytest.approx(filled(positive).threshold("entropy"), rel=0.1)


def test_a_moving_average_is_the_mean_of_each_images_greatest():
    histogram = calibration.Histogram()
    for peak in (1.0, 2.0, 6.0):
        histogram.add(np.array([[[-peak, 0.5]]], np.float32))
    assert histogram.threshold("moving_average") == pytest.approx(3.0)
    assert histogram.peaks.tolist() == [6.0]


def test_extremes_are_kept_by_channel_and_signed():
    values = np.array([[[1.0, -2.0], [0.25, 0.5]]], np.float32)
    histogram = filled(values)
    assert (histogram.least, histogram.most) == (-2.0, 1.0)
    assert histogram.peaks.tolist() == [2.0, 0.5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_enter_a_histogram(value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        filled([1.0, value, 2.0])


def test_memory_does_not_grow_with_the_number_of_images(stages):
    import tracemalloc

    def most(count):
        draw = np.random.default_rng(0)
        tracemalloc.start()
        calibration.observe(
            stages, ["rectified", "sum"], (draw.normal(size=(1, 3, 128, 128)).astype(np.float32) for _ in range(count))
        )
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    most(2)
    assert most(40) < 1.3 * most(4)


@pytest.mark.parametrize("values", [[1e-39, 0.0], [1e-42, -3e-40], [0.0, 0.0], [1e-30, 2e-30]])
def test_the_tiniest_values_are_counted_like_others(values):
    histogram = filled(values)
    assert histogram.counts.sum() == 2
    assert 0 <= histogram.threshold("percentile") <= max(abs(v) for v in values) + 1e-37


def test_ranges_are_those_of_every_image_though_memory_is_used_again(branches):
    session = onnxruntime.InferenceSession(execute.observed(branches, ["ra", "sum"])[0].SerializeToString())
    found = calibration.observe(branches, ["ra", "sum", "image"], feed(7))
    for name, place in (("ra", 1), ("sum", 2)):
        made = [session.run(None, {"image": images})[place] for images in feed(7)]
        assert found[name].most == max(values.max() for values in made)
        assert found[name].least == min(values.min() for values in made)
    assert found["image"].peak == max(np.abs(images).max() for images in feed(7))


def test_histograms_survive_a_file(branches, tmp_path):
    made = []

    def make():
        made.append(1)
        return calibration.observe(branches, ["ra", "image"], feed())

    key = {"network": "n", "images": "i", "preprocessing": "p", "algorithm": "a"}
    first = caches.tensor_data(tmp_path / "cal" / "data.npz", key, ["ra", "image"], make)
    again = caches.tensor_data(tmp_path / "cal" / "data.npz", key, ["ra", "image"], make)
    assert len(made) == 1
    for name in first:
        assert np.array_equal(first[name].counts, again[name].counts)
        assert np.array_equal(first[name].peaks, again[name].peaks)
        for method in calibration.METHODS:
            assert first[name].threshold(method) == again[name].threshold(method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "other"}, "the network changed"),
        ({"images": "other"}, "the list of calibration images changed"),
        ({"preprocessing": "other"}, "the preprocessing"),
        ({"algorithm": "other"}, "the algorithm"),
    ],
)
def test_a_cache_of_another_calibration_is_refused_and_what_changed_is_named(change, message, tmp_path):
    key = {"network": "n", "images": "i", "preprocessing": "p", "algorithm": "a"}
    caches.tensor_data(tmp_path / "data.npz", key, [], dict)
    caches.write_scales(tmp_path / "scales.json", key, {}, [], 127)
    with pytest.raises(UserError, match=rf"data.npz: made with another calibration: {message}"):
        caches.tensor_data(tmp_path / "data.npz", {**key, **change}, [], dict)
    with pytest.raises(UserError, match=rf"scales.json: made with another calibration: {message}"):
        caches.read_scales(tmp_path / "scales.json", {**key, **change}, [])


def test_files_that_are_no_caches_are_refused(tmp_path):
    (tmp_path / "data.npz").write_text("nothing")
    (tmp_path / "scales.json").write_text("[1]")
    caches.tensor_data(tmp_path / "whole.npz", {}, ["a"], lambda: {"a": filled([1.0])})
    assert list(caches.tensor_data(tmp_path / "whole.npz", {}, ["a"], dict)) == ["a"]
    with pytest.raises(UserError, match="whole.npz: not a cache of tensor data"):
        caches.tensor_data(tmp_path / "whole.npz", {}, ["a", "b"], dict)
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(UserError, match="empty.npz: not a cache of tensor data"):
        caches.tensor_data(tmp_path / "empty.npz", {}, [], dict)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cal_data_file=.*file/x.npz: cannot make its folder"):
        caches.tensor_data(tmp_path / "file" / "x.npz", {}, [], dict)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:300])
    with pytest.raises(UserError, match="cut.npz: not a cache of tensor data"):
        caches.tensor_data(tmp_path / "cut.npz", {}, [], dict)
    with pytest.raises(UserError, match="data.npz: not a cache of tensor data"):
        caches.tensor_data(tmp_path / "data.npz", {}, [], dict)
    with pytest.raises(UserError, match="scales.json: not a cache of scales"):
        caches.read_scales(tmp_path / "scales.json", {}, [])
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda file: caches.tensor_data(file, {}, [], dict), lambda file: caches.read_scales(file, {}, [])):
        for file in (tmp_path / "pipe", Path("/dev/zero")):
            with pytest.raises(UserError, match=r"no regular file; name another"):
                read(file)


def test_a_cache_with_flipped_bits_is_refused_in_a_line(tmp_path):
    whole = tmp_path / "whole.npz"
    caches.tensor_data(whole, {}, ["a"], lambda: {"a": filled([1.0])})
    content, draw = whole.read_bytes(), np.random.default_rng(0)
    for n in range(300):
        damaged = bytearray(content)
        damaged[draw.integers(len(damaged))] ^= 1 << int(draw.integers(8))
        (tmp_path / f"{n}.npz").write_bytes(damaged)
        with suppress(UserError):  # a bit that nothing reads may be any
            assert list(caches.tensor_data(tmp_path / f"{n}.npz", {}, ["a"], dict)) == ["a"]


def both(threshold):
    return dict.fromkeys(("tensorrt", "onnxruntime"), threshold)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"least": 0, "most": 1}, "no least, most and threshold of 'a'"),
        ({"least": 0, "most": 1, "threshold": 1.0}, "no least, most and threshold of 'a'"),
        ({"least": 0, "most": 1, "threshold": both("x")}, "no least, most and threshold of 'a'"),
        (
            {"least": 0, "most": 1, "threshold": both(-1)},
            r"the thresholds of 'a' are \[-1.0, -1.0\], of values from 0.0 to 1.0",
        ),
        ({"least": 0, "most": 1, "threshold": {"tensorrt": 1, "onnxruntime": 0}}, r"the thresholds of 'a' are \[1.0, 0.0\]"),
        ({"least": 0, "most": float("nan"), "threshold": both(1)}, "the thresholds of 'a' are"),
        (None, "no least, most and threshold of 'a'"),
    ],
)
def test_scales_that_are_damaged_are_refused(row, message, tmp_path):
    caches.write_scales(tmp_path / "scales.json", {}, {} if row is None else {"a": row}, [], 127)
    with pytest.raises(UserError, match=rf"scales.json: {message}"):
        caches.read_scales(tmp_path / "scales.json", {}, ["a"])


def test_a_calibration_is_taken_up_again_and_a_changed_one_is_not(described, tmp_path):
    options = {"cal_data_file": str(tmp_path / "data.npz"), "cal_cache_file": str(tmp_path / "scales.json")}
    (tmp_path / "one").mkdir()
    first = Int8(**options).quantize(described, fed(feed()), None, tmp_path / "one")
    (tmp_path / "two").mkdir()
    second = Int8(**options).quantize(described, fed(feed()), None, tmp_path / "two")
    assert (first["scales_from"], second["scales_from"]) == ("the calibration images", str(tmp_path / "scales.json"))
    for file in ("scales.json", "model.tensorrt.onnx"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    kept = (tmp_path / "scales.json").read_bytes()
    other = fed(feed())
    with pytest.raises(UserError, match=r"scales.json: .*the list of calibration images changed"):
        Int8(**options).quantize(described, replace(other, images="others"), None, tmp_path)
    with pytest.raises(UserError, match=r"scales.json: .*the algorithm"):
        Int8("mse", **options).quantize(described, fed(feed()), None, tmp_path)
    assert (tmp_path / "scales.json").read_bytes() == kept


@given(st.dictionaries(st.text("abz./_:09", min_size=1, max_size=12), st.floats(0, 2.0**100, width=32), min_size=1, max_size=5))
def test_tensorrts_cache_round_trips_to_the_bit(scales):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "c.cache"
        caches.write_tensorrt(file, scales)
        assert caches.read_tensorrt(file) == scales


def test_tensorrts_cache_has_its_form(tmp_path):
    caches.write_tensorrt(tmp_path / "c", {"image": 1.0, "a": 0.0078125})
    assert (tmp_path / "c").read_text() == "TRT-100300-EntropyCalibration2\na: 3c000000\nimage: 3f800000\n"
    assert struct.unpack(">f", bytes.fromhex("3c000000")) == (0.0078125,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing\n", "begins with 'nothing'"),
        ("", "begins with ''"),
        ("TRT-1-X\na: zz\n", "line 2: not 'tensor: eight hexadecimal digits'"),
        ("TRT-1-X\na: 7fc00000\n", "line 2: the scale of 'a' is nan"),
        ("TRT-1-X\na: bf800000\n", "line 2: the scale of 'a' is -1.0"),
    ],
)
def test_a_broken_tensorrt_cache_is_refused(text, message, tmp_path):
    (tmp_path / "c").write_text(text)
    with pytest.raises(UserError, match=message):
        caches.read_tensorrt(tmp_path / "c")
    with pytest.raises(UserError, match="cannot read the calibration cache"):
        caches.read_tensorrt(tmp_path / "absent")


def test_tensorrts_scales_are_imported(described, tmp_path):
    off = {"equalize_concatenations": False, "equalize_layers": False}
    (tmp_path / "one").mkdir()
    Int8(**off).quantize(described, fed(feed()), None, tmp_path / "one")
    cache = tmp_path / "one" / "calibration.cache"
    (tmp_path / "two").mkdir()
    Int8("minmax", tensorrt_cache=str(cache), **off).quantize(described, fed(feed()), None, tmp_path / "two")
    ours, theirs = (json.loads((tmp_path / n / "scales.json").read_text())["tensors"] for n in ("two", "one"))
    ours, theirs = ({n: r["scale"]["tensorrt"] for n, r in rows.items()} for rows in (ours, theirs))
    assert ours == pytest.approx(theirs, rel=1e-6)
    with pytest.raises(ValueError, match="its scales are of the network without equalization"):
        Int8(tensorrt_cache=str(cache))
    with pytest.raises(UserError, match="cannot read the calibration cache"):
        Int8(tensorrt_cache=str(described))
    (tmp_path / "equal").mkdir()
    Int8().quantize(described, fed(feed()), None, tmp_path / "equal")
    with pytest.raises(UserError, match="scales are of another network, perhaps of this one equalized"):
        Int8(tensorrt_cache=f"{tmp_path}/equal/calibration.cache", **off).quantize(described, fed(feed()), None, tmp_path)
    caches.write_tensorrt(cache, {name: 50 * scale for name, scale in caches.read_tensorrt(cache).items()})
    with pytest.raises(
        UserError,
        match=r"the fields' error on calibration images is \d\.\d\d of their size in TensorRT's file, with .* \d\.\d\d",
    ):
        Int8(tensorrt_cache=str(cache), **off).quantize(described, fed(feed()), None, tmp_path)
    caches.write_tensorrt(cache, {"image": 1.0})
    with pytest.raises(UserError, match="no scale for"):
        Int8(tensorrt_cache=str(cache), **off).quantize(described, fed(feed()), None, tmp_path)


def test_the_names_of_tools_do_not_change_a_networks_digest(branches):
    other = onnx.ModelProto()
    other.CopyFrom(branches)
    other.producer_name = "another"
    assert caches.network_digest(other) == caches.network_digest(branches)
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    assert caches.network_digest(other) != caches.network_digest(branches)


def test_auto_takes_the_method_of_least_error_and_says_what_it_tried(described, tmp_path):
    report = Int8().quantize(described, fed(feed()), None, tmp_path)
    for flavour, tried in report["tried"].items():
        assert set(tried) == {"percentile 99.999", "percentile 99.99", "percentile 99.9", "minmax", "mse", "entropy"}
        assert tried[report["calibration_method"][flavour]] == min(tried.values())
        name, _, percentile = report["calibration_method"][flavour].partition(" ")
        off = {"percentile": float(percentile)} if percentile else {}
        (tmp_path / flavour).mkdir()
        Int8(name, **off).quantize(described, fed(feed()), None, tmp_path / flavour)
        file = f"model.{flavour}.onnx"
        assert (tmp_path / file).read_bytes() == (tmp_path / flavour / file).read_bytes()
    (tmp_path / "mse").mkdir()
    assert "tried" not in Int8("mse").quantize(described, fed(feed()), None, tmp_path / "mse")


@pytest.fixture
def clipped(tmp_path):
    """A network whose flavours err differently: a ConvTranspose is INT8 for TensorRT alone, whose integers end at 127."""
    nodes = [
        conv("image", "a", 1),
        onnx.helper.make_node("Relu", ["a"], ["ra"], name="ra"),
        onnx.helper.make_node("ConvTranspose", ["ra", "t_w", "t_b"], ["t"], name="t", kernel_shape=[2, 2], strides=[2, 2]),
        onnx.helper.make_node("Relu", ["t"], ["rt"], name="rt"),
        conv("rt", "b", 1),
        onnx.helper.make_node("Relu", ["b"], ["rb"], name="rb"),
        conv("rb", "out", 1),
    ]
    draw = np.random.default_rng(2)
    constants = {}
    for name, *shape in (("a", 8, 3, 1, 1), ("t", 8, 8, 2, 2), ("b", 4, 8, 1, 1), ("out", 4, 4, 1, 1)):
        constants |= {f"{name}_w": draw.normal(0, 0.4, shape).astype(np.float32)}
        constants |= {f"{name}_b": draw.normal(0, 0.1, shape[1] if name == "t" else shape[0]).astype(np.float32)}
    onnx.save(with_spec(model_of(nodes, constants, ["out"]), 4), tmp_path / "clipped.onnx")
    return tmp_path / "clipped.onnx"


def test_auto_judges_each_file_by_itself(clipped, tmp_path):
    given = feed(6)
    expected = [ran(onnx.load(clipped), one) for one in given]

    def errors(method):
        out = tmp_path / method
        out.mkdir()
        report = Int8(method).quantize(clipped, fed(given), None, out)
        found = {}
        for flavour in ("tensorrt", "onnxruntime"):
            model = onnx.load(out / f"model.{flavour}.onnx")
            made = [ran(model, one, optimise=flavour == "onnxruntime") for one in given]
            found[flavour] = np.linalg.norm(np.array(made) - expected) / np.linalg.norm(expected)
        return report, found

    report, auto = errors("auto")
    assert report["calibration_method"]["tensorrt"] != report["calibration_method"]["onnxruntime"]
    for method in ("minmax", "mse", "entropy"):
        for flavour, error in errors(method)[1].items():
            assert auto[flavour] <= 1.05 * error, (method, flavour)


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e9])
def test_a_scale_that_is_far_from_what_a_tensor_holds_is_refused_and_named(factor, clipped, tmp_path):
    off = {"equalize_concatenations": False, "equalize_layers": False}
    (tmp_path / "one").mkdir()
    Int8("minmax", **off).quantize(clipped, fed(feed()), None, tmp_path / "one")
    cache = tmp_path / "one" / "calibration.cache"
    scales = caches.read_tensorrt(cache)
    caches.write_tensorrt(cache, {**scales, "ra": factor * scales["ra"]})
    with pytest.raises(
        UserError, match=r"calibration.cache: the scale of 'ra' is .*, whose integers end at .* its values reach"
    ):
        Int8(tensorrt_cache=str(cache), **off).quantize(clipped, fed(feed()), None, tmp_path)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan"), float("inf")])
def test_a_file_quantized_elsewhere_with_impossible_scales_is_refused(step, described, tmp_path):
    (tmp_path / "one").mkdir()
    Int8("minmax").quantize(described, fed(feed()), None, tmp_path / "one")
    file = tmp_path / "one" / "model.tensorrt.onnx"
    model = onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.name == "ra_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.float32(step), tensor.name))
    onnx.save(model, file)
    with pytest.raises(UserError, match="model.tensorrt.onnx: a scale of 'ra' is"):
        External(str(file)).quantize(described, None, None, tmp_path)
