"""What comes from others is data: it runs no code, reads no files of this machine, and writes nothing but its own place."""

import csv
import json
import os
import re
import sys
import zipfile
from functools import partial
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.deploy import device_figures, results_zip, zip_limits
from pipeline.launch import command_line
from pipeline.models import store
from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.trust import trust
from pipeline.report import card as card_module
from pipeline.report import collect as report
from pipeline.report import page, tables
from pipeline.results.job import Job
from pipeline.results.manifest import current, made_here, read_manifest, write_manifest
from pipeline.results.stage import Stage
from pipeline.stages import import_results
from pipeline.stages import report as report_stage
from posepress.errors import UserError
from tests.device_results import AXES, BENCHMARK, BUILD, DEVICE, EVALUATE, FIGURES, JPEG, LAYERS, draws, local, packed


@pytest.fixture(autouse=True)
def untrusting():
    trust([], None)
    yield
    trust([], None)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint folder of a small network, and a function that changes its architecture.json."""
    make = partial(LightweightOpenPose, stages=2, width=0.125)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    store.save(make(), folder, make, [])

    def change(**changes):
        file = folder / store.ARCHITECTURE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return folder, change


NETS = """
import pathlib
from torch import nn
pathlib.Path(__file__).with_name("imported").touch()

class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        pathlib.Path(__file__).with_name("made").touch()

def build(**options):
    return Net()
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A module of somebody else on the path, which leaves a file when it is imported."""
    (tmp_path / "others_nets.py").write_text(NETS)
    (tmp_path / "reexporting.py").write_text("from others_nets import Net\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("others_nets", "reexporting"):
        sys.modules.pop(name, None)


def test_a_checkpoint_of_our_own_networks_loads(checkpoint):
    network, make, history = store.load(checkpoint[0])
    assert isinstance(network, LightweightOpenPose)
    assert make.keywords == {"stages": 2, "width": 0.125}
    assert history == []


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.Popen", "torch.nn.Linear", "builtins.eval", "pipeline.probing.processes.pool", "others_nets.Net",
     "pipeline.modelsx.Net", "print"],
)  # fmt: skip
def test_a_class_of_another_module_is_not_even_imported(target, checkpoint, nets):
    folder, change = checkpoint
    change(target=target, options={})
    with pytest.raises(UserError, match=rf"architecture\.json: its network is {target}, .*add trusted_modules=\[") as found:
        store.load(folder)
    assert f"trusted_modules=[{target.rpartition('.')[0] or target}]" in str(found.value)
    assert not (nets / "imported").exists()


@pytest.mark.parametrize(
    "target",
    [
        "pipeline.models.store.read_weights",
        "pipeline.models.store.partial",
        "pipeline.models.onnx_graph.onnx",
        "pipeline.models.lightweight_openpose.nn",
        "pipeline.models.none",
        "pipeline.models.none.Net",
        "pipeline.models.store.SafetensorError",
        "pipeline.models",
        "",
        None,
        5,
        ["os.system"],
        "../x",
        "os.system; x",
        "pipeline.models..x",
        ".x",
    ],
)
def test_what_is_no_network_is_refused(target, checkpoint):
    folder, change = checkpoint
    change(target=target, options={})
    with pytest.raises(UserError, match=r"architecture\.json: "):
        store.load(folder)


def test_networks_of_modules_that_the_command_names_load(checkpoint, nets):
    folder, change = checkpoint
    change(target="others_nets.Net", options={"any": 1})
    trust(["others_nets"], None)
    with pytest.raises(UserError, match=r"others_nets\.Net has no `spec`"):  # it was made, and is no network of ours
        store.load(folder)
    assert (nets / "made").exists()
    change(target="others_nets.build")
    with pytest.raises(UserError, match=r"others_nets\.build is no class of a network"):
        store.load(folder)
    change(target="reexporting.Net")
    trust(["reexporting"], None)
    with pytest.raises(UserError, match=r"reexporting\.Net is no class of a network"):
        store.load(folder)


@pytest.mark.parametrize("own", ["others_nets.Net", "reexporting.Net"])
def test_the_commands_own_network_loads(own, checkpoint, nets):
    folder, change = checkpoint
    change(target="others_nets.Net", options={})
    trust([], own)
    with pytest.raises(UserError, match=r"others_nets\.Net has no `spec`"):
        store.load(folder)
    assert (nets / "made").exists()
    change(target="others_nets.build", options={})
    trust([], "others_nets.build")
    with pytest.raises(UserError, match=r"others_nets\.build is no class of a network"):
        store.load(folder)


@pytest.mark.parametrize("names", ["my.nets", [5], ["a b"], ["../x"], [""], None])
def test_trusted_modules_are_names(names):
    with pytest.raises(UserError, match=r"trusted_modules=.*give them like trusted_modules=\[my\.nets\]"):
        trust(names, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"width": "wide"}},
        {"options": {"width": 1e9}},
        {"options": {"stages": -1}},
        {"options": {"unknown": 1}},
        {"options": ["stages"]},
        {"options": None},
        {"pruning": None},
        {"pruning": [["backbone.0.0", True, [-1]]]},
        {"pruning": [["backbone.0.0", True, ["0"]]]},
        {"pruning": [["backbone.0.0", True]]},
        {"pruning": [["none", True, [0]]]},
        {"pruning": [5]},
        {"pruning": [[None, "2:4", []]]},
        {"pruning": [["none", "2:4", []]]},
    ],
)
def test_a_structure_that_is_none_is_refused(changes, checkpoint):
    folder, change = checkpoint
    change(**changes)
    with pytest.raises(UserError, match=r"architecture\.json: "):
        store.load(folder)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{", '{"target": "os.system"}', "5"])
def test_a_damaged_description_is_refused(text, checkpoint):
    folder, _ = checkpoint
    (folder / store.ARCHITECTURE).write_text(text)
    with pytest.raises(UserError, match=r"architecture\.json: .*make it again"):
        store.load(folder)


def test_damaged_weights_are_refused(checkpoint):
    folder, _ = checkpoint
    blob = (folder / store.WEIGHTS).read_bytes()
    for damage in (b"", blob[: len(blob) // 2], b"\xff" * 100):
        (folder / store.WEIGHTS).write_bytes(damage)
        with pytest.raises(UserError, match=r"model\.safetensors: damaged or missing"):
            store.load(folder)
    (folder / store.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or missing"):
        store.load(folder)


class Peeking(nn.Module):
    """A network that looks at its weights while it is made, which weights without storage do not allow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.ignored_layers = [self.layer]
        self.spec = LightweightOpenPose(stages=2, width=0.125).spec
        if float(self.layer.weight.detach().sum()) == 5:
            raise ValueError


