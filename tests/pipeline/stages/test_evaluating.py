"""Tuning, evaluation, comparison and what the report makes of them."""

import csv
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from evaluation import audit
from evaluation.contracts import MetricInfo
from evaluation.metrics.agreement import PoseAgreement
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.statistics import Draws
from pipeline.backends.onnxruntime import OnnxRuntime
from pipeline.datasets.synthetic import Synthetic
from pipeline.report import collect as report
from pipeline.report import tables, waterfall
from pipeline.report.comparison import Side, rows_of
from pipeline.results.job import Job
from pipeline.results.manifest import write_manifest
from pipeline.stages import evaluate, tune
from posepress import predict as loop
from posepress.decoders.heatmap_paf.decoder import HeatmapPafDecoder
from posepress.errors import UserError
from posepress.framing.whole_image import WholeImage
from posepress.predict import Watch, predict
from posepress.results import Poses, load_results, save_results
from tests.conftest import SMOKE, pipeline, refused

CELL = [*SMOKE, "precision=int8"]


@pytest.fixture
def chain(finished, tmp_path, images):
    """A finished engine with its tuning, and a data set to evaluate it on."""
    (engine,) = (finished / "outputs/smoke/build").glob("*dense*fp32*")
    (tuned,) = (finished / "outputs/smoke/tune").glob("*dense*")

    def job(name):
        (tmp_path / name).mkdir()
        return Job(tmp_path / name, {"engine": engine, "tuned": tuned}, {}, tmp_path / "scratch", tmp_path)

    data = Synthetic(images.preset, images.counts, 3, str(images.cache))
    return job, data


@pytest.fixture
def exported(finished):
    """The ONNX file that the engines of the chain come from."""
    (network,) = (finished / "outputs/smoke/export").glob("*dense*")
    return network


def run(job, data, metric=CocoKeypoints, backend=None, agreement=None):
    framing, on = WholeImage("pad_image_input"), backend or OnnxRuntime()
    stage = evaluate.Evaluate(data, on, framing, HeatmapPafDecoder, metric, agreement, "64x80", 1, {"data": "test"}, 3, 40)
    return stage.run(job)


class Interrupted(CocoKeypoints):
    """Ctrl-C at the tenth image."""

    def process(self, *image):
        super().process(*image)
        if len(self._rows) == 10:
            raise KeyboardInterrupt


class Counting(OnnxRuntime):
    """Counts how often the network runs."""

    calls = 0

    def load(self, engine, threads=0):
        runner = super().load(engine, threads)
        inner = runner.__class__.__call__

        class Counted(runner.__class__):
            def __call__(self, images):
                Counting.calls += 1
                return inner(self, images)

        runner.__class__ = Counted
        return runner


def test_an_interrupted_evaluation_goes_on_where_it_was(chain):
    job, data = chain
    whole = run(job("whole"), data)
    with pytest.raises(KeyboardInterrupt):
        run(job("first"), data, metric=Interrupted)
    kept = load_results(job("looked").scratch / "validation.npz")
    assert len(kept) == 10
    Counting.calls = 0
    second = job("second")
    resumed = run(second, data, backend=Counting())
    assert Counting.calls == len(data.open("validation")) - 10
    assert resumed == whole
    assert not second.scratch.exists(), "a finished evaluation keeps no partial result"


class InterruptedLater(PoseAgreement):
    """Ctrl-C in the agreement images, when the validation images are done."""

    def process(self, *image):
        raise KeyboardInterrupt


def test_an_interrupt_in_the_agreement_images_keeps_the_validation_images(chain):
    job, data = chain
    first = job("first")
    nobody = Poses(np.zeros((0, 18, 3), np.float32), np.zeros(0, np.float32))
    tuned = first.out.parent / "tuned"
    shutil.copytree(first.inputs["tuned"], tuned)
    save_results(tuned / "reference.npz", [(data.open("agreement")[n].id, nobody) for n in range(2)])
    first = replace(first, inputs={**first.inputs, "tuned": tuned})
    with pytest.raises(KeyboardInterrupt):
        run(first, data, agreement=InterruptedLater)
    assert len(load_results(first.scratch / "validation.npz")) == len(data.open("validation"))


