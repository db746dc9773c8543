"""Results as strangers and broken disks leave them: read, or refused by one plain error, never anything else."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.datasets.results import load_results
from pipeline.deploy import device_figures, results_zip
from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.report import card as card_module
from pipeline.report import collect as report
from pipeline.report import page, tables, waterfall
from pipeline.results.manifest import MANIFEST, checked_manifest, current, read_manifest, write_manifest
from pipeline.results.stage import Stage
from pipeline.stages import import_results
from posepress import results as codec
from posepress.errors import UserError
from posepress.results import Poses
from posepress.skeletons import COCO_17
from tests.conftest import replaced
from tests.device_results import BENCHMARK, BUILD, EVALUATE, FIGURES, contents, draws, local, packed

NUMBERS = st.one_of(
    st.integers(-3, 300), st.integers(), st.floats(), st.booleans(), st.sampled_from([10**400, -(10**400), 1e308, 0.5, -1])
)
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        [
            "..",
            "/",
            "../x",
            "build",
            "evaluate",
            "<script>",
            "=1+1",
            "javascript:x",
            "os.system",
            "2:4",
            "int8",
            "\x1b",
            "\ud800",
        ]
    ),
)
LEAVES = st.one_of(st.none(), NUMBERS, TEXTS)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=10
)


def places(value, path=()):
    """The path of everything in nested data."""
    yield path
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def one_change(good):
    """Data like `good` with one value changed, left out, or all of it something else."""
    return st.tuples(st.sampled_from(list(places(good))), TREES).map(lambda change: replaced(good, *change))


def as_bytes(value):
    """JSON of anything, lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def damaged(blob):
    """Bytes like `blob`: cut, with some of them changed, or others altogether."""
    flips = st.lists(st.tuples(st.integers(0, len(blob) - 1), st.integers(0, 255)), min_size=1, max_size=4)

    def flip(changes):
        made = bytearray(blob)
        for at, value in changes:
            made[at] = value
        return bytes(made)

    return st.one_of(flips.map(flip), st.integers(0, len(blob) - 1).map(lambda n: blob[:n]), st.binary(max_size=200))


