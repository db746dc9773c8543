"""The command: what it prints, what it refuses, what it survives."""

import errno
import json
import shutil
from pathlib import Path

import pytest

from pipeline.launch.messages import message_of as _message
from tests.conftest import SMOKE, pipeline, refused, snapshot

CELL = [*SMOKE, "precision=int8"]


# Wrong options are in wrong_options.yaml; these go all the way to the exit status.
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=trian"], "stage=trian: no such stage; did you mean 'train'"),
        (["precision=int9"], "precision=int9: no such choice; did you mean 'int8'?"),
        (["modle=onnx"], "modle: no such option; did you mean 'model'"),
        (["name=../elsewhere"], "name=../elsewhere: choose letters"),
        (["stage=build"], "make it with: python -m pipeline stage=quantize experiment=smoke"),
        (["experiment=mobilenetv2_paf_coco"], "has no value"),
        (["stages.train.training.steps=0"], "no weights=FILE"),
        (["outputs=/proc/nowhere"], "outputs=/proc/nowhere: cannot write there"),
        (["sampler.num_images=9999", "precision=int8", "stage=sample"], "only 24 images are eligible"),
    ],
)
def test_bad_input_is_refused(tmp_path, words, message):
    done = pipeline(*SMOKE, *words, cwd=tmp_path)
    text = refused(done)
    assert message in text.replace("\n", " "), text
    assert not list((tmp_path / "outputs").rglob("manifest.json"))


def test_a_finished_chain_is_not_run_again(smoke):
    before = snapshot(smoke)
    done = pipeline(*SMOKE, cwd=smoke, check=0)
    fresh = [line.split()[0] for line in done.stderr.splitlines() if " fresh " in line]
    assert fresh == ["train", "export", "quantize", "build", "tune", "evaluate", "benchmark", "report"]
    assert snapshot(smoke) == before
    assert "lwop-s2-w0.125" in done.stdout, "the table is shown again"
    assert "No engine is recommended: the highest AP is" in done.stdout


def test_a_change_runs_what_depends_on_it(smoke):
    done = pipeline(*SMOKE, "stages.evaluate.pictures=2", cwd=smoke, check=0)
    ran = [line.split()[0] for line in done.stderr.splitlines() if " done " in line]
    assert ran == ["evaluate", "report"]


def test_a_sweep_finishes_its_cells_and_lists_those_that_failed(smoke):
    words = ["--multirun", *SMOKE, "resolution=64x80,100x100,72x88", "stage=[quantize,build,tune,evaluate,report]"]
    done = pipeline(*words, cwd=smoke)
    text = refused(done)
    assert "1 of 3 cells failed" in text
    assert "resolution=100x100" in text
    rows = (smoke / "outputs/smoke/report/results.csv").read_text().splitlines()
    assert any(",72x88," in row for row in rows)


def test_two_cells_that_would_share_an_address_are_an_error(smoke):
    done = pipeline("--multirun", *SMOKE, "stage=[tune,evaluate]", "decoder.paf_threshold=0.06,0.07", cwd=smoke)
    text = refused(done)
    assert "1 of 2 cells failed" in text
    assert "tell them apart with tag=" in text


def test_what_is_asked_for_is_in_the_results(finished):
    folder = finished / "outputs/smoke/report"
    rows = (folder / "results.csv").read_text().splitlines()
    wanted = (
        "network,params,macs,resolution,precision,ran,backend,device,threads,images,ap,ap_lo,ap_hi,ap50,ap75,ap_medium,ap_large,"
        "latency_p50_ms,latency_p95_ms,engine_mb,data_digest"
    )
    assert set(wanted.split(",")) <= set(rows[0].split(","))
    assert len(rows) == 5
    page = (folder / "report.html").read_text()
    engines = page[page.index("<h2>Engines</h2>") :]
    assert engines[: engines.index("</table>")].count("<tr") == 5
    assert "data:image/jpeg;base64," in page
    assert "http" not in page.split("</script>")[-1].replace("http://www.w3.org", "")
    assert (folder / "model_card.md").read_text().startswith("# smoke")


def test_a_damaged_input_is_refused_and_nothing_else_is_lost(smoke):
    (model,) = (smoke / "outputs/smoke/export").glob("*_dense/model.onnx")
    model.write_bytes(model.read_bytes() + b"x")
    before = snapshot(smoke)
    text = refused(pipeline(*SMOKE, "stage=quantize", cwd=smoke))
    assert "changed since it was made; make it again with: python -m pipeline stage=export" in text
    assert snapshot(smoke) == before
    pipeline(*SMOKE, "tracking=none", cwd=smoke, check=0)  # the chain mends it


