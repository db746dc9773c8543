"""A bundle runs an engine where nothing but its wheel is installed, and says when one of its files has changed."""

import base64
import csv
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import numpy as np
import onnx
import pytest
import tomllib
from onnx import TensorProto, helper, numpy_helper

import posepress
from pipeline.datasets.detector import Detector
from pipeline.deploy import bundle_infer, triton, wheel
from pipeline.deploy.bundle import Sources, _candidates, _refuse_own_code, write_bundle
from pipeline.launch import command_line, wiring
from pipeline.launch.cell import resolved
from pipeline.results.manifest import write_manifest
from pipeline.results.stage import Stage
from posepress.decoders.boxes import BoxDecoder
from posepress.description import Description
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.skeletons import COCO_17, HAND_21
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec
from tests.conftest import FAKES, ROOT, SMOKE, compiled_before, pipeline, refused
from tests.posepress.test_posepress import ALLOWED

WORDS = [*SMOKE, "precision=int8", "stage=package", "target=bundle"]
FILES = {
    "Dockerfile", "MODEL_CARD.md", "README.md", "SHA256SUMS", "engine.onnx", "example.jpg", "expected.json", "infer.py",
    "model.json", "model.onnx", "posepress_engine-0.1.0-py3-none-any.whl", "triton/smoke/1/model.onnx",
    "triton/smoke/config.pbtxt",
}  # fmt: skip
BARE = """
import runpy, sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {allowed!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed here", name=name)

sys.meta_path.insert(0, Nothing())
sys.argv = ["infer.py", *{words!r}]
import posepress
assert posepress.__file__.startswith({site!r}), posepress.__file__
runpy.run_path("infer.py", run_name="__main__")
"""


def names(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def written(sweep, target="bundle"):
    (folder,) = (sweep / "outputs").glob(f"*/package/*_{target}/bundle")
    return folder


@pytest.fixture(scope="module")
def bundle(finished, tmp_path_factory):
    """A bundle of the smoke network's INT8."""
    sweep = tmp_path_factory.mktemp("bundled")
    shutil.copytree(finished / "outputs", sweep / "outputs")
    pipeline(*WORDS, cwd=sweep, check=0)
    return written(sweep)


@pytest.fixture(scope="module")
def site(bundle, tmp_path_factory):
    """A folder with the content of the wheel."""
    folder = tmp_path_factory.mktemp("site")
    (file,) = bundle.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder)
    for module in (folder / "posepress").rglob("*.py"):  # numba keeps compiled code by the time of its source
        times = (ROOT / module.relative_to(folder)).stat()
        os.utime(module, ns=(times.st_atime_ns, times.st_mtime_ns))
    compiled_before(folder)
    return folder


def bare(folder, site, *words):
    """Run infer.py where nothing is installed but the wheel and what it requires."""
    code = BARE.format(allowed=("posepress", "onnxruntime", *ALLOWED), words=words, site=str(site))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("POSEPRESS", "PYTHON"))}
    env |= {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_it_runs_and_is_checked_where_only_its_wheel_is_installed(bundle, site, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "away")
    done = bare(folder, site, "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("OK\n")
    assert f"{len(FILES) - 1} files are unchanged" in done.stdout
    assert re.search(r"First result after \d+\.\d s, .* the next one after \d+\.\d ms", done.stdout)
    done = bare(folder, site, "example.jpg")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "expected.json").read_text())["result"]
    assert (folder / "example_overlay.jpg").stat().st_size > 1000


