"""A device for the CPU: its memory is shared memory, and its copies are done when they are enqueued, or later."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

import torch

from moeless.core.errors import TransportError


@dataclass(frozen=True)
class SharedDevice:
    """Twin of dispatch.cuda_memory.CudaMemory.

    Args:
        looks: how often another process's event is looked at in vain after each record.
    """

    looks: int = 0

    def allocate(self, num_bytes: int) -> SharedArea:
        fd = os.memfd_create("moeless-device")
        os.ftruncate(fd, num_bytes)
        return SharedArea(fd, num_bytes, f"/proc/{os.getpid()}/fd/{fd}")

    def open(self, handle: str, num_bytes: int) -> SharedArea:
        try:
            return SharedArea(os.open(handle, os.O_RDWR), num_bytes, handle)
        except OSError as error:
            raise TransportError(f"area {handle!r} cannot be reached: {error}") from error

    def make_event(self) -> SharedEvent:
        return SharedEvent(self.allocate(8), looks=0)

    def open_event(self, handle: str) -> SharedEvent:
        return SharedEvent(self.open(handle, 8), looks=self.looks)


class SharedArea:
    def __init__(self, fd: int, num_bytes: int, handle: str) -> None:
        self.handle = handle
        self.tensor = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self._fd = fd

    def close(self) -> None:
        os.close(self._fd)
        del self.tensor

    def __del__(self) -> None:
        if hasattr(self, "tensor"):
            self.close()


class SharedEvent:
    """Counts its records in shared memory."""

    def __init__(self, area: SharedArea, *, looks: int) -> None:
        self.handle = area.handle
        self._area = area
        self._count = area.tensor.view(torch.int64)
        self._looks = looks
        self._seen, self._looked = 0, 0

    def record(self) -> None:
        self._count += 1

    def is_past(self) -> bool:
        if int(self._count) != self._seen:
            self._seen, self._looked = int(self._count), 0
        self._looked += 1
        return self._looked > self._looks
