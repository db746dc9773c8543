"""Mixed precision, networks quantized elsewhere, retraining with rounding: through the command, and their parts."""

import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.probing.candidate import Candidate
from pipeline.probing.judge import Scoring
from pipeline.probing.probe import Probe
from pipeline.quantization import place as place_module
from pipeline.quantization import writers
from pipeline.quantization.precisions import int8 as quantizers
from pipeline.quantization.precisions.int8 import Int8
from pipeline.quantization.precisions.int8_qat import Retrained
from pipeline.quantization.precisions.mixed import Mixed
from pipeline.stages import quantize
from pipeline.training.fake_quantization import FakeQuantized
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.predict import Selection
from posepress.resolution import Resolution
from posepress.results import Sample
from tests.conftest import SMOKE, pipeline, refused
from tests.pipeline.quantization.test_half import with_spec
from tests.pipeline.quantization.test_quantization import branches, fed, feed  # noqa: F401

QUICK = ["precision=mixed", "precision.seconds=0.5", "precision.units=4", "precision.finalists=3"]


def test_a_budget_is_solved_measured_and_written_down(smoke):
    pipeline(*SMOKE, *QUICK, cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/quantize").glob("*mixed*onnxruntime-t1")
    found = json.loads((folder / "sensitivity.json").read_text())
    assert (found["backend"], found["timed"]) == ("onnxruntime", True)
    assert sorted(found["order"]) == list(range(len(found["units"]))) == [0, 1, 2, 3]
    assert [row["float_units"] for row in found["finalists"]] == [0, 1, 4]
    whole = found["finalists"][-1]
    assert whole["error"] < 1e-4 < found["finalists"][0]["error"], "all in float is FP32"
    chosen = found["finalists"][found["chosen"]]
    assert all(row["ms"] >= chosen["ms"] for row in found["finalists"] if row["drop_lo"] <= 0.002)
    summary = json.loads((folder / "manifest.json").read_text())["summary"]
    assert summary["budget_solved_on"] == "onnxruntime"
    kept = {name for n in found["order"][: chosen["float_units"]] for name in found["units"][n]["nodes"]}
    written = {
        node.name: node.input[1] for node in onnx.load(folder / "model.onnxruntime.onnx").graph.node if node.op_type == "Conv"
    }
    assert kept <= set(summary["float_layers"])
    assert kept <= set(json.loads((folder / "scales.json").read_text())["excluded"])
    for layer in found["layers"]:
        assert written[layer["name"]].endswith("_dequantized") == (layer["precision"] == "int8")
        assert not (layer["name"] in kept and layer["precision"] == "int8")
    page = (smoke / "outputs/smoke/report/report.html").read_text()
    assert "Budget solved on onnxruntime" in page
    assert "units in float" in page
    assert "after each step" in page, "of the INT8 cells of the sweep"
    assert "Calibration images: stratified-8-s0" in page


ROWS = [
    {"float_units": 0, "ms": 10.0, "error": 0.2, "drop_lo": 0.01, "drop": 0.02, "expected_agreement": 0.90},
    {"float_units": 1, "ms": 12.0, "error": 0.1, "drop_lo": 0.00, "drop": 0.01, "expected_agreement": 0.94},
    {"float_units": 2, "ms": 11.0, "error": 0.05, "drop_lo": 0.0, "drop": 0.0, "expected_agreement": 0.97},
    {"float_units": 4, "ms": 20.0, "error": 0.0, "drop_lo": 0.0, "drop": 0.0, "expected_agreement": 1.0},
]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, 2),
        ({"min_agreement": 0.98}, 3),
        ({"min_agreement": 0.0}, 2),
        ({"min_agreement": 0.0, "max_drop": 0.05}, 0),
        ({"max_latency": 10.5}, 0),
        ({"max_latency": "0.6x"}, 2),
        ({"max_latency": "2x"}, 3),
    ],
)
def test_the_fastest_within_the_limits_is_chosen_or_the_best_within_the_time(options, chosen):
    assert Mixed(**options)._choose(ROWS, 20.0, timed=True) == chosen


def test_a_backend_that_cannot_be_timed_counts_units():
    assert Mixed(min_agreement=0.94)._choose(ROWS, 1.0, timed=False) == 1


