"""Which engine the report recommends, what the terminal shows, and the network that the demo begins with."""

import csv
import hashlib
import io
from dataclasses import asdict, replace

import numpy as np
import pytest

from evaluation.contracts import MetricInfo
from evaluation.metrics.coco_keypoints import CocoKeypoints
from evaluation.statistics import Draws
from pipeline.report import card as card_module
from pipeline.report import tables
from pipeline.report.card import write_card
from pipeline.report.choice import choices, said
from pipeline.report.collect import AXES, PEOPLE, Result, Table, _row, columns
from pipeline.report.page import write_html
from pipeline.report.tables import narrow, of_people, tabulated, write_csv
from tests.conftest import ROOT

SPREAD = np.linspace(-0.002, 0.002, 101)


def engine(folder, name, ap, ms, lost=SPREAD, **more):
    """A row and its result; `lost` is added to the draws, so that the paired difference has a spread."""
    folder = folder / name.replace(" ", "-")
    folder.mkdir()
    Draws(("1", "2"), ap, ap + lost).save(folder / "draws.npz")
    row = dict.fromkeys([*columns([CocoKeypoints.info]), *PEOPLE], "") | {
        "metric": CocoKeypoints.info,
        "data": "test", "data_digest": "d", "device": "a processor", "threads": 1, "batch": 1, "ap": ap, "latency_p50_ms": ms,
        "network": name, "pruning": "dense", "resolution": "64x80", "precision": "fp32", "keep_aspect_ratio_mode": "pad",
        "macs": 515850240, "rebuild": 0, "ap_lo": ap - 0.02, "ap_hi": ap + 0.02, "as_found_ap": ap, "agreement_ap": ap, **more,
    }  # fmt: skip
    return row, Result(folder, row, row | {"metric": asdict(CocoKeypoints.info)})


def table(*engines):
    return Table([row for row, _ in engines], [result for _, result in engines], [])


def test_the_fastest_engine_that_loses_next_to_nothing_is_chosen(tmp_path):
    made = table(
        engine(tmp_path, "slow", 0.800, 9.0),
        engine(tmp_path, "fast", 0.797, 4.0, SPREAD * 2),
        engine(tmp_path, "lossy", 0.780, 2.0),
        engine(tmp_path, "never timed", 0.790, ""),
    )
    (sentence,) = choices(made)
    assert sentence.startswith(
        "Ship fast dense 64x80 fp32: 4.00 ms, AP 0.797, -0.003 [-0.005, -0.001] to slow dense 64x80 fp32, which"
    )


def test_an_interval_that_reaches_further_disqualifies(tmp_path):
    made = table(engine(tmp_path, "slow", 0.8, 9.0), engine(tmp_path, "unsure", 0.8 - 1e-6, 4.0, SPREAD * 10))
    (sentence,) = choices(made)
    assert sentence.startswith("Ship slow")
    assert "AP 0.800, the highest here." in sentence
    assert "unsure dense 64x80 fp32 takes 4.00 ms. It differs by -0.0000, but may lose up to 0.0171: more" in sentence


def test_an_engine_that_is_slower_than_its_fp32_is_not_chosen(tmp_path):
    slower = {"speedup_vs_fp32": 0.88, "speedup_vs_fp32_lo": 0.87, "speedup_vs_fp32_hi": 0.89, "precision": "int8"}
    fp32 = engine(tmp_path, "fp32", 0.800, 7.0, SPREAD * 10)
    (sentence,) = choices(table(fp32, engine(tmp_path, "int8", 0.805, 8.0, **slower)))
    assert sentence.startswith("Ship fp32")
    assert "It is the fastest" in sentence
    (alone,) = choices(table(engine(tmp_path, "alone", 0.805, 8.0, **slower)))
    assert alone.startswith("Ship alone")
    assert "It is the fastest" not in alone


def test_research_settings_and_other_machines_are_told_apart(tmp_path):
    made = table(
        engine(tmp_path, "here", 0.8, 9.0),
        engine(tmp_path, "flipped", 0.9, 1.0, keep_aspect_ratio_mode="pad-flip"),
        engine(tmp_path, "there", 0.7, 1.0, device="another"),
    )
    assert [sentence.split()[1] for sentence in choices(made)] == ["here", "there"]