def test_results_come_in_order_whatever_the_batch_and_the_threads(chain, finished):
    _, data = chain
    (engine,) = (finished / "outputs/smoke/build").glob("*dense*fp32*")
    part = data.open("validation")
    found = {}
    for batch in (1, 5):
        with OnnxRuntime().load(engine / "engine.onnx") as runner:
            runner.workers = 3
            watch = Watch()
            decoder = HeatmapPafDecoder(runner.spec)
            size = evaluate.Resolution(64, 80)
            results = list(predict(part, runner, WholeImage("pad_image_input"), decoder, size, batch, watch))
        assert [sample.id for sample, _ in results] == [part[n].id for n in range(len(part))]
        assert set(watch.busy) == {"reading", "framing", "network", "decoding"}
        assert watch.bottleneck in watch.busy
        found[batch] = [poses.keypoints for _, poses in results]
    for one, five in zip(found[1], found[5], strict=True):
        assert np.allclose(one, five, atol=1e-3)


def test_memory_does_not_grow_with_the_images(chain, finished):
    """No more than a bounded number of images is in flight."""
    _, data = chain
    (engine,) = (finished / "outputs/smoke/build").glob("*dense*fp32*")
    part = data.open("validation")
    read = 0

    class Watched:
        def __len__(self):
            return 10 * len(part)

        def __getitem__(self, index):
            nonlocal read
            read += 1
            return part[index % len(part)]

    with OnnxRuntime().load(engine / "engine.onnx") as runner:
        decoder = HeatmapPafDecoder(runner.spec)
        size = evaluate.Resolution(64, 80)
        results = predict(Watched(), runner, WholeImage("pad_image_input"), decoder, size)
        ahead = max(read - n for n, _ in enumerate(results))
    assert read == 10 * len(part)
    assert ahead <= loop._READ_AHEAD + runner.workers + 4


def test_found_people_survive_a_file(chain, tmp_path):
    some = Poses(
        np.ones((2, 18, 3), np.float32),
        np.ones(2, np.float32),
        {"guessed": np.zeros((2, 18), bool), "features": np.ones((2, 7), np.float32)},
        {"dropped_peaks": 3, "images_not_finite": 1},
    )
    none = Poses(np.zeros((0, 18, 3), np.float32), np.zeros(0, np.float32))
    save_results(tmp_path / "r.npz", [("7", some), ("1", none)])
    back = load_results(tmp_path / "r.npz")
    assert list(back) == ["7", "1"]
    assert back["7"].counts == {"dropped_peaks": 3, "images_not_finite": 1}
    assert back["7"].notes.keys() == some.notes.keys()
    assert np.array_equal(back["7"].notes["guessed"], some.notes["guessed"])
    assert back["1"].notes == {}
    assert back["1"].keypoints.shape == (0, 18, 3)


@dataclass(frozen=True)
class Noted:
    """A result of a family from elsewhere, with names that poses had in version 0.1."""

    features: np.ndarray
    more: Mapping[str, np.ndarray]


def test_results_of_any_class_survive_a_file(tmp_path):
    file = tmp_path / "r.npz"
    save_results(file, [("1", Noted(np.ones(3), {})), ("2", Noted(np.zeros(0), {"a": np.ones(2)}))])
    back = load_results(file, Noted)
    assert back["1"].features.tolist() == [1, 1, 1]
    assert back["1"].more == {}
    assert back["2"].more["a"].tolist() == [1, 1]
    with pytest.raises(UserError, match="holds Noted, which is not the expected kind"):
        load_results(file)


def test_poses_of_version_0_1_are_read(tmp_path):
    old = {"0.keypoints": np.ones((1, 2, 3)), "0.scores": np.ones(1), "0.guessed": np.zeros((1, 2), bool), "0.not_finite": True}
    np.savez_compressed(tmp_path / "old.npz", ids=np.array(["7"]), kind=np.array(["Poses"]), **old, **{"0.dropped_peaks": 3})
    poses = load_results(tmp_path / "old.npz")["7"]
    assert poses.counts == {"dropped_peaks": 3, "images_not_finite": True}
    assert list(poses.notes) == ["guessed"]


