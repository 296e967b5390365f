"""Transport between machines: length-known frames over TCP, received straight into the buffer they are read from."""

from __future__ import annotations

import contextlib
import mmap
import select
import socket
import threading
import time

import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import LineConfig, PeerConfig, WorkerEndpoint, has_hung_up
from moeless.dispatch.handshake import (
    HANDSHAKE_TIMEOUT_S,
    Accept,
    Ask,
    TransportKind,
    ask_for,
    check_sizes,
    prove,
    send_message,
)
from moeless.dispatch.wire import (
    ANSWER_HEADER,
    CALL_HEADER,
    FailedCallError,
    Frame,
    LayerCall,
    ReceivedCall,
    answer_length,
    call_bytes,
    max_answer_bytes,
    read_answer,
    read_call,
    read_call_head,
    write_answer,
    write_call,
    write_error,
)

_SUBMIT_PATIENCE_MS = 10
"""How long a submit waits for room in the line before it leaves the rest of a long call to collect."""


class TcpChannel:
    """An engine's line to a worker on another machine."""

    kind: TransportKind = "tcp"

    def __init__(self, endpoint: WorkerEndpoint, config: LineConfig) -> None:
        """Connect. Raises HandshakeError or TransportError."""
        self._worker = endpoint.worker
        self._sequence = 0
        self._shape = (0, 0)
        self._broken = False
        self._closed = False
        self._lock = threading.Lock()
        self._unsent = memoryview(b"")
        num_call_bytes, num_answer_bytes = self._frame_bytes(config)
        detail = self._offer(config)
        try:
            self._socket = socket.create_connection((endpoint.tcp_host, endpoint.tcp_port), timeout=HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        try:
            _tune(self._socket)
            accept, _ = ask_for(
                self._socket,
                config.run_secret,
                kind=self.kind,
                engine=config.engine,
                call_bytes=num_call_bytes,
                answer_bytes=num_answer_bytes,
                detail=detail,
            )
        except OSError as error:
            self._socket.close()
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        except HandshakeError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.max_rows = min(config.max_rows, accept.max_rows)
        self._call = _lazy_frame(num_call_bytes)
        self._answer = _lazy_frame(num_answer_bytes)
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(self._socket, select.POLLOUT)
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

    # What a transport overrides whose rows do not travel in the frames.

    def _frame_bytes(self, config: LineConfig) -> tuple[int, int]:
        """Sizes of the largest call and answer."""
        calls = call_bytes(config.max_rows, config.max_pairs, config.hidden_size, config.dtype)
        return calls, max_answer_bytes(config.max_rows, config.hidden_size, config.dtype)

    def _offer(self, config: LineConfig) -> dict[str, str]:  # noqa: ARG002
        """What the worker must know beyond the sizes."""
        return {}

    def _take_offer(self, detail: dict[str, str]) -> None:
        """Use what the worker told. Raises TransportError if that is impossible."""

    def _put(self, call: LayerCall) -> int:
        return write_call(self._call, call, self._sequence)

    def _wanted_bytes(self) -> int:
        return answer_length(self._answer.buffer)

    def _send_rows(self, call: LayerCall) -> None:
        """Send what `_put` left out."""

    def _take(self, deadline_s: float) -> torch.Tensor:  # noqa: ARG002
        return read_answer(self._answer, self._sequence, self._shape)

    def _release(self) -> None:
        """Give back what the transport holds beyond the socket and the frames."""

    def _push(self, patience_ms: int) -> None:
        """Send what is unsent, until the line takes nothing for `patience_ms`."""
        while self._unsent:
            try:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
            except BlockingIOError:
                if not self._writable.poll(patience_ms):
                    return

    def _receive(self, deadline_s: float, timeout_s: float) -> None:
        """One answer's frame. Nothing else can come: a line carries one call at a time."""
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

    def _check_usable(self) -> None:
        if self._broken:
            raise TransportError(f"the line to worker {self._worker} is broken")

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


class TcpPeer:
    """A worker's end of one engine's line. Takes and sends what the line has room for, so that a slow one delays
    nobody else.
    """

    kind: TransportKind = "tcp"

    def __init__(self, sock: socket.socket, ask: Ask, config: PeerConfig) -> None:
        """Accept. Raises HandshakeError for a bad size, or OSError."""
        check_sizes(sock, ask)
        self.engine = ask.engine
        self.socket = sock
        self.bell = sock.fileno()
        self._config = config
        self._call = _lazy_frame(ask.call_bytes)
        self._received = 0
        self._answer = _lazy_frame(ask.answer_bytes)
        self._unsent = memoryview(b"")
        _tune(sock)
        try:
            detail = self._offer(ask)
        except TransportError as error:
            send_message(sock, Accept(error=str(error)))
            raise
        try:
            send_message(
                sock,
                Accept(proof=prove(config.run_secret, "server", ask.nonce), max_rows=config.max_rows, detail=detail),
            )
            self._meet()
        except (OSError, TransportError):
            self._release()
            raise
        sock.setblocking(False)

    @property
    def has_unsent(self) -> bool:
        """Whether a part of an answer waits for room in the line."""
        return bool(self._unsent)

    def receive(self) -> ReceivedCall | None:
        """The next call, or None until all of it has come. Raises TransportError at the line's end or for nonsense."""
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

    # What a transport overrides whose rows do not travel in the frames.

    def _offer(self, ask: Ask) -> dict[str, str]:  # noqa: ARG002
        """What the engine must know. Raises TransportError if its wish cannot be granted."""
        return {}

    def _meet(self) -> None:
        """What is left to do once the engine knows. Raises TransportError."""

    def _wanted_bytes(self) -> int:
        return read_call_head(self._call.buffer).num_bytes

    def _take(self) -> ReceivedCall:
        return read_call(self._call, max_rows=self._config.max_rows, num_experts=self._config.num_experts)

    def _put(self, sequence: int, partial_RH: torch.Tensor) -> int:
        return write_answer(self._answer, sequence, partial_RH)

    def _send_rows(self, partial_RH: torch.Tensor) -> None:
        """Send what `_put` left out."""

    def _release(self) -> None:
        """Give back what the transport holds beyond the socket and the frames."""

    def _send(self, length: int) -> None:
        if self._unsent:
            raise TransportError(f"engine {self.engine} called again before it took its answer")
        self._unsent = self._answer.buffer[:length]
        self.flush()

    def flush(self) -> None:
        """Send what the line takes. Raises TransportError at its end."""
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
