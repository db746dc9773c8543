"""Parity finds how far two computations are apart, and where they part."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from evaluation.parity import Difference, compare, first_apart
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.onnx_files.cut import cut, tensors_of
from pipeline.onnx_files.execute import computed_over
from pipeline.onnx_files.files import ModelFiles, Shapes, read_spec
from pipeline.results.job import Job
from pipeline.results.manifest import write_manifest
from pipeline.stages import parity
from posepress.framing.whole_image import WholeImage
from posepress.resolution import Resolution
from tests.conftest import SMOKE, pipeline


def test_figures_of_a_known_difference():
    reference, other = np.array([3.0, 4.0], np.float32), np.array([3.0, 2.0], np.float32)
    found = compare([({"a": reference, "b": reference}, {"a": other}), ({"a": reference}, {"a": reference})])
    assert set(found) == {"a"}
    assert found["a"]["max"] == 2
    assert found["a"]["mean"] == pytest.approx(0.5)
    assert found["a"]["relative"] == pytest.approx(2 / np.sqrt(50))
    assert found["a"]["cosine"] == pytest.approx((17 + 25) / np.sqrt(50 * (13 + 25)))


def test_nan_is_never_the_same_and_shapes_must_fit():
    difference = Difference()
    difference.add(np.ones(4), np.array([1, 1, np.nan, 1]))
    assert difference.figures()["relative"] == 1
    assert Difference().figures()["cosine"] == 1
    with pytest.raises(ValueError, match=r"\(4,\) and \(3,\)"):
        difference.add(np.ones(4), np.ones(3))


@given(st.integers(0, 40), st.integers(1, 41))
def test_bisection_finds_the_first(place, count):
    asked = []

    def apart(name):
        asked.append(name)
        return int(name) >= place

    found = first_apart([str(n) for n in range(count)], apart)
    assert found == (str(place) if place < count else None)
    assert len(asked) <= 2 + np.log2(count)


@pytest.fixture
def exported(finished):
    (model,) = (finished / "outputs/smoke/export").glob("*_dense/model.onnx")
    return model


def test_a_part_computes_what_the_whole_does(exported, tmp_path):
    model = onnx.shape_inference.infer_shapes(onnx.load(exported))
    names, images = tensors_of(model, "pafs"), np.random.default_rng(0).normal(size=(1, 3, 64, 80)).astype(np.float32)
    assert names[-1] == "pafs"
    assert "heatmaps" not in names
    for name in (names[0], names[len(names) // 2], "pafs"):
        files = cut(model, name, read_spec(exported), tmp_path)
        assert [field.name for field in read_spec(files.onnx["tensorrt"]).fields] == [name]
        (part,) = computed_over(onnx.load(files.onnx["tensorrt"]), [name], [images])
        (whole,) = computed_over(model, [name], [images])
        assert np.allclose(part[name], whole[name], atol=1e-5)


def test_torch_onnx_runtime_and_the_double_agree(smoke):
    pipeline(*SMOKE, "backend=tensorrt", "precision=int8", "stage=[quantize,build]", cwd=smoke, double=True, check=0)
    done = pipeline(*SMOKE, "backend=tensorrt", "precision=int8", "stage=parity", cwd=smoke, double=True, check=0)
    assert "more than 0.01 apart: nowhere" in done.stdout.replace("\n", " ")
    (file,) = (smoke / "outputs/smoke/parity").glob("*/parity.json")
    content = json.loads(file.read_text())
    by_link = {(row["other"], row["tensor"]): row["relative"] for row in content["rows"]}
    assert by_link["ONNX Runtime, FP32", "pafs"] < 1e-4
    assert 1e-3 < by_link["ONNX Runtime, typed file", "pafs"] < 0.2
    assert by_link["tensorrt-double", "pafs"] < 1e-6


class Broken(OnnxRuntime):
    """Doubles the weights of one convolution, in every network that has it."""

    name = "broken"

    def build(self, files, shapes, out):
        model = onnx.load(files.onnx["onnxruntime"])
        for tensor in model.graph.initializer:
            if tensor.name == "network.refining_heads.0.heatmaps.0.0.weight":
                tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
        onnx.save(model, out / "changed.onnx")
        return super().build(ModelFiles(dict.fromkeys(files.onnx, out / "changed.onnx")), shapes, out)


def test_the_layer_that_differs_is_named(finished, images, exported, tmp_path):
    (typed,) = (finished / "outputs/smoke/quantize").glob("*_dense_*_fp32")
    size = Resolution(64, 80)
    engine = tmp_path / "engine"
    engine.mkdir()
    built = Broken().build(ModelFiles.in_folder(typed), Shapes((size, size, size), (1, 1, 1)), engine)
    content = json.loads((typed / "manifest.json").read_text()) | {"summary": {"engine": built.name}}
    write_manifest(engine, {key: value for key, value in content.items() if key != "seal"})
    job = Job(tmp_path, {"engine": engine, "network": typed, "reference": exported.parent}, {}, tmp_path, tmp_path)
    found = parity.Parity(images, Broken(), WholeImage("pad_image_input"), "64x80", 2, 1e-5).run(job)
    model = onnx.load(typed / "model.onnxruntime.onnx")
    (victim,) = (node for node in model.graph.node if "network.refining_heads.0.heatmaps.0.0.weight" in node.input)
    assert found["first_apart"] == victim.output[0]
    assert found["where"] == f"first in '{victim.output[0]}', of {victim.name} (Conv)"
    assert found["relative_engine"] > 1e-5 > found["relative_export"]
