import json
import shutil

import pytest

from pipeline.artifacts import MANIFEST, Results, Stage, arguments, closure, read_manifest, requested, source_files
from pipeline.errors import UserError


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
        closure(chain(a={"x": "b"}, b={"x": "a"}), ["a"])
    with pytest.raises(UserError, match=r"stages\.a\.inputs: no stage 'bild'; did you mean 'build'"):
        closure(chain(a={"x": "bild"}, build={}), ["a"])


@pytest.mark.parametrize("name", ["..", "../other", "a/b", "", "/tmp", ".hidden", "runs", "cache"])
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
    stage = Stage("train", "a", {"_target_": "pipeline.stages.train.run", "steps": 3}, code=["evaluation/types.py"])
    fingerprint = make(results, stage)
    assert results.fresh(stage, fingerprint)
    changes = [
        Stage("train", "a", {**stage.options, "steps": 4}, code=stage.code),
        Stage("train", "a", stage.options, code=["evaluation/views.py"]),
        Stage("train", "a", stage.options, code=stage.code, toolchain=["numpy"]),
    ]
    prints = {results.fingerprint(changed, {}, None, {})[0] for changed in changes}
    assert len(prints | {fingerprint}) == 4
    on_device = Stage("train", "a", stage.options, code=stage.code, device=True)
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
            "part": {"_target_": "pipeline.pruning.pruner.Pruner", "label": label},
            "weights": str(tmp_path / file),
        }
        return Stage("train", "a", options, files=["weights"])

    first = results.fingerprint(stage("a", "one"), {}, None, {})
    assert first == results.fingerprint(stage("b", "two"), {}, None, {})
    assert str(tmp_path) not in json.dumps(first[1])
    assert "label" not in arguments(stage("a", "one"))["part"]
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
    with pytest.raises(UserError, match="damaged"):
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


def test_components_outside_the_lists_are_watched_too():
    stage = Stage(
        "train",
        "a",
        {"_target_": "pipeline.stages.train.run", "x": {"_target_": "evaluation.audit.label"}},
        code=["evaluation/types.py"],
    )
    names = {f.name for f in source_files(stage)}
    assert names == {"train.py", "audit.py", "types.py"}


def test_no_manifest_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "none") is None