@pytest.fixture
def infer(monkeypatch, capsys):
    """The program of a bundle, in this process: its exit status and what it prints."""

    def run(folder, *words):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["infer.py", *map(str, words)])
        status = 0
        try:
            runpy.run_path("infer.py", run_name="__main__")
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_a_changed_or_missing_file_is_named(bundle, tmp_path, infer):
    folder = shutil.copytree(bundle, tmp_path / "away")
    for name in sorted(FILES - {"SHA256SUMS", "infer.py"}):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert infer(folder, "--verify") == (2, f"error: {name}: changed; copy the bundle again\n")
        (folder / name).unlink()
        assert infer(folder, "--verify") == (2, f"error: {name}: missing; copy the bundle again\n")
        (folder / name).write_bytes(content)
    assert infer(folder, "--verify")[0] == 0
    for words in ((), ("example.jpg", "--verify")):
        assert "give an image, or --verify" in infer(folder, *words)[1]
    status, printed = infer(folder, "nowhere.jpg")
    assert (status, "nowhere.jpg: cannot read the image" in printed) == (2, True)
    assert "is the image itself; give another file" in infer(folder, "example.jpg", "--out", "example.jpg")[1]


def test_its_files_and_checksums_are_complete(bundle):
    assert names(bundle) == FILES
    sums = dict(reversed(line.split("  ")) for line in (bundle / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in FILES - {"SHA256SUMS"}}
    with zipfile.ZipFile(bundle.with_suffix(".zip")) as archive:
        assert {entry.filename for entry in archive.infolist()} == {f"bundle/{name}" for name in FILES}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o100644}, "regular files, no links"
        assert all(archive.read(f"bundle/{name}") == (bundle / name).read_bytes() for name in FILES)
    said = (bundle / "README.md").read_text()
    assert all(f"| {name.partition('/')[0]} |" in said for name in FILES - {"README.md"} if not name.endswith(".whl"))


def test_it_predicts_what_the_evaluated_engine_predicts(bundle):
    root = bundle.parents[2]
    (engine,) = root.glob("build/*_dense_*int8*")
    content = json.loads((bundle / "model.json").read_text())
    tuned = json.loads(next(root.glob("tune/*_dense_*/decoder.json")).read_text())["options"]
    assert content["decoder"].items() >= tuned.items()
    assert (bundle / "engine.onnx").read_bytes() == (engine / "engine.onnx").read_bytes()
    with posepress.load(bundle) as packed, posepress.load(engine) as built:
        image = bundle / "example.jpg"
        assert packed(image).to_dict() == built(image).to_dict()
        assert packed.decoder == built.decoder
    card = (bundle / "MODEL_CARD.md").read_text()
    (evaluated,) = root.glob("evaluate/*_dense_*int8*")
    digest = json.loads((evaluated / "metrics.json").read_text())["data_digest"]
    assert f"on 12 validation images (person), digest `{digest}`" in card
    assert "### How the figures were made" in card, "the report shows this engine"
    generated = {file.read_bytes() for file in (root.parent / "cache/synthetic").rglob("validation/*.jpg")}
    assert (bundle / "example.jpg").read_bytes() in generated


