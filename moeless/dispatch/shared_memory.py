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
import threading
import time

import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import LineConfig, PeerConfig, WorkerEndpoint, has_hung_up
from moeless.dispatch.handshake import Accept, Ask, TransportKind, ask_for, check_sizes, close_all, prove, send_message
from moeless.dispatch.wire import (
    FailedCallError,
    Frame,
    LayerCall,
    ReceivedCall,
    call_bytes,
    max_answer_bytes,
    read_answer,
    read_call,
    write_answer,
    write_call,
    write_error,
)

_NUM_FDS = 4

_WATCH_S = 0.0003


class SharedMemoryChannel:
    """An engine's line to a worker on the same machine."""

    kind: TransportKind = "shm"

    def __init__(self, endpoint: WorkerEndpoint, config: LineConfig) -> None:
        """Connect and map. Raises HandshakeError or TransportError."""
        self._worker = endpoint.worker
        self._sequence = 0
        self._shape = (0, 0)
        self._broken = False
        self._closed = False
        self._lock = threading.Lock()
        num_call_bytes, num_answer_bytes = self._frame_bytes(config)
        detail = self._offer(config)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect("\0" + endpoint.unix_address)
            accept, fds = ask_for(
                self._socket,
                config.run_secret,
                kind=self.kind,
                engine=config.engine,
                call_bytes=num_call_bytes,
                answer_bytes=num_answer_bytes,
                detail=detail,
                max_fds=_NUM_FDS,
            )
        except OSError as error:
            self._socket.close()
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        except HandshakeError:
            self._socket.close()
            raise
        self.max_rows = min(config.max_rows, accept.max_rows)
        self._call_bell, self._answer_bell, call_fd, answer_fd = fds
        self._call = _map(call_fd)
        self._answer = _map(answer_fd)
        self._poll = select.poll()
        self._poll.register(self._answer_bell, select.POLLIN)
        self._poll.register(self._socket, select.POLLIN)
        try:
            self._take_offer(accept.detail)
        except TransportError:
            self.close()
            raise

    @property
    def is_broken(self) -> bool:
        if not self._broken and self._lock.acquire(blocking=False):  # a call under way notices by itself
            try:
                self._broken = has_hung_up(self._socket)
            finally:
                self._lock.release()
        return self._broken

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

    # What a transport overrides whose rows lie elsewhere than in the frames.

    def _frame_bytes(self, config: LineConfig) -> tuple[int, int]:
        """Sizes of the areas for calls and answers."""
        calls = call_bytes(config.max_rows, config.max_pairs, config.hidden_size, config.dtype)
        return calls, max_answer_bytes(config.max_rows, config.hidden_size, config.dtype)

    def _offer(self, config: LineConfig) -> dict[str, str]:  # noqa: ARG002
        """What the worker must know beyond the sizes."""
        return {}

    def _take_offer(self, detail: dict[str, str]) -> None:
        """Use what the worker told. Raises TransportError if that is impossible."""

    def _put(self, call: LayerCall) -> None:
        write_call(self._call, call, self._sequence)

    def _take(self, deadline_s: float) -> torch.Tensor:  # noqa: ARG002
        return read_answer(self._answer, self._sequence, self._shape)

    def _release(self) -> None:
        """Give back what `_offer` and `_take_offer` took."""

    def _check_usable(self) -> None:
        if self._broken:
            raise TransportError(f"the line to worker {self._worker} is broken")

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


class SharedMemoryPeer:
    """A worker's end of one engine's line."""

    kind: TransportKind = "shm"

    def __init__(self, sock: socket.socket, ask: Ask, config: PeerConfig) -> None:
        """Make the areas and the bells and pass them over. Raises HandshakeError for a bad size, or OSError."""
        self.engine = ask.engine
        self.socket = sock
        self._config = config
        check_sizes(sock, ask)
        fds: list[int] = []
        try:
            fds += [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
            for name, size in (("moeless-call", ask.call_bytes), ("moeless-answer", ask.answer_bytes)):
                fds.append(_memfd(name, size))
            detail = self._offer(ask)
            accept = Accept(
                proof=prove(config.run_secret, "server", ask.nonce), max_rows=config.max_rows, detail=detail
            )
            send_message(sock, accept, fds)
        except (OSError, TransportError) as error:
            close_all(fds)
            self._release()
            if isinstance(error, TransportError):
                send_message(sock, Accept(error=str(error)))
            raise
        self.bell, self._answer_bell, call_fd, answer_fd = fds
        self._call = _map(call_fd)
        self._answer = _map(answer_fd)

    @property
    def has_unsent(self) -> bool:
        return False

    def flush(self) -> None:
        """Nothing is ever left to send."""

    def receive(self) -> ReceivedCall | None:
        """The call that was rung for. Raises TransportError if it makes no sense."""
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

    def _offer(self, ask: Ask) -> dict[str, str]:  # noqa: ARG002
        """What the engine must know beyond the descriptors. Raises TransportError if its wish cannot be granted."""
        return {}

    def _take(self) -> ReceivedCall | None:
        return read_call(self._call, max_rows=self._config.max_rows, num_experts=self._config.num_experts)

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> None:
        write_answer(self._answer, sequence, partial_RH)

    def _release(self) -> None:
        """Give back what `_offer` took."""

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
