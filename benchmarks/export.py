"""Exporting a network for every shape, compared with torch's exporter: `python benchmarks/export.py`.

Our export is timed without and with a kept graph of a network of equal structure. The peer is torch.onnx.export with equal
dynamic axes, including its optimisation. All run in turns in one process, after one run of each; the minimum of five counts.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.models.lightweight_openpose import LightweightOpenPose
from pipeline.models.mobilenetv2_paf import MobileNetV2Paf
from pipeline.onnx_files.export import export

REPEATS = 5
AXES = {0: "batch", 2: "height", 3: "width"}


def seconds(call: Callable[[], object]) -> float:
    """The time of one call, in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    warnings.simplefilter("ignore")
    networks: dict[str, nn.Module] = {
        "lightweight OpenPose, width .5": LightweightOpenPose(width=0.5),
        "mobilenetv2_paf, width 1.4": MobileNetV2Paf(width=1.4),
    }
    images = np.random.default_rng(0).random((1, 3, 176, 208), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        out, graphs = Path(folder) / "model.onnx", Path(folder) / "graphs"
        for name, network in networks.items():
            network.eval()

            def peer(network: nn.Module = network) -> None:
                program = torch.onnx.export(
                    network, (torch.from_numpy(images),), dynamo=True, opset_version=20, dynamic_shapes=(AXES,), verbose=False
                )
                assert program is not None
                program.save(out)

            ways: dict[str, Callable[[], object]] = {
                "torch": peer,
                "ours": lambda network=network: export(network, images, 20, out),  # type: ignore[misc]
                "ours, known structure": lambda network=network: export(network, images, 20, out, graphs=graphs),  # type: ignore[misc]
            }
            runs = [{way: seconds(call) for way, call in ways.items()} for _ in range(REPEATS + 1)][1:]
            least = {way: min(run[way] for run in runs) for way in ways}
            print(f"{name}: " + ", ".join(f"{way} {value:.1f} s" for way, value in least.items()), flush=True)


if __name__ == "__main__":
    main()