def test_a_network_that_looks_at_its_weights_loads(tmp_path):
    make = partial(Peeking)
    network = make()
    store.save(network, tmp_path, make, [])
    trust([Peeking.__module__], None)
    loaded, _, _ = store.load(tmp_path)
    assert torch.equal(loaded.layer.weight, network.layer.weight)


@pytest.fixture
def zipped(tmp_path):
    """Results of this machine, and a function that imports results.zip once something was done to it."""
    results = local(tmp_path)

    def bring(**changes):
        file = packed(results, tmp_path / "results.zip", **changes)
        (tmp_path / "out").mkdir(exist_ok=True)
        job = Job(tmp_path / "out", {}, {}, tmp_path / "scratch", tmp_path / "cache")
        return import_results.ImportResults(str(file), str(tmp_path / "outputs"), "x").run(job)

    return results, bring


def files_of(results):
    return {file: file.read_bytes() for file in (results.outputs / "x").rglob("*") if file.is_file()}


def test_results_come_home_beside_those_of_this_machine(zipped):
    results, bring = zipped
    before = files_of(results)
    assert bring()["device"] == DEVICE
    root = results.outputs / "x"
    found = read_manifest(root / EVALUATE)
    assert found is not None
    assert found["imported"] == DEVICE
    assert current(found, root)
    assert {file: blob for file, blob in files_of(results).items() if file in before} == before
    bring()  # again: what was imported may be replaced


def test_results_of_this_machine_are_never_replaced(zipped):
    results, bring = zipped
    stage = Stage("evaluate", EVALUATE.partition("/")[2], {"_target_": "x.y"})
    fingerprint, parts = results.fingerprint(stage, {}, None, {})
    with results.writing(stage) as out:
        results.finish(out, fingerprint, parts, {"ap": 0.1})
    before = files_of(results)
    said = r"evaluate/.* was made here, or imported by an older version, and is never replaced by what a device brings; remove"
    with pytest.raises(UserError, match=said):
        bring()
    assert files_of(results) == before