def test_its_wheel_is_one(bundle):
    (file,) = bundle.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = "posepress_engine-0.1.0.dist-info"
    rows = {name: (digest, size) for name, digest, size in csv.reader(files[f"{info}/RECORD"].decode().splitlines())}
    assert set(rows) == set(files)
    for name in set(files) - {f"{info}/RECORD"}:
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        assert rows[name] == (f"sha256={digest}", str(len(files[name]))), name
    own = [file for file in (ROOT / "posepress").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {name for name in files if not name.startswith(info)} == {file.relative_to(ROOT).as_posix() for file in own}
    about = message_from_string(files[f"{info}/METADATA"].decode())
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("posepress-engine", "0.1.0", ">=3.10")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = about.get_all("Requires-Dist")
    plain = [need for need in needs if ";" not in need]
    assert {re.match(r"[\w-]+", need)[0] for need in plain} == {
        "numpy", "numba", "opencv-python-headless", "annotated-types", "onnxruntime",
    }  # fmt: skip
    assert set(plain) <= set(project["dependencies"]), "the bounds are the project's"
    assert project["requires-python"] == wheel.PYTHON
    assert {extra: list(of) for extra, of in wheel.EXTRAS.items()} == {
        extra: of for extra, of in project["optional-dependencies"].items() if extra in wheel.EXTRAS
    }
    assert f"posepress = {project['scripts']['posepress']}" in files[f"{info}/entry_points.txt"].decode()


def parsed(text):
    """A message in protobuf's text format, as far as model configurations need it: fields by name, repeated ones in lists."""
    words = re.findall(r'"[^"]*"|[\w.+-]+|[{}\[\]:,]', text)
    assert "".join(words) == re.sub(r"\s(?=(?:[^\"]*\"[^\"]*\")*[^\"]*$)", "", text), "nothing else is in it"

    def message(end):
        fields = {}
        while words and words[0] != end:
            name = words.pop(0)
            colon = words[0] == ":" and words.pop(0)
            assert colon or words[0] in "{[", name
            assert name not in fields, name
            fields[name] = value()
        assert not end or words.pop(0) == end
        return fields

    def value():
        word = words.pop(0)
        if word == "{":
            return message("}")
        if word != "[":
            return json.loads(word) if re.match(r'["\d-]', word) else word
        items = []
        while words[0] != "]":
            items.append(value())
            assert words[0] in ",]"
            words[0] == "," and words.pop(0)
        words.pop(0)
        return items

    return message("")


TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64}


def test_tritons_configuration_fits_the_network(bundle):
    found = parsed((bundle / "triton/smoke/config.pbtxt").read_text())
    assert set(found) == {"name", "platform", "max_batch_size", "input", "output", "dynamic_batching"}
    assert (found["name"], found["platform"], found["max_batch_size"]) == ("smoke", "onnxruntime_onnx", 8)
    assert found["dynamic_batching"] == {}
    with posepress.load(bundle) as model:
        spec, size = model.spec, model.description.resolution
    assert [tensor["name"] for tensor in found["input"]] == [spec.input.name]
    assert [tensor["name"] for tensor in found["output"]] == [field.name for field in spec.fields]
    shapes = [spec.input.shape(1, size)[1:], *(field.shape(size) for field in spec.fields)]
    kinds = [spec.input.dtype, *(field.dtype for field in spec.fields)]
    for tensor, shape, kind in zip([*found["input"], *found["output"]], shapes, kinds, strict=True):
        assert TYPES[tensor["data_type"]] == np.dtype(kind)
        assert len(tensor["dims"]) == len(shape)
        assert all(side in (-1, wanted) for side, wanted in zip(tensor["dims"], shape, strict=True))
    assert (bundle / "triton/smoke/1/model.onnx").read_bytes() == (bundle / "engine.onnx").read_bytes()


def constant(file, size, batch="n", **outputs):
    """A network that returns the given values for every image."""
    nodes = [helper.make_node("ReduceMean", ["image"], ["mean"], axes=[1, 2, 3], keepdims=1)]
    nodes.append(helper.make_node("Mul", ["mean", "tiny"], ["nearly_0"]))
    values = {"tiny": np.array(1e-9), **{f"{name}_values": value for name, value in outputs.items()}}
    infos = []
    for name, value in outputs.items():
        shape = [0, 1, 1, 1] if value.ndim == 4 else [0, 1, 1]
        values[f"{name}_shape"] = np.array(shape)
        nodes.append(helper.make_node("Reshape", ["nearly_0", f"{name}_shape"], [f"{name}_nearly_0"]))
        nodes.append(helper.make_node("Add", [f"{name}_values", f"{name}_nearly_0"], [name]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *value.shape[1:]]))
    tensors = [
        numpy_helper.from_array(v.astype(np.int64 if k.endswith("_shape") else np.float32), k) for k, v in values.items()
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size.height, size.width])
    graph = helper.make_graph(nodes, "g", [image], infos, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, file)
    return file