@pytest.mark.parametrize("wrong", [{"0.notes": np.ones(2)}, {"-1.scores": np.ones(1)}, {"0.keypoints.a": np.ones(1)}])
def test_a_result_of_another_form_is_damaged(wrong, tmp_path):
    plain = {"0.keypoints": np.ones((1, 2, 3)), "0.scores": np.ones(1)}
    np.savez_compressed(tmp_path / "r.npz", ids=np.array(["7"]), kind=np.array(["Poses"]), **{**plain, **wrong})
    with pytest.raises(UserError, match="damaged"):
        load_results(tmp_path / "r.npz")


def test_agreement_of_fp32_with_itself_is_whole_or_undefined(chain, exported):
    job, data = chain
    tuning = tune.Tune(
        data,
        OnnxRuntime(),
        WholeImage("pad_image_input"),
        partial(HeatmapPafDecoder, heatmap_threshold=[0.05, 0.1], paf_threshold=0.05, score_weights="tuned"),
        CocoKeypoints,
        PoseAgreement,
        "64x80",
    ).run(replace(job("tuned"), inputs={"network": exported}))
    assert tuning["heatmap_threshold"] in (0.05, 0.1)
    made = job("again")
    made = replace(made, inputs={**made.inputs, "tuned": made.out.parent / "tuned"})
    summary = run(made, data, agreement=PoseAgreement)
    assert ("agreement_ap" in summary) == (summary["agreement_people"] > 0)
    assert summary.get("agreement_ap", 1) == pytest.approx(1)
    decoder = json.loads((made.inputs["tuned"] / "decoder.json").read_text())
    assert len(decoder["tried"]) == 2
    assert {"as_found_ap", "as_found_ap_lo", "ap_hi", "agreement_people"} <= set(summary)


class Twice(WholeImage):
    """A framing that shows each image twice, by the same view."""

    def views(self, *given):
        return 2 * super().views(*given)


def test_an_image_ends_with_its_last_view(chain, exported):
    _, data = chain
    part, merged = data.open("validation"), []

    class Counting(HeatmapPafDecoder):
        def merge(self, parts, views):
            merged.append(len(parts))
            return parts[0]

    with OnnxRuntime().load(exported / "model.onnx") as runner:
        found = list(predict(part, runner, Twice("pad_image_input"), Counting(runner.spec), evaluate.Resolution(64, 80), 3))
    assert [sample.id for sample, _ in found] == [part[n].id for n in range(len(part))]
    assert set(merged) == {2}


@pytest.mark.parametrize(("wanted", "best"), [([0.1, 0.9], 0.1), ([0.9, 0.1], 0.1)])
def test_what_scores_best_on_the_tune_images_is_chosen(chain, exported, wanted, best, monkeypatch):
    """A decoder that knows the truth unless its threshold is .9."""
    job, data = chain
    truth = {sample.id: sample.truth for sample in (data.open("tune")[n] for n in range(4))}

    class Knowing:
        def __init__(self, spec, threshold):
            self.threshold = threshold

        def plain(self, found):
            return found

    def results(part, runner, framing, decoder, *_, **__):
        for n in range(len(part)):
            sample = part[n]
            found = []
            for each in decoder.decoders if hasattr(decoder, "decoders") else [decoder]:
                keypoints = np.zeros((len(truth.get(sample.id, sample.truth).keypoints) if sample.id in truth else 0, 17, 3))
                if sample.id in truth:
                    keypoints[:] = truth[sample.id].keypoints + (50 if each.threshold == 0.9 else 0)
                found.append(Poses(keypoints.astype(np.float32), np.ones(len(keypoints), np.float32)))
            yield sample, found if hasattr(decoder, "decoders") else found[0]

    monkeypatch.setattr(tune, "predict", results)
    measured = partial(CocoKeypoints)
    summary = tune.Tune(
        data,
        OnnxRuntime(),
        WholeImage(),
        partial(Knowing, threshold=wanted),
        lambda labels, found_labels: measured(labels=labels, found_labels=labels),
        PoseAgreement,
        "64x80",
    ).run(replace(job("chosen"), inputs={"network": exported}))
    assert summary["threshold"] == best
    assert summary["tune_ap"] > 0.9
    assert json.loads((job("x").out.parent / "chosen/decoder.json").read_text())["options"] == {"threshold": best}