def test_limits_that_nothing_keeps_are_refused_with_the_nearest():
    with pytest.raises(
        UserError, match=r"max_drop=0.0, precision.min_agreement=0.95: no choice .* loses 0.0100 and agrees to 0.940"
    ):
        Mixed(max_drop=0.0)._choose(ROWS[:2], 20.0, timed=True)
    with pytest.raises(UserError, match=r"max_latency=0.4x: the fastest choice takes 10 ms \(0.5x of FP32\)"):
        Mixed(max_latency="0.4x")._choose(ROWS, 20.0, timed=True)
    without = [{k: v for k, v in row.items() if k != "expected_agreement"} for row in ROWS]
    assert Mixed()._choose(without, 20.0, timed=True) == 2, "with nothing to tell the agreement, the drop itself counts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 2}, "max_drop=2: choose 0 to 1"),
        ({"min_agreement": -1}, "min_agreement=-1: choose 0 to 1"),
        ({"units": 0}, "units=0"),
        ({"max_latency": "fast"}, "max_latency=fast: choose milliseconds, or 0.6x"),
        ({"max_latency": "0x"}, "max_latency=0x"),
        ({"max_latency": "nan"}, "max_latency=nan"),
        ({"finalists": 4.5}, "finalists=4.5: choose a whole number"),
        ({"seconds": -1}, "seconds=-1: choose more than 0"),
        ({"max_drop": "abc"}, "max_drop=abc: choose a number"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Mixed(**options)


def test_a_candidates_engine_is_built_once_and_goes_with_it(smoke, images):
    built = []

    class Counting(OnnxRuntime):
        def build(self, files, shapes, out):
            built.append(out.parent)
            return super().build(files, shapes, out)

    (export,) = (smoke / "outputs/smoke/export").glob("*_dense/model.onnx")
    probe = Probe(
        Selection.spread(images.open("tune"), 1), WholeImage(), Resolution(64, 80), Counting(), export, Scoring(threads=1)
    )
    candidate = Candidate.of_file(export)
    with probe.engine(candidate), probe.engine(candidate, 1):
        assert len(built) == 1
    (folder,) = built
    assert folder.exists()
    del candidate
    assert not folder.exists()


def test_a_file_quantized_elsewhere_is_taken_measured_and_audited(smoke):
    (theirs,) = (smoke / "outputs/smoke/quantize").glob("*_dense_*int8*")
    given = onnx.load(theirs / "model.onnxruntime.onnx")
    del given.metadata_props[:]
    onnx.save(given, smoke / "theirs.onnx")
    pipeline(*SMOKE, "precision=external", f"precision.file={smoke}/theirs.onnx", cwd=smoke, check=0)
    (ours,) = (smoke / "outputs/smoke/evaluate").glob("*external*")
    (folder,) = (smoke / "outputs/smoke/evaluate").glob("*_dense_*int8-auto*")
    ours, own = (json.loads((f / "metrics.json").read_text()) for f in (ours, folder))
    assert ours["ap"] == own["ap"]
    (bench,) = (smoke / "outputs/smoke/benchmark").glob("*external*")
    assert "int8" in json.loads((bench / "manifest.json").read_text())["summary"]["ran"]


def test_a_file_of_another_network_or_without_integers_is_refused(smoke, branches):  # noqa: F811
    def message(file):
        return refused(pipeline(*SMOKE, "precision=external", f"precision.file={file}", "stage=quantize", cwd=smoke))

    (smoke / "not.onnx").write_text("nothing")
    assert "not.onnx: not a valid ONNX file" in message(smoke / "not.onnx")
    onnx.save(branches, smoke / "other.onnx")
    assert "other.onnx: takes 'image' and returns ['out']" in message(smoke / "other.onnx")
    (fp32,) = (smoke / "outputs/smoke/export").glob("*dense/model.onnx")
    assert "no DequantizeLinear node in it" in message(fp32)
    assert "no such file" in message(smoke / "absent.onnx")


@pytest.fixture
def rounded(branches):  # noqa: F811
    model = with_spec(branches, 4)
    placement = place_module.place(model)
    found = writers.Scales.of(dict.fromkeys(placement.tensors, 8.0), dict.fromkeys(placement.tensors, -8.0), placement)
    return model, placement, found


def test_rounding_in_training_is_what_tensorrts_file_says(rounded):
    model, placement, scales = rounded
    network = FakeQuantized(model, placement, scales).eval()
    file = writers.insert(model, placement, scales, "tensorrt")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    images = feed(1)[0]
    expected = onnxruntime.InferenceSession(file.SerializeToString(), options).run(None, {"image": images})[0]
    network.steps = {
        name: network.steps[name] for name in {*placement.inputs, *placement.skips.values()}
    }  # as TensorRT has them
    found = network(torch.from_numpy(images))["out"].detach().numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_weights_learn_through_the_rounding_and_scales_stay(rounded):
    model, placement, scales = rounded
    network = FakeQuantized(model, placement, scales)
    images = torch.from_numpy(np.concatenate(feed(4)))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    wanted = torch.from_numpy(np.concatenate([session.run(None, {"image": one})[0] for one in feed(4)]))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = ((network(images)["out"] - wanted) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    made = network.float_model(model)
    changed = [n.name for n, o in zip(made.graph.initializer, model.graph.initializer, strict=True) if n.raw_data != o.raw_data]
    assert {"a_w", "b_w", "c_w"} <= set(changed)
    assert "low" not in changed


def test_a_retrained_network_is_quantized_with_the_scales_beside_it(smoke):
    pipeline(*SMOKE, "precision=int8_qat", cwd=smoke, check=0)
    (trained,) = (smoke / "outputs/smoke/qat").glob("*qat2-auto*-stratified-8-s0")
    (written,) = (smoke / "outputs/smoke/quantize").glob("*_dense-qat_*int8-qat2*")
    ours, theirs = (json.loads((folder / "scales.json").read_text()) for folder in (written, trained))
    assert ours["tensors"] == theirs["tensors"]
    assert ours["excluded"] == theirs["excluded"]
    rows = (smoke / "outputs/smoke/report/results.csv").read_text()
    assert "lwop-s2-w0.125-qat" in rows
    (metrics,) = (smoke / "outputs/smoke/evaluate").glob("*-qat_*")
    assert json.loads((metrics / "metrics.json").read_text())["axes"]["network"] == "lwop-s2-w0.125-qat"


def test_families_without_an_objective_are_not_retrained(smoke):
    (file,) = (smoke / "outputs/smoke/export").glob("*dense/model.onnx")
    words = ["precision=int8_qat", "objective=null", f"stages.export.onnx={file}"]
    assert "this family's networks are not trained here" in refused(pipeline(*SMOKE, *words, "stage=qat", cwd=smoke))


def test_what_calibrates_once_calibrates_alike(branches, tmp_path):  # noqa: F811
    onnx.save(with_spec(branches, 4), tmp_path / "m.onnx")
    made = [quantizers.Int8().calibrate(tmp_path / "m.onnx", fed(feed())) for _ in range(2)]
    assert made[0].rows() == made[1].rows()
    for flavour in ("tensorrt", "onnxruntime"):
        assert all(np.array_equal(shift, made[1].shifts[flavour][name]) for name, shift in made[0].shifts[flavour].items())
    with pytest.raises(UserError, match="no images"):
        quantizers.Int8().calibrate(tmp_path / "m.onnx", fed([]))


def test_a_wish_that_a_latency_goes_before_is_said():
    row = ROWS[0] | {"drop_hi": 0.03}
    by_time = Mixed(max_latency=10.5)
    assert by_time._missed(row) == [
        "precision.max_drop=0.002 is not kept: the tune images lose 0.0200, 0.0100 to 0.0300 within max_latency=10.5",
        "precision.min_agreement=0.95 is not kept: the choice agrees to 0.900 with FP32 within max_latency=10.5",
    ]
    assert Mixed()._missed(ROWS[2]) == []
    noisy = ROWS[2] | {"drop": 0.004, "drop_lo": -0.001, "drop_hi": 0.009}
    (said,) = Mixed()._missed(noisy)
    assert said == "precision.max_drop=0.002 is not shown to be kept: the tune images lose 0.0040, -0.0010 to 0.0090"
    assert list(quantize._notes({"missed": [said]})) == [said]


class Tune:
    """Two images of noise."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        noise = np.random.default_rng(index).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        return Sample(str(index), Resolution(8, 8), lambda: noise, None)


def test_engines_lie_in_the_scratch_folder_and_what_a_killed_run_left_is_gone(branches, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    onnx.save(with_spec(branches, 4), tmp_path / "m.onnx")
    scratch = tmp_path / "scratch"
    (scratch / "engines" / "left").mkdir(parents=True)
    size = Resolution(8, 8)
    probe = Probe(Selection.spread(Tune(), 2), WholeImage(None), size, OnnxRuntime(), tmp_path / "m.onnx", None, scratch)
    assert not list((scratch / "engines").iterdir())
    candidate = quantizers.Int8("minmax").calibrate(tmp_path / "m.onnx", fed(feed())).written()
    assert probe.errors(candidate)["out"] < 0.2
    assert len(list((scratch / "engines").iterdir())) == 2, "FP32 and the candidate"
    ours, theirs = probe.errors(candidate)["out"], probe.errors_in_tensorrt(candidate)["out"]
    assert 0 < theirs < 0.2
    assert ours != theirs, "another file"
    del candidate
    assert len(list((scratch / "engines").iterdir())) == 1


def test_two_that_are_timed_wait_for_each_other(monkeypatch, tmp_path):
    import fcntl

    from pipeline.probing.processes import alone

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def taken():
        other = os.open(tmp_path, os.O_RDONLY)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(other)
        return False

    with alone():
        assert taken()
    assert not taken()
    assert not list(tmp_path.iterdir()), "no file is left behind"


def test_an_audit_leaves_nothing_behind(branches, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    onnx.save(with_spec(branches, 4), tmp_path / "m.onnx")
    (tmp_path / "scratch").mkdir()
    assert OnnxRuntime().audit(tmp_path / "m.onnx", Resolution(8, 8), tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_a_remedy_names_the_option_where_it_stands(branches, tmp_path):  # noqa: F811
    file = tmp_path / "model.onnx"
    onnx.save(branches, file)
    wrong = {"nodes_to_exclude": ("node_con2d",)}
    for quantizer, place in (
        (Int8(**wrong), "precision"),
        (Mixed(int8=Int8(**wrong)).int8, r"precision\.int8"),
        (Retrained(trained_with=Int8(**wrong)).trained_with, r"precision\.trained_with"),
    ):
        with pytest.raises(UserError, match=rf"^{place}\.nodes_to_exclude: no node matches 'node_con2d'"):
            quantizer.calibrate(file, fed(feed(1, (1, 3, 64, 80))))
    with pytest.raises(ValueError, match=r"^precision\.high_precision_dtype=fp64: choose fp32, fp16"):
        Retrained(high_precision_dtype="fp64")
