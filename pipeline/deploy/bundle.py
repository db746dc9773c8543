"""Bundles: a folder, and a zip file of it, that runs an engine without this project.

A bundle holds the engine with its description, the package posepress as a wheel, and an example with its expected result.
"""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.contracts import Splits
from pipeline.datasets.detector import Detector
from pipeline.deploy import triton
from pipeline.deploy.bundle_texts import DETECTOR, EXAMPLE, EXPECTED, SUMS, card, readme
from pipeline.deploy.wheel import RUNTIME, add, write_wheel
from pipeline.onnx_files.files import CALIBRATION
from pipeline.progress import say
from pipeline.results.content import sha256
from pipeline.results.fingerprint import ROOT
from pipeline.results.manifest import read_manifest
from posepress.description import FILE, Description, describe
from posepress.errors import UserError
from posepress.labels import Skeleton
from posepress.model import Model
from posepress.resolution import Resolution
from posepress.runners.onnxruntime import ENGINE
from posepress.runners.tensorrt_plan import ENGINE as PLAN
from posepress.runners.tensorrt_plan import SIDE
from posepress.skeletons import HAND_21

_HERE = Path(__file__).resolve().parent
_TRIES = 16  # largest number of images among which the example is chosen
_GPU_RUNTIME = {"CUDAExecutionProvider": "onnxruntime-gpu>=1.20", "TensorrtExecutionProvider": "onnxruntime-gpu>=1.20"}
_BUILT_WITH = ("mem_pool_size_mb", "builder_optimization_level", "tf32", "sparse_weights")  # options of the builder


@dataclass(frozen=True)
class Sources:
    """The results from which a bundle is made.

    Attributes:
        evaluation: result of the stage `evaluate`.
        network: result of the stage `quantize`.
        reference: result of the stage `export`.
        report: result of the stage `report`, which need not exist.
        cache: folder that keeps adopted files.
    """

    evaluation: Path
    network: Path
    reference: Path
    report: Path
    cache: Path


def write_bundle(folder: Path, name: str, sources: Sources, detector: object, data: Splits) -> int:
    """Write a bundle, and a zip file of it beside it.

    Args:
        folder: a new folder.
        name: name of the results.
        sources: the results from which it is made.
        detector: finds the people's boxes; None where there is none.
        data: the data set. One of its images is the example if they are generated; images of users never are.

    Returns:
        The number of results in the example.

    Raises:
        UserError: the engine runs in the project alone, or is no file that can be built elsewhere.
    """
    about = describe(sources.evaluation)
    _refuse_own_code(about)
    folder.mkdir()
    on_tensorrt = about.engine.name == PLAN
    if on_tensorrt:
        _write_build(folder, about, sources)
    else:
        _copy_network(about.engine, folder / ENGINE)
    float_network = sources.reference / "model.onnx"
    if sha256(float_network) != sha256(folder / ENGINE):
        _copy_network(float_network, folder / "model.onnx")
    finder = None if detector is None or not _needs_boxes(about) else _write_detector(folder / DETECTOR, detector, sources)
    content = about.to_dict(about.engine.name, None if finder is None else DETECTOR)
    (folder / FILE).write_text(json.dumps(content, indent=1))
    runtime = [_GPU_RUNTIME.get(about.provider, RUNTIME)] if not on_tensorrt else [RUNTIME] if finder is not None else []
    write_wheel(folder, runtime)
    shutil.copyfile(_HERE / "bundle_infer.py", folder / "infer.py")
    if (dockerfile := ROOT / "docker" / "Dockerfile.bundle").is_file():  # an installed project has none
        shutil.copyfile(dockerfile, folder / "Dockerfile")
    _write_triton(folder, re.sub(r"[^\w-]", "_", name), about.batch if on_tensorrt else None)
    (folder / "MODEL_CARD.md").write_text(card(name, sources.evaluation, sources.report), encoding="utf-8")
    given = about if on_tensorrt else describe(folder)  # the bundle itself runs where it can
    with Model(given, None if finder is None else Model(describe(folder / DETECTOR))) as model:
        count = _write_example(folder, model, data)
    (folder / "README.md").write_text(readme(name, folder, on_tensorrt, _needs_boxes(about) and finder is None))
    _seal(folder)
    return count


def _refuse_own_code(about: Description) -> None:
    """Make sure that nothing outside of posepress is needed.

    Raises:
        UserError: the framing or the decoder is code of the user.
    """
    for what, options in (("framing", about.framing), ("decoder", about.decoder)):
        target = str(options.get("_target_"))
        if not target.startswith("posepress."):
            raise UserError(
                f"{what}: {target} is no part of posepress, and a bundle runs nothing else; choose target=onnxruntime or "
                "target=tensorrt, which copy the code that runs"
            )


def _needs_boxes(about: Description) -> bool:
    return str(about.framing["_target_"]).endswith(".PersonCrops")


def _copy_network(source: Path, target: Path) -> None:
    """Copy a network, with the weights that lie in further files, into one file."""
    import onnx

    from pipeline.onnx_files.cut import external_files

    if external_files(source):
        onnx.save(onnx.load(source), target)
    else:
        shutil.copyfile(source, target)