def test_tune_images_without_people_measure_nothing(chain, exported):
    class Nothing(CocoKeypoints):
        def evaluate(self):
            return {**super().evaluate(), self.info.primary: -1}

    job, data = chain
    read = partial(HeatmapPafDecoder, heatmap_threshold=0.05, score_weights="tuned")
    where = replace(job("nothing"), inputs={"network": exported})
    summary = tune.Tune(data, OnnxRuntime(), WholeImage(), read, Nothing, None, "64x80").run(where)
    assert summary == {"heatmap_threshold": 0.05, "tune_images": 4} or not any("ap" in name for name in summary)
    written = json.loads((where.out / "decoder.json").read_text())
    assert written["options"]["score_weights"] is None
    assert [row["figure"] for row in written["tried"]] == [None]


# --- compare ---------------------------------------------------------------------------------------------------------------


def addresses(folder):
    return sorted(f.parent.name for f in (folder / "outputs/smoke/evaluate").glob("*/manifest.json"))


def test_two_engines_are_compared(smoke):
    first, second = (
        next(a for a in addresses(smoke) if word in a) for word in ("dense_64x80_pad_fp32", "dense_64x80_pad_int8")
    )
    done = pipeline(*SMOKE, "stage=compare", f"engines=[{first},{second}]", cwd=smoke, check=0)
    assert "second - first" in done.stdout
    content = json.loads((smoke / "outputs/smoke/compare/comparison.json").read_text())
    ap = next(row for row in content["pairs"][0]["figures"] if row["figure"] == "ap")
    assert ap["difference"] == pytest.approx(ap["second"] - ap["first"])
    assert ap["low"] <= ap["difference"] <= ap["high"]


def test_a_result_file_is_compared_with_an_engine_and_with_itself(smoke):
    address = addresses(smoke)[0]
    file = smoke / "outputs/smoke/evaluate" / address / "predictions.json"
    done = pipeline(*SMOKE, "stage=compare", f"engines=[{address},{file}]", cwd=smoke, check=0)
    assert "predictions.json" in "".join(done.stdout.split())  # a long path is folded
    content = json.loads((smoke / "outputs/smoke/compare/comparison.json").read_text())
    ap = next(row for row in content["pairs"][0]["figures"] if row["figure"] == "ap")
    assert (ap["difference"], ap["low"], ap["high"]) == pytest.approx((0, 0, 0), abs=1e-9)


def test_what_cannot_be_compared_is_refused(smoke):
    address = addresses(smoke)[0]
    other = smoke / "outputs/smoke/evaluate" / addresses(smoke)[1] / "draws.npz"
    draws = Draws.load(other)
    replace(draws, images=draws.images[1:]).save(other)
    bad = smoke / "bad.json"
    bad.write_text('[{"image_id": 1, "keypoints": [], "score": 1}]')
    for words, message in (
        ([], "engines=[]: give two"),
        ([f"engines=[{address}]"], "give two"),
        ([f"engines=[{address},{address}x]"], f"did you mean '{address}'"),
        ([f"engines=[{address},{addresses(smoke)[1]}]"], "evaluated on different images"),
        ([f"engines=[{address},{bad}]"], "result 0 has 0 keypoint numbers, not 51"),
        ([f"engines=[{address},none.json]"], "engines: none.json: no such file"),
        (["engines=[smoke,smoek]"], "smoke is a sweep and smoek is none; did you mean 'smoke'?; give two sweeps"),
    ):
        text = refused(pipeline(*SMOKE, "stage=compare", *words, cwd=smoke)).replace("\n", " ")
        assert message in text, text
    assert not (smoke / "outputs/smoke/compare").exists()


