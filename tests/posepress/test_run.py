"""Prediction of whole sources: what they are, the files that come out, and what is refused."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import posepress
from posepress.cli import main
from posepress.errors import UserError
from posepress.run import Options, run
from posepress.sources import Shot, Source, open_source
from posepress.writers import writers
from tests.posepress.planted import one_stage, picture, top_down


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return one_stage(tmp_path_factory.mktemp("planted") / "bundle")


@pytest.fixture
def model(bundle):
    with posepress.load(bundle) as loaded:
        yield loaded


@pytest.fixture
def photos(tmp_path):
    for n in range(5):
        picture(tmp_path / "photos" / f"{n}.png", 64 + n, 80)
    return tmp_path / "photos"


def names(source):
    return [shot.name.rpartition("/")[2] for shot in source.shots]


def test_a_folder_gives_its_images_in_order(photos):
    source = open_source(photos)
    assert (source.name, source.total) == ("photos", 5)
    shots = list(source.shots)
    assert [shot.sample.size.height for shot in shots] == [64, 65, 66, 67, 68]
    assert shots[1].sample.read() is shots[1].sample.read(), "a detector and a network share the pixels"


def test_a_pattern_and_a_file(photos):
    assert names(open_source(f"{photos}/[13].png")) == ["1.png", "3.png"]
    assert names(open_source(photos / "2.png")) == ["2.png"]


def test_paths_come_from_the_standard_input(photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{photos}/4.png\n\n{photos}/0.png\n"))
    source = open_source("-")
    assert source.total is None
    assert names(source) == ["4.png", "0.png"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert names(open_source("-")) == []


def test_other_files_of_a_folder_are_named_or_counted(photos):
    (photos / "notes.txt").write_text("none")
    (photos / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"notes.txt: no images; remove them, or skip them with strict=false"):
        open_source(photos)
    source = open_source(photos, strict=False)
    assert len(names(source)) == 5
    assert source.counts["skipped_files"] == 2
    (photos / "notes.txt").unlink()
    with pytest.raises(UserError, match="broken.png"):
        list(open_source(photos).shots)


@pytest.mark.parametrize("given", ["nothing.jpg", "nothing/*.jpg"])
def test_absent_sources_are_refused(given):
    with pytest.raises(UserError, match="no such image, folder, video or pattern"):
        open_source(given)


def test_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds no file"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(UserError, match="no images"):
        open_source(tmp_path, strict=False)


def test_all_files_of_a_folder_of_images(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    done = run(model, [photos], Options(out, ("overlay", "coco", "csv"), jsonl=True))
    assert (done["images"], done["instances"]) == (5, 10)
    assert sorted(file.name for file in out.iterdir()) == [*(f"{n}.jpg" for n in range(5)), "photos.csv", "photos.json"]
    rows = json.loads((out / "photos.json").read_text())
    assert [row["image_id"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    table = list(csv.DictReader((out / "photos.csv").open()))
    assert len(table) == 10
    assert float(table[0]["head_score"]) == pytest.approx(0.9)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2, 3, 4]


def test_nothing_found_makes_whole_files(model, photos, tmp_path):
    run(model, [photos], Options(tmp_path / "out", ("coco", "csv"), threshold=1.0), quiet=True)
    assert json.loads((tmp_path / "out/photos.json").read_text()) == []
    assert "head_x" in (tmp_path / "out/photos.csv").read_text()


def test_several_sources_at_once(model, photos, tmp_path):
    for n in range(3):
        picture(tmp_path / "more" / f"{n}.png")
    done = run(model, [photos, tmp_path / "more"], Options(tmp_path / "out", ("coco",)), quiet=True)
    assert done["images"] == 8
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["more.json", "photos.json"]
    picture(tmp_path / "elsewhere" / "photos" / "1.png")
    with pytest.raises(UserError, match="two sources are named 'photos'"):
        run(model, [photos, tmp_path / "elsewhere/photos"], Options(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": ("film",)}, "save=film: unknown; choose of overlay, coco, csv"),
        ({"smooth": True}, "add track=true"),
        ({"every": 0}, "every=0"),
        ({"every": 2}, "a model with a detector"),
    ],
)
def test_wrong_options_are_refused(model, photos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run(model, [photos], Options(tmp_path / "out", **options))


def test_a_source_is_never_overwritten(model, tmp_path):
    picture(tmp_path / "1.jpg")
    before = (tmp_path / "1.jpg").read_bytes()
    with pytest.raises(UserError, match="would overwrite its own source"):
        run(model, [tmp_path / "1.jpg"], Options(tmp_path))
    assert (tmp_path / "1.jpg").read_bytes() == before


def test_two_images_of_one_name_are_refused(model, tmp_path):
    for ending in ("jpg", "png"):
        picture(tmp_path / "in" / f"1.{ending}")
    with pytest.raises(UserError, match=r"belongs to .*1\.jpg and .*1\.png; rename one"):
        run(model, [tmp_path / "in"], Options(tmp_path / "out"), quiet=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("ending", ["json", "csv"])
def test_tables_on_a_full_disk_are_reported(model, photos, tmp_path, ending):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"photos.{ending}").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot be written .*free some space"):
        run(model, [photos], Options(tmp_path / "out", ("coco", "csv")), quiet=True)


def test_an_unwritable_folder_is_refused(model, photos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        run(model, [photos], Options(tmp_path / "file" / "out"))


def test_what_was_written_before_an_error_can_be_read(model, photos, tmp_path):
    (photos / "3.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"3\.png"):
        run(model, [photos], Options(tmp_path / "out", ("overlay", "coco")), quiet=True)
    assert len(json.loads((tmp_path / "out/photos.json").read_text())) <= 6
    assert (tmp_path / "out/photos.json").read_text().endswith("]")


def test_a_full_disk_ends_the_run(model, photos, tmp_path, monkeypatch):
    from posepress import writers as module

    def full(file, content):
        raise UserError(f"{file}: cannot be written (no space left)")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(UserError, match="no space left"):
        run(model, [photos], Options(tmp_path / "out"), quiet=True)
    assert json.loads((tmp_path / "out/photos.json").read_text()) is not None


def test_an_interruption_finishes_the_files(model, tmp_path):
    image = picture(tmp_path / "1.png")
    sample = next(iter(open_source(image).shots)).sample

    def endless():
        for n in range(10**6):
            if n == 20:
                raise KeyboardInterrupt
            yield Shot(str(image), n, 0.0, sample)

    from posepress import run as module

    source = Source("endless", endless())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_source", lambda *_: source)
        with pytest.raises(KeyboardInterrupt):
            run(model, ["endless"], Options(tmp_path / "out", ("coco",)), quiet=True)
    assert isinstance(json.loads((tmp_path / "out/endless.json").read_text()), list)


def test_an_error_of_one_source_ends_the_others(model, photos, tmp_path):
    sample = next(iter(open_source(picture(tmp_path / "1.png")).shots)).sample
    endless = Source("endless", (Shot("film", n, 0.0, sample) for n in range(10**9)))
    (photos / "3.png").write_bytes(b"nothing")
    from posepress import run as module

    opened = iter([endless, open_source(photos)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_source", lambda *_: next(opened))
        with pytest.raises(UserError, match=r"3\.png"):
            run(model, ["endless", photos], Options(tmp_path / "out", ("coco",)), quiet=True)
    assert isinstance(json.loads((tmp_path / "out/endless.json").read_text()), list)


def test_tracked_people_keep_their_numbers(model, tmp_path):
    sample = next(iter(open_source(picture(tmp_path / "1.png")).shots)).sample
    shots = [Shot("film", n, n / 30, sample) for n in range(10)]
    from posepress import run as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_source", lambda *_: Source("film", shots, 10, frame_rate=30.0))
        run(model, ["film"], Options(tmp_path / "out", ("coco",), track=True, smooth=True), quiet=True)
    rows = json.loads((tmp_path / "out/film.json").read_text())
    assert {row["track_id"] for row in rows} == {1, 2}
    for number in (1, 2):
        points = np.array([row["keypoints"] for row in rows if row["track_id"] == number])
        assert len(points) == 10
        np.testing.assert_allclose(points, points[:1].repeat(10, 0), atol=1e-2)


# --- the command -----------------------------------------------------------------------------------------------------------


def status(*words):
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_the_command_predicts(bundle, photos, tmp_path, capsys):
    main(["predict", str(bundle), str(photos), "--out", str(tmp_path / "out"), "--save", "coco"])
    assert "images 5, instances 10" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out/photos.json").read_text())) == 10


def test_the_command_tells_what_an_engine_is(tmp_path, capsys):
    main(["info", str(top_down(tmp_path / "crops"))])
    told = json.loads(capsys.readouterr().out)
    assert told["needs_boxes"]
    assert told["labels"] == ["head", "left_hand", "right_hand"]


def test_the_command_refuses_what_it_cannot_do(bundle, photos, tmp_path, capsys):
    assert status("predict", tmp_path / "nothing", photos) == 2
    assert status("predict", bundle, tmp_path / "nothing.jpg") == 2
    assert status("predikt", bundle) == 2
    errors = capsys.readouterr().err
    assert "did you mean 'predict'?" in errors
    assert "Traceback" not in errors


def test_an_interrupted_command_says_so(monkeypatch, bundle, photos, capsys):
    from posepress import cli

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_loaded", interrupted)
    assert status("predict", bundle, photos) == 130
    assert "finished" in capsys.readouterr().err


def test_further_commands_are_found_when_they_are_named(monkeypatch):
    from posepress import cli

    class Entry:
        name = "greet"

        @staticmethod
        def load():
            return called.extend

    called = []
    monkeypatch.setattr(cli, "entry_points", lambda group: [Entry])
    main(["greet", "a", "b"])
    assert called == ["a", "b"]


def test_a_writer_of_an_unknown_format_makes_no_folder(tmp_path):
    with pytest.raises(UserError):
        writers(Source("x", []), tmp_path / "out", ("film",), to_stdout=False)
    assert not (tmp_path / "out").exists()
