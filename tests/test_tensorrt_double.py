"""The strict double refuses what TensorRT refuses, and the backend gets through it."""

import json
import sys

import numpy as np
import onnx
import pytest
from conftest import FAKES, SMOKE, pipeline, real_options, refused
from onnx import numpy_helper

from evaluation.types import Resolution
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.tensorrt import TensorRT, TensorRTRunner, _logger
from pipeline.errors import UserError
from pipeline.specs import ModelFiles, Shapes

SIZE = Resolution(64, 80)


@pytest.fixture
def trt(monkeypatch):
    """The double as `tensorrt`, for this test only."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    _logger.cache_clear()
    import tensorrt

    yield tensorrt
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    _logger.cache_clear()


def quantized(finished, precision):
    (folder,) = (finished / "outputs/smoke/quantize").glob(f"*_dense_*{precision}*")
    return ModelFiles.in_folder(folder)


def shapes(batch=1, resolution=SIZE):
    return Shapes((resolution, resolution, resolution), (1, batch, batch))


def test_names_and_arguments_that_tensorrt_has_not_do_not_exist(trt):
    class Logger(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)

        def log(self, severity, msg):
            pass

    builder = trt.Builder(Logger())
    config = builder.create_builder_config()
    with pytest.raises(AttributeError):
        trt.BuilderFlag.TF33
    with pytest.raises(AttributeError):
        trt.make_engine
    with pytest.raises(AttributeError, match="max_workspace_size"):
        config.max_workspace_size = 1
    with pytest.raises(AttributeError, match="no setter"):
        config.num_optimization_profiles = 1
    with pytest.raises(AttributeError, match="build_engine"):
        builder.build_engine
    with pytest.raises(TypeError):
        trt.BuilderFlag(3)
    with pytest.raises(TypeError, match="expected tensorrt.BuilderFlag"):
        config.set_flag(3)
    with pytest.raises(TypeError, match="expected tensorrt.ProfilingVerbosity"):
        config.profiling_verbosity = 2
    with pytest.raises(TypeError, match="incompatible function arguments"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size=3)
    with pytest.raises(TypeError, match="No constructor"):
        trt.ICudaEngine()
    with pytest.raises(NotImplementedError, match="does not simulate"):
        builder.reset()

    class Careless(trt.ILogger):
        def __init__(self):
            pass

    with pytest.raises(TypeError, match="must be called"):
        trt.Builder(Careless())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_engine_gives_what_its_file_says(trt, finished, precision, tmp_path):
    files = quantized(finished, precision)
    backend = TensorRT()
    assert (backend.name, backend.timeable) == ("tensorrt-double", False)
    engine = backend.build(files, shapes(2), tmp_path)
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 80, 3), np.uint8)
    with backend.load(engine) as ours:
        found = ours.download(ours(ours.upload(images)))
    (tmp_path / "ort").mkdir()
    runner = OnnxRuntime().load(OnnxRuntime().build(files, shapes(2), tmp_path / "ort"))
    reference = runner(runner.upload(images))
    assert list(found) == list(reference) == ["heatmaps", "pafs"]
    limit = 1e-6 if precision == "fp32" else 0.15
    for name, field in found.items():
        assert np.abs(field - reference[name]).max() <= limit * np.abs(reference[name]).max()


def test_an_input_outside_the_profile_is_refused(trt, finished, tmp_path):
    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    runner = TensorRTRunner(engine)
    images = runner.upload(np.zeros((2, 64, 80, 3), np.uint8))
    with pytest.raises(UserError, match="outside the engine's profile.*build it for that resolution"):
        runner(images)


def test_a_foreign_or_damaged_plan_is_refused(trt, finished, tmp_path):
    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    blob = engine.read_bytes()
    engine.write_bytes(blob.replace(b"10.16.0", b"10.03.0"))
    with pytest.raises(UserError, match=r"Version tag does not match.*stage=build force=true"):
        TensorRTRunner(engine)
    engine.write_bytes(b"nothing")
    with pytest.raises(UserError, match="magic tag does not match"):
        TensorRTRunner(engine)


def planted(files, tmp_path, fault):
    """The tensorrt flavour with one fault."""
    model = onnx.load(files.onnx["tensorrt"])
    initializers = {i.name: i for i in model.graph.initializer}

    def put(name, value):
        initializers[name].CopyFrom(numpy_helper.from_array(value, name))

    zeros = next(n for n in initializers if n.endswith("_zero") and not n.endswith("weight_zero"))
    weights = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in initializers)
    if fault == "zero point":
        put(zeros, np.array(3, np.int8))
    elif fault == "uint8":
        for n in [n for n in initializers if n.endswith("_zero")]:
            put(n, numpy_helper.to_array(initializers[n]).astype(np.uint8))
    elif fault == "axis":
        next(a for a in weights.attribute if a.name == "axis").i = 1
    elif fault == "bias":
        held = weights.input[0]
        put(held, numpy_helper.to_array(initializers[held]).astype(np.int32))
        put(weights.input[2], numpy_helper.to_array(initializers[weights.input[2]]).astype(np.int32))
    elif fault == "concat":
        concat = next(n for n in model.graph.node if n.op_type == "Concat")
        maker = next(n for n in model.graph.node if n.output[0] == concat.input[0])
        extra = numpy_helper.from_array(np.array(0.5, np.float32), "extra_scale")
        model.graph.initializer.append(extra)
        maker.input[1] = "extra_scale"
    file = tmp_path / "faulty.onnx"
    onnx.save(model, file)
    return ModelFiles({"tensorrt": file, "onnxruntime": file})


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("zero point", "symmetric quantization"),
        ("uint8", "only INT8 is supported"),
        ("axis", "per-channel axis 1 of Conv weights"),
        ("bias", "only activation types allowed"),
        ("concat", "must share one scale"),
    ],
)
def test_what_tensorrt_refuses_is_refused(trt, finished, tmp_path, fault, message):
    faulty = planted(quantized(finished, "int8"), tmp_path, fault)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"cannot parse it:.*{message}"):
        TensorRT().build(faulty, shapes(1), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_precision_flags_and_missing_profiles_fail_as_in_tensorrt(trt, finished):
    file = str(quantized(finished, "fp32").onnx["tensorrt"])
    builder = trt.Builder(_logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, _logger()).parse_from_file(file)
    config = builder.create_builder_config()
    assert builder.build_serialized_network(network, config) is None
    assert "no optimization profile" in _logger().errors[-1]
    config.set_flag(trt.BuilderFlag.INT8)
    assert builder.build_serialized_network(network, config) is None
    assert "incompatible with strongly typed networks" in _logger().errors[-1]


def test_the_whole_chain_runs_and_its_figures_are_left_out(smoke):
    done = pipeline(*SMOKE, "backend=tensorrt", "precision=int8", cwd=smoke, double=True, check=0)
    assert "left out: 1 evaluated with the TensorRT test double" in done.stdout.replace("\n", " ")
    (folder,) = (smoke / "outputs/smoke/evaluate").glob("*tensorrt*")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["backend"] == "tensorrt-double"
    assert metrics["ap"] >= 0
    (latency,) = (smoke / "outputs/smoke/benchmark").glob("*tensorrt*/latency.json")
    assert json.loads(latency.read_text())["timed"] == 0
    table = (smoke / "outputs/smoke/report/results.csv").read_text()
    assert "tensorrt" not in table


def test_without_tensorrt_nothing_is_started(tmp_path):
    message = refused(pipeline(*SMOKE, "backend=tensorrt", cwd=tmp_path))
    assert "the Python package 'tensorrt' is not installed" in message
    assert not (tmp_path / "outputs/smoke").exists()


@pytest.mark.real
def test_on_real_images_its_ap_is_onnx_runtimes(tmp_path):
    words = [*real_options(), "tracking=none", "resolution=176x208", "stages.benchmark.seconds=0.1"]
    pipeline("--multirun", *words, "backend=onnxruntime,tensorrt", cwd=tmp_path, double=True, check=0)
    figures = {}
    for file in (tmp_path / "outputs/mobilenetv2_paf_coco/evaluate").glob("*/metrics.json"):
        content = json.loads(file.read_text())
        figures[content["backend"]] = content
    ours, theirs = figures["tensorrt-double"], figures["onnxruntime"]
    assert theirs["ap"] > 0.05
    for name in ("ap", "ap50", "ap75", "ar"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