def _write_detector(folder: Path, detector: object, sources: Sources) -> Description:
    """Write the core of a bundle of the detector.

    Raises:
        UserError: the detector is code of the user.
    """
    if not isinstance(detector, Detector):
        raise UserError(f"detector: {type(detector).__name__} is code of yours, which no bundle runs; give detector.file=FILE")
    about = detector.description(sources.cache)
    folder.mkdir()
    _copy_network(about.engine, folder / ENGINE)
    (folder / FILE).write_text(json.dumps(about.to_dict(ENGINE), indent=1))
    return about


def _write_build(folder: Path, about: Description, sources: Sources) -> None:
    """Write the typed network that TensorRT builds, and how it is built.

    Raises:
        UserError: the plan needs a calibration or plugins, which the bundle does not hold.
    """
    side = json.loads((about.engine.parent / SIDE).read_text())
    if (sources.network / CALIBRATION).exists():
        raise UserError("precision=int8_entropy: TensorRT calibrates while it builds, with images; choose precision=int8")
    if side["plugins"] or side["profiles"] is None:
        raise UserError(f"{about.engine}: needs plugins, or was built elsewhere; a bundle holds networks without plugins")
    _copy_network(sources.network / "model.tensorrt.onnx", folder / ENGINE)
    options = (read_manifest(sources.evaluation) or {})["config"]["backend"]
    content = {key: side[key] for key in ("kind", "spec", "tensors", "profiles", "nodes")}
    content["options"] = {key: options[key] for key in _BUILT_WITH}
    (folder / "build.json").write_text(json.dumps(content, indent=1))
    shutil.copyfile(_HERE / "bundle_build.py", folder / "build.py")
    tensor = side["spec"]["input"]["name"]
    words = ["trtexec", f"--onnx={ENGINE}", "--saveEngine=engine.plan", "--stronglyTyped"]
    words += [f"--memPoolSize=workspace:{options['mem_pool_size_mb']}"]
    words += [f"--builderOptimizationLevel={options['builder_optimization_level']}", *([] if options["tf32"] else ["--noTF32"])]
    words += [
        f"--{kind}Shapes={tensor}:{'x'.join(map(str, shape))}"
        for kind, shape in zip(("min", "opt", "max"), side["profiles"][0], strict=True)
    ]
    (folder / "build.txt").write_text(
        "# This command builds engine.plan for infer.py, and describes it in engine.json:\npython build.py\n\n"
        f"# This one builds a plan for other programs:\n{' '.join(words)}\n"
    )


def _write_triton(folder: Path, name: str, batch: int | None) -> None:
    """Write Triton's model repository. For TensorRT, build.py adds the plan.

    Args:
        folder: the bundle.
        name: name of the model.
        batch: largest batch of the plan; None for ONNX Runtime.
    """
    model = folder / "triton" / name
    model.mkdir(parents=True)
    platform = "onnxruntime_onnx" if batch is None else "tensorrt_plan"
    (model / "config.pbtxt").write_text(triton.config(folder / ENGINE, name, platform, batch))
    if batch is None:
        (model / "1").mkdir()
        try:
            os.link(folder / ENGINE, model / "1" / "model.onnx")
        except OSError:  # the file system has no hard links
            shutil.copyfile(folder / ENGINE, model / "1" / "model.onnx")


def _write_example(folder: Path, model: Model, data: Splits) -> int:
    """Write an image in which the engine finds something, if there is one, and the result. Return the number of results."""
    image = folder / EXAMPLE
    tried: list[tuple[bytes, list[list[float]] | None]] = []
    for content, boxes in _candidates(data, model.spec.labels):
        tried.append((content, boxes if model.needs_boxes and model.detector is None else None))
        image.write_bytes(content)
        if len(model(image, tried[-1][1])):
            break
    else:
        image.write_bytes(tried[0][0])
        tried.append(tried[0])
        say("the engine finds nothing in its example image, so that --verify compares no points", "yellow")
    found = model(image, tried[-1][1])
    content_of = {"image": EXAMPLE, "boxes": tried[-1][1], "threshold": model.threshold, "result": found.to_dict()}
    (folder / EXPECTED).write_text(json.dumps(content_of, indent=1))
    return len(found)


def _candidates(data: Splits, labels: object) -> Iterator[tuple[bytes, list[list[float]] | None]]:
    """Content and people's boxes of the images from which the example is chosen: JPEG files of generated images."""
    from pipeline.datasets.synthetic import Synthetic

    if isinstance(data, Synthetic) and type(data.preset).__module__.startswith("pipeline.datasets."):
        split = data.open("validation")
        for place in range(min(len(split), _TRIES)):
            boxes = split[place].boxes
            file = split.root / split.images[place].file
            yield file.read_bytes(), None if boxes is None else boxes.xywh.tolist()
        return
    import cv2

    from pipeline.datasets.drawing import Preset
    from pipeline.datasets.hands import Hands

    size = Resolution(384, 512)
    hands = isinstance(labels, Skeleton) and labels.names == HAND_21.names
    preset = Hands(size) if hands else Preset(size, (1, 3), (0.5, 0.9), 4, 0, 0.0, 0.2, 0.0)
    for seed in range(_TRIES):
        image, people = preset.draw([seed])
        jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        yield jpeg.tobytes(), [list(map(float, person["bbox"])) for person in people]


def _seal(folder: Path) -> None:
    """Write the checksums of all files, and the zip file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(sums))
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in [*files, folder / SUMS]:
            add(archive, f"{folder.name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