GOOD_MANIFEST = {
    "stage": "evaluate", "address": "a", "config": {"axes": {"network": "n"}}, "code": "c", "toolchain": {"numpy": "2"},
    "inputs": {"engine": [{"stage": "build", "address": "a", "digest": "d"}]}, "fingerprint": "f", "files": {"x/y": "d"},
    "digest": "e", "summary": {"ap": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(deadline=None)
@given(st.one_of(one_change(GOOD_MANIFEST).map(as_bytes), damaged(as_bytes(GOOD_MANIFEST)), TREES.map(as_bytes)))
def test_manifests(folder, blob):
    results = local(folder / "manifests")
    stage = Stage("evaluate", "a", {"_target_": "x.y"})
    results.folder(stage).mkdir(parents=True, exist_ok=True)
    (results.folder(stage) / MANIFEST).write_bytes(blob)
    found = read_manifest(results.folder(stage))
    assert not results.fresh(stage, "g")
    if found is None:
        return
    assert checked_manifest(found) == found
    assert current(found, results.outputs / "x") in (True, False)
    for reader in (
        Stage("report", "", {}, {"all": "evaluate"}, collect=True),
        Stage("compare", "", {}, {"one": "evaluate"}),
    ):
        try:
            results.input_manifests(reader, {"evaluate": stage}, str)
        except UserError as error:
            assert "\n" not in str(error)


CHANGED = {
    "summary": (EVALUATE, 3), "times": (BENCHMARK, 3), "config": (EVALUATE, 2), "inputs": (EVALUATE, 1), "engine": (BUILD, 3),
}  # fmt: skip
FILES = {
    "metrics": (EVALUATE, "metrics.json"), "details": (EVALUATE, "details.json"),
    "captions": (EVALUATE, "pictures/captions.json"), "audit": (BENCHMARK, "audit.json"),
    "latency": (BENCHMARK, "latency.json"),
}  # fmt: skip


@settings(deadline=None)
@given(st.data())
def test_figures_of_a_device(folder, data):
    """What is taken in can be shown; what cannot be shown is not taken in."""
    results = local(folder / "device")
    whole = contents(results)
    what = data.draw(st.sampled_from([*CHANGED, *FILES]))

    def change(found):
        if what in CHANGED:
            place, part = CHANGED[what]
            found[place][part] = data.draw(one_change(whole[place][part]))
            summary, config = found[EVALUATE][3], found[EVALUATE][2]
            axes = config.get("axes") if isinstance(config, dict) else None
            if isinstance(summary, dict):  # an attacker changes both
                found[EVALUATE][0]["metrics.json"] = as_bytes({**summary, "axes": axes})
        else:
            place, name = FILES[what]
            blob = found[place][0][name]
            changed = st.one_of(one_change(json.loads(blob)).map(as_bytes), damaged(blob))
            found[place][0][name] = data.draw(changed)

    try:
        file = packed(results, folder / "results.zip", change=change)
    except (AttributeError, TypeError, ValueError):  # inputs that no manifest could be made of
        assume(False)
    before = sorted((results.outputs / "x").rglob("*"))
    try:
        brought = results_zip.unpack(file, results, folder / "unpacked")
    except UserError as error:
        assert "\n" not in str(error).encode("unicode_escape").decode()
        assert sorted((results.outputs / "x").rglob("*")) == before
        return
    root = folder / "unpacked"
    cells = [import_results._cell(m, brought) for place, m in brought.manifests.items() if place.startswith("evaluate/")]
    json.dumps(cells)
    for place, manifest in brought.manifests.items():
        write_manifest(root / place, {**manifest, "imported": brought.device})
    shutil.copytree(results.outputs / "x" / "quantize", root / "quantize")
    table = report.collect([root / EVALUATE, root / EVALUATE], [root / BENCHMARK], root)
    assert all(row["imported"] == "yes" for row in table.rows)
    if not table.rows:
        assert table.left_out
        return
    tables.write_csv(table, folder / "results.csv")
    card_module.write_card(table, "x", folder / "card.md")
    waterfall.front(table.rows, [0, 1])
    tables.narrow(table.rows)
    waterfall.rank_correlation(table.rows)
    waterfall.waterfalls(table.results)
    page._details_html(table.results[0])
    page._pictures(table.results[0])


RESULT = {"image_id": 1, "category_id": 1, "keypoints": [1.0, 2.0, 0.5] * 17, "score": 0.5}


@settings(deadline=None)
@given(st.one_of(one_change([RESULT, RESULT | {"score": 0.4}]).map(as_bytes), damaged(as_bytes([RESULT])), TREES.map(as_bytes)))
def test_predictions(folder, blob):
    file = folder / "predictions.json"
    file.write_bytes(blob)
    try:
        found = load_results(file, COCO_17, {"1", "2"})
    except UserError as error:
        assert str(file) in str(error)
        return
    assert set(found) == {"1", "2"}
    assert all(np.isfinite(poses.keypoints).all() and (poses.scores >= 0).all() for poses in found.values())


@pytest.fixture(scope="module")
def kept(folder):
    file = folder / "results.npz"
    codec.save_results(file, [("1", Poses(np.ones((2, 17, 3)), np.ones(2))), ("2", Poses(np.ones((0, 17, 3)), np.ones(0)))])
    return file.read_bytes()


@settings(deadline=None)
@given(st.data())
def test_kept_results(folder, kept, data):
    file = folder / "damaged.npz"
    file.write_bytes(data.draw(damaged(kept)))
    try:
        found = codec.load_results(file)
    except UserError as error:
        assert str(file) in str(error)
        return
    assert all(isinstance(image, str) for image in found)


@settings(deadline=None)
@given(damaged(draws()))
def test_draws(folder, blob):
    file = folder / "draws.npz"
    file.write_bytes(blob)
    try:
        found = device_figures._draws(file)
    except codec.DAMAGED:
        return
    assert abs(found.value) <= 1


ARCHITECTURE = {
    "target": "pipeline.models.lightweight_openpose.LightweightOpenPose", "options": {"stages": 2, "width": 0.125},
    "pruning": [["initial.0.0.0", True, [0, 1]]], "spec": {}, "params": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(folder):
    made = folder / "checkpoint"
    made.mkdir()
    make = partial(LightweightOpenPose, stages=2, width=0.125)
    store.save(make(), made, make, [])
    return made


@settings(deadline=None)
@given(st.one_of(one_change(ARCHITECTURE).map(as_bytes), damaged(as_bytes(ARCHITECTURE)), TREES.map(as_bytes)))
def test_architectures(checkpoint, blob):
    (checkpoint / store.ARCHITECTURE).write_bytes(blob)
    try:
        network, _, _ = store.load(checkpoint)
    except UserError as error:
        assert str(checkpoint) in str(error)
        return
    assert isinstance(network, LightweightOpenPose)


def test_the_untouched_ones_are_good(folder, kept, checkpoint):
    """Each of these tests could fail: what it changes is taken as it is."""
    assert checked_manifest(GOOD_MANIFEST) == GOOD_MANIFEST
    results = local(folder / "good")
    assert results_zip.unpack(packed(results, folder / "good.zip"), results, folder / "good-unpacked").manifests
    (folder / "good.npz").write_bytes(kept)
    assert set(codec.load_results(folder / "good.npz")) == {"1", "2"}
    (folder / "good.json").write_bytes(as_bytes([RESULT]))
    assert len(load_results(folder / "good.json", COCO_17, {"1"})["1"].scores) == 1
    (checkpoint / store.ARCHITECTURE).write_bytes(as_bytes({**ARCHITECTURE, "pruning": []}))
    assert isinstance(store.load(checkpoint)[0], LightweightOpenPose)
    assert FIGURES["ap"] == 0.5
