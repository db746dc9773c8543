"""PyTorch itself: the network as it was trained, or a typed ONNX file node by node, in floating point."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.onnx_files.files import ModelFiles, Shapes
from posepress.errors import UserError
from posepress.spec import Array, Fields, NetworkSpec, Resolution

ENGINE = "engine.json"
_TYPED = "typed.onnx"
_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Torch:
    """Runs the checkpoint that was exported, on a GPU where there is one.

    A network that was given as ONNX runs node by node, each in the precision that its typed file says.

    Attributes:
        precision: fp32, fp16 or bf16; half precisions run the weights and everything between input and fields.
        cuda_graph: replay the network as one CUDA graph for each input shape.
        compile: by torch.compile on a GPU, some seconds for each input shape.
    """

    precision: str = "fp32"
    cuda_graph: bool = True
    compile: bool = False

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """What differs from the usual, in a label."""
        return "compiled" if options.get("compile") else ""

    def __post_init__(self) -> None:
        """Check the precision.

        Raises:
            UserError: torch cannot run it.
        """
        if self.precision not in _PRECISIONS:
            raise UserError(
                f"precision={self.precision}: backend=torch runs {', '.join(_PRECISIONS)}; choose one or another backend"
            )

    @property
    def name(self) -> str:
        """What ran."""
        return "torch"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        import torch

        return torch.cuda.is_available()

    @property
    def timeable(self) -> bool:
        """Its latencies are real."""
        return True

    def in_fp32(self) -> "Torch":
        """The same, as FP32 networks are built."""
        return replace(self, precision="fp32")

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:  # noqa: ARG002 - torch takes any shape
        """Copy the checkpoint, or the typed ONNX file where there is none, and say in which precision it runs."""
        from pipeline.models import store

        if files.checkpoint is None:
            shutil.copyfile(files.onnx["tensorrt"], out / _TYPED)
        else:
            for name in (store.WEIGHTS, store.ARCHITECTURE):
                shutil.copyfile(files.checkpoint / name, out / name)
        engine = out / ENGINE
        options = {"precision": self.precision, "cuda_graph": self.cuda_graph, "compile": self.compile}
        engine.write_text(json.dumps(options))
        return engine

    def load(self, engine: Path, threads: int = 0) -> "TorchRunner":
        """Load the network; `threads` of the processor, where there is no GPU."""
        return TorchRunner(engine.parent, json.loads(engine.read_text()), threads)

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """One record a convolution or linear layer, in the precision of all."""
        import torch

        plain = {**json.loads(engine.read_text()), "compile": False, "fuse": False}
        with TorchRunner(engine.parent, plain, 0) as runner:
            records: list[dict[str, Any]] = []

            def count(name: str) -> Any:
                def hook(layer: Any, _: Any, made: Any) -> None:
                    area = made.shape[2:].numel() if made.dim() > 2 else 1
                    records.append(
                        {
                            "name": name,
                            "op": type(layer).__name__,
                            "precision": self.precision,
                            "macs": int(layer.weight.numel()) * int(area),
                        }
                    )

                return hook

            hooks = [
                layer.register_forward_hook(count(name))
                for name, layer in runner.network.named_modules()
                if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))
            ]
            with torch.inference_mode():
                zeros = np.zeros((1, resolution.height, resolution.width, 3), np.uint8)
                runner.forward(runner.upload(zeros))
            for hook in hooks:
                hook.remove()
        return records


class TorchRunner:
    """A loaded network; as many calls as it has workers run at once, on a GPU each on a stream of its own."""

    def __init__(self, folder: Path, options: Mapping[str, Any], threads: int) -> None:
        import torch

        from pipeline.backends.torch_fusion import fused
        from pipeline.models import store
        from pipeline.models.onnx_graph import OnnxNetwork, RoundedToHalf

        typed = (folder / _TYPED).exists()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        kind = OnnxNetwork if on_gpu else RoundedToHalf  # a processor's half convolutions take several times as long
        network: Any = kind.read(folder / _TYPED) if typed else store.load(folder)[0]
        self.spec: NetworkSpec = network.spec
        self.workers = 2 if on_gpu else 1
        halves = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = torch.float32 if typed else halves.get(options["precision"], torch.float32)
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        network.eval()
        if on_gpu and self.dtype == torch.float16 and options.get("fuse", True):
            fused(network)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        if not typed:  # whose nodes have types of their own
            self.network.to(self.dtype)
        if on_gpu and not typed and options.get("compile"):
            self.network = torch.compile(self.network, dynamic=False)
        self.cuda_graph = bool(options["cuda_graph"]) and on_gpu and not typed
        self.capturing = Lock()
        self.slots: LifoQueue[_Slot] = LifoQueue()
        for _ in range(self.workers):
            self.slots.put(_Slot(torch.cuda.Stream() if on_gpu else None, {}))  # type: ignore[no-untyped-call]

    def __enter__(self) -> "TorchRunner":
        return self

    def __exit__(self, *_: object) -> None:
        del self.slots, self.network

    @contextmanager
    def _slot(self) -> Iterator["_Slot"]:
        """A free stream, made the current one."""
        import torch

        slot = self.slots.get()
        try:
            with torch.inference_mode(), torch.cuda.stream(slot.stream) if slot.stream else nullcontext():
                yield slot
                if slot.stream:
                    slot.stream.synchronize()
        finally:
            self.slots.put(slot)

    def upload(self, images: NDArray[Any]) -> Array:
        """Images on the device, in the network's precision."""
        import torch

        from posepress.pixels_torch import normalise

        with self._slot():
            return normalise(images, self.spec.input, self.device).to(self.dtype, memory_format=torch.channels_last)

    def forward(self, images: Array) -> dict[str, Any]:
        """The network's fields, float32."""
        return {name: made.float() for name, made in self.network(images).items() if "." not in name}

    def __call__(self, images: Array) -> Fields:
        """Fields of uploaded images [B, 3, H, W], float32, where the network ran."""
        with self._slot() as slot:
            return self._replay(slot, images) if self.cuda_graph else self.forward(images)

    def _replay(self, slot: "_Slot", images: Any) -> dict[str, Any]:
        """Run as a CUDA graph, captured when a stream first sees a shape."""
        import torch

        key = tuple(images.shape)
        if key not in slot.graphs:
            with self.capturing:
                given = images.clone(memory_format=torch.channels_last)
                for _ in range(3):
                    self.forward(given)
                slot.stream.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=slot.stream, capture_error_mode="thread_local"):
                    made = self.forward(given)
                slot.graphs[key] = (graph, given, made)
        graph, given, made = slot.graphs[key]
        given.copy_(images)
        graph.replay()
        return {name: field.clone() for name, field in made.items()}

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Copies in the host's memory."""
        return {name: field.cpu().numpy() for name, field in fields.items()}


@dataclass(frozen=True)
class _Slot:
    """What one call at a time uses: a CUDA stream, and the graphs captured on it by input shape."""

    stream: Any
    graphs: dict[tuple[int, ...], Any]
