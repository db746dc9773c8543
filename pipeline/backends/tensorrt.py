"""TensorRT 10 and 11, strongly typed: precision is what the ONNX file says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evaluation.types import Array, Fields, NetworkSpec, Resolution
from pipeline.errors import UserError
from pipeline.specs import SPEC_KEY, ModelFiles, Shapes

ENGINE, SIDE = "engine.plan", "engine.json"


@cache
def _logger() -> Any:
    """TensorRT's logger; it keeps the last errors, because failing calls only return None and say why here."""
    import tensorrt as trt

    class Logger(trt.ILogger):  # type: ignore[misc] # the base exists only where TensorRT does
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)

    return Logger()


def _failed(what: str, fix: str) -> UserError:
    """The error of a call that returned nothing, with what TensorRT logged."""
    logger = _logger()
    reason = "; ".join(logger.errors[-3:]) or "TensorRT gave no reason"
    logger.errors.clear()
    return UserError(f"{what}: {reason}; {fix}")


def _shape(batch: int, size: Resolution) -> tuple[int, int, int, int]:
    return (batch, 3, size.height, size.width)


@dataclass(frozen=True)
class TensorRT:
    """Builds plans from the int8 flavour and runs them.

    Attributes:
        mem_pool_size_mb: workspace the builder may use.
        builder_optimization_level: 0 to 5.
        tf32: let float32 layers use TF32; off gives a true FP32 baseline.
    """

    mem_pool_size_mb: int = 4096
    builder_optimization_level: int = 3
    tf32: bool = False

    @property
    def name(self) -> str:
        """What ran: "tensorrt", or "tensorrt-double" in tests."""
        import tensorrt as trt

        return "tensorrt-double" if getattr(trt, "POSEPRESS_DOUBLE", False) else "tensorrt"

    @property
    def on_gpu(self) -> bool:
        """TensorRT has nothing else."""
        return True

    @property
    def timeable(self) -> bool:
        """Whether a GPU ran it."""
        return self.name == "tensorrt"

    def in_fp32(self) -> "TensorRT":
        """Itself: precision is in the ONNX file."""
        return self

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:
        """Parse the typed network and build a plan with one optimisation profile.

        Raises:
            UserError: the parser or the builder refuses the network.
        """
        import onnx
        import tensorrt as trt

        source = files.onnx["tensorrt"]
        builder = trt.Builder(_logger())
        flags = 0
        if int(trt.__version__.split(".")[0]) < 11:  # later versions have no other kind of network
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, _logger())
        if not parser.parse_from_file(str(source)):
            reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise UserError(f"{source.name}: TensorRT cannot parse it: {reasons}")
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.mem_pool_size_mb << 20)
        config.builder_optimization_level = self.builder_optimization_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        profile = builder.create_optimization_profile()
        wanted = [_shape(b, r) for b, r in zip(shapes.batch, shapes.resolution, strict=True)]
        profile.set_shape(network.get_input(0).name, *wanted)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise _failed(f"{source.name}: TensorRT cannot build it", "see the log, or try another precision")
        engine = out / ENGINE
        engine.write_bytes(memoryview(plan))
        metadata = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
        side = {"spec": json.loads(metadata[SPEC_KEY]), "tensorrt": trt.__version__, "profile": wanted}
        (out / SIDE).write_text(json.dumps(side, indent=1))
        return engine

    def load(self, engine: Path, threads: int = 0) -> "TensorRTRunner":  # noqa: ARG002
        """Load a plan.

        Raises:
            UserError: it was built by another version or for another GPU.
        """
        return TensorRTRunner(engine)

    def audit(self, engine: Path, resolution: Resolution) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """The layers as the engine inspector lists them.

        Raises:
            UserError: there is no inspector behind the test double.
        """
        import tensorrt as trt

        with TensorRTRunner(engine) as runner:
            inspector = runner.engine.create_engine_inspector()
            listed = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        layers = listed["Layers"] if isinstance(listed, dict) else listed
        return [
            {
                "name": layer["Name"],
                "op": layer.get("LayerType", ""),
                "precision": _precision(layer),
                "macs": _macs(layer),
            }
            for layer in layers
        ]


def _precision(layer: dict[str, Any]) -> str:
    weights = layer.get("Weights")
    text = weights["Type"] if isinstance(weights, dict) else str((layer.get("Inputs") or [{}])[0])
    for word, name in (
        ("Int8", "int8"),
        ("BF16", "bf16"),
        ("BFloat16", "bf16"),
        ("Half", "fp16"),
        ("FP16", "fp16"),
        ("FP8", "fp8"),
    ):
        if word.lower() in text.lower():
            return name
    return "fp32"


def _macs(layer: dict[str, Any]) -> int:
    weights = layer.get("Weights")
    if not isinstance(weights, dict) or not layer.get("Outputs"):
        return 0
    made = layer["Outputs"][0].get("Dimensions") or [0]
    area = 1
    for size in made[2:]:
        area *= size
    return int(weights.get("Count", 0)) * int(made[0]) * area


class TensorRTRunner:
    """A loaded plan with its execution context; buffers are torch tensors on the GPU."""

    workers = 1

    def __init__(self, engine: Path) -> None:
        import tensorrt as trt
        import torch

        self.spec = NetworkSpec.from_dict(json.loads((engine.parent / SIDE).read_text())["spec"])
        self.runtime = trt.Runtime(_logger())
        self.engine = self.runtime.deserialize_cuda_engine(engine.read_bytes())
        if self.engine is None:
            raise _failed(f"{engine}: cannot be loaded", "build it on this machine with stage=build force=true")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise _failed(f"{engine}: no execution context", "free memory of the GPU")
        # Without a GPU there is only the double, which computes in host memory.
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.stream = torch.cuda.Stream() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __enter__(self) -> "TensorRTRunner":
        return self

    def __exit__(self, *_: object) -> None:
        self.context = self.engine = self.runtime = None

    def upload(self, images: NDArray[Any]) -> Array:
        """The network's input form, contiguous on the engine's device."""
        import torch

        from evaluation.pixels_torch import normalise

        made = normalise(images, self.spec.input, self.device).contiguous()
        if self.stream is not None:
            torch.cuda.current_stream().synchronize()
        return made

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Copies in the host's memory."""
        return {name: field.cpu().numpy() for name, field in fields.items()}

    def __call__(self, images: Array) -> Fields:
        """Fields of uploaded images float32 [B, 3, H, W].

        Raises:
            UserError: the shape lies outside the plan's profile.
        """
        import torch

        name = self.spec.input.name
        if not self.context.set_input_shape(name, tuple(images.shape)):
            raise _failed(
                f"an input of {tuple(images.shape)} lies outside the engine's profile",
                "build it for that resolution and batch",
            )
        self.context.set_tensor_address(name, images.data_ptr())
        fields = {}
        for field in self.spec.fields:
            shape = tuple(self.context.get_tensor_shape(field.name))
            fields[field.name] = torch.empty(shape, dtype=torch.float32, device=self.device)
            self.context.set_tensor_address(field.name, fields[field.name].data_ptr())
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        if not self.context.execute_async_v3(stream_handle=self.stream.cuda_stream if self.stream else 0):
            raise _failed("the engine did not run", "check the GPU")
        if self.stream is not None:
            self.stream.synchronize()
        return fields
