"""The backend that runs the trained network, or a typed ONNX file node by node, in PyTorch in floating point."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.onnx_files.files import ModelFiles, Shapes
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.spec import Array, Fields, NetworkSpec

ENGINE = "engine.json"
_TYPED = "typed.onnx"
_PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Torch:
    """Runs the checkpoint that was exported, on a GPU if there is one.

    A network that was given as an ONNX file runs node by node, each node in the precision that the typed file says.

    Attributes:
        precision: fp32, fp16 or bf16; a half precision applies to the weights and to all layers between input and fields.
        cuda_graph: replay the network as one CUDA graph for each input shape.
        compile: compile the network with torch.compile on a GPU, which takes some seconds for each input shape.
    """

    kind: ClassVar[str] = "torch"
    precision: str = "fp32"
    cuda_graph: bool = True
    compile: bool = False

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """Return the label suffix for options that differ from the default."""
        return "compiled" if options.get("compile") else ""

    def __post_init__(self) -> None:
        """Check the precision.

        Raises:
            UserError: torch cannot run this precision.
        """
        if self.precision not in _PRECISIONS:
            raise UserError(
                f"precision={self.precision}: backend=torch runs {', '.join(_PRECISIONS)}; choose one or another backend"
            )

    @property
    def name(self) -> str:
        """Name of the backend in reports."""
        return "torch"

    @property
    def simulated(self) -> bool:
        """False: its figures are real."""
        return False

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on a GPU."""
        import torch

        return torch.cuda.is_available()

    @property
    def timeable(self) -> bool:
        """True: its latencies are real measurements."""
        return True

    def in_fp32(self) -> "Torch":
        """Return a backend with equal options for FP32 networks."""
        return replace(self, precision="fp32")

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:  # noqa: ARG002 - torch takes any shape
        """Copy the checkpoint, or the typed ONNX file if there is none, and write the options of the engine."""
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

    def adopt(self, plan: Path, spec: NetworkSpec, tensors: Mapping[str, str], out: Path) -> Path:  # noqa: ARG002
        """Refuse: engines of other programs are TensorRT plans.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"model.plan={plan}: backend=torch runs no plan; choose backend=tensorrt, or model=onnx model.onnx=FILE"
        )

    def load(self, engine: Path, threads: int = 0) -> "TorchRunner":
        """Load the network. Without a GPU it runs on `threads` threads of the CPU."""
        return TorchRunner(engine.parent, json.loads(engine.read_text()), threads)

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """Return one record for each convolution or linear layer. All have the network's precision."""
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
    """A loaded network. Up to `workers` calls run at the same time; on a GPU each call has its own stream."""

    def __init__(self, folder: Path, options: Mapping[str, Any], threads: int) -> None:
        import torch

        from pipeline.backends.torch_fusion import fused
        from pipeline.models import store
        from pipeline.models.onnx_graph import OnnxNetwork, RoundedToHalf

        typed = (folder / _TYPED).exists()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_gpu = self.device.type == "cuda"
        kind = OnnxNetwork if on_gpu else RoundedToHalf  # half-precision convolutions are several times slower on a CPU
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
        if not typed:  # a typed file sets the type of each node
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
        """Wait for a free stream and make it the current stream."""
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
        """Copy images to the device, in the network's precision."""
        import torch

        from posepress.pixels_torch import normalise

        with self._slot():
            return normalise(images, self.spec.input, self.device).to(self.dtype, memory_format=torch.channels_last)

    def forward(self, images: Array) -> dict[str, Any]:
        """Return the network's fields as float32."""
        fields = {name: made for name, made in self.network(images).items() if "." not in name}
        return {name: made.float() if made.is_floating_point() else made for name, made in fields.items()}

    def __call__(self, images: Array) -> Fields:
        """Return the fields of uploaded images [B, 3, H, W] as float32, on the network's device."""
        with self._slot() as slot:
            return self._replay(slot, images) if self.cuda_graph else self.forward(images)

    def _replay(self, slot: "_Slot", images: Any) -> dict[str, Any]:
        """Run the network as a CUDA graph, which is captured at the first batch of a shape on each stream."""
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
        """Copy fields to the host's memory."""
        return {name: field.cpu().numpy() for name, field in fields.items()}


@dataclass(frozen=True)
class _Slot:
    """The resources of one call: a CUDA stream, and the graphs that were captured on it, by input shape."""

    stream: Any
    graphs: dict[tuple[int, ...], Any]