@pytest.mark.parametrize("content", [b"{", b"[" * 200_000, b"{}", None])
def test_results_with_a_damaged_manifest_are_never_replaced(zipped, content):
    results, bring = zipped
    folder = results.outputs / "x" / EVALUATE
    folder.mkdir(parents=True)
    (folder / "predictions.json").write_bytes(b"of this machine")
    if content is not None:
        (folder / "manifest.json").write_bytes(content)
    before = files_of(results)
    with pytest.raises(UserError, match=r"evaluate/.* is damaged, and is never replaced by what a device brings; remove the"):
        bring()
    assert files_of(results) == before


def test_what_comes_home_is_marked_in_the_report(zipped):
    """Also where its axes or figures come as close to other columns as they may."""
    results, bring = zipped
    bring()
    root = results.outputs / "x"
    table = report.collect([root / EVALUATE], [root / BENCHMARK], root)
    (row,) = table.rows
    assert (row["imported"], row["ap"], row["speedup_vs_fp32"], row["macs"]) == ("yes", 0.5, 2.0, 100)
    tables.tabulated(table.rows)
    tables.narrow(table.rows)
    before = table.results[0]
    forged = report.Result(before.folder, {**AXES, "imported": "no", "ap": "fast", "macs": 1}, before.figures)
    assert report._row(forged, []) == row


def test_an_import_of_an_older_version_is_not_built_upon(zipped):
    results, bring = zipped
    bring()
    root = results.outputs / "x"
    manifest = read_manifest(root / BUILD)
    assert manifest is not None
    write_manifest(root / BUILD, {key: value for key, value in manifest.items() if key not in ("imported", "seal")})
    old = read_manifest(root / BUILD)
    assert made_here(old, root / BUILD), "nothing says where it comes from"
    (root / "import").mkdir()
    (root / "import" / "package.json").write_text(json.dumps({"name": "x", "device": DEVICE, "results": [BUILD]}))
    assert not made_here(old, root / BUILD)
    for content in ("[", "[]", json.dumps({"results": {BUILD: "a digest"}}), json.dumps({"results": [EVALUATE]})):
        (root / "import" / "package.json").write_text(content)
        assert made_here(old, root / BUILD)
    with pytest.raises(UserError, match="imported by an older version, and is never replaced"):
        bring()


def put(place, name, content):
    """A change of one file of a result."""

    def change(found):
        found[place][0][name] = content if isinstance(content, bytes) else json.dumps(content).encode()

    return change


def figures(place=EVALUATE, **changed):
    """A change of figures, everywhere they stand."""

    def change(found):
        found[place][3].update(changed)
        found[place][0]["metrics.json"] = json.dumps({**found[place][3], "axes": found[place][2].get("axes")}).encode()

    return change


def axes(**changed):
    def change(found):
        for place in (EVALUATE, BENCHMARK):
            found[place][2] = {"axes": {**AXES, **changed}}
        found[EVALUATE][0]["metrics.json"] = json.dumps({**FIGURES, "axes": {**AXES, **changed}}).encode()

    return change


def moved(old, new):
    def change(found):
        found[new] = found.pop(old)

    return change


def engine(found):
    """An evaluation of an engine of this machine."""
    quantized = found[BUILD][1]["network"]
    found[EVALUATE][1] = {"engine": quantized}


def caption(name, link=""):
    return put(EVALUATE, "pictures/captions.json", {name: link})


