"""Memory, streams and graphs of an NVIDIA GPU through cuda-python; the host side needs numpy only."""

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from threading import RLock
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import DTypeLike, NDArray

from posepress.errors import UserError


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array in GPU memory; the memory is reused when no reference to the array is left.

    Attributes:
        address: address of the first byte, aligned to 256 bytes.
        shape: shape of the array.
        dtype: type of the elements.
        memory: the `DeviceMemory` that copies the array.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    memory: "DeviceMemory" = field(repr=False)

    @property
    def nbytes(self) -> int:
        """The array's size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def host(self) -> NDArray[Any]:
        """A copy in host memory, made at the first access."""
        made = self.memory.pinned(self.shape, self.dtype)
        self.memory.copy(made, self)
        return made

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.host, dtype) if copy else np.asarray(self.host, dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.host[index]


class DeviceMemory:
    """Allocations, copies, a stream and graphs on one GPU.

    Unused memory is kept for the next array of the same size, because an allocation stops the GPU.

    Args:
        device: number of the GPU.

    Raises:
        UserError: cuda-python is not installed, or no such GPU answers.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self._free: dict[int, list[int]] = defaultdict(list)
        self._pinned: dict[int, list[int]] = defaultdict(list)
        self._closed = False
        self._lock = RLock()  # a copy during the recording of a graph would become part of it

    @cached_property
    def _cuda(self) -> Any:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise UserError(
                f"backend=tensorrt needs cuda-python to reach the GPU ({error}); install it: pip install cuda-python"
            ) from error
        return runtime

    def _check(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime.

        Raises:
            UserError: the call failed; the message names the function and the reason.
        """
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            _, text = self._cuda.cudaGetErrorString(status)
            why = text.decode() if isinstance(text, bytes) else str(text)
            raise UserError(f"GPU {self.device}: {name} failed ({why}); {_REMEDIES.get(name, 'see nvidia-smi')}")
        return values[0] if len(values) == 1 else values

    @cached_property
    def gpu(self) -> dict[str, str]:
        """The GPU's "name" and "sm", the compute capability."""
        found = self._check("cudaGetDeviceProperties", self.device)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        return {"name": name.rstrip("\0"), "sm": f"{found.major}.{found.minor}"}

    def activate(self) -> None:
        """Send this thread's calls to this GPU."""
        self._check("cudaSetDevice", self.device)

    @cached_property
    def stream(self) -> int:
        """A separate stream: on the default stream, TensorRT waits for the whole GPU."""
        self.activate()
        made = int(self._check("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))
        finalize(self, self._cuda.cudaStreamDestroy, made).atexit = False
        return made

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        """An uninitialised array on the GPU."""
        kind = np.dtype(dtype)
        size = max(math.prod(shape) * kind.itemsize, 1)
        try:
            address = self._free[size].pop()
        except IndexError:
            address = int(self._check("cudaMalloc", size))
        made = DeviceArray(address, tuple(shape), kind, self)
        finalize(made, self._release, self._free, size, address, "cudaFree").atexit = False
        return made

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array in page-locked host memory, which is copied at full speed; its memory is reused, too."""
        kind = np.dtype(dtype)
        size = max(math.prod(shape) * kind.itemsize, 1)
        try:
            address = self._pinned[size].pop()
        except IndexError:
            address = int(self._check("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))
        held = (ctypes.c_uint8 * size).from_address(address)
        finalize(held, self._release, self._pinned, size, address, "cudaFreeHost").atexit = False
        return np.frombuffer(memoryview(held), np.uint8)[: math.prod(shape) * kind.itemsize].view(kind).reshape(shape)

    def _release(self, pool: dict[int, list[int]], size: int, address: int, free: str) -> None:
        """Keep unused memory for the next array of its size, or free it after `close`."""
        if self._closed:
            self.activate()
            self._check(free, address)
        else:
            pool[size].append(address)

    def close(self) -> None:
        """Free all unused memory. Memory in use is freed when the last reference to its array is gone."""
        self._closed = True
        self.activate()
        for pool, free in ((self._free, "cudaFree"), (self._pinned, "cudaFreeHost")):
            for addresses in pool.values():
                while addresses:
                    self._check(free, addresses.pop())

    def copy(self, to: DeviceArray | NDArray[Any], source: DeviceArray | NDArray[Any], wait: bool = True) -> None:
        """Copy an array to, from or within the GPU, on the stream.

        Args:
            to: a contiguous array of the same size.
            source: a contiguous array.
            wait: whether to wait for the end of the copy; False suffices if only later work on the stream needs it.

        Raises:
            ValueError: the arrays differ in size, or one is not contiguous.
        """
        if to.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes cannot be copied into an array whose size in bytes is {to.nbytes}")
        for array in (to, source):
            if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
                raise ValueError("an array to copy is not contiguous")
        addresses = [a.ctypes.data if isinstance(a, np.ndarray) else a.address for a in (to, source)]
        kinds = self._cuda.cudaMemcpyKind
        with self._lock:
            self._check("cudaMemcpyAsync", *addresses, source.nbytes, kinds.cudaMemcpyDefault, self.stream)
            if wait:
                self.wait()

    def wait(self) -> None:
        """Wait until the stream has finished its work."""
        self._check("cudaStreamSynchronize", self.stream)

    def graph(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work that a function puts on the stream; the returned function repeats it with one launch."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._lock:
            self._check("cudaStreamBeginCapture", self.stream, mode)
            try:
                work()
            finally:
                captured = self._check("cudaStreamEndCapture", self.stream)
        executable = self._check("cudaGraphInstantiate", captured, 0)
        self._check("cudaGraphDestroy", captured)

        def launch() -> None:
            self._check("cudaGraphLaunch", executable, self.stream)

        finalize(launch, self._cuda.cudaGraphExecDestroy, executable).atexit = False
        return launch


_REMEDIES = {
    "cudaSetDevice": "choose one that nvidia-smi lists",
    "cudaGetDeviceProperties": "choose one that nvidia-smi lists",
    "cudaMalloc": "free GPU memory, or choose a smaller batch or resolution",
}
