"""The strict double refuses what TensorRT refuses, and the backend gets through it."""

import ast
import gc
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.backends.tensorrt import TensorRT
from pipeline.contracts import CalibrationFeed
from pipeline.models.fastpose import FastPose
from pipeline.onnx_files import export
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import ModelFiles, Shapes, read_spec
from pipeline.quantization.precisions.bf16 import Bf16
from pipeline.quantization.precisions.fp8 import Fp8
from pipeline.quantization.precisions.fp32 import Fp32
from pipeline.quantization.precisions.int8 import Int8
from pipeline.quantization.precisions.int8_entropy import ImplicitInt8
from posepress.errors import UserError
from posepress.pixels import normalise
from posepress.resolution import Resolution
from posepress.runners.device_memory import DeviceMemory
from posepress.runners.tensorrt import TensorRTRunner
from posepress.runners.tensorrt_module import load
from posepress.runners.tensorrt_plan import check
from tests.conftest import FAKES, REAL, ROOT, SMOKE, pipeline, real_options, refused

SIZE = Resolution(64, 80)


VERSIONS = ["10_3", "10_16", "11_1"]


@pytest.fixture(params=VERSIONS)
def trt(monkeypatch, request, doubles):
    """The double as `tensorrt`, for this test only."""
    monkeypatch.setenv("POSEPRESS_TENSORRT_DOUBLE", request.param)
    load.cache_clear()
    import tensorrt

    yield tensorrt
    load.cache_clear()


def names_used(source):
    """Every `trt.A` and `trt.A.B` of a file."""
    found = set()
    for at in ast.walk(ast.parse(source.read_text())):
        node, parts = at, []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "trt" and parts:
            found.add(tuple(parts[:3]))
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_in_the_source_is_one_of_every_version(version):
    api = json.loads((FAKES / "tensorrt" / f"api_{version}.json").read_text())
    own = {"__version__", "POSEPRESS_DOUBLE"}
    used = set().union(*(names_used(file) for file in (ROOT / "pipeline").rglob("*.py")))
    assert len(used) > 20
    for name, *rest in used:
        if name in own:
            continue
        assert name in {*api["classes"], *api["enums"], *api["functions"]}, name
        if rest and name in api["enums"] and not rest[0].startswith("__"):
            assert rest[0] in api["enums"][name]["members"], f"{name}.{rest[0]}"
        elif rest and name in api["classes"]:
            inner = f"{name}.{rest[0]}"
            known = {*api["classes"][name].get("methods", {}), *api["classes"][name].get("properties", {})}
            assert rest[0] in known or inner in api["enums"], inner
            if inner in api["enums"] and rest[1:]:
                assert rest[1] in api["enums"][inner]["members"], f"{inner}.{rest[1]}"


REMOVED = [  # calls that TensorRT 10 has not any more, put where the source has others
    (
        "pipeline.backends.tensorrt",
        "config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, ",
        "config.__setattr__('max_workspace_size', ",
    ),
    ("pipeline.backends.tensorrt", "builder.build_serialized_network(", "builder.build_engine("),
    ("pipeline.backends.tensorrt", "builder.create_network(flags)", "builder.create_network(flags, explicit=True)"),
    ("posepress.runners.tensorrt", "execute_async_v3(stream_handle=", "execute_async_v2(stream_handle="),
    ("posepress.runners.tensorrt", "loaded.get_tensor_profile_shape(", "loaded.get_profile_shape("),
    ("posepress.runners.tensorrt", "loaded.get_tensor_dtype(", "loaded.get_binding_dtype("),
    ("posepress.runners.tensorrt", "context.made.set_input_shape(", "context.made.set_binding_shape("),
]


