"""TensorRT: builds plans from typed ONNX files, adopts plans of others, and audits them."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Interval, MinLen
from filelock import FileLock

from pipeline.backends.engine_inspector import layers
from pipeline.backends.tensorrt_calibrator import calibrate
from pipeline.backends.tensorrt_checks import check_plugins, check_tensors, check_types, member, reason_of
from pipeline.onnx_files.files import ModelFiles, Shapes, read_spec
from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.runners.device_memory import DeviceMemory
from posepress.runners.tensorrt import TensorRTRunner
from posepress.runners.tensorrt_module import TensorRTModule, load
from posepress.runners.tensorrt_plan import ENGINE, SIDE, WEIGHTS
from posepress.spec import InputSpec, NetworkSpec

if TYPE_CHECKING:
    import onnx

_LAST_WITH_FLAG = 10  # later versions make only strongly typed networks and have no flag for them


def _shapes(shapes: Shapes, spec: InputSpec) -> list[tuple[int, int, int, int]]:
    """Return the minimum, optimum and maximum shape of the input."""
    return [spec.shape(batch, size) for batch, size in zip(shapes.batch, shapes.resolution, strict=True)]


_Gpu = Annotated[int, Interval(ge=0, le=1023)]


@dataclass(frozen=True)
class TensorRT:
    """Builds plans from the int8 runtime variant and runs them. The options have the names that trtexec uses.

    Attributes:
        mem_pool_size_mb: workspace the builder may use, in MiB.
        builder_optimization_level: 0 (fastest build) to 5 (longest search).
        tf32: let float32 layers use TF32; false gives a true FP32 baseline.
        tactic_sources: names of the tactic sources that the builder may use; None uses TensorRT's default.
        preview_features: names of the preview features to switch on.
        hardware_compatibility_level: "none", "ampere_plus" or, from 10.16 on, "same_compute_capability".
        version_compatible: the plan also runs with later versions of the same major version.
        sparse_weights: use 2:4 sparse kernels for weights that have this pattern.
        strip_weights: the plan holds no weights; they are read from the ONNX file beside it when the plan is loaded.
        use_dla_core: number of a Jetson's deep-learning accelerator (DLA); the GPU runs the layers that the DLA cannot. None
            uses the GPU alone.
        error_on_timing_cache_miss: use only kernels in the timing cache, so that the build gives an equal plan, or else fail.
        plugins: libraries to load before parsing.
        timing_cache: folder that keeps measured kernels, by version and GPU; None measures them in each build.
        rebuild: number of this build of the same engine; builds from 1 on do not use the timing cache.
        avg_timing_iterations: number of measurements of each kernel.
        cuda_graph: replay the plan as one CUDA graph for each input shape.
        device: number of the GPU, or numbers of several GPUs that share the work; the first GPU builds the engine.
    """

    kind: ClassVar[str] = "tensorrt"
    mem_pool_size_mb: Annotated[int, Interval(ge=1, le=1 << 20)] = 4096
    builder_optimization_level: Annotated[int, Interval(ge=0, le=5)] = 3
    tf32: bool = False
    tactic_sources: Sequence[str] | None = None
    preview_features: Sequence[str] = ()
    hardware_compatibility_level: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    version_compatible: bool = False
    sparse_weights: bool = False
    strip_weights: bool = False
    use_dla_core: Annotated[int, Interval(ge=0, le=63)] | None = None
    error_on_timing_cache_miss: bool = False
    plugins: Sequence[str] = ()
    timing_cache: str | None = None
    avg_timing_iterations: Annotated[int, Interval(ge=1, le=1000)] = 1
    cuda_graph: bool = True
    device: _Gpu | Annotated[Sequence[_Gpu], MinLen(1)] = 0
    rebuild: Annotated[int, Ge(0)] = 0

    @staticmethod
    def label_of(options: Mapping[str, Any], _: Mapping[str, str]) -> str:
        """Return the label suffix for options that differ from the default."""
        return "tf32" if options.get("tf32") else ""

    def __post_init__(self) -> None:
        """Check the options that all versions have.

        Raises:
            ValueError: an option is out of range.
            UserError: a plugin library is missing.
        """
        for option, least, most in (
            ("mem_pool_size_mb", 1, 1 << 20),
            ("builder_optimization_level", 0, 5),
            ("avg_timing_iterations", 1, 1000),
        ):
            value = getattr(self, option)
            if not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"backend.{option}={value}: choose {least} to {most}")
        for file in self.plugins:
            if not Path(file).is_file():
                raise UserError(f"backend.plugins: {file} is not there; give the library's path")
        numbers = self.devices
        if not numbers or len(set(numbers)) < len(numbers) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"backend.device={self.device}: choose the number of a GPU, or a list of different ones")
        for option in (
            "tf32",
            "version_compatible",
            "sparse_weights",
            "strip_weights",
            "error_on_timing_cache_miss",
            "cuda_graph",
        ):
            if not isinstance(getattr(self, option), bool):
                raise ValueError(f"backend.{option}={getattr(self, option)}: choose true or false")  # noqa: TRY004

    @property
    def cache(self) -> str | None:
        """The folder of measured kernels; None for a rebuild, which measures them again."""
        return None if self.rebuild else self.timing_cache

    @property
    def devices(self) -> list[int]:
        """Numbers of the GPUs."""
        return list(self.device) if isinstance(self.device, Sequence) else [self.device]

    @property
    def name(self) -> str:
        """Name of the backend in reports: its kind, with "-double" in tests."""
        return f"{self.kind}-double" if self.simulated else self.kind

    @property
    def simulated(self) -> bool:
        """Whether the tests' double runs instead of TensorRT."""
        return load(self.kind).is_double

    @property
    def on_gpu(self) -> bool:
        """True: TensorRT runs on GPUs only."""
        return True

    @property
    def timeable(self) -> bool:
        """Whether engines run on a real GPU and not in the tests' double."""
        return not self.simulated

    def in_fp32(self) -> "TensorRT":
        """Return itself, because the ONNX file determines the precision."""
        return self

    def build(self, files: ModelFiles, shapes: Shapes, out: Path) -> Path:
        """Parse the typed network and build a plan with an optimization profile for each set of shapes.

        Raises:
            UserError: this version lacks an option, or the parser or the builder refuses the network.
        """
        import onnx

        lib, source = load(self.kind), files.onnx["tensorrt"]
        memory, spec = DeviceMemory(self.devices[0]), read_spec(source)
        memory.activate()
        model = onnx.load(source)
        check_types(lib.trt, model, memory.gpu)
        lib.prepare(self.plugins)
        check_plugins(lib.trt, model, source.name)
        builder = lib.trt.Builder(lib.logger)
        typed = files.calibration is None
        network, _parser = _parsed(lib, builder, source, model, typed)  # the network needs its parser until it is built
        config = self._config(lib, builder, memory.gpu, typed)
        profiles = [_shapes(one, spec.input) for one in (shapes, *shapes.more)]
        for wanted in profiles:
            profile = builder.create_optimization_profile()
            profile.set_shape(network.get_input(0).name, *wanted)
            if config.add_optimization_profile(profile) < 0:
                raise lib.failed(
                    f"{source.name}: the profile {wanted}", "choose resolution and batch so that min <= opt <= max"
                )
        finish = None
        if files.calibration is not None:
            empty = builder.create_optimization_profile()
            kept = None if self.cache is None else Path(self.cache)
            finish = calibrate(lib.trt, config, empty, files.calibration, spec.input, memory, kept)
        plan = self._built(lib, builder, network, config, memory.gpu)
        if finish is not None:
            finish()
        if plan is None:
            fix = "lower backend.mem_pool_size_mb, batch or resolution if memory ran out; else try another precision"
            if self.error_on_timing_cache_miss:
                fix = "build it once with backend.error_on_timing_cache_miss=false, which measures the missing kernels"
            raise lib.failed(f"{source.name}: TensorRT {lib.trt.__version__} cannot build it", fix)
        engine, content = out / ENGINE, bytes(memoryview(plan))
        engine.write_bytes(content)
        if self.strip_weights:
            shutil.copyfile(source, out / WEIGHTS)
        side = self._side(lib.trt, spec, memory.gpu, content) | {
            "tensors": {name: name for name in (spec.input.name, *(field.name for field in spec.fields))},
            "profiles": profiles,
            "weights": hashlib.sha256((out / WEIGHTS).read_bytes()).hexdigest() if self.strip_weights else None,
            "nodes": _nodes(model, shapes.resolution[1], spec.input),
        }
        (out / SIDE).write_text(json.dumps(side, indent=1))
        return engine

    def adopt(self, plan: Path, spec: NetworkSpec, tensors: Mapping[str, str], out: Path) -> Path:
        """Copy an engine that another program built, and write its description beside it.

        The arguments are those of `pipeline.contracts.Backend.adopt`.

        Raises:
            UserError: the file is no plan of this version and GPU, or its tensors do not fit the description.
        """
        lib = load(self.kind)
        trt = lib.trt
        memory = DeviceMemory(self.devices[0])
        memory.activate()
        content = plan.read_bytes()
        lib.prepare(self.plugins)
        runtime = trt.Runtime(lib.logger)
        runtime.engine_host_code_allowed = self.version_compatible
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise lib.failed(
                f"model.plan={plan}: TensorRT {trt.__version__} cannot load it", "give a plan that it built on this GPU"
            )
        wanted = check_tensors(trt, engine, f"model.plan={plan}", spec, tensors)
        (out / ENGINE).write_bytes(content)
        side = self._side(trt, spec, memory.gpu, content) | {"tensors": wanted, "profiles": None, "weights": None, "nodes": {}}
        (out / SIDE).write_text(json.dumps(side, indent=1))
        return out / ENGINE

    def _side(self, trt: Any, spec: NetworkSpec, gpu: Mapping[str, str], content: bytes) -> dict[str, Any]:
        """Return the description that is written beside every plan."""
        return {
            "spec": json.loads(spec.to_json()),
            "kind": self.kind,
            "tensorrt": trt.__version__,
            "gpu": dict(gpu),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "version_compatible": self.version_compatible,
            "hardware_compatibility_level": self.hardware_compatibility_level.lower(),
            "plugins": list(self.plugins),
        }

    def _config(self, lib: TensorRTModule, builder: Any, gpu: Mapping[str, str], typed: bool) -> Any:
        """Return the builder's configuration.

        Raises:
            UserError: this version of TensorRT lacks something that an option names.
        """
        trt, config = lib.trt, builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, self.mem_pool_size_mb << 20)
        config.builder_optimization_level = self.builder_optimization_level
        config.avg_timing_iterations = self.avg_timing_iterations
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.hardware_compatibility_level = member(
            trt, "HardwareCompatibilityLevel", self.hardware_compatibility_level, "hardware_compatibility_level"
        )
        if not self.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        switches = {
            "VERSION_COMPATIBLE": self.version_compatible,
            "SPARSE_WEIGHTS": self.sparse_weights,
            "STRIP_PLAN": self.strip_weights,
            "REFIT_IDENTICAL": self.strip_weights,
            "ERROR_ON_TIMING_CACHE_MISS": self.error_on_timing_cache_miss,
        }
        for flag in (name for name, on in switches.items() if on):
            config.set_flag(member(trt, "BuilderFlag", flag, flag.lower()))
        for feature in self.preview_features:
            config.set_preview_feature(member(trt, "PreviewFeature", feature, "preview_features"), True)
        if self.tactic_sources is not None:
            sources = [member(trt, "TacticSource", source, "tactic_sources") for source in self.tactic_sources]
            if not config.set_tactic_sources(sum({1 << int(source) for source in sources})):
                raise lib.failed(f"backend.tactic_sources={list(self.tactic_sources)}", "leave it out, or choose others")
        if self.use_dla_core is not None:
            there = builder.num_DLA_cores
            if not 0 <= self.use_dla_core < there:
                raise UserError(
                    f"backend.use_dla_core={self.use_dla_core}: TensorRT {trt.__version__} sees {there} DLA cores on "
                    f"{gpu['name']} (10.8 to 11.3 support none); build for its GPU with backend.use_dla_core=null"
                )
            if typed:
                raise UserError(
                    f"backend.use_dla_core={self.use_dla_core}: DLA takes no strongly typed network; choose "
                    "precision=int8_entropy, or backend.use_dla_core=null"
                )
            config.default_device_type, config.DLA_core = trt.DeviceType.DLA, self.use_dla_core
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
        return config

    def _built(self, lib: TensorRTModule, builder: Any, network: Any, config: Any, gpu: Mapping[str, str]) -> Any:
        """Build the plan, read measured kernels from the timing cache and add the new ones to it.

        Raises:
            UserError: the timing cache is damaged, or belongs to another version or GPU.
        """
        if self.cache is None:
            return builder.build_serialized_network(network, config)
        name = "-".join(gpu["name"].split())
        file = Path(self.cache) / f"{self.kind}-{lib.trt.__version__}-{name}-sm{gpu['sm']}.timing"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"backend.timing_cache={self.timing_cache}: cannot write there ({error.strerror}); choose another, or null"
            ) from error
        wrong = f"backend.timing_cache: {file} is damaged, or of another TensorRT or GPU"

        def read() -> Any:
            cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
            if cache is None:
                raise lib.failed(wrong, "delete it")
            return cache

        lock = FileLock(f"{file}.lock")
        with lock:
            if not config.set_timing_cache(read(), False):
                raise lib.failed(wrong, "delete it")
        plan = builder.build_serialized_network(network, config)
        with lock:  # another build may have written meanwhile
            merged = read()
            if plan is not None and merged.combine(config.get_timing_cache(), False):
                unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                unfinished.write_bytes(bytes(memoryview(merged.serialize())))
                unfinished.replace(file)
        return plan

    def load(self, engine: Path, threads: int = 0) -> TensorRTRunner:  # noqa: ARG002 - the option is for CPUs
        """Load a plan.

        Raises:
            UserError: another version built the plan, or it was built for another GPU.
        """
        return TensorRTRunner(engine, self.devices, self.cuda_graph, self.kind)

    def audit(self, engine: Path, resolution: Resolution, scratch: Path | None = None) -> Sequence[dict[str, Any]]:  # noqa: ARG002
        """Return the layers from TensorRT's engine inspector.

        Raises:
            UserError: the plan holds only the names of its layers.
        """
        with TensorRTRunner(engine, self.devices[:1], cuda_graph=False, kind=self.kind) as runner:
            text, times, nodes = runner.inspected()
        found = layers(text, nodes, times)
        return [{**x, "precision": "tf32"} if self.tf32 and x["precision"] == "fp32" and x["macs"] else x for x in found]


def _parsed(lib: TensorRTModule, builder: Any, source: Path, model: "onnx.ModelProto", typed: bool) -> tuple[Any, Any]:
    """The network in an ONNX file, and its parser.

    Raises:
        UserError: TensorRT cannot parse the file.
    """
    trt, flags = lib.trt, 0
    if typed and int(trt.__version__.split(".")[0]) <= _LAST_WITH_FLAG:
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, lib.logger)
    if not parser.parse_from_file(str(source)):
        reasons = "; ".join(reason_of(parser.get_error(i), model) for i in range(parser.num_errors))
        what = f"{source.name}: TensorRT {trt.__version__} cannot parse it: {reasons}"
        raise UserError(f"{what}; choose another precision, or change these nodes")
    return network, parser


def _nodes(model: "onnx.ModelProto", size: Resolution, spec: InputSpec) -> dict[str, dict[str, Any]]:
    """The MACs of each node at a size, and whether it reads quantized data and weights."""
    from pipeline.backends.macs import macs

    made = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    quantized = {node.name for node in model.graph.node if made.issuperset(node.input[:2]) and len(node.input) > 1}
    return {name: {"macs": count, "quantized": name in quantized} for name, count in macs(model, size, spec).items()}