STRANGE = {
    "a file of this machine as a picture": caption("/etc/passwd"),
    "a file above as a picture": caption("../../../../../../etc/passwd"),
    "another file of the results as a picture": caption("../metrics.json"),
    "a picture that is none": put(EVALUATE, "pictures/000001.jpg", b"<svg onload=alert(1)>"),
    "no picture": caption("2.jpg"),
    "captions that are none": put(EVALUATE, "pictures/captions.json", ["000001.jpg"]),
    "a script as a link": caption("000001.jpg", "javascript:alert(1)"),
    "a file as a link": caption("000001.jpg", "file:///etc/passwd"),
    "a link that ends its attribute": caption("000001.jpg", 'https://x"onload="alert(1)'),
    "data as a link": caption("000001.jpg", "data:text/html,x"),
    "AP above 1": figures(ap=1.5),
    "AP below -1": figures(ap=-2),
    "AP as text": figures(ap="0.9"),
    "AP that is none": figures(ap=float("nan")),
    "AP without end": figures(ap_hi=float("inf")),
    "a nested figure": figures(ap50={"x": 1}),
    "no AP": lambda found: found[EVALUATE][3].pop("ap"),
    "a huge number": figures(images=10**400),
    "a digest that is none": figures(data_digest="x"),
    "a control character": figures(backend="\x1b]0;x\x07"),
    "a long text": figures(backend="x" * 10_000),
    "a key that is none": figures(**{"<script>": 1}),
    "other figures in metrics.json": put(EVALUATE, "metrics.json", {"ap": 0.98}),
    "no metrics.json": lambda found: found[EVALUATE][0].pop("metrics.json"),
    "details that are none": put(EVALUATE, "details.json", {"x": {"y": "<script>"}}),
    "details nested deeply": put(EVALUATE, "details.json", b"[" * 200_000),
    "draws that are none": put(EVALUATE, "draws.npz", b"PK"),
    "draws beyond 1": put(EVALUATE, "draws.npz", draws((0.5, 7.0))),
    "no draws": lambda found: found[EVALUATE][0].pop("draws.npz"),
    "axes that are none": axes(data=["x"]),
    "an axis that is missing": axes(network=None),
    "rebuild as text": axes(rebuild="x"),
    "an axis that says where it was made": axes(imported="no"),
    "an axis that is a figure": axes(ap="fast"),
    "an axis that nothing knows": axes(colour="red"),
    "a seed as text": axes(seed="x"),
    "a calibration as number": axes(calibration=1),
    "a category as number": figures(category=1),
    "a digest as number": figures(data_digest=12),
    "a difference that only the report computes": figures(ap_vs_fp32=0.1, ap_vs_fp32_lo=0.1, ap_vs_fp32_hi=0.1),
    "a time of an evaluation": figures(latency_p50_ms=0.1, latency_p50_ms_lo=0.1, latency_p50_ms_hi=0.1),
    "a name in place of its axis": figures(network="another"),
    "a word about where it was made": figures(imported="no"),
    "AP of a benchmark": lambda found: found[BENCHMARK][3].update(ap=0.9, ap_lo=0.9, ap_hi=0.9),
    "a digest of a benchmark": lambda found: found[BENCHMARK][3].update(data_digest="cd" * 32),
    "images of a benchmark": lambda found: found[BENCHMARK][3].update(images=1),
    "what ran as number": lambda found: found[BENCHMARK][3].update(ran=1),
    "a speedup as text": lambda found: found[BENCHMARK][3].update(speedup="fast"),
    "a speedup without an interval": lambda found: found[BENCHMARK][3].pop("speedup_lo"),
    "an interval without a speedup": lambda found: found[BENCHMARK][3].pop("speedup"),
    "a latency of what was not timed": lambda found: found[BENCHMARK][3].update(timed=0, latency_p50_ms_hi=None),
    "a latency as text": lambda found: found[BENCHMARK][3].update(latency_p50_ms="1"),
    "a negative latency": lambda found: found[BENCHMARK][3].update(latency_p50_ms=-0.5),
    "no device": lambda found: found[BENCHMARK][3].pop("device"),
    "layers that are none": put(BENCHMARK, "audit.json", [{"name": "x", "op": "y", "precision": "z", "macs": -1}]),
    "layers that are texts": put(BENCHMARK, "audit.json", ["x"]),
    "an engine of this machine": engine,
    "the address of another": moved(EVALUATE, "evaluate/net_dense_64x80_pad_int8_onnxruntime-b1"),
    "a stage that no device runs": moved(EVALUATE, EVALUATE.replace("evaluate", "train")),
    "an engine that is not there": lambda found: found[BUILD][3].update(engine="../../x"),
    "no results": dict.clear,
}


@pytest.mark.parametrize("what", STRANGE)
def test_contents_that_no_device_writes_are_refused(what, zipped):
    results, bring = zipped
    before = files_of(results)
    with pytest.raises(UserError, match=r"results=.*results\.zip: no results of a package .*; copy it again") as found:
        bring(change=STRANGE[what])
    assert "root:" not in str(found.value), "no file of this machine is shown"
    assert files_of(results) == before