@pytest.mark.parametrize("ap", [0.0, -1.0])
def test_engines_that_find_nothing_are_not_recommended(tmp_path, ap):
    made = table(engine(tmp_path, "slow", ap, 9.0), engine(tmp_path, "fast", ap, 1.0))
    assert said(list(choices(made))).startswith(f"No engine is recommended: the highest AP is {ap:.3f}")


def test_the_loss_to_its_own_fp32_is_said_and_where_the_thresholds_lie(tmp_path):
    figures = {
        "ap_vs_fp32": -0.001,
        "ap_vs_fp32_lo": -0.003,
        "ap_vs_fp32_hi": 0.002,
        "speedup_vs_fp32": 2.0,
        "speedup_vs_fp32_lo": 1.9,
        "speedup_vs_fp32_hi": 2.1,
    }
    row, result = engine(tmp_path, "small", 0.8, 4.0, precision="int8", **figures)
    (sentence,) = choices(table((row, replace(result, made_of={"tune": tmp_path / "tune"}))))
    assert "The AP's difference to its FP32 is -0.001 [-0.003, +0.002]." in sentence
    assert "It is 2.00 [1.90, 2.10] times as fast as its FP32." in sentence
    assert str(tmp_path / "tune" / "decoder.json") in sentence


def test_a_doubt_is_said_once_with_the_engines_that_it_is_of(tmp_path):
    made = [
        engine(tmp_path, name, 0.002, 9.0, doubts=["3 are left out", f"AP is 0.00{n}, implausible"])
        for n, name in enumerate("abcd")
    ]
    made = table(*made, made[0])  # timed twice
    shared, *own = made.doubts
    assert shared == "a dense 64x80 fp32, b dense 64x80 fp32, c dense 64x80 fp32 ...: 3 are left out"
    assert own[0] == "a dense 64x80 fp32: AP is 0.000, implausible"
    assert len(own) == 4
    card_module.write_card(made, "demo", tmp_path / "card.md")
    assert shared in (tmp_path / "card.md").read_text()


def test_a_median_that_missed_its_precision_is_marked(tmp_path):
    rows = [engine(tmp_path, str(width), 0.8, 12.5, latency_width=width)[0] for width in (0.01, 0.03)]
    assert [row["p50 ms"] for row in tables.narrow(rows)] == ["12.50", "12.50*"]
    assert "wider than 2%" in tables.latency_notes(rows)[-1]
    assert len(tables.latency_notes(rows[:1])) == 1
    card_module.write_card(Table(rows, [Result(tmp_path, row, row) for row in rows], []), "demo", tmp_path / "card.md")
    assert "raise stages.benchmark.seconds" in (tmp_path / "card.md").read_text()
    assert tables.latency_notes([engine(tmp_path, "untimed", 0.8, "")[0]]) == []


def test_without_timings_the_next_command_is_named(tmp_path):
    assert "Run stage=benchmark" in said(list(choices(table(engine(tmp_path, "slow", 0.8, "")))))


def test_the_printed_table_fits_100_columns(tmp_path, monkeypatch):
    from rich import console

    from pipeline.stages.report import _print

    intervals = {
        f"{name}{end}": -0.0123 for name in ("ap_vs_fp32", "ap_vs_dense", "speedup_vs_fp32") for end in ("", "_lo", "_hi")
    }
    rows = [engine(tmp_path, f"lwop-s2-w0.5-{n}", 0.8, 12.5, pruning="l1-0.45-r16", **intervals) for n in range(3)]
    out = io.StringIO()
    plain = console.Console
    monkeypatch.setattr(console, "Console", lambda *a, **k: plain(*a, **k, file=out))
    _print(table(*rows), "demo", tmp_path / "shown.txt")
    shown = out.getvalue()
    assert (tmp_path / "shown.txt").read_text() == shown
    printed = shown[: shown.index("Ship ")].splitlines()
    assert max(map(len, printed)) <= 100
    assert "…" not in shown
    assert "[-.012, -.012]" in shown
    assert all(column in shown for column in tables.narrow([rows[0][0]])[0])


