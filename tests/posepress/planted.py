"""Bundles of networks that return planted people, whatever they see."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from posepress.labels import Skeleton
from posepress.spec import SPEC_KEY, InputSpec, NetworkSpec, OutputSpec

SIZE = 64
LABELS = Skeleton(("head", "left_hand", "right_hand"), ((0, 1), (0, 2)), (0.05, 0.05, 0.05))
BOXES = np.array([[8, 4, 24, 60], [32, 4, 56, 60], [2, 2, 6, 6]], np.float32)  # the third is faint
SCORES = np.array([[0.9], [0.6], [0.1]], np.float32)
POINTS = np.array([[16, 8, 0.9, 10, 30, 0.8, 22, 30, 0.7], [44, 8, 0.9, 36, 30, 0.8, 52, 30, 0.7], [4] * 9], np.float32)
ONESTAGE = {"_target_": "posepress.decoders.onestage.OneStageDecoder", "nms_iou": 0.65}
WHOLE = {"_target_": "posepress.framing.whole_image.WholeImage", "keep_aspect_ratio_mode": "pad_image_input"}
CROPS = {"_target_": "posepress.framing.person_crops.PersonCrops", "padding": 1.0}
TOPDOWN = {"_target_": "posepress.decoders.heatmap_argmax.TopDownDecoder"}


def network(file, outputs, fields):
    """Write a network of free batch that returns the given outputs for every image."""
    spec = NetworkSpec(InputSpec("image"), fields, LABELS, frozenset({"batch"}))
    nodes = [
        helper.make_node("ReduceSum", ["image", "axes"], ["sum"], keepdims=1),
        helper.make_node("Mul", ["sum", "nothing"], ["zero4"]),
        helper.make_node("Squeeze", ["zero4", "last"], ["zero3"]),
    ]
    constants = [numpy_helper.from_array(np.array([1, 2, 3]), "axes"), numpy_helper.from_array(np.array([3]), "last")]
    constants += [numpy_helper.from_array(np.array(0, np.float32), "nothing")]
    infos = []
    for name, values in outputs.items():
        constants.append(numpy_helper.from_array(values[None], f"{name}_values"))
        nodes.append(helper.make_node("Add", [f"{name}_values", f"zero{values.ndim + 1}"], [name]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *values.shape]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    graph = helper.make_graph(nodes, "planted", [image], infos, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save(model, file)


def described(folder, **values):
    content = {
        "engine": "engine.onnx", "provider": "CPUExecutionProvider", "resolution": f"{SIZE}x{SIZE}", "batch": 4,
        "detector": None, **values,
    }  # fmt: skip
    (folder / "model.json").write_text(json.dumps(content))
    return folder


def one_stage(folder, **more):
    """A bundle of a one-stage network that finds two people, and a faint third."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"boxes": 4, "scores": 1, "keypoints": 9}
    fields = tuple(OutputSpec(name, 1, channels, axes="NC") for name, channels in sets.items())
    network(folder / "engine.onnx", {"boxes": BOXES, "scores": SCORES, "keypoints": POINTS}, fields)
    return described(folder, **{"framing": WHOLE, "decoder": ONESTAGE, **more})


def top_down(folder, **more):
    """A bundle of a top-down network whose three keypoints lie at fixed places of a crop: (20, 8), (12, 36) and (28, 36)."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = np.zeros((3, 16, 16), np.float32)
    for k, (x, y) in enumerate(((5, 2), (3, 9), (7, 9))):
        maps[k, y, x] = 0.8
    network(folder / "engine.onnx", {"heatmaps": maps}, (OutputSpec("heatmaps", 4, 3),))
    return described(folder, **{"framing": CROPS, "decoder": TOPDOWN, **more})


def picture(file, height=64, width=64):
    """Write a grey image."""
    import cv2

    file.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(file), np.full((height, width, 3), 90, np.uint8))
    return file
