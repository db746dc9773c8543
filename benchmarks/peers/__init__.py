"""Peers' decoders of heatmaps and PAFs, from clones of their repositories. None of their code is stored here.

A folder holds the clones under their original names, at these commits: `lightweight-human-pose-estimation.pytorch` (d23c284),
`tf-pose-estimation` (9aaf347), `pytorch_Realtime_Multi-Person_Pose_Estimation` (02174bc), `trt_pose` (336b8cd). Their C++ is
compiled with `g++ -O3 -march=native` when it is first needed. Each decoder takes heatmaps [19, H, W] and PAFs [38, H, W] in
the order of OPENPOSE_18 and returns [N, 18, 3]: x, y in input pixels, and a score that is 0 where the keypoint is missing.
"""

import ctypes
import importlib.util
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from posepress.skeletons import OPENPOSE_18

F32 = NDArray[np.float32]
Decode = Callable[[F32, F32], F32]

HERE, STRIDE = Path(__file__).resolve().parent, 8
_LIGHT, _TF, _TB, _TRT = (
    "lightweight-human-pose-estimation.pytorch",
    "tf-pose-estimation",
    "pytorch_Realtime_Multi-Person_Pose_Estimation",
    "trt_pose",
)


def _library(out: Path, source: str, include: Path, *others: Path) -> ctypes.CDLL:
    if not out.exists():
        command = ["g++", "-O3", "-march=native", "-shared", "-fPIC", f"-I{include}", str(HERE / source), *map(str, others)]
        subprocess.run([*command, "-o", str(out)], check=True)
    return ctypes.CDLL(str(out))


def _to_pixels(found: F32, ratio: float) -> F32:
    """Convert cells of maps, upsampled `ratio` times, to input pixels. The centres of cells are preserved."""
    found[..., :2] = np.where(found[..., 2:] != 0, (found[..., :2] + 0.5) * (STRIDE / ratio) - 0.5, 0)
    return found


def _lightweight(folder: Path, ratio: int) -> Decode:
    """The peer's decoder. Ratio 8 is that of val.py, which upsamples to the size of the image; ratio 4 is that of demo.py."""
    made = importlib.util.spec_from_file_location("lightweight_keypoints", folder / _LIGHT / "modules/keypoints.py")
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)

    def decode(heatmaps: F32, pafs: F32) -> F32:
        maps, limbs = (
            cv2.resize(field.transpose(1, 2, 0), (0, 0), fx=ratio, fy=ratio, interpolation=cv2.INTER_CUBIC)
            for field in (heatmaps, pafs)
        )
        peaks: list[Any] = []
        total = 0
        for k in range(18):
            total += module.extract_keypoints(maps[:, :, k], peaks, total)
        people, points = module.group_keypoints(peaks, limbs)
        if not len(people):
            return np.zeros((0, 18, 3), np.float32)
        ids = people[:, :18].astype(int)
        return _to_pixels(np.where(ids[..., None] >= 0, points[ids, :3], 0).astype(np.float32), ratio)

    return decode


def _pafprocess(library: ctypes.CDLL) -> Callable[..., None]:
    shape = [ctypes.c_int] * 3 + [ctypes.c_void_p]
    library.paf_process.argtypes = shape * 3
    library.paf_humans.argtypes = [ctypes.c_void_p]
    library.paf_score.restype = library.paf_part_score.restype = ctypes.c_float

    def process(*fields: NDArray[Any]) -> None:
        arrays = [np.ascontiguousarray(field, np.float32) for field in fields]
        library.paf_process(*(value for array in arrays for value in (*array.shape, array.ctypes.data)))

    return process


def _tf_pose(folder: Path) -> Decode:
    """The decoder of estimator.py. OpenCV replaces its TensorFlow part (upsampling, smoothing, maxima)."""
    from scipy.stats import norm

    library = _library(folder / "tf_pose.so", "pafprocess_c.cpp", folder / _TF / "tf_pose/pafprocess")
    process = _pafprocess(library)
    size, deviations = 25, 3.0
    edge = deviations + (2 * deviations + 1) / size / 2
    kernel = np.sqrt(np.diff(norm.cdf(np.linspace(-edge, edge, size + 1))))
    kernel = (kernel / kernel.sum()).astype(np.float32)
    around = np.ones((3, 3), np.uint8)

    def decode(heatmaps: F32, pafs: F32) -> F32:
        heat, limbs = (
            cv2.resize(field.transpose(1, 2, 0), (0, 0), fx=4, fy=4, interpolation=cv2.INTER_NEAREST)
            for field in (heatmaps, pafs)
        )
        smooth = cv2.sepFilter2D(heat, -1, kernel, kernel, borderType=cv2.BORDER_CONSTANT)
        process(np.where(smooth == cv2.dilate(smooth, around), smooth, np.float32(0)), heat, limbs)
        out = np.empty((library.paf_num_humans(), 18, 3), np.float32)
        library.paf_humans(out.ctypes.data)
        return _to_pixels(out, 4)

    return decode


