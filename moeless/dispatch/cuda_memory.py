"""CUDA memory and events that another process can open, through the CUDA runtime that torch has loaded.

torch's own sharing of storages keeps reference counts in files of /dev/shm, which a SIGKILL leaves behind; the runtime
calls below leave nothing: the driver frees a process's memory with the process.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moeless.core.errors import TransportError

_LAZY_ENABLE_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess: the area may be on another GPU than the one that opens it."""


class _IpcMemHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


class _PointerAttributes(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    )


class CudaMemory:
    """Areas and events of one GPU.

    Args:
        device: a CUDA device of this process.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises TransportError if CUDA cannot be used."""
        self.device = device
        with _as_transport_error("CUDA cannot be used"), torch.cuda.device(device):
            torch.cuda.current_stream(device).synchronize()  # begins the context and loads the runtime
        self._runtime = _load_runtime()

    def allocate(self, num_bytes: int) -> CudaArea:
        """New device memory, to be freed by its close. Raises TransportError if there is none left."""
        pointer, handle = ctypes.c_void_p(), _IpcMemHandle()
        with torch.cuda.device(self.device):
            self._runtime.call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
            try:
                self._runtime.call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
                return CudaArea(self._runtime, pointer, num_bytes, "cudaFree", bytes(handle).hex())
            except TransportError:
                self._runtime.call("cudaFree", pointer)
                raise

    def open(self, handle: str, num_bytes: int) -> CudaArea:
        """Another process's area, to be unmapped by its close. Raises TransportError if it cannot be reached."""
        pointer, raw = ctypes.c_void_p(), _IpcMemHandle.from_buffer_copy(_decode(handle, ctypes.sizeof(_IpcMemHandle)))
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        with torch.cuda.device(self.device):
            self._runtime.call("cudaIpcOpenMemHandle", ctypes.byref(pointer), raw, flags)
            try:
                return CudaArea(self._runtime, pointer, num_bytes, "cudaIpcCloseMemHandle", handle)
            except TransportError:
                self._runtime.call("cudaIpcCloseMemHandle", pointer)
                raise

    def make_event(self) -> CudaEvent:
        """An event of this process. Raises TransportError."""
        with _as_transport_error("a CUDA event cannot be shared"), torch.cuda.device(self.device):
            event = torch.cuda.Event(interprocess=True)
            return CudaEvent(event, self.device, event.ipc_handle().hex())

    def open_event(self, handle: str) -> CudaEvent:
        """Another process's event. Raises TransportError if it cannot be reached."""
        with _as_transport_error("a CUDA event cannot be opened"), torch.cuda.device(self.device):
            event = torch.cuda.Event.from_ipc_handle(self.device, _decode(handle, ctypes.sizeof(_IpcMemHandle)))
            return CudaEvent(event, self.device, handle)


class CudaArea:
    """Device memory that two processes share; `tensor` must not be used after close."""

    def __init__(self, runtime: _Runtime, pointer: ctypes.c_void_p, num_bytes: int, closer: str, handle: str) -> None:
        """Raises TransportError if torch cannot use the memory in place."""
        self.handle = handle
        self._runtime = runtime
        self._pointer = pointer
        self._closer = closer
        self._index = runtime.device_of(pointer)
        self._num_bytes = num_bytes
        self.tensor = torch.as_tensor(self, device=f"cuda:{self._index}")
        if self.tensor.data_ptr() != pointer.value:
            raise TransportError("torch copied a shared CUDA area instead of using it in place")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        data = (self._pointer.value, False)
        return {"shape": (self._num_bytes,), "typestr": "|u1", "data": data, "version": 3, "strides": None}

    def close(self) -> None:
        with torch.cuda.device(self._index):
            torch.cuda.synchronize(self._index)  # nothing may still read or write it
            del self.tensor
            self._runtime.call(self._closer, self._pointer)


class CudaEvent:
    """An event that two processes share."""

    def __init__(self, event: torch.cuda.Event, device: torch.device, handle: str) -> None:
        self.handle = handle
        self._event = event
        self._device = device

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def is_past(self) -> bool:
        return bool(self._event.query())


class _Runtime:
    """The CUDA runtime's functions, with their errors as TransportError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # or torch would report it at its next launch
            raise TransportError(f"{name} failed: {self._library.cudaGetErrorString(code).decode()}")

    def device_of(self, pointer: ctypes.c_void_p) -> int:
        """Index of the device that the memory is on."""
        attributes = _PointerAttributes()
        self.call("cudaPointerGetAttributes", ctypes.byref(attributes), pointer)
        return int(attributes.device)


def _load_runtime() -> _Runtime:
    """The runtime library that torch uses: found among the files that this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith("libcudart"):
            return _Runtime(ctypes.CDLL(path))
    raise TransportError("torch has not loaded the CUDA runtime as a library of its own")


@contextmanager
def _as_transport_error(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise TransportError(f"{what}: {error}") from error


def _decode(handle: str, size: int) -> bytes:
    try:
        raw = bytes.fromhex(handle)
    except ValueError as error:
        raise TransportError(f"a CUDA handle must be hexadecimal, got {handle!r}") from error
    if len(raw) != size:
        raise TransportError(f"a CUDA handle must have {size} bytes, got {len(raw)}")
    return raw