def test_sweeps_are_compared_address_by_address_and_the_report_shows_it(smoke):
    shutil.copytree(smoke / "outputs/smoke", smoke / "outputs/later")
    (benchmark,) = (smoke / "outputs/later/benchmark").glob("*dense*int8*/manifest.json")
    content = json.loads(benchmark.read_text())
    content["summary"]["device"] = "another machine"
    write_manifest(benchmark.parent, {key: value for key, value in content.items() if key != "seal"})
    shutil.rmtree(next((smoke / "outputs/later/evaluate").glob("*l1*int8*")))
    done = pipeline(*SMOKE, "stage=compare", "engines=[smoke,later]", cwd=smoke, check=0)
    assert "in one sweep only:" in done.stdout
    content = json.loads((smoke / "outputs/smoke/compare/comparison.json").read_text())
    assert len(content["pairs"]) == 3
    assert len(content["alone"]) == 1
    times = {p["name"]: next(r for r in p["figures"] if r["figure"] == "latency_p50_ms") for p in content["pairs"]}
    apart = [name for name, row in times.items() if "apart" in row]
    assert len(apart) == 1
    assert "dense" in apart[0]
    assert "int8" in apart[0]
    pipeline(*SMOKE, "stage=report", cwd=smoke, check=0)
    page = (smoke / "outputs/smoke/report/report.html").read_text()
    assert "smoke -&gt; later: ap" in page
    assert "not compared:" in page
    assert "another machine, 1 thread(s), batch 1" in page


# --- report ----------------------------------------------------------------------------------------------------------------


def result(tmp_path, name, values, **axes):
    folder = tmp_path / name
    folder.mkdir()
    Draws(("1", "2"), float(values[0]), np.array(values[1:])).save(folder / "draws.npz")
    common = {
        "calibration": "",
        "data": "coco",
        "network": "n",
        "pruning": "dense",
        "resolution": "368x432",
        "precision": "fp32",
    }
    figures = {"data_digest": "d", "ap": values[0], "primary": "ap"}
    return report.Result(folder, {**common, "keep_aspect_ratio_mode": "pad", "backend": "onnxruntime", **axes}, figures)


def test_the_waterfall_pairs_each_step_with_the_one_before(tmp_path):
    results = [
        result(tmp_path, "a", [0.35, 0.36, 0.34], backend="torch", keep_aspect_ratio_mode="adjust-x0.5-1-1.5-2-flip"),
        result(tmp_path, "b", [0.30, 0.31, 0.29], backend="torch", keep_aspect_ratio_mode="adjust"),
        result(tmp_path, "c", [0.28, 0.28, 0.28], backend="torch"),
        result(tmp_path, "d", [0.28, 0.28, 0.28]),
        result(tmp_path, "f", [0.10, 0.10, 0.10], precision="int8", calibration="bad"),
        result(tmp_path, "e", [0.27, 0.27, 0.26], precision="int8", calibration="good"),
        result(tmp_path, "g", [0.33, 0.33, 0.33], backend="torch", keep_aspect_ratio_mode="pad-flip"),
    ]
    ((title, rows),) = waterfall.waterfalls(results).items()
    assert "368x432" in title
    assert [name for name, _, _ in rows] == [
        "several scales, torch: adjust-x0.5-1-1.5-2-flip", "one scale, torch: adjust", "strict letterbox, torch: pad",
        "ONNX: pad", "INT8: pad good",
    ]  # fmt: skip
    found = {name.partition(":")[0]: (ap, difference) for name, ap, difference in rows}
    assert found["several scales, torch"][1] == ""
    assert found["one scale, torch"][1].startswith("-0.050 [-0.050, -0.050]")
    assert found["ONNX"][1].startswith("+0.000")
    assert found["INT8"][1].startswith("-0.010 [-0.0")
    assert found["INT8"][1].endswith("to ONNX"), "FP16 was not measured"
    assert waterfall.waterfalls(results[3:6]) == {}, "AP − FP32 tells it"
    foreign = replace(results[3], figures={"data_digest": "other", "primary": "ap", "ap": 0.28})
    ((_, rows),) = waterfall.waterfalls([*results[:3], foreign]).items()
    assert rows[3][2] == "", "no difference over different images"


