"""Transport between machines: length-known frames over TCP, received straight into the buffer they are read from."""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import time

import torch

from moeless.core.errors import TransportError, WorkerTimeoutError
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.handshake import HANDSHAKE_TIMEOUT_S, Ask, TransportKind
from moeless.dispatch.socket_channel import SocketChannel, SocketServerChannel
from moeless.dispatch.wire import (
    ANSWER_HEADER,
    CALL_HEADER,
    FailedCallError,
    Frame,
    LayerCall,
    ReceivedCall,
    answer_length,
    read_answer,
    read_call,
    read_call_head,
    write_answer,
    write_call,
    write_error,
)

_SUBMIT_PATIENCE_MS = 10
"""Time that a submit waits for room in the socket before it leaves the rest of a long call to collect."""


class TcpChannel(SocketChannel):
    """An engine's channel to a worker on another machine."""

    kind: TransportKind = "tcp"

    def _connect(self, endpoint: WorkerEndpoint) -> socket.socket:
        sock = socket.create_connection((endpoint.tcp_host, endpoint.tcp_port), timeout=HANDSHAKE_TIMEOUT_S)
        _tune(sock)
        return sock

    def _open(self, fds: list[int], num_call_bytes: int, num_answer_bytes: int) -> None:  # noqa: ARG002
        self._unsent = memoryview(b"")
        self._socket.setblocking(False)
        self._call = _lazy_frame(num_call_bytes)
        self._answer = _lazy_frame(num_answer_bytes)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._socket, select.POLLOUT)

    def submit(self, call: LayerCall) -> None:
        with self._lock:
            self._check_usable()
            self._sequence += 1
            self._shape = (len(call.tokens_R), call.x_TH.shape[1])
            self._unsent = self._call.buffer[: self._put(call)]
            try:
                self._push(_SUBMIT_PATIENCE_MS)
                self._send_rows(call)
            except OSError as error:
                self._broken = True
                raise TransportError(f"worker {self._worker} hung up: {error}") from error
            except TransportError:
                self._broken = True
                raise

    def collect(self, timeout_s: float) -> torch.Tensor:
        with self._lock:
            self._check_usable()
            deadline_s = time.monotonic() + timeout_s
            try:
                self._receive(deadline_s, timeout_s)
                return self._take(deadline_s)
            except FailedCallError:
                raise
            except TransportError:
                self._broken = True
                raise
            except OSError as error:
                self._broken = True
                raise TransportError(f"worker {self._worker} hung up: {error}") from error

    # Overridden by a transport whose rows travel apart from the frames.

    def _put(self, call: LayerCall) -> int:
        return write_call(self._call, call, self._sequence)

    def _wanted_bytes(self) -> int:
        return answer_length(self._answer.buffer)

    def _send_rows(self, call: LayerCall) -> None:
        """Send what `_put` left out."""

    def _take(self, deadline_s: float) -> torch.Tensor:  # noqa: ARG002
        return read_answer(self._answer, self._sequence, self._shape)

    def _push(self, patience_ms: int) -> None:
        """Send what is unsent, until it takes nothing for `patience_ms`."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                if not self._writable.poll(patience_ms):
                    return

    def _receive(self, deadline_s: float, timeout_s: float) -> None:
        """One answer's frame. Nothing else can come: a channel carries one call at a time."""
        frame = self._answer.buffer
        received, wanted = 0, ANSWER_HEADER.size
        while received < wanted:
            if self._unsent:
                self._readable.modify(self._socket, select.POLLIN | select.POLLOUT)
            ready = self._readable.poll(max(0.0, deadline_s - time.monotonic()) * 1e3)
            if self._unsent:
                self._push(0)
                self._readable.modify(self._socket, select.POLLIN)
            if not ready:
                raise WorkerTimeoutError(f"worker {self._worker} did not answer within {timeout_s:g} s")
            try:
                count = self._socket.recv_into(frame[received:])
            except BlockingIOError:
                continue
            if count == 0:
                raise TransportError(f"worker {self._worker} hung up")
            received += count
            if received >= ANSWER_HEADER.size:
                wanted = self._wanted_bytes()
                if wanted > len(frame):
                    raise TransportError(f"an answer of worker {self._worker} needs {wanted} bytes, got {len(frame)}")
        if received > wanted:
            raise TransportError(f"worker {self._worker} sent {received - wanted} bytes more than its answer")

    def close(self) -> None:
        self._broken = True
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # the worker hung up before
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a collect in another thread, which still holds the lock
        with self._lock:
            self._release()
            self._socket.close()
            del self._call, self._answer, self._unsent


class TcpServerChannel(SocketServerChannel):
    """A worker's end of one engine's channel.

    Takes and sends only what there is room for, so that a slow engine delays no other.
    """

    kind: TransportKind = "tcp"

    def _make_frames(self, ask: Ask) -> list[int]:
        self.bell = self.socket.fileno()
        self._call = _lazy_frame(ask.call_bytes)
        self._received = 0
        self._answer = _lazy_frame(ask.answer_bytes)
        self._unsent = memoryview(b"")
        _tune(self.socket)
        return []

    def _open(self, fds: list[int]) -> None:  # noqa: ARG002
        self.socket.setblocking(False)

    @property
    def has_unsent(self) -> bool:
        """Whether a part of an answer waits for room in the socket."""
        return bool(self._unsent)

    def receive(self) -> ReceivedCall | None:
        """The next call, or None until all of it has come.

        Raises: TransportError when the engine hung up, or for nonsense.
        """
        frame = self._call.buffer
        try:
            count = self.socket.recv_into(frame[self._received :])
        except BlockingIOError:
            return None
        except OSError as error:
            raise TransportError(f"engine {self.engine} hung up: {error}") from error
        if count == 0:
            raise TransportError(f"engine {self.engine} hung up")
        self._received += count
        if self._received < CALL_HEADER.size:
            return None
        wanted = self._wanted_bytes()
        if wanted > len(frame):
            raise TransportError(f"a call of engine {self.engine} may have {len(frame)} bytes, got {wanted}")
        if self._received > wanted:
            raise TransportError(f"engine {self.engine} sent {self._received - wanted} bytes more than its call")
        if self._received < wanted:
            return None
        self._received = 0
        return self._take()

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None:
        self._send(self._put(sequence, partial_RH))
        self._send_rows(partial_RH)

    def fail(self, sequence: int, status: int, message: str) -> None:
        self._send(write_error(self._answer, sequence, status, message))

    # Overridden by a transport whose rows travel apart from the frames.

    def _wanted_bytes(self) -> int:
        return read_call_head(self._call.buffer).num_bytes

    def _take(self) -> ReceivedCall:
        return read_call(self._call, max_rows=self._config.max_rows, num_experts=self._config.num_experts)

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> int:
        return write_answer(self._answer, sequence, partial_RH)

    def _send_rows(self, partial_RH: torch.Tensor) -> None:
        """Send what `_put` left out."""

    def _send(self, length: int) -> None:
        if self._unsent:
            raise TransportError(f"engine {self.engine} called again before it took its answer")
        self._unsent = self._answer.buffer[:length]
        self.flush()

    def flush(self) -> None:
        """Send as much as there is room for. Raises TransportError when the engine hung up."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError as error:
            raise TransportError(f"engine {self.engine} hung up: {error}") from error

    def close(self) -> None:
        self._release()
        self.socket.close()


def _tune(sock: socket.socket) -> None:
    """Send at once, and notice within half a minute that the other machine is no more."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


def _lazy_frame(num_bytes: int) -> Frame:
    """Memory that is taken only once it is written to: most calls are far smaller than the largest."""
    return Frame(memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