@pytest.mark.parametrize("batch", ["n", 1])
def test_triton_adds_a_batch_where_the_network_leaves_it_free(batch, tmp_path):
    file = constant(tmp_path / "net.onnx", Resolution(8, 16), batch, boxes=np.zeros((1, 5, 4)))
    found = parsed(triton.config(file, "net", "tensorrt_plan", 4))
    first = [] if batch == "n" else [1]
    assert found["input"] == [{"name": "image", "data_type": "TYPE_FP32", "dims": [*first, 3, 8, 16]}]
    assert found["output"] == [{"name": "boxes", "data_type": "TYPE_FP32", "dims": [*first, 5, 4]}]
    assert (found["max_batch_size"], "dynamic_batching" in found) == ((4, True) if batch == "n" else (0, False))
    assert "dynamic_batching" not in parsed(triton.config(file, "net", "tensorrt_plan", 1)), "one image is no batch"


class Unread:
    """Images of a user, which nothing of a bundle may read."""

    def __contains__(self, split):
        return True

    def open(self, split):
        raise AssertionError(split)

    def digest(self, splits):
        raise AssertionError(splits)


POSE = NetworkSpec(InputSpec("image"), (OutputSpec("heatmaps", 4, 17),), COCO_17)
FINDER = {
    "input": {"name": "image", "multiple": 1},
    "fields": [{"name": name, "stride": 1, "channels": n, "axes": "NC"} for name, n in (("boxes", 4), ("scores", 1))],
    "labels": {"names": ["person"], "colours": [[255, 120, 40]]},
}


def result(folder, **content):
    """A finished result."""
    entry = {"stage": folder.parent.name, "address": folder.name, "digest": f"of {folder.name}", "fingerprint": "", "files": {}}
    write_manifest(folder, {"config": {}, "inputs": {}, "summary": {}, **entry, **content})
    return {key: entry[key] for key in ("stage", "address", "digest")}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """The results of a network that sees one person at a time, and a detector."""
    root = tmp_path_factory.mktemp("people")
    for stage in ("build", "evaluate", "export"):
        (root / stage / "net").mkdir(parents=True)
    heatmaps = np.zeros((1, 17, 16, 12))
    heatmaps[0, np.arange(17), np.arange(17) % 14 + 1, np.arange(17) % 10 + 1] = 0.9
    engine = constant(root / "build/net/engine.onnx", Resolution(64, 48), heatmaps=heatmaps)
    model = onnx.load(engine)
    helper.set_model_props(model, {SPEC_KEY: POSE.to_json()})
    onnx.save(model, engine)
    shutil.copyfile(engine, root / "export/net/model.onnx")
    info = {"digits": 3, "title": "keypoint AP", "short": "AP", "columns": ["ap50"]}
    figures = {"primary": "ap", "ap": 0.5, "ap_lo": 0.4, "ap_hi": 0.6, "ap50": 0.7, "images": 9, "category": "person"}
    result(
        root / "evaluate/net",
        config={
            "framing": {"_target_": "posepress.framing.person_crops.PersonCrops", "padding": 1.25},
            "decoder": {"_target_": "posepress.decoders.heatmap_argmax.TopDownDecoder", "_partial_": True},
            "backend": {"provider": "CPUExecutionProvider"},
            "axes": {"network": "a|b", "backend": "onnxruntime"},
            "resolution": "64x48",
            "batch": 2,
        },
        inputs={"engine": [result(root / "build/net")]},
        summary={**figures, "metric": info, "data_digest": "0", "backend": "onnxruntime", "doubts": []},
    )
    boxes = {"boxes": np.array([[[8, 8, 30, 40], [25, 5, 60, 45]]]), "scores": np.array([[[0.8], [0.1]]])}
    detector = Detector(str(constant(root / "boxes.onnx", Resolution(48, 64), **boxes)), FINDER, resolution="48x64")
    return Sources(root / "evaluate/net", root / "build/net", root / "export/net", root / "report", root / "cache"), detector


@pytest.fixture(scope="module")
def crops(people, tmp_path_factory):
    """A bundle of that network with the detector."""
    folder = tmp_path_factory.mktemp("crops") / "bundle"
    assert write_bundle(folder, "a.b", *people, Unread()) == 2  # one is fainter than pictures show, and was evaluated
    return folder