def _tensorboy(folder: Path) -> Decode:
    """The peer's Python decoder. It calls the peer's C++ through ctypes instead of SWIG."""
    library = _library(folder / "tensorboy.so", "pafprocess_c.cpp", folder / _TB / "lib/pafprocess")
    stand_in: Any = types.ModuleType("lib.pafprocess.pafprocess")
    stand_in.process_paf = _pafprocess(library)
    for name in ("num_humans", "score", "part_cid", "part_x", "part_y", "part_score"):
        setattr(stand_in, f"get_{name}", getattr(library, f"paf_{name}"))
    sys.modules[stand_in.__name__] = stand_in
    sys.path.insert(0, str(folder / _TB))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("lib.utils.paf_to_pose")
    sys.path.pop(0)
    space = types.SimpleNamespace
    config = space(MODEL=space(NUM_KEYPOINTS=18, DOWNSAMPLE=STRIDE), TEST=space(THRESH_HEATMAP=0.1))

    def decode(heatmaps: F32, pafs: F32) -> F32:
        people = module.paf_to_pose_cpp(heatmaps.transpose(1, 2, 0), pafs.transpose(1, 2, 0), config)
        out = np.zeros((len(people), 18, 3), np.float32)
        for n, person in enumerate(people):
            for k, part in person.body_parts.items():
                out[n, k] = part.x * heatmaps.shape[2] * STRIDE, part.y * heatmaps.shape[1] * STRIDE, part.score
        return out

    return decode


def _trt_pose(folder: Path, window: int) -> Decode:
    """The decoder of parse_objects.py with its defaults. The default of `window` is 5; the example notebooks use 3."""
    parse = folder / _TRT / "trt_pose/parse"
    names = ("find_peaks", "refine_peaks", "paf_score_graph", "munkres", "connect_parts")
    sources = [parse / f"{name}.cpp" for name in names]
    library = _library(folder / "trt_pose.so", "trt_pose_c.cpp", folder / _TRT / "trt_pose", *sources)
    pointer, whole, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    library.trt_parse.argtypes = [pointer] * 3 + [whole] * 4 + [real] * 2 + [whole] * 3 + [pointer]
    topology = np.array([(2 * n + 1, 2 * n, a, b) for n, (a, b) in enumerate(OPENPOSE_18.limbs)], np.int32)

    def decode(heatmaps: F32, pafs: F32) -> F32:
        heat, limbs = (np.ascontiguousarray(field, np.float32) for field in (heatmaps, pafs))
        _, H, W = heat.shape
        out: F32 = np.empty((100, 18, 3), np.float32)
        fixed = (topology.ctypes.data, 18, len(topology), H, W, 0.1, 0.1, window, 7, 100)
        out = out[: library.trt_parse(heat.ctypes.data, limbs.ctypes.data, *fixed, out.ctypes.data)]
        out = out[(out[..., 2] > 0).sum(axis=1) >= 3]  # only this peer returns single keypoints as people
        pixels = out[..., :2] * np.array([W * STRIDE, H * STRIDE], np.float32) - 0.5
        out[..., :2] = np.where(out[..., 2:] != 0, pixels, 0)
        return out

    return decode


def load(folder: Path) -> dict[str, Decode]:
    """The decoders whose clones are in the folder.

    Raises:
        SystemExit: the folder has no known clone.
    """
    made: dict[str, Decode] = {}
    if (folder / _TRT).is_dir():
        made |= {"trt_pose": _trt_pose(folder, 5), "trt_pose, window 3": _trt_pose(folder, 3)}
    if (folder / _TF).is_dir():
        made["tf-pose-estimation"] = _tf_pose(folder)
    if (folder / _TB).is_dir():
        made["pytorch_Realtime_Multi-Person"] = _tensorboy(folder)
    if (folder / _LIGHT).is_dir():
        made |= {"lightweight, demo": _lightweight(folder, 4), "lightweight, val": _lightweight(folder, 8)}
    if not made:
        raise SystemExit(f"{folder}: no clone of a peer; add one of those that benchmarks/peers/__init__.py lists")
    return made