def test_captions_that_name_files_are_read_by_no_page(tmp_path):
    """Also where the import was not what wrote them."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "secret").write_bytes(JPEG + b"secret")
    (tmp_path / "pictures" / "link.jpg").symlink_to(tmp_path / "secret")
    for name in ("../secret", str(tmp_path / "secret"), "link.jpg", "none.jpg", ""):
        with pytest.raises(ValueError, match="the picture"):
            page.picture(tmp_path / "pictures", name)
    (tmp_path / "pictures" / "1.jpg").write_bytes(JPEG)
    assert page.picture(tmp_path / "pictures", "1.jpg") == JPEG


@pytest.mark.parametrize(
    "link",
    [
        "javascript:alert(1)",
        "JAVASCRIPT:x",
        "file:///x",
        "data:x",
        "//x",
        "x",
        "",
        "http://",
        "https://a b",
        'https://x"',
        "https://x'",
        "https://<",
        "vbscript:x",
        " https://x",
        "https://x\n",
    ],
)
def test_links_go_to_the_web_alone(link):
    assert not page.web_address(link)
    assert page.web_address("https://www.flickr.com/photos/1?x=2&y=3")


def listed(**changes):
    return {"listing": lambda about: about.update(changes)}


def raw(name, blob):
    return {"raw": lambda members: members.update({name: blob})}


def with_member(name, blob=b"x"):
    """A member that package.json lists too."""
    return {**raw(name, blob), "listing": lambda about: about["files"].update({name: sha256(blob).hexdigest()})}


ARCHIVES = {
    "a path that leaves": with_member("evaluate/../../escaped.txt"),
    "a deep path that leaves": with_member(f"{EVALUATE}/../../../escaped.txt"),
    "an absolute path": with_member("/tmp/escaped.txt"),
    "a backslash": with_member("evaluate\\..\\x"),
    "a stage as a file": with_member("evaluate/manifest.json"),
    "a hidden file": with_member(f"{EVALUATE}/.hidden"),
    "a long path": with_member(f"{EVALUATE}/a/b/c/d"),
    "a file that is a folder too": with_member(f"{EVALUATE}/pictures"),
    "a result without a manifest": with_member(f"{EVALUATE}x/file"),
    "a file that nothing lists": raw(f"{EVALUATE}/more.txt", b"x"),
    "a file that was changed": raw(f"{EVALUATE}/metrics.json", b"{}"),
    "a file that was removed": {"raw": lambda members: members.pop(f"{BENCHMARK}/audit.json")},
    "a manifest that is a list": {"raw": lambda members: members.update({f"{EVALUATE}/manifest.json": b"[]"})},
    "no package.json": {"raw": lambda members: members.pop("package.json")},
    "a package.json that is a list": raw("package.json", b"[]"),
    "a package.json nested deeply": raw("package.json", b"[" * 200_000),
    "a name that is none": listed(name="../x"),
    "a device that is none": listed(device="../x"),
    "files that are none": listed(files=["x"]),
    "made of a folder above": listed(made_of={"../../x": "y"}),
    "a bomb": with_member(f"{BUILD}/zeros", bytes(64 << 20)),
    "another way of packing": {"compression": zipfile.ZIP_BZIP2},
    "lzma": {"compression": zipfile.ZIP_LZMA},
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_no_device_writes_are_refused(what, zipped):
    results, bring = zipped
    before = files_of(results)
    with pytest.raises(UserError, match=r"results=.*results\.zip: no results of a package .*; copy it again"):
        bring(**ARCHIVES[what])
    assert files_of(results) == before
    assert not list(results.outputs.parent.rglob("escaped.txt"))


def test_a_list_of_a_million_members_is_not_read(zipped, tmp_path):
    results, _ = zipped
    file = packed(results, tmp_path / "results.zip")
    blob = bytearray(file.read_bytes())
    at = blob.rindex(b"PK\5\6") + 12  # the size of the list, which lies before
    blob[at : at + 4] = (5 << 20).to_bytes(4, "little")
    file.write_bytes(blob)
    with pytest.raises(UserError, match="more members than results have"):
        results_zip.unpack(file, results, tmp_path / "unpacked")


def many(file, count, comment=b""):
    """A zip file of empty members, its bytes, and where the record of its end begins."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = comment
        for n in range(count):
            archive.writestr(str(n), b"")
    blob = bytearray(file.read_bytes())
    return blob, len(blob) - 22 - len(comment)