def test_a_damaged_cell_is_left_out_of_the_report_and_said(smoke):
    (file,) = (smoke / "outputs/smoke/evaluate").glob("*_dense_*fp32*/metrics.json")
    file.write_text("{}")
    done = pipeline(*SMOKE, "stage=report", cwd=smoke, check=0)
    assert "is damaged; run its cell again with force=true" in done.stderr
    assert len((smoke / "outputs/smoke/report/results.csv").read_text().splitlines()) == 4


def test_a_damaged_image_is_named(smoke):
    (folder,) = (smoke / "outputs/cache/synthetic").glob("v*/images/validation")
    file = min(folder.iterdir())
    file.write_bytes(file.read_bytes()[:300])
    text = refused(pipeline(*SMOKE, "stage=evaluate", "force=true", cwd=smoke))
    assert f"{file.name} (not a whole image)" in text


def test_strict_false_skips_and_counts(images, tmp_path):
    shutil.copytree(images.folder, tmp_path / "coco")
    root = tmp_path / "coco"
    victim = sorted((root / "images/validation").iterdir())[3]
    victim.write_bytes(b"")
    words = [
        *SMOKE, "data=coco", f"data.train.images={root}/images/train", f"data.train.annotations={root}/annotations/train.json",
        f"data.val.images={root}/images/validation", f"data.val.annotations={root}/annotations/validation.json",
        "stage=[train,export,quantize,build,tune,evaluate]",
    ]  # fmt: skip
    assert "not a whole image" in refused(pipeline(*words, cwd=tmp_path))
    done = pipeline(*words, "strict=false", cwd=tmp_path, check=0)
    assert "evaluate   skipped 1 images" in done.stderr
    (metrics,) = (tmp_path / "outputs/smoke/evaluate").glob("*/metrics.json")
    assert json.loads(metrics.read_text())["images"] == 23
    manifest = json.loads((metrics.parent / "manifest.json").read_text())
    assert manifest["summary"]["images_skipped"] == 1


def test_a_full_disk_leaves_the_earlier_result(smoke, monkeypatch):
    """/dev/full is a disk that is always full: the report's table is written there."""
    before, real = snapshot(smoke), Path.open

    def full(file, *how, **options):
        return real(Path("/dev/full"), "w") if file.name == "results.csv" and "w" in how else real(file, *how, **options)

    monkeypatch.setattr(Path, "open", full)
    done = pipeline(*SMOKE, "stage=report", "force=true", cwd=smoke)
    assert "No space left on device; free some space" in refused(done)
    assert snapshot(smoke) == before


def test_the_given_onnx_file_goes_through_the_chain(smoke):
    (model,) = (smoke / "outputs/smoke/export").glob("*_dense/model.onnx")
    words = [*SMOKE, "name=adopted", "model=onnx", f"model.onnx={model}", "model.spec.input.order=RGB"]
    words += ["model.spec.input.range=1", "model.spec.input.mean=[.5,.5,.5]", "model.spec.input.std=[.5,.5,.5]"]
    words += ["model.spec.input.multiple=8", "precision=int8", "stage=[export,sample,quantize,build,tune,evaluate,report]"]
    pipeline(*words, cwd=smoke, check=0)

    def metrics(name, label):
        (file,) = (smoke / f"outputs/{name}/evaluate").glob(f"{label}*_int8*/metrics.json")
        return json.loads(file.read_text())

    ours, theirs = metrics("adopted", "onnx_dense"), metrics("smoke", "lwop-s2-w0.125_dense")
    assert [ours[k] for k in ("ap", "ar", "images")] == [theirs[k] for k in ("ap", "ar", "images")]


def test_debug_shows_the_traceback(tmp_path):
    done = pipeline(*SMOKE, "stage=[]", "debug=true", cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_results_hold_no_path_of_this_machine(finished):
    for file in (finished / "outputs/smoke").rglob("manifest.json"):
        assert str(finished) not in file.read_text()
        assert str(Path.home()) not in file.read_text()


def test_a_file_that_is_gone_is_not_a_folder_that_cannot_be_written(tmp_path):
    file = str(tmp_path / "captions.json")
    gone = _message(FileNotFoundError(errno.ENOENT, "No such file or directory", file), tmp_path)
    assert gone == f"{file}: No such file or directory; make it again with force=true"
    full = _message(OSError(errno.ENOSPC, "No space left on device", file), tmp_path)
    assert full == f"{file}: No space left on device; free some space and run the same command again"
    denied = _message(PermissionError(errno.EACCES, "Permission denied", file), tmp_path)
    assert denied == f"outputs={tmp_path}: cannot write there (Permission denied); choose another folder with outputs=DIR"