def test_what_was_not_measured_is_no_figure(tmp_path):
    one = result(tmp_path, "a", [0.3, 0.3, 0.3])
    old = replace(one, figures={**one.figures, "ap_large": -1.0, "agreement_ap": -1.0, "ap_lo": 0.2})  # of an earlier version
    row = report._row(old, [old])
    assert row["ap_large"] == row["agreement_ap"] == row["latency_p50_ms"] == ""
    assert row["ap_lo"] == 0.2
    sides = [Side({"ap": 0.3, "ap_large": large, "primary": "ap"}, {}, {}) for large in (-1.0, 0.2)]
    rows = rows_of(*sides, ["a", "b"])
    assert [found["figure"] for found in rows] == ["ap"]
    before = {"figure": "ar_large", "first": -1.0, "second": -1.0, "difference": 0.0}  # as earlier versions wrote it
    ((_, _, shown),) = tables.differences(["a", "b"], [{"name": "", "figures": [*rows, before]}])
    assert shown[1] == ["ar_large", "–", "–", "–"]
    sides = [Side({"ap": 0.3, "primary": "ap", **more}, {}, {}) for more in ({"agreement_ap": 0.9}, {})]
    (_, told) = rows_of(*sides, ["a", "b"])
    assert told["apart"] == "measured only for a"
    ((_, _, shown),) = tables.differences(["a", "b"], [{"name": "", "figures": [told]}])
    assert shown[0] == ["agreement_ap", "0.9000", "–", "not compared: measured only for a"]


def test_the_rank_correlation_is_spearmans():
    from scipy.stats import spearmanr

    draw = np.random.default_rng(0)
    ap = draw.integers(0, 6, 9) / 10
    agreement = ap + draw.integers(-2, 3, 9) / 10 + 0.5
    seen = {"data": "d", "data_digest": "x", "keep_aspect_ratio_mode": "pad", "precision": "int8", "metric": CocoKeypoints.info}
    seen |= dict.fromkeys(("network", "pruning", "resolution", "calibration", "backend"), "")
    rows = [
        {**seen, "calibration": n, "ap_vs_fp32": a, "agreement_ap": b}
        for n, (a, b) in enumerate(zip(ap, agreement, strict=True))
    ]
    assert waterfall.rank_correlation(rows) == pytest.approx(spearmanr(ap, agreement).statistic)
    assert waterfall.rank_correlation([*rows, *rows]) == waterfall.rank_correlation(rows), "timed twice, counted once"
    assert waterfall.rank_correlation(rows[:3]) is None
    assert waterfall.rank_correlation([*rows[:3], *rows[:3]]) is None
    assert waterfall.rank_correlation([{**row, "ap_vs_fp32": -0.3} for row in rows]) is None
    research = [{**row, "keep_aspect_ratio_mode": "pad-flip"} for row in rows]
    assert waterfall.rank_correlation(research) is None
    none = [{**row, "agreement_ap": ""} for row in rows]
    assert waterfall.rank_correlation(none) is None


def test_engines_of_different_images_or_machines_share_no_plot():
    row = {"data": "d", "data_digest": "x", "device": "a", "threads": 1, "batch": 1, "metric": CocoKeypoints.info}
    other = {"metric": MetricInfo("miou", "mean IoU", "mIoU")}
    changes = ({}, {"data_digest": "y"}, {"device": "b"}, {"threads": 2}, {"batch": 8}, other, {})
    assert report.comparable([{**row, **change} for change in changes]) == [[0, 6], [1], [2], [3], [4], [5]]


# --- backends and families -------------------------------------------------------------------------------------------------


def test_torch_runs_what_was_exported(smoke):
    pipeline(*SMOKE, "backend=torch", cwd=smoke, check=0)
    rows = list(csv.DictReader((smoke / "outputs/smoke/report/results.csv").open()))
    ours = next(row for row in rows if row["backend"] == "torch")
    assert ours["ran"] == "fp32 100%"
    theirs = next(
        row for row in rows if row["backend"] == "onnxruntime" and row["precision"] == "fp32" and row["pruning"] == "dense"
    )
    assert float(ours["ap"]) == pytest.approx(float(theirs["ap"]), abs=1e-3)
    text = refused(pipeline(*SMOKE, "backend=torch", "precision=int8", cwd=smoke))
    assert "precision=int8: backend=torch runs fp32, fp16, bf16" in text.replace("\n", " ")


def test_too_little_int8_fails_the_benchmark(smoke):
    words = [*SMOKE, "stage=benchmark", "stages.benchmark.min_int8_share=0.5"]
    text = refused(pipeline(*words, cwd=smoke)).replace("\n", " ")
    assert "min_int8_share=0.5: only 0.000 of the MACs" in text
    assert "build it with precision=int8" in text
    done = pipeline(*words, "precision=int8", cwd=smoke, check=0)
    assert "done" in done.stderr


