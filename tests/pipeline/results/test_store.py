import errno
import json
import shutil
from pathlib import Path

import pytest

from pipeline.launch.chain import needed, requested
from pipeline.results.manifest import MANIFEST, current, read_manifest, write_manifest
from pipeline.results.stage import Stage, arguments
from pipeline.results.store import Results
from posepress.errors import UserError


def chain(**inputs):
    return {name: Stage(name, name, {}, ups) for name, ups in inputs.items()}


STAGES = chain(
    train={}, prune={"network": "train"}, export={"network": "train"}, build={"network": "export"}, report={"engines": "build"}
)


def test_all_is_what_the_report_needs():
    assert requested("all", STAGES) == ["train", "export", "build", "report"]
    assert requested(["build", "train"], STAGES) == ["train", "build"]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ([], r"stage=\[\]: nothing to run"),
        ("biuld", "stage=biuld: no such stage; did you mean 'build'"),
        (["train", "zzz"], "stage=zzz: no such stage; choose"),
        ("prune", "stage=prune: outside the chain.*pruner=l1"),
    ],
)
def test_impossible_requests_are_refused(stage, message):
    with pytest.raises(UserError, match=message):
        requested(stage, STAGES)


def test_circles_and_unknown_inputs_are_refused():
    with pytest.raises(UserError, match="a circle, a -> b -> a"):
        needed(chain(a={"x": "b"}, b={"x": "a"}), ["a"])
    with pytest.raises(UserError, match=r"stages\.a\.inputs: no stage 'bild'; did you mean 'build'"):
        needed(chain(a={"x": "bild"}, build={}), ["a"])


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "", "/tmp", ".hidden", "runs", "cache", "mlartifacts"])
def test_names_that_leave_the_outputs_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="must be a plain folder name"):
        Results(tmp_path / "outputs", name, "run")
    assert not (tmp_path / "outputs").exists()


def test_an_outputs_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(UserError, match="cannot write there"):
        Results(tmp_path / "outputs", "x", "run")


@pytest.mark.parametrize("label", ["a/b", "a b", "../a", ".a"])
def test_labels_that_are_no_folder_names_are_refused(label):
    with pytest.raises(UserError, match=r"stages\.train\.address"):
        Stage.from_config("train", {"address": label})


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "outputs", "x", "run")


def make(results, stage, content="content", inputs=None):
    fingerprint, parts = results.fingerprint(stage, inputs or {}, None, {})
    with results.writing(stage) as out:
        (out / "file").write_text(content)
        results.finish(out, fingerprint, parts, {"figure": 1.5})
    return fingerprint


def test_a_result_is_fresh_until_something_it_follows_from_changes(results):
    stage = Stage("train", "a", {"_target_": "pipeline.stages.train.Train", "steps": 3})
    fingerprint = make(results, stage)
    assert results.fresh(stage, fingerprint)
    changes = [
        Stage("train", "a", {**stage.options, "steps": 4}),
        Stage("train", "a", {**stage.options, "x": {"_target_": "posepress.framing.whole_image.WholeImage"}}),
        Stage("train", "a", stage.options, toolchain=["numpy"]),
    ]
    prints = {results.fingerprint(changed, {}, None, {})[0] for changed in changes}
    assert len(prints | {fingerprint}) == 4
    on_device = Stage("train", "a", stage.options, device=True)
    assert (
        results.fingerprint(on_device, {}, None, {"cpu": "a"})[0] != results.fingerprint(on_device, {}, None, {"cpu": "b"})[0]
    )
    (results.folder(stage) / "file").write_text("other")
    assert not results.fresh(stage, fingerprint)


