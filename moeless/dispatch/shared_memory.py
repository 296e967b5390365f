"""Transport between processes of one machine: a memfd for each direction and an eventfd to ring with.

The worker makes both and passes the descriptors over a Unix socket, which stays open only to notice a death: memory
that is reached by descriptor is gone with the processes, however they end.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import time

import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.handshake import Accept, Ask, ask_for, prove, send_message
from moeless.dispatch.wire import (
    LayerCall,
    ReceivedCall,
    answer_bytes,
    call_bytes,
    read_answer,
    read_call,
    write_answer,
    write_call,
    write_error,
)

_MAX_AREA_BYTES = 4 << 30


class SharedMemoryChannel:
    """An engine's line to a worker on the same machine."""

    kind = "shm"

    def __init__(
        self,
        endpoint: WorkerEndpoint,
        *,
        token: str,
        engine: str,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        max_rows: int,
    ) -> None:
        """Connect and map. Raises HandshakeError or TransportError."""
        self.max_rows = max_rows
        self._worker = endpoint.worker
        self._sequence = 0
        self._broken = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect("\0" + endpoint.unix_address)
            _, fds = ask_for(
                self._socket,
                token,
                kind="shm",
                engine=engine,
                call_bytes=call_bytes(max_rows, max_rows * top_k, hidden_size, dtype),
                answer_bytes=answer_bytes(max_rows, hidden_size, dtype),
                max_fds=4,
            )
        except OSError as error:
            self._socket.close()
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        except HandshakeError:
            self._socket.close()
            raise
        if len(fds) != 4:
            self._socket.close()
            raise HandshakeError(f"worker {endpoint.worker} passed {len(fds)} descriptors instead of 4")
        call_fd, answer_fd, self._call_bell, self._answer_bell = fds
        self._call_area = _map(call_fd)
        self._answer_area = _map(answer_fd)
        self._poll = select.poll()
        self._poll.register(self._answer_bell, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN | select.POLLHUP)

    @property
    def is_broken(self) -> bool:
        if not self._broken and self._socket.fileno() >= 0:
            hung_up = select.poll()  # its own: the compute thread may be polling for an answer
            hung_up.register(self._socket, select.POLLIN | select.POLLHUP)
            self._broken = bool(hung_up.poll(0))
        return self._broken

    def submit(self, call: LayerCall) -> None:
        if self._broken:
            raise TransportError(f"the line to worker {self._worker} is broken")
        self._sequence += 1
        write_call(self._call_area, call, self._sequence)
        os.eventfd_write(self._call_bell, 1)

    def collect(self, timeout_s: float) -> torch.Tensor:
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            ready = self._poll.poll(max(0.0, left_s) * 1e3)
            fds = {fd for fd, _ in ready}
            if self._answer_bell in fds:
                os.eventfd_read(self._answer_bell)
                return read_answer(self._answer_area, self._sequence)
            self._broken = True
            if ready:
                raise TransportError(f"worker {self._worker} hung up")
            raise WorkerTimeoutError(f"worker {self._worker} did not answer within {timeout_s:g} s")

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        self._broken = True
        self._socket.close()
        os.close(self._call_bell)
        os.close(self._answer_bell)


class SharedMemoryPeer:
    """A worker's end of one engine's line."""

    kind = "shm"

    def __init__(self, sock: socket.socket, ask: Ask, *, token: str, max_rows: int, num_experts: list[int]) -> None:
        """Make the areas and the bells and pass them over. Raises HandshakeError for a bad size."""
        for name, size in (("call_bytes", ask.call_bytes), ("answer_bytes", ask.answer_bytes)):
            if not 0 < size <= _MAX_AREA_BYTES:
                send_message(sock, Accept(error=f"{name} must be in (0, {_MAX_AREA_BYTES}], got {size}"))
                raise HandshakeError(f"{name} must be in (0, {_MAX_AREA_BYTES}], got {size}")
        self.engine = ask.engine
        self.socket = sock
        self._max_rows = max_rows
        self._num_experts = num_experts
        call_fd = _memfd("moeless-call", ask.call_bytes)
        answer_fd = _memfd("moeless-answer", ask.answer_bytes)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._answer_bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        send_message(
            sock,
            Accept(proof=prove(token, "server", ask.nonce), max_rows=max_rows),
            [call_fd, answer_fd, self.bell, self._answer_bell],
        )
        self._call_area = _map(call_fd)
        self._answer_area = _map(answer_fd)

    def receive(self) -> ReceivedCall:
        """The call that was rung for. Raises TransportError if it makes no sense."""
        os.eventfd_read(self.bell)
        return read_call(self._call_area, max_rows=self._max_rows, num_experts=self._num_experts)

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None:
        write_answer(self._answer_area, sequence, partial_RH)
        os.eventfd_write(self._answer_bell, 1)

    def fail(self, sequence: int, status: int, message: str) -> None:
        write_error(self._answer_area, sequence, status, message)
        os.eventfd_write(self._answer_bell, 1)

    def close(self) -> None:
        self.socket.close()
        os.close(self.bell)
        os.close(self._answer_bell)


def _memfd(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def _map(fd: int) -> memoryview:
    """Map the whole file and close the descriptor; the mapping lives as long as the view."""
    mapping = mmap.mmap(fd, 0)
    os.close(fd)
    return memoryview(mapping)