def test_a_list_that_looks_like_the_end_is_not_read(zipped, tmp_path, monkeypatch):
    """zipfile takes the record of the end that lies 22 bytes before the end, whatever lies in it."""
    results, _ = zipped
    file = tmp_path / "results.zip"
    blob, at = many(file, 60_000)
    blob[at + 8 : at + 12] = b"PK\5\6"
    file.write_bytes(blob)
    assert len(zipfile.ZipFile(file).infolist()) == 60_000
    monkeypatch.setattr(zipfile, "ZipFile", None)  # the list is refused before it is read
    with pytest.raises(UserError, match="the size or place of its list of members is wrong"):
        results_zip.unpack(file, results, tmp_path / "unpacked")
    with pytest.raises(zipfile.BadZipFile, match="the size or place"):
        device_figures._draws(file)


ENDS = {
    "a record in its own comment": (b"PK\5\6" + bytes(18), 0, b"", "the size or place"),
    "a comment that ends too early": (b"some words", 20, b"\1\0", "something lies behind its end"),
    "a comment that ends too late": (b"some words", 20, b"\x7f\0", "something lies behind its end"),
    "a list that begins elsewhere": (b"", 16, b"\1\0\0\0", "the size or place"),
    "a list that is too short for its members": (b"", 8, b"\x10\0\x10\0", "the size or place"),
    "a list on another disk": (b"", 4, b"\1\0", "the size or place"),
    "no end": (b"", 0, b"PK\1\2", "not a whole zip file"),
}


@pytest.mark.parametrize("what", ENDS)
def test_an_end_that_zipfile_would_take_for_another_is_refused(what, tmp_path):
    comment, place, changed, said = ENDS[what]
    blob, at = many(tmp_path / "x.zip", 3, comment)
    blob[at + place : at + place + len(changed)] = changed
    (tmp_path / "x.zip").write_bytes(blob)
    with pytest.raises(zipfile.BadZipFile, match=said):
        zip_limits.check_directory(tmp_path / "x.zip")


def test_the_end_of_a_large_list_is_found_behind_the_longest_comment(tmp_path):
    blob, at = many(tmp_path / "x.zip", 3, b"c" * 0xFFFF)
    zip_limits.check_directory(tmp_path / "x.zip")
    (tmp_path / "x.zip").write_bytes(blob[:at] + b"PK\6\7" + bytes(16) + blob[at:])
    with pytest.raises(zipfile.BadZipFile, match="more members than results have"):
        zip_limits.check_directory(tmp_path / "x.zip")


def test_a_large_manifest_is_not_read(zipped, monkeypatch):
    _, bring = zipped
    monkeypatch.setattr(device_figures, "MOST_JSON", 5_000)
    with pytest.raises(UserError, match=r"manifest\.json is missing or too large"):
        bring(**with_member(f"{BUILD}/manifest.json", b" " * 5_001))


@pytest.mark.parametrize(
    "header", [((1 << 40,), "<f8"), ((1 << 40,), "|S0"), ((1,), f"|S{1 << 30}"), ((1 << 20, 1 << 20), "<f8")]
)
def test_an_array_larger_than_its_file_takes_no_memory(tmp_path, monkeypatch, header):
    shape, kind = header
    with zipfile.ZipFile(tmp_path / "draws.npz", "w") as archive, archive.open("values.npy", "w") as stream:
        np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(ValueError, match="larger than its file or than draws are"):
        device_figures._draws(tmp_path / "draws.npz")


def test_a_member_that_is_there_twice_is_refused(zipped, tmp_path):
    results, _ = zipped
    file = packed(results, tmp_path / "results.zip")
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("package.json", b"{}")
    with pytest.raises(UserError, match="is there twice"):
        results_zip.unpack(file, results, tmp_path / "unpacked")


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "device", "empty", "text", "cut"])
def test_files_that_are_no_archives_are_refused(kind, zipped, tmp_path):
    results, _ = zipped
    file = tmp_path / "results.zip"
    whole = packed(results, tmp_path / "whole.zip").read_bytes()
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "device":
        file = Path("/dev/zero")
    elif kind != "missing":
        file.write_bytes({"empty": b"", "text": b"no zip" * 1000, "cut": whole[:1000]}[kind])
    with pytest.raises(UserError, match="results="):
        results_zip.unpack(file, results, tmp_path / "unpacked")


