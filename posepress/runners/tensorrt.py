"""Runner of TensorRT plans. It needs numpy, tensorrt and cuda-python; torch is optional, to work on the GPU."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from queue import LifoQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posepress.errors import UserError
from posepress.resolution import Resolution
from posepress.runners.device_memory import DeviceArray, DeviceMemory
from posepress.runners.tensorrt_module import TensorRTModule, installed, load
from posepress.runners.tensorrt_plan import WEIGHTS, check, check_version
from posepress.spec import Array, Fields, NetworkSpec

_PROFILED = 20  # number of runs whose layers are timed

_SHAPES = 32  # largest number of input shapes whose buffers are kept

_GRAPHS = 4  # largest number of input shapes with a separate context and graph, which take memory

_CONTEXTS = 2  # contexts on each GPU: one computes while the other's results are copied


@dataclass
class _Context:
    """An execution context and its optimization profile."""

    made: Any
    profile: int = 0


@dataclass
class _Bound:
    """Resources of an input shape: a context, buffers, and a graph if no other shape uses the context."""

    context: _Context
    given: DeviceArray
    fields: dict[str, DeviceArray]
    graph: Callable[[], None] | None = None


@dataclass
class _Slot:
    """Resources of one call at a time: an engine, a stream, a shared context, and the resources of each shape."""

    engine: Any
    memory: DeviceMemory
    shared: _Context | None = None
    bound: dict[tuple[int, ...], _Bound] = field(default_factory=dict)


class TensorRTRunner:
    """A loaded plan. It runs `workers` calls at the same time, each with its own context and stream.

    Args:
        engine: file of the plan; its description lies in the same folder.
        devices: numbers of the GPUs that share the work.
        cuda_graph: replay the plan as one CUDA graph for each input shape.
        kind: "tensorrt", or "tensorrt_rtx" for TensorRT for RTX.

    Raises:
        UserError: the plan was built for another version or GPU, is damaged, or cannot be loaded.
    """

    def __init__(self, engine: Path, devices: Sequence[int] = (0,), cuda_graph: bool = True, kind: str = "tensorrt") -> None:
        memories = {device: [DeviceMemory(device) for _ in range(_CONTEXTS)] for device in devices}
        for first, *_ in memories.values():
            side, plan = check(engine, installed(kind), first.gpu, kind)
        self.lib = load(kind)
        trt = self.lib.trt
        check_version(engine, side, trt.__version__)
        try:
            self.spec = NetworkSpec.from_dict(side["spec"])
        except ValueError as error:
            raise UserError(f"{engine}: not a network description beside it ({error}); build it again") from error
        self.cuda_graph, self._torch = cuda_graph, _torch(devices)
        self.lib.prepare(side["plugins"])
        self.nodes: Mapping[str, Mapping[str, Any]] = side["nodes"]
        self.tensors: Mapping[str, str] = side["tensors"]
        self.slots: dict[int, LifoQueue[_Slot]] = {device: LifoQueue() for device in devices}
        self.engines = []
        for device, some in memories.items():
            some[0].activate()
            runtime = trt.Runtime(self.lib.logger)
            if side["version_compatible"]:
                runtime.engine_host_code_allowed = True
            loaded = runtime.deserialize_cuda_engine(plan)
            if loaded is None:
                raise self.lib.failed(f"{engine}: cannot be loaded", "build it on this machine: stage=build force=true")
            if side["weights"] is not None:
                _refit(self.lib, loaded, engine.parent / WEIGHTS, side["weights"])
            self.engines.append((loaded, runtime))
            for memory in some:
                self.slots[device].put(_Slot(loaded, memory))
        self.types = {name: np.dtype(trt.nptype(loaded.get_tensor_dtype(tensor))) for name, tensor in self.tensors.items()}
        name = self.tensors[self.spec.input.name]
        profiles = range(loaded.num_optimization_profiles)
        self.profiles = [loaded.get_tensor_profile_shape(name, profile) for profile in profiles]
        self.workers = _CONTEXTS * len(devices)
        self._turn = cycle(devices)

    def __enter__(self) -> "TensorRTRunner":
        return self

    def __exit__(self, *_: object) -> None:
        for queue in self.slots.values():
            while not queue.empty():
                slot = queue.get()
                slot.bound.clear()
                slot.shared = None
                slot.memory.close()
        self.engines.clear()

    @contextmanager
    def _slot(self, device: int) -> Iterator[_Slot]:
        """Wait for a free slot of a GPU, and send this thread's calls to that GPU."""
        slot = self.slots[device].get()
        try:
            slot.memory.activate()
            yield slot
        finally:
            self.slots[device].put(slot)

    def upload(self, images: NDArray[Any]) -> Array:
        """Convert images to the network's input form in GPU memory; the GPUs take turns. torch, if usable, converts there."""
        if self._torch is not None:
            from posepress.pixels_torch import normalise as on_gpu

            there, kind = self._torch.device("cuda", next(self._turn)), self.types[self.spec.input.name].name
            made = on_gpu(images, self.spec.input, there).to(getattr(self._torch, kind)).contiguous()
            self._torch.cuda.current_stream(there).synchronize()
            return made
        from posepress.pixels import normalise  # numba, which only a run needs

        with self._slot(next(self._turn)) as slot:
            size = Resolution(*images.shape[1:3])
            staged = slot.memory.pinned(self.spec.input.shape(len(images), size), np.dtype(self.spec.input.dtype))
            host = normalise(images, self.spec.input, staged).astype(self.types[self.spec.input.name], copy=False)
            array = slot.memory.empty(host.shape, host.dtype)
            slot.memory.copy(array, host)
        return array

    def __call__(self, images: Array) -> Fields:
        """Run the network on uploaded images; the fields stay in GPU memory.

        Raises:
            UserError: the shape lies outside the plan's profiles.
        """
        shape = tuple(images.shape)
        device = images.memory.device if isinstance(images, DeviceArray) else next(iter(self.slots))
        with self._slot(device) as slot:
            bound = slot.bound.get(shape) or self._bind(slot, shape)
            slot.memory.copy(bound.given, _on_device(images, slot.memory), wait=False)
            if bound.graph is not None:
                bound.graph()
            else:
                self._address(slot, bound)
                self._enqueue(slot, bound.context)
            made: dict[str, Any] = {}
            for name, field_ in bound.fields.items():
                made[name] = self._empty(field_, slot.memory)
                slot.memory.copy(_on_device(made[name], slot.memory), field_, wait=False)
            slot.memory.wait()
        return made

    def inspected(self) -> tuple[str, dict[str, float], Mapping[str, Mapping[str, Any]]]:
        """The inspector's JSON, the microseconds of each layer at the first profile's optimal shape, and the file's nodes."""
        trt = self.lib.trt
        times: dict[str, list[float]] = {}

        class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined] # the base exists only where TensorRT does
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(1000 * ms)

        with self._slot(next(iter(self.slots))) as slot:
            shape = tuple(self.profiles[0][1])
            bound = self._bind(slot, shape)
            slot.memory.copy(bound.given, np.zeros(shape, bound.given.dtype))
            context = bound.context.made
            self._enqueue(slot, bound.context)
            slot.memory.wait()
            profiler = context.profiler = Profiler()  # alive while the context reports to it
            for _ in range(_PROFILED):
                self._enqueue(slot, bound.context)
                slot.memory.wait()
            context.profiler = None
            del profiler
            inspector = slot.engine.create_engine_inspector()
            inspector.execution_context = context
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return text, {name: float(np.median(some)) for name, some in times.items()}, self.nodes

    def download(self, fields: Fields) -> Mapping[str, NDArray[Any]]:
        """Copy fields to host memory; floating-point fields become float32."""
        host = {name: np.asarray(one if isinstance(one, DeviceArray) else one.cpu()) for name, one in fields.items()}
        return {name: one.astype(np.float32) if one.dtype.kind == "f" else one for name, one in host.items()}

    def _empty(self, like: DeviceArray, memory: DeviceMemory) -> Any:
        if self._torch is None:
            return memory.empty(like.shape, like.dtype)
        # Allocate on the stream that writes the array. Memory of torch's own stream may still be in use there.
        with self._torch.cuda.stream(self._torch.cuda.ExternalStream(memory.stream)):
            there = self._torch.device("cuda", memory.device)
            return self._torch.empty(like.shape, dtype=getattr(self._torch, like.dtype.name), device=there)

    def _bind(self, slot: _Slot, shape: tuple[int, ...]) -> _Bound:
        """Allocate buffers for an input shape; the first shapes also get a separate context and a graph.

        Raises:
            UserError: the shape lies in no profile.
        """
        if len(slot.bound) >= _SHAPES:
            slot.bound = {known: bound for known, bound in slot.bound.items() if bound.graph is not None}
        own = self.cuda_graph and sum(bound.graph is not None for bound in slot.bound.values()) < _GRAPHS
        if own:
            context = _context(self.lib, slot.engine)
        else:
            context = slot.shared = slot.shared or _context(self.lib, slot.engine)
        self._choose(slot, context, shape)
        fields = {
            one.name: slot.memory.empty(tuple(context.made.get_tensor_shape(self.tensors[one.name])), self.types[one.name])
            for one in self.spec.fields
        }
        bound = _Bound(context, slot.memory.empty(shape, self.types[self.spec.input.name]), fields)
        self._address(slot, bound)
        if own:
            self._enqueue(slot, context)  # TensorRT prepares a shape in its first run; a graph must not record that
            slot.memory.wait()
            bound.graph = slot.memory.graph(lambda: self._enqueue(slot, context))
        slot.bound[shape] = bound
        return bound

    def _choose(self, slot: _Slot, context: _Context, shape: tuple[int, ...]) -> None:
        """Select a profile that includes a shape, and set the shape.

        Raises:
            UserError: no profile includes the shape.
        """
        fitting = [n for n, (least, _, most) in enumerate(self.profiles) if _between(least, shape, most)]
        if not fitting:
            listed = "; ".join(f"{tuple(least)} to {tuple(most)}" for least, _, most in self.profiles)
            raise UserError(
                f"an input of {shape} lies outside the engine's profile ({listed}); build it for that resolution and batch"
            )
        if context.profile not in fitting:
            if not context.made.set_optimization_profile_async(fitting[0], slot.memory.stream):
                raise self.lib.failed(f"TensorRT cannot select the engine's profile {fitting[0]}", "build the engine again")
            slot.memory.wait()
            context.profile = fitting[0]
        if not context.made.set_input_shape(self.tensors[self.spec.input.name], shape):
            raise self.lib.failed(
                f"the engine does not accept an input of {shape}", "build the engine for that resolution and batch"
            )

    def _address(self, slot: _Slot, bound: _Bound) -> None:
        self._choose(slot, bound.context, bound.given.shape)
        bound.context.made.set_tensor_address(self.tensors[self.spec.input.name], bound.given.address)
        for name, array in bound.fields.items():
            bound.context.made.set_tensor_address(self.tensors[name], array.address)

    def _enqueue(self, slot: _Slot, context: _Context) -> None:
        if not context.made.execute_async_v3(stream_handle=slot.memory.stream):
            raise self.lib.failed("the engine did not run", "check the GPU with nvidia-smi")


