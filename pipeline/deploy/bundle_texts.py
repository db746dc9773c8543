"""The texts of a bundle: its instructions and its model card."""

import re
from pathlib import Path

from pipeline.report.tables import in_markdown
from pipeline.results.manifest import by_double, read_manifest
from posepress.description import FILE
from posepress.runners.onnxruntime import ENGINE

SUMS, EXAMPLE, EXPECTED, DETECTOR = "SHA256SUMS", "example.jpg", "expected.json", "detector"
_README = """# {name}

This folder runs one engine on images, on Python 3.10 or later. It needs nothing else of the project that made it.

    python -m venv .venv
    .venv/bin/pip install posepress_engine-*.whl
    .venv/bin/python infer.py --verify
    .venv/bin/python infer.py photo.jpg --out overlay.jpg

Install the wheel in a venv of its own: it contains the package `posepress`, as the whole project does.
The first result takes some seconds, because the decoder is compiled once for this processor.
{build}
In Python:

    >>> import posepress
    >>> model = posepress.load("{folder}")
    >>> poses = model("photo.jpg")

The command `posepress predict {folder} SOURCE` takes folders, videos and cameras, too.
{boxes}
## Files

| file | what it is |
| --- | --- |
{files}

`--verify` compares every file with SHA256SUMS, and the example's result with expected.json.
It accepts differences of 0.5 px and of .02 of a score. Checksums show damage, and not the origin of the files.

## Triton and Docker

`tritonserver --model-repository=triton` serves the network alone. Its client prepares the images and decodes the outputs.
`docker build -t engine .` makes an image that runs infer.py. Neither was run where this bundle was made.
"""
_BUILD = """
The engine is built on the device, because a TensorRT plan runs on its own kind of GPU only:

    .venv/bin/python build.py

This needs TensorRT and cuda-python, which the wheel does not install. build.txt holds the command for trtexec, too.
"""
_BOXES = """
The network sees one person at a time, and this bundle has no detector. Give each person's box: `--box X Y WIDTH HEIGHT`.
"""
_FILES = {
    ENGINE: "the engine",
    "model.onnx": "the network before quantization",
    FILE: "resolution, framing, and decoder with its tuned options",
    DETECTOR: "the detector that finds the people's boxes, and its description",
    "posepress_engine-*.whl": "the package `posepress`",
    "infer.py": "runs the engine on an image, and checks the bundle",
    "build.py": "builds the plan of TensorRT for this machine",
    "build.json": "shapes and options of the plan",
    "build.txt": "the same as commands",
    "MODEL_CARD.md": "figures of the engine, and how they were made",
    EXAMPLE: "a generated image",
    EXPECTED: "the engine's result of that image",
    "triton": "a model repository of NVIDIA's Triton Inference Server",
    "Dockerfile": "an image that runs infer.py",
    SUMS: "checksums of all other files",
}


def card(name: str, evaluation: Path, report: Path) -> str:
    """The model card: this engine's accuracy, and the report's card if the report shows this evaluation.

    Args:
        name: name of the results.
        evaluation: result of the stage `evaluate`.
        report: result of the stage `report`, which need not exist.
    """
    manifest = read_manifest(evaluation)
    assert manifest is not None
    summary, axes = manifest["summary"], manifest["config"]["axes"]
    info, key = summary["metric"], summary["primary"]
    low, figure, high = (f"{summary[part]:.{info['digits']}f}" for part in (f"{key}_lo", key, f"{key}_hi"))
    others = [f"{column} {summary[column]:.{info['digits']}f}" for column in info["columns"] if column in summary]
    lines = [f"# {in_markdown(name)}", "", "This bundle holds one engine, which Posepress made and evaluated.", ""]
    lines += [f"- {in_markdown(axis)}: {in_markdown(str(value))}" for axis, value in axes.items() if value not in ("", None)]
    lines += [
        f"- {in_markdown(info['short'])}: {figure}, 95 % interval {low} to {high}: {in_markdown(info['title'])} on "
        f"{summary['images']} validation images ({in_markdown(summary['category'])}), digest `{summary['data_digest']}`",
        f"- run by {in_markdown(summary['backend'])}",
        *([f"- further figures: {in_markdown(', '.join(others))}"] if others else []),
        "- The interval is a bootstrap over images. Images unlike the validation images were not measured.",
        *(["- A double of TensorRT computed these figures in a test; they are no measurements."] if by_double(summary) else []),
        *(f"- {in_markdown(doubt)}" for doubt in summary["doubts"]),
    ]
    whole, text = read_manifest(report), report / "model_card.md"
    shown = [] if whole is None else whole["inputs"].get("evaluations", [])
    this = (manifest["address"], manifest["digest"])
    if text.is_file() and this in {(entry["address"], entry["digest"]) for entry in shown}:
        lines += ["", re.sub(r"(?m)^#", "##", text.read_text(encoding="utf-8")).rstrip()]
    return "\n".join(lines) + "\n"


def readme(name: str, folder: Path, on_tensorrt: bool, boxes: bool) -> str:
    """The instructions: how to install, run and check the bundle, and what is in it.

    Args:
        name: name of the results.
        folder: the bundle, with all its other files.
        on_tensorrt: whether the plan is built on the device.
        boxes: whether the user must give people's boxes.
    """
    files = [f"| {file} | {what} |" for file, what in _FILES.items() if file == SUMS or any(folder.glob(file))]
    parts = {"build": _BUILD if on_tensorrt else "", "boxes": _BOXES if boxes else ""}
    return _README.format(name=name, folder=folder.name, files="\n".join(files), **parts)