def test_results_of_other_networks_are_refused(zipped):
    bring = zipped[1]
    with pytest.raises(UserError, match=r"of name=y, not x; add name=y"):
        bring(**listed(name="y"))
    with pytest.raises(UserError, match="which the package was made of, was made again since; package it again"):
        bring(listing=lambda about: about["made_of"].update(dict.fromkeys(about["made_of"], "0")))
    with pytest.raises(UserError, match="is not here any more; package it again"):
        bring(**listed(made_of={"quantize/other": "0"}))


EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "a | b",
    "`x`",
    "[/x]",
    "![x](y)",
    "&lt;b&gt;",
    "**x**",
    "<b>x</b>",
]


class Tags(HTMLParser):
    """The tags and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.found, self.addresses, self.handlers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.addresses += [value for key, value in attrs if key in ("href", "src", "action")]
        self.handlers += [key for key, _ in attrs if key.startswith("on")]


@pytest.mark.parametrize("text", EVIL)
def test_no_text_of_a_device_is_more_than_text(text, zipped, tmp_path, capsys):
    results, bring = zipped

    def change(found):
        axes(network=text, precision=text, calibration=text, data=text)(found)
        found[EVALUATE][0]["details.json"] = json.dumps({text: {text: 0.5}}).encode()
        found[BENCHMARK][3].update(device=text, ran=text, not_in_int8=[text])
        found[BENCHMARK][0]["audit.json"] = json.dumps([{**LAYERS[0], "name": text, "op": text, "reason": text}]).encode()

    bring(change=change)
    root = results.outputs / "x"
    table = report.collect([root / EVALUATE], [root / BENCHMARK], root)
    assert table.rows[0]["imported"] == "yes"
    page.write_html(table, text, tmp_path / "report.html")
    tables.write_csv(table, tmp_path / "results.csv")
    card_module.write_card(table, text, tmp_path / "card.md")
    job = Job(
        tmp_path / "out",
        {},
        {"evaluations": [root / EVALUATE], "benchmarks": [root / BENCHMARK], "comparisons": []},
        tmp_path,
        tmp_path,
    )
    report_stage.Report(text).run(job)
    assert text in capsys.readouterr().out
    written = (tmp_path / "report.html").read_text(encoding="utf-8")
    tags = Tags(written)
    assert not tags.handlers
    assert all(address.startswith(("https://", "data:image/jpeg;base64,")) for address in tags.addresses), tags.addresses
    assert "b" not in tags.found
    assert "alert(1)</script>" not in written
    with (tmp_path / "results.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert not any(value.startswith(("=", "@")) or value in EVIL[4:6] for value in row.values())
    assert row["network"].removeprefix("'") == text
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    bare = re.sub(r"\\.", "", card)  # without what is escaped
    assert "<" not in bare
    assert "](" not in bare
    rows = [line for line in bare.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1, "no text makes a column"


YAMLS = {
    "aliases": "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
    "a circle": "a: &a [*a]\n",
    "a circle of maps": "a: &a {b: *a}\n",
    "depth": "a: " + "[" * 5000 + "]" * 5000 + "\n",
    "size": "a: " + "x" * 200_000 + "\n",
    "many": "a: [" + "1," * 90_000 + "1]\n",
}


@pytest.mark.parametrize("what", YAMLS)
def test_choices_of_others_are_bounded(what, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text(YAMLS[what])
    for flag in ("--config-dir", "--config-path"):
        with pytest.raises(UserError, match=r"own\.yaml: too large, too deep, or too large by its aliases"):
            command_line.read([flag, str(tmp_path), "stage=train"])


def test_ordinary_choices_are_read(tmp_path):
    (tmp_path / "own.yaml").write_text("a: &a {b: 1}\nc: *a\n")
    (tmp_path / "empty.yaml").write_text("")
    command_line.read(["--config-dir", str(tmp_path), "stage=train"])
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"broken\.yaml: no YAML .*correct it"):
        command_line.read(["--config-dir", str(tmp_path), "stage=train"])


def test_a_value_that_is_nested_without_end_is_refused():
    with pytest.raises(UserError, match="nested too deeply"):
        command_line.read(["engines=" + "[" * 5000 + "]" * 5000])