def _context(lib: TensorRTModule, engine: Any) -> _Context:
    """A new context.

    Raises:
        UserError: TensorRT cannot create it, usually for lack of memory.
    """
    made = engine.create_execution_context()
    if made is None:
        raise lib.failed("TensorRT cannot create an execution context of the engine", "free GPU memory")
    return _Context(made)


def _refit(lib: TensorRTModule, engine: Any, weights: Path, digest: str) -> None:
    """Put the weights of an ONNX file into a plan that was built without weights.

    Raises:
        UserError: the plan was built from other weights.
    """
    again = "build it here: stage=build force=true"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != digest:
        raise UserError(f"{weights}: not the network that the plan was built from; the plan needs its weights; {again}")
    refitter = lib.trt.Refitter(engine, lib.logger)
    if not lib.trt.OnnxParserRefitter(refitter, lib.logger).refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
        raise lib.failed(f"{weights}: its weights do not fit the plan", again)


def _between(least: Sequence[int], shape: Sequence[int], most: Sequence[int]) -> bool:
    return len(least) == len(shape) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))


def _torch(devices: Sequence[int]) -> Any:
    """The module torch if it is installed, sees a GPU, and the engine uses one GPU only; else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() and len(devices) == 1 else None


def _on_device(array: Any, memory: DeviceMemory) -> DeviceArray:
    if isinstance(array, DeviceArray):
        return array
    kind = np.dtype(str(array.dtype).removeprefix("torch."))
    return DeviceArray(array.data_ptr(), tuple(array.shape), kind, memory)
