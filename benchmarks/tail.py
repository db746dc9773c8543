"""INT8 of a network whose one output holds pixels and probabilities: our files, and ONNX Runtime's own quantization.

    python benchmarks/tail.py [--folder FOLDER]

The network of `experiment=onestage_quickstart` gets the one output of YOLOv8-pose: boxes, scores and keypoints side by side.
Our quantizer leaves that concatenation in float. ONNX Runtime's static quantization (uint8, per channel, min-max, the same 32
images) gives it one scale. The table holds the AP of both on the 400 validation images.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SIZE = "192x224"
DATA = ["data=synthetic_demo", "data.counts.train=800", "tracking=none"]
LAYOUT = [
    "name=tail", "model=yolov8_pose", "model.onnx=joined.onnx", "decoder.form=xyxy", f"training_resolution={SIZE}",
    "model.spec.input.mean=0.5", "model.spec.input.std=0.5", "sampler.num_images=32",
    *(f"model.spec.fields.{n}.shift=0" for n in (0, 2)),
]  # fmt: skip


def pipeline(folder: Path, *words: str) -> None:
    """Run the command in a folder."""
    subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def joined(source: Path, file: Path) -> None:
    """Write the network of a file with one output [n, 56, entries] instead of three sets."""
    model = onnx.load(source)
    names = ["boxes", "scores", "keypoints"]
    model.graph.node.append(helper.make_node("Concat", names, ["sides"], axis=2, name="join"))
    model.graph.node.append(helper.make_node("Transpose", ["sides"], ["output0"], perm=[0, 2, 1], name="turn"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("output0", onnx.TensorProto.FLOAT, ["batch", 56, "entries"]))
    del model.metadata_props[:]
    onnx.checker.check_model(model)
    onnx.save(model, file)


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images that the stage `sample` chose, as the network's inputs."""

    def __init__(self, folder: Path, spec: Any) -> None:
        from pipeline.calibration.feed import calibration_feed
        from pipeline.datasets.synthetic import Synthetic
        from pipeline.launch.cell import resolved
        from pipeline.launch.command_line import compose
        from pipeline.launch.components import build
        from posepress.framing.whole_image import WholeImage
        from posepress.resolution import Resolution

        options = {k: v for k, v in resolved(compose(DATA, None).data).items() if k != "about"}
        data: Synthetic = build({**options, "cache": str(folder / "outputs/cache")})
        (chosen,) = (folder / "outputs/tail/sample").glob("*/calibration.json")
        feed = calibration_feed(chosen, data, None, WholeImage(), spec.input, Resolution.parse(SIZE), folder / "outputs/cache")
        self._batches: Iterator[Any] = iter(feed.read(None))
        self._name = spec.input.name

    def get_next(self) -> dict[str, Any] | None:
        """The next image, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def by_onnxruntime(folder: Path) -> Path:
    """ONNX Runtime's static quantization of the adopted network."""
    from pipeline.onnx_files.files import read_spec

    (source,) = (folder / "outputs/tail/export").glob("*/model.onnx")
    prepared, file = folder / "prepared.onnx", folder / "static.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(file), Images(folder, read_spec(source)), QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return file


def main() -> None:
    """Print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--folder", type=Path, default=Path("outputs/tail"))
    folder: Path = words.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(ROOT / "data")
    pipeline(folder, "experiment=onestage_quickstart", "stage=[train,export]", *DATA)
    (source,) = (folder / "outputs/onestage_quickstart/export").glob("*dense/model.onnx")
    joined(source, folder / "joined.onnx")
    pipeline(folder, "--multirun", *LAYOUT, *DATA, "precision=fp32,int8", "stage=[export,sample,quantize,build,tune,evaluate]")
    file = by_onnxruntime(folder)
    pipeline(folder, *LAYOUT, *DATA, "precision=external", f"precision.file={file}", "stage=[quantize,build,evaluate]")
    table = Table("file", "AP", "interval")
    for name, part in (("FP32", "fp32"), ("ours, INT8", "int8"), ("ONNX Runtime's static quantization", "external")):
        (metrics,) = (folder / "outputs/tail/evaluate").glob(f"*_{part}*/metrics.json")
        figures = json.loads(metrics.read_text())
        table.add_row(name, f"{figures['ap']:.3f}", f"{figures['ap_lo']:.3f} to {figures['ap_hi']:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
