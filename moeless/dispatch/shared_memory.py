"""Transport between processes of one machine: a memfd for each direction and an eventfd to ring with.

The worker makes both and passes the descriptors over a Unix socket, which stays open only to notice a death: memory
that is reached by descriptor is gone with the processes, however they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import time

import torch

from moeless.core.errors import TransportError, WorkerTimeoutError
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.handshake import Ask, TransportKind, close_all
from moeless.dispatch.socket_channel import SocketChannel, SocketServerChannel
from moeless.dispatch.wire import (
    FailedCallError,
    Frame,
    LayerCall,
    ReceivedCall,
    read_answer,
    read_call,
    write_answer,
    write_call,
    write_error,
)

_WATCH_S = 0.0003
"""Time for which a collect polls for the answer before it sleeps."""


class SharedMemoryChannel(SocketChannel):
    """An engine's channel to a worker on the same machine."""

    kind: TransportKind = "shm"
    _num_fds = 4

    def _connect(self, endpoint: WorkerEndpoint) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect("\0" + endpoint.unix_address)
        except OSError:
            sock.close()
            raise
        return sock

    def _open(self, fds: list[int], num_call_bytes: int, num_answer_bytes: int) -> None:  # noqa: ARG002
        self._call_bell, self._answer_bell, call_fd, answer_fd = fds
        self._call = _map(call_fd)
        self._answer = _map(answer_fd)
        self._poll = select.poll()
        self._poll.register(self._answer_bell, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)

    def submit(self, call: LayerCall) -> None:
        with self._lock:
            self._check_usable()
            self._sequence += 1
            self._shape = (len(call.tokens_R), call.x_TH.shape[1])
            self._put(call)
            os.eventfd_write(self._call_bell, 1)

    def collect(self, timeout_s: float) -> torch.Tensor:
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._check_usable()
            ready = self._watch() or self._poll.poll(timeout_s * 1e3)
            for fd, _ in ready:
                if fd == self._answer_bell:
                    os.eventfd_read(fd)
                    try:
                        return self._take(deadline_s)
                    except FailedCallError:
                        raise
                    except TransportError:
                        self._broken = True
                        raise
            self._broken = True
        if ready:
            raise TransportError(f"worker {self._worker} hung up")
        raise WorkerTimeoutError(f"worker {self._worker} did not answer within {timeout_s:g} s")

    def _watch(self) -> list[tuple[int, int]]:
        """Look for the answer for as long as one usually takes, before going to sleep.

        A sleeping core takes tens of microseconds to wake. Every look yields, so that whoever else wants this core
        (a worker, on a small machine) has it at once.
        """
        until_s = time.perf_counter() + _WATCH_S
        while time.perf_counter() < until_s:
            if ready := self._poll.poll(0):
                return ready
            os.sched_yield()
        return []

    # Overridden by a transport whose rows travel apart from the frames.

    def _put(self, call: LayerCall) -> None:
        write_call(self._call, call, self._sequence)

    def _take(self, deadline_s: float) -> torch.Tensor:  # noqa: ARG002
        return read_answer(self._answer, self._sequence, self._shape)

    def close(self) -> None:
        self._broken = True
        if self._closed:
            return
        self._closed = True
        if not self._lock.acquire(blocking=False):
            with contextlib.suppress(OSError):  # the worker hung up before
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the collect in another thread that holds the lock
            self._lock.acquire()
        try:
            self._release()  # before the worker hears of it and frees what is shared
        finally:
            del self._call, self._answer  # unmaps them, unless an answer is still in use
            self._socket.close()
            close_all([self._call_bell, self._answer_bell])
            self._lock.release()


class SharedMemoryServerChannel(SocketServerChannel):
    """A worker's end of one engine's channel: makes the areas and the bells and passes them over."""

    kind: TransportKind = "shm"

    def _make_frames(self, ask: Ask) -> list[int]:
        fds: list[int] = []
        try:
            fds += [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
            for name, size in (("moeless-call", ask.call_bytes), ("moeless-answer", ask.answer_bytes)):
                fds.append(_memfd(name, size))
        except OSError:
            close_all(fds)
            raise
        return fds

    def _open(self, fds: list[int]) -> None:
        self.bell, self._answer_bell, call_fd, answer_fd = fds
        self._call = _map(call_fd)
        self._answer = _map(answer_fd)

    @property
    def has_unsent(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is ever left to send."""

    def receive(self) -> ReceivedCall | None:
        """The call that the bell announced. Raises TransportError if it makes no sense."""
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            return None
        return self._take()

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None:
        self._put(sequence, partial_RH)
        os.eventfd_write(self._answer_bell, 1)

    def fail(self, sequence: int, status: int, message: str) -> None:
        write_error(self._answer, sequence, status, message)
        os.eventfd_write(self._answer_bell, 1)

    def _take(self) -> ReceivedCall | None:
        return read_call(self._call, max_rows=self._config.max_rows, num_experts=self._config.num_experts)

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> None:
        write_answer(self._answer, sequence, partial_RH)

    def close(self) -> None:
        self.socket.close()
        close_all([self.bell, self._answer_bell])
        self._release()


def _memfd(name: str, size: int) -> int:
    """Anonymous memory that nobody can shrink: touching a page that is no more would kill the process."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


def _map(fd: int) -> Frame:
    """Map the whole file and close the descriptor; the mapping lives as long as the frame and its views."""
    try:
        return Frame(memoryview(mmap.mmap(fd, 0)))
    finally:
        os.close(fd)
