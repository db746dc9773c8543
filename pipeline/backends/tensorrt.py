"""TensorRT 10 and 11, strongly typed: precision is what the ONNX file says."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from evaluation.types import Resolution
from pipeline.backends.device_memory import DeviceMemory
from pipeline.backends.engine_inspector import layers
from pipeline.backends.tensorrt_runner import ENGINE, SIDE, TensorRTRunner, failed, load_plugins, logger
from pipeline.errors import UserError, nearest
from pipeline.specs import SPEC_KEY, ModelFiles, Shapes

_LAST_WITH_FLAG = 10  # later versions have no other kind of network than strongly typed ones


def _shape(batch: int, size: Resolution) -> tuple[int, int, int, int]:
    return (batch, 3, size.height, size.width)


@dataclass(frozen=True)
class TensorRT:
    """Builds plans from the int8 flavour and runs them. Options have the names that trtexec's users know.

    Attributes:
        mem_pool_size_mb: workspace the builder may use.
        builder_optimization_level: 0 to 5.
        tf32: let float32 layers use TF32; off gives a true FP32 baseline.
        tactic_sources: names of those that may be used; None leaves TensorRT's own.
        preview_features: names of those that are switched on.
        hardware_compatibility_level: "none", "ampere_plus" or, from 10.16 on, "same_compute_capability".
        version_compatible: the plan runs with later versions of the same major one.
        sparse_weights: use 2:4 sparse kernels where weights are so.
        plugins: libraries to load before parsing.
        timing_cache: a folder where measured kernels are kept, by version and GPU; None measures anew.
        avg_timing_iterations: how often a kernel is measured.
        cuda_graph: replay the plan as one CUDA graph for each input shape.
        device: number of the GPU.
    """

    mem_pool_size_mb: int = 4096
    builder_optimization_level: int = 3
    tf32: bool = False
    tactic_sources: Sequence[str] | None = None
    preview_features: Sequence[str] = ()
    hardware_compatibility_level: str = "none"
    version_compatible: bool = False
    sparse_weights: bool = False
    plugins: Sequence[str] = ()
    timing_cache: str | None = None
    avg_timing_iterations: int = 1
    cuda_graph: bool = True
    device: int = 0

    def __post_init__(self) -> None:
        """Check the options that are the same for all versions.

        Raises:
            ValueError: one is out of range.
        """
        for option, least, most in (
            ("mem_pool_size_mb", 1, 1 << 20),
            ("builder_optimization_level", 0, 5),
            ("avg_timing_iterations", 1, 1000),
            ("device", 0, 1000),
        ):
            value = getattr(self, option)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"backend.{option}={value}: choose {least} to {most}")
        for option in ("tf32", "version_compatible", "sparse_weights", "cuda_graph"):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"backend.{option}={getattr(self, option)}: choose true or false")  # noqa: TRY004

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
            UserError: this version lacks an option, or the parser or the builder refuses the network.
        """
        import onnx
        import tensorrt as trt

        source = files.onnx["tensorrt"]
        gpu = DeviceMemory(self.device).gpu
        trt.init_libnvinfer_plugins(logger(), "")
        load_plugins(trt, self.plugins)
        builder = trt.Builder(logger())
        flags = 0
        if int(trt.__version__.split(".")[0]) <= _LAST_WITH_FLAG:
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger())
        if not parser.parse_from_file(str(source)):
            reasons = "; ".join(_reason(parser.get_error(i)) for i in range(parser.num_errors))
            raise UserError(f"{source.name}: TensorRT {trt.__version__} cannot parse it: {reasons}")
        config = self._config(trt, builder)
        profile = builder.create_optimization_profile()
        wanted = [_shape(b, r) for b, r in zip(shapes.batch, shapes.resolution, strict=True)]
        profile.set_shape(network.get_input(0).name, *wanted)
        if config.add_optimization_profile(profile) < 0:
            raise failed(f"{source.name}: the profile {wanted}", "choose resolution and batch so that min <= opt <= max")
        plan = self._built(trt, builder, network, config, gpu)
        if plan is None:
            raise failed(
                f"{source.name}: TensorRT {trt.__version__} cannot build it",
                "out of memory: lower backend.mem_pool_size_mb, batch or resolution; else try another precision",
            )
        engine, content = out / ENGINE, bytes(memoryview(plan))
        engine.write_bytes(content)
        metadata = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
        side = {
            "spec": json.loads(metadata[SPEC_KEY]),
            "tensorrt": trt.__version__,
            "gpu": gpu,
            "profile": wanted,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "version_compatible": self.version_compatible,
            "hardware_compatibility_level": self.hardware_compatibility_level.lower(),
            "plugins": list(self.plugins),
        }
        (out / SIDE).write_text(json.dumps(side, indent=1))
        return engine

    def _config(self, trt: Any, builder: Any) -> Any:
        """What the builder is told.

        Raises:
            UserError: this version does not have what an option names.
        """
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.mem_pool_size_mb << 20)
        config.builder_optimization_level = self.builder_optimization_level
        config.avg_timing_iterations = self.avg_timing_iterations
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.hardware_compatibility_level = _member(
            trt, "HardwareCompatibilityLevel", self.hardware_compatibility_level, "hardware_compatibility_level"
        )
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        switches = {
            "VERSION_COMPATIBLE": self.version_compatible,
            "SPARSE_WEIGHTS": self.sparse_weights,
        }
        for flag in (name for name, on in switches.items() if on):
            config.set_flag(_member(trt, "BuilderFlag", flag, flag.lower()))
        for feature in self.preview_features:
            config.set_preview_feature(_member(trt, "PreviewFeature", feature, "preview_features"), True)
        if self.tactic_sources is not None:
            sources = [_member(trt, "TacticSource", source, "tactic_sources") for source in self.tactic_sources]
            if not config.set_tactic_sources(sum({1 << int(source) for source in sources})):
                raise failed(f"backend.tactic_sources={list(self.tactic_sources)}", "leave it out, or choose others")
        return config

    def _built(self, trt: Any, builder: Any, network: Any, config: Any, gpu: Mapping[str, str]) -> Any:
        """The plan, with the measured kernels of earlier builds; those of this one are kept, too.

        Raises:
            UserError: the timing cache is damaged, or of another version or GPU.
        """
        if self.timing_cache is None:
            return builder.build_serialized_network(network, config)
        name = "-".join(gpu["name"].split())
        file = Path(self.timing_cache) / f"tensorrt-{trt.__version__}-{name}-sm{gpu['sm']}.timing"
        file.parent.mkdir(parents=True, exist_ok=True)
        wrong = f"backend.timing_cache: {file} is damaged, or of another TensorRT or GPU"

        def read() -> Any:
            cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
            if cache is None:
                raise failed(wrong, "delete it")
            return cache

        lock = FileLock(f"{file}.lock")
        with lock:
            if not config.set_timing_cache(read(), False):
                raise failed(wrong, "delete it")
        plan = builder.build_serialized_network(network, config)
        with lock:  # another build may have written meanwhile
            merged = read()
            if plan is not None and merged.combine(config.get_timing_cache(), False):
                unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                unfinished.write_bytes(bytes(memoryview(merged.serialize())))
                unfinished.replace(file)
        return plan

    def load(self, engine: Path, threads: int = 0) -> TensorRTRunner:  # noqa: ARG002 - a GPU has its own
        """Load a plan.

        Raises:
            UserError: it was built by another version or for another GPU.
        """
        return TensorRTRunner(engine, self.device, self.cuda_graph)

    def audit(self, engine: Path, resolution: Resolution) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """The layers as the engine inspector lists them.

        Raises:
            UserError: the plan holds their names alone.
        """
        import tensorrt as trt

        with TensorRTRunner(engine, self.device, cuda_graph=False) as runner:
            inspector = runner.engine.create_engine_inspector()
            return layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _member(trt: Any, kind: str, name: str, option: str) -> Any:
    """A member of an enum by its name, in any case.

    Raises:
        UserError: this version has no such member.
    """
    owner = getattr(trt, kind)
    found = getattr(owner, str(name).upper(), None)
    if found is None:
        known = _names(owner)
        raise UserError(
            f"backend.{option}={name}: TensorRT {trt.__version__} has no {kind} of this name"
            f"{nearest(str(name).upper(), known)}; it has {', '.join(n.lower() for n in known)}"
        )
    return found


def _names(owner: Any) -> list[str]:
    members: Iterable[str] = getattr(owner, "__members__", ())
    return sorted(members)


def _reason(error: Any) -> str:
    """What the parser complains about, with the node and its operator."""
    node = error.node_name()
    return f"{error.desc()}" + (f" (at '{node}', {error.node_operator()})" if node else "")