def test_the_demos_network_is_whole_and_small():
    from safetensors.torch import load_file

    from pipeline.models import store
    from pipeline.models.lightweight_openpose import LightweightOpenPose

    file = ROOT / "data/networks/lightweight_openpose_w0.5_demo.safetensors"
    assert file.stat().st_size <= 5e6
    state = load_file(file)
    assert {str(tensor.dtype) for tensor in state.values()} == {"torch.float32", "torch.int64"}
    store.load_state(LightweightOpenPose(2, 0.5), state, file)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (file.parent / "README.md").read_text()


@pytest.mark.parametrize("experiment", ["demo", "demo_untrained"])
def test_the_demo_begins_trained_and_can_begin_from_nothing(experiment):
    from tests.pipeline.launch.test_config import compose

    config = compose(f"experiment={experiment}")
    trained = experiment == "demo"
    assert (config.weights is not None) == trained == (config.stages.train.training.steps == 0)


def test_tables_and_sentences_take_names_from_the_metric(tmp_path):
    info = MetricInfo("miou", "mean IoU of all classes", "mIoU", columns=("iou_road",), digits=2)
    results = []
    for name, precision, values, ms in (("a", "fp32", (0.5, 0.5, 0.52), 10.0), ("b", "int8", (0.499, 0.499, 0.519), 4.0)):
        (tmp_path / name).mkdir()
        Draws(("1", "2"), values[0], np.array(values[1:])).save(tmp_path / name / "draws.npz")
        axes = dict.fromkeys(AXES, "") | {"network": "unet", "pruning": "dense", "precision": precision, "rebuild": 0}
        figures = {
            "metric": asdict(info),
            "miou": values[0],
            "miou_lo": 0.4,
            "miou_hi": 0.6,
            "iou_road": 0.7,
            "data_digest": "d",
        }
        timed = {
            "latency_p50_ms": ms,
            "latency_p50_ms_lo": ms,
            "latency_p50_ms_hi": ms,
            "device": "a processor",
            "ran": "fp32 100%",
        }
        results.append(Result(tmp_path / name, axes, {**figures, **timed, "threads": 1, "batch": 1, "images": 2}))
    table = Table([_row(result, results) for result in results], results, [])
    write_csv(table, tmp_path / "results.csv")
    first, second = csv.DictReader((tmp_path / "results.csv").open())
    assert "ap" not in first
    assert (first["miou"], first["iou_road"], second["miou_vs_fp32"]) == ("0.5", "0.7", str(table.rows[1]["miou_vs_fp32"]))
    assert narrow(table.rows)[0]["mIoU [95 %]"] == ".50\n[.40, .60]"
    assert tabulated(table.rows)[1]["mIoU − FP32"].startswith("-0.00")
    (sentence,) = choices(table)
    assert "4.00 ms, mIoU 0.50, -0.00 [-0.00, -0.00] to unet dense  fp32" in sentence
    write_card(table, "roads", tmp_path / "card.md")
    assert "mIoU: mean IoU of all classes on 2 validation images" in (tmp_path / "card.md").read_text()


def test_the_columns_of_keypoint_results_keep_their_names():
    names = columns([CocoKeypoints.info])
    assert names[18] == "boxes"
    assert names[19:27] == ["ap", "ap_lo", "ap_hi", "ap50", "ap75", "ap_medium", "ap_large", "as_found_ap"]
    assert names.index("latency_p50_ms") == names.index("ap_vs_dense_hi") + 1


TIMES = {"image_1_ms": 1.5, "image_5_ms": 6.5, "image_20_ms": 25.0, "latency_p50_ms": 1.25}
DETECTED = {"detector_ms": 9.0, "chain_1_ms": 10.5, "chain_5_ms": 15.5, "chain_20_ms": 34.0, "boxes": "finder-s0.3"}


def on_page(made, folder):
    """The page of a table whose engines found nothing worth a picture."""
    for result in made.results:
        (result.folder / "pictures").mkdir()
        (result.folder / "pictures" / "captions.json").write_text("{}")
        (result.folder / "details.json").write_text("{}")
    write_html(made, "people", folder / "report.html")
    return (folder / "report.html").read_text()


