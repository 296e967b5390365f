"""Transport between processes of one machine whose rows never leave the GPUs.

The worker allocates an area for calls and one for answers on its GPU and exports both; the engine maps them. Headers
and pairs travel in shared memory and eventfds ring, as in shared_memory.py. A bell rings when the copy is enqueued;
an interprocess event tells when it is done, and is looked at, not waited for on the stream: a stream that waits for
an event of a process that died would wait for ever.

Engine and worker each use one stream for the calls of a channel: an area is written again only after the answer, whose
computation came after every read of it.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Protocol

import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import ChannelConfig, ServerConfig, WorkerEndpoint, has_hung_up
from moeless.dispatch.handshake import Ask, TransportKind, rows_bytes_of
from moeless.dispatch.shared_memory import SharedMemoryChannel, SharedMemoryServerChannel
from moeless.dispatch.socket_channel import frame_bytes_without_rows
from moeless.dispatch.wire import (
    LayerCall,
    ReceivedCall,
    gather_rows,
    read_answer_head,
    read_call_head,
    receive_call,
    write_answer_head,
    write_routing,
)

_LOOK_AT_SOCKET_EVERY = 256
"""Looks at an event between two looks at whether the other process is alive."""
_MAX_CACHED_VIEWS = 256


class Area(Protocol):
    """A piece of device memory that two processes share."""

    tensor: torch.Tensor
    """Its bytes."""
    handle: str
    """Handle with which another process opens it."""

    def close(self) -> None:
        """Free it (its maker) or unmap it (the other)."""
        ...


class DeviceEvent(Protocol):
    """A point in a process's stream that another process can look for."""

    handle: str

    def record(self) -> None:
        """Set it behind everything that was enqueued before."""
        ...

    def is_past(self) -> bool: ...


class DeviceMemory(Protocol):
    """Device functions of this transport. cuda_memory.CudaMemory is the real one; tests have a twin on the CPU."""

    def allocate(self, num_bytes: int) -> Area: ...

    def open(self, handle: str, num_bytes: int) -> Area:
        """Raises TransportError if the memory cannot be reached from here."""
        ...

    def make_event(self) -> DeviceEvent: ...

    def open_event(self, handle: str) -> DeviceEvent: ...


class _SharedRows:
    """An area seen as rows."""

    def __init__(self, area: Area) -> None:
        self._area = area
        self._views: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}

    def view(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """The area's beginning as (num_rows, hidden_size). Raises TransportError if it does not fit."""
        key = (num_rows, hidden_size, dtype)
        if key not in self._views:
            num_bytes, room = num_rows * hidden_size * dtype.itemsize, len(self._area.tensor)
            if num_bytes > room:
                raise TransportError(f"{num_rows} rows of {hidden_size} need {num_bytes} bytes, got {room}")
            if len(self._views) >= _MAX_CACHED_VIEWS:
                self._views.clear()
            self._views[key] = self._area.tensor[:num_bytes].view(dtype).view(num_rows, hidden_size)
        return self._views[key]

    def close(self) -> None:
        self._views.clear()
        self._area.close()


class CudaIpcChannel(SharedMemoryChannel):
    """An engine's channel to a worker on the same machine, both with their rows on GPUs."""

    kind: TransportKind = "cuda-ipc"

    def __init__(self, endpoint: WorkerEndpoint, config: ChannelConfig, memory: DeviceMemory) -> None:
        """Connect and map. Raises HandshakeError, or TransportError where the GPUs cannot reach each other."""
        self._memory = memory
        self._rows: list[_SharedRows] = []
        super().__init__(endpoint, config)

    def _frame_bytes(self, config: ChannelConfig) -> tuple[int, int]:
        return frame_bytes_without_rows(config)

    def _offer(self, config: ChannelConfig) -> dict[str, str]:
        self._rows_bytes = config.rows_bytes
        self._call_written = self._memory.make_event()
        return {"call_written": self._call_written.handle, "rows_bytes": str(self._rows_bytes)}

    def _take_offer(self, detail: dict[str, str]) -> None:
        missing = {"calls", "answers", "answer_written"} - detail.keys()
        if missing:
            raise HandshakeError(f"the worker's offer must name {', '.join(sorted(missing))}")
        for name in ("calls", "answers"):
            self._rows.append(_SharedRows(self._memory.open(detail[name], self._rows_bytes)))
        self._answer_written = self._memory.open_event(detail["answer_written"])

    def _put(self, call: LayerCall) -> None:
        write_routing(self._call, call, self._sequence)
        self._rows[0].view(*self._shape, call.x_TH.dtype).copy_(gather_rows(call))
        self._call_written.record()

    def _take(self, deadline_s: float) -> torch.Tensor:
        dtype = read_answer_head(self._answer, self._sequence, self._shape)
        num_looks = 0
        while not self._answer_written.is_past():
            num_looks += 1
            if num_looks % _LOOK_AT_SOCKET_EVERY == 0:
                if has_hung_up(self._socket):
                    raise TransportError(f"worker {self._worker} hung up")
                if time.monotonic() > deadline_s:
                    raise WorkerTimeoutError(f"worker {self._worker} did not finish its answer in time")
            os.sched_yield()
        return self._rows[1].view(*self._shape, dtype)

    def _release(self) -> None:
        while self._rows:
            self._rows.pop().close()


class CudaIpcServerChannel(SharedMemoryServerChannel):
    """A worker's end of one engine's channel.

    Args:
        memory: of the worker's device.
        Others as for SharedMemoryServerChannel.
    """

    kind: TransportKind = "cuda-ipc"

    def __init__(self, sock: socket.socket, ask: Ask, config: ServerConfig, memory: DeviceMemory) -> None:
        """Allocate and export. Raises HandshakeError for a bad size, TransportError if the device refuses."""
        self._memory = memory
        self._rows: list[_SharedRows] = []
        super().__init__(sock, ask, config)

    def _offer(self, ask: Ask) -> dict[str, str]:
        num_bytes = rows_bytes_of(ask)
        self._call_written = self._memory.open_event(ask.detail.get("call_written", ""))
        self._answer_written = self._memory.make_event()
        detail = {"answer_written": self._answer_written.handle}
        for name in ("calls", "answers"):
            area = self._memory.allocate(num_bytes)
            self._rows.append(_SharedRows(area))
            detail[name] = area.handle
        return detail

    def _take(self) -> ReceivedCall | None:
        if not self._call_written.is_past():
            os.eventfd_write(self.bell, 1)  # look again after the other engines' turns
            os.sched_yield()
            return None
        head = read_call_head(self._call.buffer)
        if head.num_rows > self._config.max_rows:
            raise TransportError(f"a call may have {self._config.max_rows} rows, got {head.num_rows}")
        x_RH = self._rows[0].view(head.num_rows, head.hidden_size, head.dtype)
        return receive_call(self._call, head, x_RH, num_experts=self._config.num_experts)

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> None:
        num_rows, hidden = partial_RH.shape
        self._rows[1].view(num_rows, hidden, partial_RH.dtype).copy_(partial_RH, non_blocking=True)
        self._answer_written.record()
        write_answer_head(self._answer, sequence, partial_RH)

    def _release(self) -> None:
        while self._rows:
            self._rows.pop().close()