def test_the_detector_is_a_bundle_of_its_own(crops, infer):
    content = json.loads((crops / "detector/model.json").read_text())
    assert content["decoder"]["_target_"] == f"{BoxDecoder.__module__}.{BoxDecoder.__name__}"
    assert (content["resolution"], content["decoder"]["score_threshold"]) == ("48x64", 0.05)
    with posepress.load(crops / "detector") as detector:
        assert detector(crops / "example.jpg").xywh.shape == (1, 4)
    assert json.loads((crops / "model.json").read_text())["detector"] == "detector"
    expected = json.loads((crops / "expected.json").read_text())
    assert expected["boxes"] is None
    assert len(expected["result"]["people"]) == 2
    status, printed = infer(crops, "--verify")
    assert (status, "example.jpg: as expected, 2 results." in printed) == (0, True), printed
    assert not {"model.onnx", "build.py"} & names(crops), "the float network is the engine itself"
    assert (crops / "triton/a_b/config.pbtxt").exists()
    card = (crops / "MODEL_CARD.md").read_text()
    assert card.startswith("# a.b\n")
    assert "- network: a\\|b\n" in card
    assert "- AP: 0.500, 95 % interval 0.400 to 0.600: keypoint AP on 9 validation images (person)" in card
    assert "## " not in card, "there is no report"


def test_images_of_users_are_in_no_bundle(crops):
    assert [name for name in names(crops) if name.endswith((".jpg", ".png"))] == ["example.jpg"]
    image, _ = next(_candidates(Unread(), COCO_17))
    hand, _ = next(_candidates(Unread(), HAND_21))
    assert (crops / "example.jpg").read_bytes() == image != hand


def test_without_a_detector_the_user_gives_boxes(people, tmp_path, infer):
    folder = tmp_path / "bundle"
    write_bundle(folder, "alone", people[0], None, Unread())
    assert json.loads((folder / "expected.json").read_text())["boxes"]
    assert "--box X Y WIDTH HEIGHT" in (folder / "README.md").read_text()
    assert infer(folder, "--verify")[0] == 0
    assert "give boxes=, or a detector" in infer(folder, "example.jpg")[1]
    boxes = ["--box", 10, 10, 60, 90, "--box", 80, 10, 60, 90]
    status, printed = infer(folder, "example.jpg", "--out", "overlay.png", *boxes)
    assert (status, len(json.loads(printed)["people"])) == (0, 2)
    assert (folder / "overlay.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(UserError, match=r"detector: Unread is code of yours, .*give detector.file=FILE"):
        write_bundle(tmp_path / "other", "other", people[0], Unread(), Unread())


def test_the_stage_reads_an_evaluation_and_the_detector_for_a_bundle():
    config = command_line.compose(["experiment=topdown_quickstart", "detector=own", "detector.file=a.onnx"], None)
    made = {}
    for target in ("tensorrt", "bundle"):
        config.target = target
        wiring.settle(config)
        wiring.wire(config, ["package"])
        made[target] = Stage.from_config("package", resolved(config.stages.package))
        assert made[target].options["detector"]["file"] == "a.onnx"
    assert made["tensorrt"].address == f"{config.addresses.quantize}_tensorrt"
    assert made["bundle"].address == f"{config.addresses.evaluate}_bundle"
    assert made["bundle"].inputs == {**made["tensorrt"].inputs, "evaluation": "evaluate"}
    assert "evaluation" not in made["tensorrt"].inputs


def resealed(folder, change):
    """Change expected.json and its checksum."""
    content = json.loads((folder / "expected.json").read_text())
    change(content["result"]["people"])
    (folder / "expected.json").write_text(json.dumps(content))
    sums = (folder / "SHA256SUMS").read_text()
    digest = hashlib.sha256((folder / "expected.json").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(re.sub(r"\w+(?=  expected\.json)", digest, sums))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda people: people[0]["keypoints"]["nose"].__setitem__(0, people[0]["keypoints"]["nose"][0] + 0.4), 0),
        (lambda people: people[0]["keypoints"]["nose"].__setitem__(0, people[0]["keypoints"]["nose"][0] + 0.6), 2),
        (lambda people: people[0]["keypoints"].__setitem__("nose", None), 2),
        (lambda people: people[0].__setitem__("score", people[0]["score"] - 0.015), 0),
        (lambda people: people[0].__setitem__("score", people[0]["score"] - 0.03), 2),
        (lambda people: people.clear(), 2),
        (lambda people: people.append(people[0] | {"keypoints": {**people[0]["keypoints"], "nose": [0, 0, 0.5]}}), 2),
    ],
)
def test_another_result_of_the_example_is_told(crops, tmp_path, infer, change, status):
    folder = shutil.copytree(crops, tmp_path / "away")
    resealed(folder, change)
    found = infer(folder, "--verify")
    assert found[0] == status, found
    assert ("this runtime or processor computes another result" in found[1]) == (status == 2)