def test_a_topdown_network_goes_through_the_chain(tmp_path):
    """A network that answers each crop with the same person: its AP is nothing, its way through every stage is all."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    draw = np.random.default_rng(0)
    weights = numpy_helper.from_array(draw.normal(0, 0.1, (17, 3, 4, 4)).astype(np.float32), "w")
    node = helper.make_node("Conv", ["image", "w"], ["c"], strides=[4, 4])
    squash = helper.make_node("Sigmoid", ["c"], ["heatmaps"])
    shapes = ["batch", 3, "h", "w_"], ["batch", 17, "oh", "ow"]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node, squash],
        "g",
        [value("image", TensorProto.FLOAT, shapes[0])],
        [value("heatmaps", TensorProto.FLOAT, shapes[1])],
        [weights],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "net.onnx")
    spec = (
        "model.spec={input:{name:image,order:RGB,range:1.0,mean:[0,0,0],std:[1,1,1],pad:0,multiple:4,offset:0},"
        "fields:[{name:heatmaps,stride:4,channels:17,shift:0.0}],labels:coco_17}"
    )
    words = [*SMOKE, "family=topdown", "model=onnx", "model.onnx=net.onnx", spec]
    done = pipeline(*words, "training_resolution=64x48", "batch=3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = list(csv.DictReader((tmp_path / "outputs/smoke/report/results.csv").open()))
    assert rows[0]["keep_aspect_ratio_mode"] == "crop1.25"
    assert rows[0]["agreement_ap"] == ""
    assert float(rows[0]["latency_p50_ms"]) > 0
    (predictions,) = (tmp_path / "outputs/smoke/evaluate").glob("*/predictions.json")
    assert len(json.loads(predictions.read_text())) > 5


def test_a_family_without_training_says_so(tmp_path):
    text = refused(pipeline(*SMOKE, "family=boxes", cwd=tmp_path)).replace("\n", " ")
    assert "networks are not trained here: give model=onnx" in text


def test_several_views_are_not_timed(smoke):
    done = pipeline(*SMOKE, "flip=true", "stage=[quantize,build,tune,evaluate,benchmark]", cwd=smoke, check=0)
    (folder,) = (smoke / "outputs/smoke/benchmark").glob("*pad-flip*")
    assert json.loads((folder / "latency.json").read_text())["timed"] == 0
    assert "p50" not in done.stderr


def test_the_audit_counts_the_macs_of_the_file(finished):
    import onnx

    from pipeline.backends.macs import macs
    from pipeline.onnx_files.files import read_spec

    for engine in (finished / "outputs/smoke/build").glob("*fp32*/engine.onnx"):
        size = evaluate.Resolution(64, 80)
        layers = OnnxRuntime().audit(engine, size)
        assert sum(layer["macs"] for layer in layers) == sum(macs(onnx.load(engine), size, read_spec(engine).input).values()), (
            "padded channels are no work"
        )


def test_the_audit_names_what_is_quantized_and_did_not_run_in_int8(finished):
    (built,) = (finished / "outputs/smoke/build").glob("*_dense_64x80*int8*onnxruntime*/engine.onnx")
    assert audit.unmet(OnnxRuntime().audit(built, evaluate.Resolution(64, 80))) == []
    (manifest,) = (finished / "outputs/smoke/benchmark").glob("*_dense_64x80*int8*onnxruntime*/manifest.json")
    assert json.loads(manifest.read_text())["summary"]["not_in_int8"] == []
    (other,) = (finished / "outputs/smoke/quantize").glob("*_dense_64x80*int8*/model.tensorrt.onnx")
    found = audit.unmet(OnnxRuntime().audit(other, evaluate.Resolution(64, 80)))
    assert found, "TensorRT's flavour leaves outputs of convolutions in float, which ONNX Runtime cannot fuse"
    assert [layer["reason"] for layer in found if layer["macs"]] == [
        "its output is not quantized, so that it cannot be fused into one integer kernel"
    ] * sum(layer["macs"] > 0 for layer in found)
