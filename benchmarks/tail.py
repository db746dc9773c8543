"""INT8 of the layouts of one-stage networks: our files, and ONNX Runtime's own quantization.

    python benchmarks/tail.py [--folder FOLDER]

The network of `experiment=onestage_quickstart` gets the outputs of YOLOv8-pose (all values side by side), of YOLO26-pose (the
300 best entries) and of RTMO (boxes and scores in one output). Our quantizer leaves these joints in float. ONNX Runtime's
static quantization (uint8, per channel, min-max, the same 32 images) gives each one scale. The table holds the AP on the 400
validation images.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
SIZE = "192x224"
DATA = ["data=synthetic_demo", "data.counts.train=800", "tracking=none"]
LAYOUTS = {
    "yolov8_pose": [f"model.spec.fields.{n}.shift=0" for n in (0, 2)],
    "yolo26_pose": ["decoder.nms_iou=0.65", *(f"model.spec.fields.{n}.shift=0" for n in (0, 3))],
    "rtmo": ["model.spec.input.order=RGB", "model.spec.input.range=1.0"],
}


def chain(layout: str) -> list[str]:
    """The options of a layout."""
    return [
        f"name=tail_{layout}", f"model={layout}", f"model.onnx={layout}.onnx", "decoder.form=xyxy",
        f"training_resolution={SIZE}", "model.spec.input.mean=0.5", "model.spec.input.std=0.5", "sampler.num_images=32",
        *LAYOUTS[layout], *DATA,
    ]  # fmt: skip


def pipeline(folder: Path, *words: str) -> None:
    """Run the command in a folder."""
    subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=folder, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def joined(source: Path, layout: str, file: Path) -> None:
    """Write the network of a file with the outputs of a layout instead of three sets."""
    model = onnx.load(source)

    def add(operator: str, inputs: list[str], out: str, **how: Any) -> str:
        model.graph.node.append(helper.make_node(operator, inputs, [out], name=out, **how))
        return out

    def constant(name: str, values: Any, kind: type = np.int64) -> str:
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, kind), name))
        return name

    shapes: dict[str, list[Any]] = {}
    if layout == "yolov8_pose":
        add("Transpose", [add("Concat", ["boxes", "scores", "keypoints"], "sides", axis=2)], "output0", perm=[0, 2, 1])
        shapes["output0"] = ["batch", 56, "entries"]
    elif layout == "yolo26_pose":
        none = add("Mul", ["scores", constant("zero", 0, np.float32)], "classes")
        every = add("Concat", ["boxes", "scores", none, "keypoints"], "sides", axis=2)
        add("Transpose", ["scores"], "line", perm=[0, 2, 1])
        model.graph.node.append(
            helper.make_node("TopK", ["line", constant("most", [300])], ["best", "rows"], name="top", axis=2)
        )
        rows = add("Transpose", ["rows"], "column", perm=[0, 2, 1])
        add("GatherElements", [every, add("Tile", [rows, constant("wide", [1, 1, 57])], "cells")], "output0", axis=1)
        shapes["output0"] = ["batch", 300, 57]
    else:
        add("Concat", ["boxes", "scores"], "dets", axis=2)
        add("Reshape", ["keypoints", constant("form", [0, 0, 17, 3])], "points")
        for node in model.graph.node:  # the output takes the name of the set that it is made of
            node.input[:] = ["flat" if name == "keypoints" else name for name in node.input]
            node.output[:] = [{"keypoints": "flat", "points": "keypoints"}.get(name, name) for name in node.output]
        shapes = {"dets": ["batch", "entries", 5], "keypoints": ["batch", "entries", 17, 3]}
    del model.graph.output[:], model.metadata_props[:], model.graph.value_info[:]
    model.graph.output.extend(helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in shapes.items())
    onnx.checker.check_model(model)
    onnx.save(model, file)


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The calibration images that the stage `sample` chose, as the network's inputs."""

    def __init__(self, folder: Path, name: str, spec: Any) -> None:
        from pipeline.calibration.feed import calibration_feed
        from pipeline.datasets.synthetic import Synthetic
        from pipeline.launch.cell import resolved
        from pipeline.launch.command_line import compose
        from pipeline.launch.components import build
        from posepress.framing.whole_image import WholeImage
        from posepress.resolution import Resolution

        options = {k: v for k, v in resolved(compose(DATA, None).data).items() if k != "about"}
        data: Synthetic = build({**options, "cache": str(folder / "outputs/cache")})
        (chosen,) = (folder / "outputs" / name / "sample").glob("*/calibration.json")
        feed = calibration_feed(chosen, data, None, WholeImage(), spec.input, Resolution.parse(SIZE), folder / "outputs/cache")
        self._batches: Iterator[Any] = iter(feed.read(None))
        self._name = spec.input.name

    def get_next(self) -> dict[str, Any] | None:
        """The next image, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def by_onnxruntime(folder: Path, name: str) -> Path:
    """ONNX Runtime's static quantization of the adopted network."""
    from pipeline.onnx_files.files import read_spec

    (source,) = (folder / "outputs" / name / "export").glob("*/model.onnx")
    prepared, file = folder / "prepared.onnx", folder / f"{name}.static.onnx"
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(file), Images(folder, name, read_spec(source)), QuantFormat.QDQ, per_channel=True,
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
    table = Table("layout", "file", "AP", "interval")
    for layout in LAYOUTS:
        joined(source, layout, folder / f"{layout}.onnx")
        stages = "stage=[export,sample,quantize,build,tune,evaluate]"
        pipeline(folder, "--multirun", *chain(layout), "precision=fp32,int8", stages)
        file = by_onnxruntime(folder, f"tail_{layout}")
        given = ["precision=external", f"precision.file={file}", "stage=[quantize,build,evaluate]"]
        pipeline(folder, *chain(layout), *given)
        for name, part in (("FP32", "fp32"), ("ours, INT8", "int8"), ("ONNX Runtime's static quantization", "external")):
            (metrics,) = (folder / f"outputs/tail_{layout}/evaluate").glob(f"*_{part}*/metrics.json")
            figures = json.loads(metrics.read_text())
            row = (f"{figures['ap']:.3f}", f"{figures['ap_lo']:.3f} to {figures['ap_hi']:.3f}")
            table.add_row(layout, name, *row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