def test_results_near_the_threshold_may_come_and_go():
    rows = {"boxes": [{"box": [1, 2, 3, 4], "score": 0.31}]}
    assert bundle_infer.unlike(rows, {"boxes": []}, 0.3) == []
    assert bundle_infer.unlike(rows, {"boxes": []}, 0.2) == [f"no result is like {rows['boxes'][0]} of boxes"]
    assert bundle_infer.unlike(rows, {"boxes": [{"box": [1, 2, 3, 4.6], "score": 0.31}]}, 0.2)
    assert not bundle_infer.unlike(rows, {"boxes": [{"box": [1, 2, 3, 4.4], "score": 0.32}]}, 0.2)


def test_a_plan_is_built_where_the_bundle_runs(smoke, doubles):
    words = [*SMOKE, "precision=fp32", "backend=tensorrt"]
    pipeline(*words, "stage=[build,evaluate]", cwd=smoke, double=True, check=0)
    pipeline(*words, "stage=package", "target=bundle", cwd=smoke, double=True, check=0)
    folder = written(smoke)
    assert names(folder) >= {"engine.onnx", "build.py", "build.json", "build.txt"}
    assert not names(folder) & {"engine.plan", "engine.json", "triton/smoke/1/model.onnx"}
    assert "trtexec --onnx=engine.onnx" in (folder / "build.txt").read_text()
    assert "--minShapes=image:1x3x64x80" in (folder / "build.txt").read_text()
    assert "double of TensorRT" in (folder / "MODEL_CARD.md").read_text()
    assert parsed((folder / "triton/smoke/config.pbtxt").read_text())["platform"] == "tensorrt_plan"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        about = archive.read("posepress_engine-0.1.0.dist-info/METADATA").decode()
    assert "onnxruntime" not in about

    def run(*words):
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{FAKES}"}
        return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=120)

    assert "build it on this machine with: python build.py" in run("infer.py", "--verify").stderr
    built = run("build.py")
    assert built.returncode == 0, built.stderr
    assert (folder / "triton/smoke/1/model.plan").read_bytes() == (folder / "engine.plan").read_bytes()
    done = run("infer.py", "--verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("OK\n")


def test_what_runs_in_the_project_alone_is_refused(smoke):
    message = refused(pipeline(*WORDS, "pruner=l1", "batch=2", cwd=smoke))
    assert "package: needs" in message
    assert "stage=evaluate" in message
    framing = {"_target_": "posepress.framing.whole_image.WholeImage"}
    about = Description(Path("engine.onnx"), "CPU", Resolution(8, 8), 1, framing, {"_target_": "nets.Mine"})
    with pytest.raises(UserError, match=r"decoder: nets.Mine is no part of posepress, .*choose target=onnxruntime"):
        _refuse_own_code(about)