def test_labels_and_paths_are_not_part_of_a_fingerprint(results, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text("weights")

    def stage(label, file):
        options = {
            "_target_": "x.y",
            "part": {"_target_": "pipeline.pruning.pruner.Pruner", "about": {"label": label}},
            "weights": str(tmp_path / file),
        }
        return Stage("train", "a", options, files=["weights"])

    first = results.fingerprint(stage("a", "one"), {}, None, {})
    assert first == results.fingerprint(stage("b", "two"), {}, None, {})
    assert str(tmp_path) not in json.dumps(first[1])
    assert "about" not in arguments(stage("a", "one"))["part"]
    with pytest.raises(UserError, match="weights=.*three: no such file"):
        results.fingerprint(stage("a", "three"), {}, None, {})


def test_a_manifest_holds_no_time_host_or_path(results, tmp_path):
    stage = Stage("train", "a", {"_target_": "x.y"})
    make(results, stage)
    first = (results.folder(stage) / MANIFEST).read_bytes()
    make(results, stage)
    assert (results.folder(stage) / MANIFEST).read_bytes() == first
    assert str(tmp_path).encode() not in first


def test_a_failure_leaves_the_earlier_result(results):
    stage = Stage("train", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)

    def fail():
        with results.writing(stage) as out:
            (out / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert results.fresh(stage, fingerprint)
    assert [f.name for f in results.folder(stage).parent.iterdir()] == ["a"]


def test_a_death_between_the_renames_loses_nothing(results):
    stage = Stage("train", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)
    folder = results.folder(stage)
    folder.rename(folder.parent / ".a.old")
    with results.lock(stage):
        pass
    assert results.fresh(stage, fingerprint)
    (folder.parent / ".a.new").mkdir()
    (folder.parent / ".a.new" / "leftover").write_text("x")
    make(results, stage)
    assert sorted(f.name for f in folder.iterdir()) == ["file", MANIFEST]


def test_inputs_must_be_there_and_unchanged(results):
    upstream = Stage("train", "a", {"_target_": "x.y"})
    reader = Stage("export", "b", {}, {"network": "train"})
    stages = {"train": upstream, "export": reader}

    def command(stage):
        return f"python -m pipeline stage={stage} name=x"

    with pytest.raises(
        UserError, match=r"export: needs .*train/a, which is not there; make it with: python -m pipeline stage=train name=x"
    ):
        results.input_manifests(reader, stages, command)
    make(results, upstream)
    assert results.input_manifests(reader, stages, command)["network"][0][0] == results.folder(upstream)
    (results.folder(upstream) / "file").write_text("changed")
    with pytest.raises(UserError, match="changed since it was made; make it again with: .* force=true"):
        results.input_manifests(reader, stages, command)
    (results.folder(upstream) / "file").unlink()
    with pytest.raises(UserError, match="is missing"):
        results.input_manifests(reader, stages, command)
    (results.folder(upstream) / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"train/a, which is damaged; make it with: python -m pipeline stage=train name=x$"):
        results.input_manifests(reader, stages, command)
    shutil.rmtree(results.folder(upstream))
    make(results, upstream)
    make(results, reader, inputs=results.input_manifests(reader, stages, command))
    make(results, upstream, content="retrained")
    last = Stage("build", "c", {}, {"network": "export"})
    with pytest.raises(UserError, match="export/b: made from inputs that changed since; make it again with: .* stage=export"):
        results.input_manifests(last, {**stages, "build": last}, command)
    shutil.rmtree(results.folder(upstream))
    collector = Stage("report", "", {}, {"all": "train"}, collect=True)
    with pytest.raises(UserError, match="no finished 'train' of x; make one"):
        results.input_manifests(collector, stages, command)
    make(results, upstream)
    (results.folder(upstream) / "file").write_text("changed")
    with pytest.raises(
        UserError, match=r"no finished 'train' of x, 1 changed since they were made \(the first is .*force=true$"
    ):
        results.input_manifests(collector, stages, command)


def test_two_cells_of_a_sweep_cannot_share_an_address(results, tmp_path):
    stage = Stage("train", "a", {})
    results.claim(stage, "one")
    results.claim(stage, "one")
    with pytest.raises(UserError, match="two cells of this sweep write .*tag="):
        results.claim(stage, "two")
    Results(tmp_path / "outputs", "x", "another-run").claim(stage, "two")


def test_two_processes_on_one_address(results):
    stage = Stage("train", "a", {})
    with results.lock(stage), pytest.raises(UserError, match=r"is being made by process \d+ on .*; wait for it or stop it"):
        with results.lock(stage):
            pytest.fail("entered twice")
    with results.lock(stage):
        pass


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "none") is None


def flipped(text, word):
    at = text.index(word) + len(word) // 2
    return text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "nothing": lambda text: "",
    "a list": lambda text: f"[{text}]",
    "no keys": lambda text: "{}",
    "nested": lambda text: "[" * 100_000,
    "figure": lambda text: text.replace("1.5", "1.6"),
    "fingerprint": lambda text: flipped(text, json.loads(text)["fingerprint"]),
    "digest": lambda text: flipped(text, json.loads(text)["digest"]),
    "code": lambda text: flipped(text, json.loads(text)["code"]),
    "stage": lambda text: text.replace('"stage": "train"', '"stage": "trein"'),
    "a key": lambda text: text.replace('"files"', '"filfs"'),
    "files": lambda text: json.dumps({**json.loads(text), "files": ["file"]}),
    "inputs": lambda text: json.dumps({**json.loads(text), "inputs": {"x": [{"stage": "..", "address": "a", "digest": "b"}]}}),
    "not text": lambda text: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_none_and_the_same_command_makes_it_again(results, damage):
    stage = Stage("train", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)
    file = results.folder(stage) / MANIFEST
    before = file.read_bytes()
    changed = DAMAGES[damage](before.decode())
    file.write_bytes(b"\xff\xfe\x00" if changed is None else changed.encode())
    assert read_manifest(file.parent) is None
    assert not results.fresh(stage, fingerprint)
    make(results, stage)
    assert file.read_bytes() == before


def test_a_damaged_manifest_is_left_out_of_what_collects(results):
    stages = {name: Stage("evaluate", name, {"_target_": "x.y"}) for name in ("a", "b")}
    for stage in stages.values():
        make(results, stage)
    (results.folder(stages["a"]) / MANIFEST).write_text("[]")
    reader = Stage("report", "", {}, {"all": "evaluate"}, collect=True)
    found = results.input_manifests(reader, {"evaluate": stages["b"]}, str)
    assert [folder.name for folder, _ in found["all"]] == ["b"]
    assert results.damaged == [results.folder(stages["a"])]


def test_manifests_that_name_each_other_end(results):
    """A loop cannot come about by itself, but in a folder of others."""
    root = results.outputs / "x"
    entry = {"stage": "train", "address": "a", "digest": "d"}
    stage = Stage("train", "a", {"_target_": "x.y"})
    make(results, stage)
    manifest = read_manifest(results.folder(stage))
    assert manifest is not None
    write_manifest(results.folder(stage), {**manifest, "inputs": {"x": [entry, entry]}, "digest": "d"})
    found = read_manifest(results.folder(stage))
    assert found is not None
    assert current(found, root)


def test_what_was_imported_is_no_input_of_what_is_made_here(results):
    stage = Stage("build", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)
    manifest = read_manifest(results.folder(stage))
    assert manifest is not None
    write_manifest(results.folder(stage), {**manifest, "imported": "a device"})
    assert not results.fresh(stage, fingerprint)
    reader = Stage("evaluate", "b", {}, {"engine": "build"})
    with pytest.raises(UserError, match="build/a, which was imported; make it with: build$"):
        results.input_manifests(reader, {"build": stage}, str)


def read_only(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "write_text", refuse)


def test_results_on_a_read_only_mount_are_read(results, tmp_path, monkeypatch):
    stage = Stage("train", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)
    read_only(monkeypatch)
    again = Results(tmp_path / "outputs", "x", "another-run")
    assert not again.writable
    again.claim(stage, fingerprint)
    assert again.fresh(stage, fingerprint)
    with pytest.raises(UserError, match="cannot write there .Read-only file system.; choose another folder"), again.lock(stage):
        pytest.fail("nothing can be made there")
    with pytest.raises(UserError, match="cannot write there"):
        Results(tmp_path / "outputs", "not-there", "another-run")


def test_two_names_share_no_scratch_folder(tmp_path):
    stage = Stage("train", "a", {"_target_": "x.y"})
    folders = {Results(tmp_path, name, "run").scratch(stage, "0" * 64) for name in ("x", "y")}
    assert len(folders) == 2


@pytest.mark.parametrize("name", ["device.json", "exports", "synthetic", "digests", "shards", "numba", "scratch"])
def test_no_name_has_its_scratch_folder_in_a_shared_cache(tmp_path, name):
    results = Results(tmp_path, name, "run")
    folder = results.scratch(Stage("train", "a", {"_target_": "x.y"}), "0" * 64)
    assert folder.relative_to(results.cache).parts[:2] == ("scratch", name)


def test_two_names_of_one_sweep_claim_their_own_addresses(tmp_path):
    stage = Stage("train", "a", {"_target_": "x.y"})
    Results(tmp_path, "x", "run").claim(stage, "one")
    Results(tmp_path, "y", "run").claim(stage, "other")
    with pytest.raises(UserError, match="two cells of this sweep write .*/y/train/a with different settings"):
        Results(tmp_path, "y", "run").claim(stage, "one")


def test_a_result_that_may_not_be_read_says_so(results, monkeypatch):
    stage = Stage("train", "a", {"_target_": "x.y"})
    fingerprint = make(results, stage)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    opened = Path.open
    with monkeypatch.context() as patch:  # the manifest may be read, which Python 3.11 opens by the same method
        patch.setattr(Path, "open", lambda self, *a, **k: refuse() if self.name == "file" else opened(self, *a, **k))
        with pytest.raises(UserError, match="a/file: cannot be read .Permission denied.; its owner must allow it"):
            results.fresh(stage, fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(UserError, match=r"a/manifest\.json: cannot be read .Permission denied.; its owner must allow it"):
            results.fresh(stage, fingerprint)