@pytest.mark.parametrize(("module", "call", "removed"), REMOVED)
def test_a_call_that_was_removed_fails(trt, finished, tmp_path, monkeypatch, module, call, removed):
    import importlib

    source = ROOT / f"{module.replace('.', '/')}.py"
    text = source.read_text()
    assert call in text
    mutant = importlib.import_module(module)
    changed = dict(vars(mutant))
    exec(compile(text.replace(call, removed), str(source), "exec"), changed)
    backend = changed.get("TensorRT", TensorRT)
    runner = changed.get("TensorRTRunner", TensorRTRunner)

    def whole():
        engine = backend().build(quantized(finished, "fp32"), shapes(1), tmp_path)
        with runner(engine) as loaded:
            loaded(loaded.upload(np.zeros((1, 64, 80, 3), np.uint8)))

    with pytest.raises((AttributeError, TypeError)):
        whole()


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensorrt": "10.1.0"}, r"built by TensorRT 10\.1\.0, here is .*stage=build force=true"),
        ({"gpu": {"name": "Orin", "sm": "8.7"}}, r"built for Orin \(SM 8\.7\), here is Double of a GPU \(SM 9\.0\)"),
        ({"hardware_compatibility_level": "same_compute_capability", "gpu": {"name": "A", "sm": "8.7"}}, "built for A"),
        ({"bytes": 7}, "not the 7 that were built; copy it again"),
        ({"sha256": "0"}, "that were built; copy it again"),
        (None, "not the description of a plan"),
    ],
)
def test_a_plan_of_another_machine_or_build_is_refused(trt, finished, tmp_path, change, message):
    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    side = tmp_path / "engine.json"
    side.write_text("[]" if change is None else json.dumps({**json.loads(side.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        TensorRTRunner(engine)


def test_compatible_plans_run_elsewhere(trt, finished, tmp_path):
    engine = TensorRT(version_compatible=True, hardware_compatibility_level="ampere_plus").build(
        quantized(finished, "fp32"), shapes(1), tmp_path
    )
    side = json.loads((tmp_path / "engine.json").read_text())
    gpu = {"name": "another", "sm": "8.9"}
    assert check(engine, side["tensorrt"], gpu)[0]["version_compatible"]
    major, minor, rest = side["tensorrt"].split(".", 2)
    assert check(engine, f"{major}.{int(minor) + 1}.{rest}", gpu)
    for version in (f"{int(major) + 1}.0.0", f"{major}.0.0"):
        with pytest.raises(UserError, match="built by TensorRT"):
            check(engine, version, gpu)
    with pytest.raises(UserError, match=r"built for .* here is old \(SM 7\.5\)"):
        check(engine, side["tensorrt"], {"name": "old", "sm": "7.5"})


def test_what_tensorrt_cannot_load_is_refused_with_its_reason(trt, finished, tmp_path):
    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    engine.write_bytes(b"nothing")
    side = json.loads((tmp_path / "engine.json").read_text())
    side |= {"bytes": 7, "sha256": hashlib.sha256(b"nothing").hexdigest()}
    (tmp_path / "engine.json").write_text(json.dumps(side))
    with pytest.raises(UserError, match="cannot be loaded: .*magic tag does not match.*stage=build force=true"):
        TensorRTRunner(engine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tactic_sources": ["cudnnn"]}, r"tactic_sources=cudnnn: TensorRT .* has no TacticSource of this name"),
        ({"preview_features": ["faster"]}, "preview_features=faster: TensorRT .* has no PreviewFeature of this name.*it has "),
        ({"hardware_compatibility_level": "all"}, "has no HardwareCompatibilityLevel of this name.*none"),
        ({"plugins": ["missing.so"]}, "backend.plugins: missing.so is not there"),
    ],
)
def test_what_a_version_lacks_is_named(trt, finished, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        TensorRT(**options).build(quantized(finished, "fp32"), shapes(1), tmp_path)
    assert not list(tmp_path.iterdir())


def test_options_out_of_range_are_refused():
    for options in (
        {"builder_optimization_level": 6},
        {"mem_pool_size_mb": 0},
        {"tf32": "yes"},
        {"device": -1},
        {"device": [0, 0]},
        {"device": []},
    ):
        with pytest.raises(ValueError, match=f"backend.{next(iter(options))}="):
            TensorRT(**options)


def test_measured_kernels_are_kept_and_taken_up(trt, finished, tmp_path):
    backend = TensorRT(timing_cache=str(tmp_path / "cache"))
    (tmp_path / "a").mkdir()
    backend.build(quantized(finished, "fp32"), shapes(1), tmp_path / "a")
    (file,) = (tmp_path / "cache").glob("*.timing")
    assert trt.__version__ in file.name
    assert "sm9.0" in file.name
    first = file.read_bytes()
    assert b"Conv" in first
    assert b"QuantizeLinear" not in first
    backend.build(quantized(finished, "int8"), shapes(1), tmp_path / "a")
    assert b"QuantizeLinear" in file.read_bytes()
    assert b"Conv" in file.read_bytes()
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="backend.timing_cache: .*is damaged, or of another TensorRT or GPU.*delete it"):
        backend.build(quantized(finished, "fp32"), shapes(1), tmp_path / "a")
    file.write_bytes(first.replace(trt.__version__.encode(), b"9.9.9"))
    with pytest.raises(UserError, match="delete it"):
        backend.build(quantized(finished, "fp32"), shapes(1), tmp_path / "a")


def test_a_shape_runs_as_one_graph_and_several_shapes_in_turns(trt, finished, tmp_path):
    from cuda.bindings import runtime

    files, sizes = quantized(finished, "fp32"), (Resolution(64, 80), Resolution(64, 96))
    engine = TensorRT().build(files, Shapes((sizes[0], sizes[0], sizes[1]), (1, 1, 2)), tmp_path)
    draw = np.random.default_rng(1)
    images = [draw.integers(0, 255, (n % 2 + 1, *(64, 80 + 16 * (n // 2 % 2)), 3), np.uint8) for n in range(8)]
    held = dict(runtime.allocations)
    with TensorRTRunner(engine) as graphs, TensorRTRunner(engine, cuda_graph=False) as plain:
        runtime.log.clear()
        every = [graphs(graphs.upload(image)) for image in images]
        launched = sum(name == "cudaGraphLaunch" for name, _ in runtime.log)
        assert launched == len(images)
        allocated = sum(name == "cudaMalloc" for name, _ in runtime.log)
        again = [graphs.download(graphs(graphs.upload(image))) for image in images]
        assert sum(name == "cudaMalloc" for name, _ in runtime.log) - allocated < len(images), "memory is used again"
        for image, kept, found in zip(images, every, again, strict=True):
            expected = plain.download(plain(plain.upload(image)))
            for name in expected:
                assert np.array_equal(expected[name], found[name])
                assert np.array_equal(expected[name], np.asarray(kept[name])), "later calls do not write over it"
    del every, again, kept, found, expected
    gc.collect()
    assert dict(runtime.allocations) == held
    assert not runtime.pinned
    assert not runtime.graphs
    assert not runtime.executables


def test_more_shapes_than_have_graphs_run_too(trt, finished, tmp_path):
    small, large = Resolution(64, 80), Resolution(64, 160)
    engine = TensorRT().build(quantized(finished, "fp32"), Shapes((small, small, large), (1, 1, 1)), tmp_path)
    draw = np.random.default_rng(1)
    images = [draw.integers(0, 255, (1, 64, 80 + 8 * (n % 9), 3), np.uint8) for n in range(27)]
    with TensorRTRunner(engine) as graphs, TensorRTRunner(engine, cuda_graph=False) as plain:
        for image in images:
            found, expected = (runner.download(runner(runner.upload(image))) for runner in (graphs, plain))
            assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_plugin_library_is_loaded_once(trt, finished, tmp_path):
    library = tmp_path / "plugin.so"
    library.write_bytes(b"\x7fELF")
    backend = TensorRT(plugins=[str(library)])
    engine = backend.build(quantized(finished, "fp32"), shapes(1), tmp_path)
    with backend.load(engine), backend.load(engine):
        pass
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(UserError, match="text.so cannot be loaded: .*build it for this TensorRT and CUDA"):
        TensorRT(plugins=[str(tmp_path / "text.so")]).build(quantized(finished, "fp32"), shapes(1), tmp_path)


def test_a_gpu_without_bfloat16_is_told_so(trt, made, tmp_path, monkeypatch):
    files, _ = made(Bf16())
    monkeypatch.setattr(DeviceMemory, "gpu", {"name": "T4", "sm": "7.5"})
    with pytest.raises(
        UserError, match=r"precision=bf16: T4 has SM 7\.5, and bfloat16 begins at SM 8\.0; choose precision=fp16"
    ):
        TensorRT().build(files, shapes(1), tmp_path)


def test_the_layers_are_audited_with_their_times_and_nodes(trt, finished, tmp_path):
    from evaluation import audit
    from pipeline.backends.macs import macs

    for precision in ("fp32", "int8"):
        out = tmp_path / precision
        out.mkdir()
        files = quantized(finished, precision)
        listed = TensorRT().audit(TensorRT().build(files, shapes(1), out), SIZE)
        assert audit.shares(listed, "layers").get(precision, 0) > 0.8
        assert audit.shares(listed, "time").get(precision, 0) > 0.8
        assert sum(layer["macs"] for layer in listed) == sum(
            macs(onnx.load(files.onnx["tensorrt"]), SIZE, read_spec(files.onnx["tensorrt"]).input).values()
        )
        assert sum(layer["quantized"] for layer in listed) == sum(layer["precision"] == "int8" for layer in listed)
        assert audit.unmet(listed) == []
        assert audit.counts(listed) == {"layers": len(listed), "fused_groups": 0, "reformat_layers": 0, "unfused_qdq": 0}


def test_too_little_int8_fails_on_every_version(smoke):
    words = ["backend=tensorrt", "precision=fp32", "stages.benchmark.min_int8_share=0.5"]
    message = refused(pipeline(*SMOKE, *words, "stage=[build,benchmark]", cwd=smoke, double=True))
    assert "min_int8_share=0.5: only 0.000 of the MACs" in message


@pytest.fixture
def made(finished, tmp_path):
    """The exported network, written by a quantizer with the images of the sweep."""
    (model,) = (finished / "outputs/smoke/export").glob("*_dense/model.onnx")
    draw = np.random.default_rng(0)
    frames = [draw.integers(0, 255, (1, 64, 80, 3), np.uint8) for _ in range(5)]
    spec = read_spec(model).input
    feed = CalibrationFeed(lambda n: (normalise(f, spec) for f in frames[:n]), lambda n: iter(frames[:n]), "images", "form")

    def write(quantizer, name="made"):
        (tmp_path / name).mkdir()
        report = quantizer.quantize(model, feed, None, tmp_path / name)
        return ModelFiles.in_folder(tmp_path / name), report

    return write


def as_written(file, images):
    """What a file says, computed node by node."""
    (found,) = computed_over(onnx.load(file), ["heatmaps", "pafs"], [normalise(images, read_spec(file).input)], optimise=False)
    return found


@pytest.mark.parametrize(
    "quantizer", [Bf16(), Fp8(), Fp8(high_precision_dtype="fp32"), Int8("minmax", high_precision_dtype="fp16")]
)
def test_every_precision_computes_what_its_file_says(trt, made, tmp_path, quantizer):
    files, _ = made(quantizer)
    images = np.random.default_rng(1).integers(0, 255, (1, 64, 80, 3), np.uint8)
    with TensorRTRunner(TensorRT().build(files, shapes(1), tmp_path)) as runner:
        found = runner.download(runner(runner.upload(images)))
    expected = as_written(files.onnx["onnxruntime" if isinstance(quantizer, Bf16) else "tensorrt"], images)
    for name, field in expected.items():
        assert np.abs(found[name] - field).max() <= 1e-6 * max(np.abs(field).max(), 1)
    kind = {"Bf16": "bf16", "Fp8": "fp8", "Int8": "int8"}[type(quantizer).__name__]
    assert any(layer["precision"] == kind for layer in TensorRT().audit(tmp_path / "engine.plan", SIZE))


def test_a_gpu_without_fp8_is_told_so(trt, made, tmp_path, monkeypatch):
    files, _ = made(Fp8())
    monkeypatch.setattr(DeviceMemory, "gpu", {"name": "Orin", "sm": "8.7"})
    with pytest.raises(UserError, match=r"precision=fp8: Orin has SM 8\.7, and FP8 begins at SM 8\.9; choose precision=int8"):
        TensorRT().build(files, shapes(1), tmp_path)


def test_tensorrts_own_calibration_is_kept_and_taken_up(trt, made, tmp_path, monkeypatch):
    files, report = made(ImplicitInt8())
    assert report["calibration_inputs"] == 5
    backend = TensorRT(timing_cache=str(tmp_path / "cache"))
    if trt.__version__.startswith("11"):
        with pytest.raises(UserError, match=r"int8_entropy: TensorRT 11.* has no calibrators.*choose precision=int8"):
            backend.build(files, shapes(1), tmp_path)
        assert not (tmp_path / "engine.plan").exists()
        return
    backend.build(files, shapes(1), tmp_path)
    first = (tmp_path / "engine.plan").read_bytes()
    assert b"EntropyCalibration2\n5 " in first, "five images"
    (cache,) = (tmp_path / "cache").glob("calibration-*.cache")
    other, _ = made(ImplicitInt8("minmax"), "other")
    backend.build(other, shapes(1), tmp_path)
    assert len(list((tmp_path / "cache").glob("calibration-*.cache"))) == 2, "of another calibrator"
    whole = cache.read_bytes()
    cache.write_bytes(whole[:-3])
    again, _ = made(ImplicitInt8(), "short")
    with pytest.raises(UserError, match=r"calibration-.*\.cache: damaged or cut short; delete it"):
        backend.build(again, shapes(1), tmp_path)
    cache.write_bytes(hashlib.sha256(b"TRT-kept\n").hexdigest().encode() + b"\nTRT-kept\n")
    again, _ = made(ImplicitInt8(), "again")
    backend.build(again, shapes(1), tmp_path)
    assert b"TRT-kept" in (tmp_path / "engine.plan").read_bytes()


@pytest.mark.parametrize("trt", VERSIONS[:2], indirect=True)  # TensorRT 11 has no calibrators
def test_what_goes_wrong_while_tensorrt_calibrates_is_raised(trt, made, tmp_path, monkeypatch):
    files, _ = made(ImplicitInt8())
    copy = DeviceMemory.copy

    def full(self, to, source, wait=True):
        if getattr(source, "shape", None) == (1, 3, 64, 80):
            raise UserError("GPU 0: out of memory")
        copy(self, to, source, wait)

    monkeypatch.setattr(DeviceMemory, "copy", full)
    with pytest.raises(UserError, match="GPU 0: out of memory"):
        TensorRT(timing_cache=str(tmp_path / "cache")).build(files, shapes(1), tmp_path)
    assert not (tmp_path / "engine.plan").exists()
    assert not list((tmp_path / "cache").glob("calibration-*"))


def test_a_stripped_plan_gets_its_weights_back(trt, finished, tmp_path):
    files = quantized(finished, "fp32")
    (tmp_path / "whole").mkdir()
    whole = TensorRT().build(files, shapes(1), tmp_path / "whole")
    engine = TensorRT(strip_weights=True).build(files, shapes(1), tmp_path)
    assert engine.stat().st_size < 0.5 * whole.stat().st_size
    images = np.random.default_rng(1).integers(0, 255, (1, 64, 80, 3), np.uint8)
    with TensorRTRunner(engine) as bare, TensorRTRunner(whole) as full:
        ours, theirs = (runner.download(runner(runner.upload(images))) for runner in (bare, full))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    (tmp_path / "weights.onnx").write_bytes(b"others")
    with pytest.raises(UserError, match="weights.onnx: not the network that the plan was built from"):
        TensorRTRunner(engine)


def test_kernels_that_nobody_measured_are_refused_where_that_is_asked(trt, finished, tmp_path):
    options = {"timing_cache": str(tmp_path / "cache")}
    strict = TensorRT(error_on_timing_cache_miss=True, **options)
    with pytest.raises(UserError, match="the timing cache has no entry"):
        strict.build(quantized(finished, "fp32"), shapes(1), tmp_path)
    TensorRT(**options).build(quantized(finished, "fp32"), shapes(1), tmp_path)
    assert strict.build(quantized(finished, "fp32"), shapes(1), tmp_path).exists()


def test_a_machine_without_dla_says_so(trt, finished, tmp_path):
    with pytest.raises(UserError, match=r"use_dla_core=0: TensorRT .* sees 0 DLA cores on .*use_dla_core=null"):
        TensorRT(use_dla_core=0).build(quantized(finished, "fp32"), shapes(1), tmp_path)


def test_several_gpus_share_the_work(trt, finished, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from cuda.bindings import runtime

    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    draw = np.random.default_rng(1)
    images = [draw.integers(0, 255, (1, 64, 80, 3), np.uint8) for _ in range(8)]
    with TensorRT().load(engine) as one, TensorRT(device=[0, 1]).load(engine) as two:
        assert (one.workers, two.workers) == (2, 4)
        runtime.log.clear()

        def found(image):
            array = two.upload(image)
            fields = two(array)
            return array.memory.device, two.download(fields)

        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(found, images))
        assert {device for device, _ in made} == {0, 1}
        assert {device for name, device in runtime.log if name == "cudaMalloc on"} == {0, 1}
        assert any(name == "cudaHostAlloc" for name, _ in runtime.log)
        for image, (_, fields) in zip(images, made, strict=True):
            expected = one.download(one(one.upload(image)))
            assert all(np.array_equal(fields[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="GPU 7: cudaGetDeviceProperties failed.*choose one that nvidia-smi lists"):
        TensorRT(device=[0, 7]).load(engine)


def test_one_engine_serves_several_profiles(trt, finished, tmp_path):
    small, large = Resolution(64, 80), Resolution(96, 128)
    both = Shapes((small, small, small), (1, 1, 1), (Shapes((large, large, large), (1, 2, 4)),))
    engine = TensorRT().build(quantized(finished, "fp32"), both, tmp_path)
    with TensorRTRunner(engine) as runner:
        for size, batch in ((small, 1), (large, 4), (small, 1)):
            fields = runner.download(runner(runner.upload(np.zeros((batch, size.height, size.width, 3), np.uint8))))
            assert fields["heatmaps"].shape == (batch, 19, size.height // 8, size.width // 8)
        with pytest.raises(UserError, match=r"outside the engine's profile \(\(1, 3, 64, 80\) to .*; \(1, 3, 96, 128\) to"):
            runner(runner.upload(np.zeros((4, 64, 80, 3), np.uint8)))


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("{min: 1x64x80}", "is no profile; give it as"),
        ("{min: 64x80, opt: 64x80, max: 64x80}", "is no profile"),
        ("{min: 2x64x80, opt: 1x64x80, max: 4x64x80}", "is not min <= opt <= max"),
    ],
)
def test_a_profile_that_is_none_is_refused(smoke, profile, message):
    words = ["backend=tensorrt", "stage=build", f"stages.build.profiles=[{profile}]"]
    assert message in refused(pipeline(*SMOKE, *words, cwd=smoke, double=True))
    assert not list((smoke / "outputs/smoke/build").glob("*tensorrt*"))


GIVEN = ["experiment=smoke", "tracking=none", "backend=tensorrt", "model=plan", "name=given"]
LIKE_OURS = "model.spec.input={name: image, order: RGB, range: 1.0, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], multiple: 8}"


def test_an_engine_of_somebody_else_is_measured(smoke):
    pipeline(*SMOKE, "backend=tensorrt", cwd=smoke, double=True, check=0)
    (plan,) = (smoke / "outputs/smoke/build").glob("*tensorrt-b1/engine.plan")
    (plan.parent / "engine.json").unlink()  # it has nothing of ours
    pipeline(*GIVEN, f"model.plan={plan}", LIKE_OURS, cwd=smoke, double=True, check=0)
    (theirs,) = (smoke / "outputs/given/evaluate").glob("*/metrics.json")
    ours = json.loads((smoke / "outputs/smoke/evaluate" / plan.parent.name / "metrics.json").read_text())
    assert json.loads(theirs.read_text())["images"] == ours["images"]
    assert list((smoke / "outputs/given/benchmark").glob("*/audit.json"))
    missing = "model.spec.fields=[{name: maps, stride: 8, channels: 19}, {name: pafs, stride: 8, channels: 38}]"
    message = refused(pipeline(*GIVEN, f"model.plan={plan}", LIKE_OURS, missing, "force=true", cwd=smoke, double=True))
    assert "has no tensor maps; its tensors are image, heatmaps, pafs: name them with model.tensors={maps: ...}" in message
    plan.write_bytes(b"no plan")
    message = refused(pipeline(*GIVEN, f"model.plan={plan}", LIKE_OURS, cwd=smoke, double=True))
    assert "cannot load it: " in message
    assert "magic tag does not match" in message
    message = refused(pipeline(*GIVEN, f"model.plan={plan}", "backend=onnxruntime", cwd=smoke))
    assert "model=plan-engine: runs on backend=tensorrt alone" in message


def test_a_wrong_engine_is_refused_before_tensorrt_is_loaded(trt, finished, tmp_path):
    engine = TensorRT().build(quantized(finished, "fp32"), shapes(1), tmp_path)
    side = tmp_path / "engine.json"
    side.write_text(json.dumps({**json.loads(side.read_text()), "gpu": {"name": "Orin", "sm": "8.7"}}))
    code = f"""
import sys
from pathlib import Path
from posepress.runners.tensorrt import TensorRTRunner
try:
    TensorRTRunner(Path({str(engine)!r}))
except Exception as error:
    print(type(error).__name__, "tensorrt" in sys.modules, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{FAKES}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("UserError False")
    assert "built for Orin" in done.stdout


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
    elif fault == "unsigned input":
        model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
        model.graph.node.insert(0, onnx.helper.make_node("Cast", ["image"], ["as_float"], to=onnx.TensorProto.FLOAT))
        for node in list(model.graph.node)[1:]:
            node.input[:] = ["as_float" if name == "image" else name for name in node.input]
    elif fault == "scale":
        put(weights.input[1], -numpy_helper.to_array(initializers[weights.input[1]]))
    elif fault == "half scale":
        put(weights.input[1], np.full_like(numpy_helper.to_array(initializers[weights.input[1]]), 2.0**-16, np.float16))
    elif fault == "activations per channel":
        quantizer = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] != "image")
        model.graph.initializer.append(numpy_helper.from_array(np.full(16, 0.1, np.float32), "many_scales"))
        quantizer.input[1] = "many_scales"
    elif fault in ("unknown operator", "plugin"):
        relu = next(n for n in model.graph.node if n.op_type == "Relu")
        relu.op_type, relu.domain = ("Det", "") if fault == "unknown operator" else ("FastRelu", "our.plugins")
        if fault == "plugin":
            model.opset_import.append(onnx.helper.make_opsetid("our.plugins", 1))
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
        ("unsigned input", "UINT8 network inputs need a cast"),
        ("scale", "scales must be positive"),
        ("half scale", "subnormal"),
        ("activations per channel", "per-channel quantization of activations is not supported"),
        ("unknown operator", "no importer registered for op: Det.*of the torch module backbone"),
    ],
)
def test_what_tensorrt_refuses_is_refused(trt, finished, tmp_path, fault, message):
    faulty = planted(quantized(finished, "int8"), tmp_path, fault)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"cannot parse it:.*{message}"):
        TensorRT().build(faulty, shapes(1), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_operator_that_no_plugin_has_is_named_before_the_build(trt, finished, tmp_path, monkeypatch):
    faulty = planted(quantized(finished, "int8"), tmp_path, "plugin")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(trt, "plugins", {"FastReLU"})
    message = r"no plugin has the operator FastRelu \(of the node 'node_relu.*'\); did you mean 'FastReLU'.*backend.plugins"
    with pytest.raises(UserError, match=message):
        TensorRT().build(faulty, shapes(1), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_deformable_convolution_needs_a_plugin(trt, tmp_path, monkeypatch):
    """TensorRT's parser implements all of ONNX's operators in FastPose but this one."""
    torch.manual_seed(0)
    network = FastPose(50, 0.25, dcn=True).eval()
    file = tmp_path / "model.onnx"
    export.export(network, np.zeros((1, 3, 64, 64), np.float32), 20, file)
    export.stamp(file, network.spec)
    Fp32().quantize(file, None, None, tmp_path)
    files = ModelFiles.in_folder(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"no plugin has the operator DeformConv \(of the node .*backend.plugins"):
        TensorRT().build(files, shapes(1, Resolution(64, 64)), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(trt, "plugins", {"DeformConv"})
    with TensorRT().load(TensorRT().build(files, shapes(1, Resolution(64, 64)), tmp_path / "out")) as runner:
        found = runner(runner.upload(np.zeros((1, 64, 64, 3), np.uint8)))
    assert next(iter(found.values())).shape == (1, 17, 16, 16)


def test_two_builds_at_once_keep_the_kernels_of_both(trt, finished, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    together = Barrier(2)
    built = TensorRT._built

    def at_once(self, *arguments):
        together.wait(30)
        return built(self, *arguments)

    monkeypatch.setattr(TensorRT, "_built", at_once)
    backend = TensorRT(timing_cache=str(tmp_path / "cache"))
    for name in ("fp32", "int8"):
        (tmp_path / name).mkdir()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: backend.build(quantized(finished, name), shapes(1), tmp_path / name), ("fp32", "int8")))
    (file,) = (tmp_path / "cache").glob("*.timing")
    assert b"QuantizeLinear" in file.read_bytes()
    assert b"Conv" in file.read_bytes()


def test_precision_flags_and_missing_profiles_fail_as_in_tensorrt(trt, finished):
    file = str(quantized(finished, "fp32").onnx["tensorrt"])
    builder = trt.Builder(load().logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, load().logger).parse_from_file(file)
    config = builder.create_builder_config()
    assert builder.build_serialized_network(network, config) is None
    assert "no optimization profile" in load().logger.errors[-1]
    if trt.__version__.startswith("11"):
        with pytest.raises(AttributeError):
            trt.BuilderFlag.INT8
        return
    config.set_flag(trt.BuilderFlag.INT8)
    assert builder.build_serialized_network(network, config) is None
    assert "incompatible with strongly typed networks" in load().logger.errors[-1]


# The tests above write and build every precision for each version. Here the chain runs those whose code differs.
PRECISIONS = {
    "10_3": ["int8_entropy"],
    "10_16": ["int8_entropy"],
    "11_1": ["fp32", "fp16", "fp8", "int8", "mixed", "int8_entropy"],
}


@pytest.mark.parametrize("version", PRECISIONS)
def test_the_whole_chain_runs_in_every_precision_and_its_figures_are_left_out(smoke, monkeypatch, version):
    monkeypatch.setenv("POSEPRESS_TENSORRT_DOUBLE", version)
    words = ["--multirun", *SMOKE, "backend=tensorrt", f"precision={','.join(PRECISIONS[version])}"]
    done = pipeline(*words, cwd=smoke, double=True)
    ran = PRECISIONS[version] if version.startswith("10") else PRECISIONS[version][:-1]
    if version.startswith("10"):
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert "precision=int8_entropy: TensorRT 11.1" in refused(done)
        assert "choose precision=int8" in done.stderr
    assert f"left out: {len(ran)} evaluated with the TensorRT test double" in done.stdout.replace("\n", " ")
    for precision in ran:
        (folder,) = (
            folder
            for folder in (smoke / "outputs/smoke/evaluate").glob("*_dense_*_tensorrt-b1")
            if folder.name.partition(f"_pad_{precision}")[2].startswith(("-", "_tensorrt"))
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["backend"] == "tensorrt-double"
        assert metrics["ap"] >= 0
        (latency,) = (smoke / "outputs/smoke/benchmark").glob(f"{folder.name}_t1/latency.json")
        assert json.loads(latency.read_text())["timed"] == 0
        layers = json.loads((latency.parent / "audit.json").read_text())
        assert all(layer["us"] > 0 for layer in layers)
    assert "tensorrt" not in (smoke / "outputs/smoke/report/results.csv").read_text()


def test_without_tensorrt_nothing_is_started(tmp_path):
    message = refused(pipeline(*SMOKE, "backend=tensorrt", cwd=tmp_path))
    assert "the Python package 'tensorrt' is not installed" in message
    assert not (tmp_path / "outputs/smoke").exists()


@pytest.mark.real
def test_on_real_images_its_ap_is_onnx_runtimes(tmp_path):
    model = REAL / "weights/bottomup_mobilenetv2_paf/mobilenetv2_w1.0_paf.onnx"
    splits = json.loads((REAL / "splits.json").read_text())
    for split in ("tune", "agreement"):
        splits[split] = {part: names[:8] for part, names in splits[split].items()}
    (tmp_path / "splits.json").write_text(json.dumps(splits))
    words = [*real_options(), "data.splits=splits.json", "model=onnx", f"model.onnx={model}", "tracking=none"]
    words += ["resolution=112x160", "training_resolution=112x160"]
    words += ["stage=[export,quantize,build,tune,evaluate]"]
    pipeline("--multirun", *words, "backend=onnxruntime,tensorrt", cwd=tmp_path, double=True, check=0)
    figures = {}
    for file in (tmp_path / "outputs/default/evaluate").glob("*/metrics.json"):
        content = json.loads(file.read_text())
        figures[content["backend"]] = content
    ours, theirs = figures["tensorrt-double"], figures["onnxruntime"]
    assert theirs["ap"] > 0.02
    for name in ("ap", "ap50", "ap75", "ar"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
