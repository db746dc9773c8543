# ruff: noqa: N802, N815, N816 - the names are CUDA's
"""A strict double of cuda-python's `cuda.bindings.runtime` in the host's memory, for tests on machines without a GPU.

Memory is real and aligned to 256 bytes; a copy that leaves an allocation, comes after its end, or goes to a stream that does
not exist fails as CUDA fails it. What is put on a stream while it is captured runs when the graph is launched, not before.
"""

import ctypes
import enum
import threading

import numpy as np


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidDevice = 101
    cudaErrorIllegalAddress = 700
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


cudaStreamNonBlocking = 1
cudaHostAllocDefault = 0
OK = cudaError_t.cudaSuccess

DEVICES = 2
LIMIT = 2 << 30  # bytes that a device holds
allocations = {}  # address -> (array that holds it, size)
pinned = {}
streams = {}  # handle -> None, or the work recorded on it
graphs = {}
executables = {}
log = []  # calls, for tests
_next = [0]


def _handle():
    _next[0] += 1
    return 0x1000 + _next[0]


def _aligned(size):
    held = np.zeros(size + 256, np.uint8)
    return held, (held.ctypes.data + 255) // 256 * 256


def inside(address, size):
    """Whether some bytes lie in one living allocation of the device."""
    return any(start <= address and address + size <= start + length for start, (_, length) in list(allocations.items()))


def put(stream, work):
    """Run something on a stream, or record it."""
    if stream not in streams:
        return cudaError_t.cudaErrorInvalidResourceHandle
    if streams[stream] is None:
        work()
    else:
        streams[stream].append(work)
    return OK


def cudaGetErrorString(status):
    return OK, cudaError_t(status).name.encode()


def cudaGetDeviceCount():
    return OK, DEVICES


current = threading.local()


def cudaSetDevice(device):
    current.device = device
    return (OK if 0 <= device < DEVICES else cudaError_t.cudaErrorInvalidDevice,)


def cudaMalloc(size):
    log.append(("cudaMalloc", size))
    log.append(("cudaMalloc on", getattr(current, "device", 0)))
    if size <= 0:
        return cudaError_t.cudaErrorInvalidValue, 0
    if sum(length for _, length in list(allocations.values())) + size > LIMIT:
        return cudaError_t.cudaErrorMemoryAllocation, 0
    held, address = _aligned(size)
    allocations[address] = (held, size)
    return OK, address


def cudaHostAlloc(size, flags):
    log.append(("cudaHostAlloc", size))
    held, address = _aligned(size)
    pinned[address] = held
    return OK, address


def cudaFreeHost(address):
    return (OK if pinned.pop(address, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaStreamDestroy(stream):
    return (OK if streams.pop(stream, "none") != "none" else cudaError_t.cudaErrorInvalidResourceHandle,)


def cudaGraphDestroy(graph):
    return (OK if graphs.pop(graph, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaGraphExecDestroy(executable):
    return (OK if executables.pop(executable, None) is not None else cudaError_t.cudaErrorInvalidValue,)


def cudaFree(address):
    return (OK if allocations.pop(address, None) else cudaError_t.cudaErrorInvalidValue,)


def cudaMemcpyAsync(to, source, size, kind, stream):
    if not isinstance(kind, cudaMemcpyKind):
        raise TypeError(f"cudaMemcpyAsync: expected cudaMemcpyKind, got {kind!r}")
    if not inside(to, size) and not inside(source, size):
        return (cudaError_t.cudaErrorIllegalAddress,)
    for address in (to, source):  # an address inside a device's allocation must stay in it
        near = [(start, length) for start, (_, length) in list(allocations.items()) if start <= address < start + length]
        if near and not inside(address, size):
            return (cudaError_t.cudaErrorIllegalAddress,)
    return (put(stream, lambda: ctypes.memmove(to, source, size)),)


def cudaStreamCreateWithFlags(flags):
    handle = _handle()
    streams[handle] = None
    return OK, handle


def cudaStreamSynchronize(stream):
    if stream not in streams:
        return (cudaError_t.cudaErrorInvalidResourceHandle,)
    return (OK if streams[stream] is None else cudaError_t.cudaErrorStreamCaptureInvalidated,)


def cudaStreamBeginCapture(stream, mode):
    streams[stream] = []
    return (OK,)


def cudaStreamEndCapture(stream):
    graph = _handle()
    graphs[graph], streams[stream] = streams[stream], None
    return OK, graph


def cudaGraphInstantiate(graph, flags):
    if graph not in graphs:
        return cudaError_t.cudaErrorInvalidValue, 0
    executable = _handle()
    executables[executable] = graphs[graph]
    return OK, executable


def cudaGraphLaunch(graph, stream):
    log.append(("cudaGraphLaunch", graph))
    for work in executables[graph]:
        if (status := put(stream, work)) != OK:
            return (status,)
    return (OK,)


class _Properties:
    name, major, minor, totalGlobalMem = b"Double of a GPU", 9, 0, LIMIT


def cudaGetDeviceProperties(device):
    return OK if 0 <= device < DEVICES else cudaError_t.cudaErrorInvalidDevice, _Properties