def test_the_columns_of_times_are_those_that_are_measured():
    from pipeline.probing import timing

    images, chains = ([f"{what}_{n}_ms" for n in timing.PEOPLE] for what in ("image", "chain"))
    assert [*images, "detector_ms", *chains] == list(PEOPLE)


def test_times_of_images_with_people_have_a_table_and_columns(tmp_path):
    axes = {"images": 9, "calibration": "", "data_digest": "d"}
    made = table(
        engine(tmp_path, "crops", 0.8, 0.0, **axes, **TIMES),
        engine(tmp_path, "crops found", 0.7, 0.0, **axes, **TIMES, **DETECTED),
        engine(tmp_path, "whole images", 0.8, 3.0, **axes),
    )
    alone, found = of_people(made.rows)
    assert list(alone.values()) == ["crops dense 64x80 pad fp32", "1.25", "1.50", "6.50", "25.00", "–", "–", "–", "–"]
    assert list(found.values())[5:] == ["9.00", "10.50", "15.50", "34.00"]
    assert found["engine"].endswith("finder-s0.3")
    page = on_page(made, tmp_path)
    assert "<h2>Time of an image with 1, 5 and 20 people</h2>" in page
    assert "In ms, on a processor, 1 thread(s), batch 1." in page
    assert "Together is the sum of the two medians, which were measured apart." in page
    assert "<td>34.00</td>" in page
    write_csv(made, tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["image_5_ms"] for row in rows] == ["6.5", "6.5", ""]
    assert [row["chain_5_ms"] for row in rows] == ["", "15.5", ""]
    assert [row["boxes"] for row in rows] == ["", "finder-s0.3", ""]


def test_without_times_of_people_there_is_no_table_of_them(tmp_path):
    made = table(engine(tmp_path, "whole images", 0.8, 3.0, images=9))
    assert of_people(made.rows) == []
    assert "Time of an image" not in on_page(made, tmp_path)


def test_each_row_names_its_machine_if_there_are_several(tmp_path):
    made = [engine(tmp_path, name, 0.8, 0.0, **{**TIMES, "device": name})[0] for name in ("one", "other")]
    assert [row["measured on"] for row in of_people(made)] == ["one, 1 thread(s), batch 1", "other, 1 thread(s), batch 1"]
    assert "measured on" not in of_people(made[:1])[0]


def test_a_time_that_is_no_number_is_not_shown(tmp_path):
    """Figures of a device are checked, but may be texts where a table has no column for them."""
    _, result = engine(tmp_path, "forged", 0.8, 3.0, image_1_ms="fast", image_5_ms=6.5)
    row = _row(replace(result, axes=dict.fromkeys(AXES, "")), [])
    assert (row["image_1_ms"], row["image_5_ms"]) == ("", 6.5)


def test_rows_that_differ_only_in_their_boxes_are_told_apart(tmp_path):
    annotated, found = (
        engine(tmp_path, name, ap, 3.0, network="crops", boxes=boxes, data_digest=name, images=9)
        for name, ap, boxes in (("annotated", 0.8, ""), ("detected", 0.7, "finder"))
    )
    made = table(annotated, found)
    assert [row["boxes"] for row in tabulated(made.rows)] == ["–", "finder"]
    assert [row["boxes"] for row in narrow(made.rows)] == ["–", "finder"]
    assert "boxes" not in tabulated(made.rows[1:])[0]
    assert "boxes" not in narrow(made.rows[1:])[0]
    ours, theirs = choices(made)
    assert ours.startswith("Ship crops dense 64x80 fp32:")
    assert theirs.startswith("Ship crops dense 64x80 fp32 with boxes by finder:")
    page = on_page(made, tmp_path)
    assert "test, 9 images, boxes by finder; a processor" in page
    assert "What crops dense · fp32 · 64x80 pad, boxes by finder finds" in page


def test_the_axis_of_boxes_is_a_column(tmp_path):
    _, result = engine(tmp_path, "crops", 0.8, 3.0)
    axes = dict.fromkeys(AXES, "")
    assert _row(replace(result, axes=axes), [])["boxes"] == ""
    assert _row(replace(result, axes={**axes, "boxes": "finder"}), [])["boxes"] == "finder"
