"""Transport between machines: length-known frames over TCP, received straight into the buffer they are read from."""

from __future__ import annotations

import select
import socket
import time

import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.handshake import HANDSHAKE_TIMEOUT_S, Accept, Ask, ask_for, prove, send_message
from moeless.dispatch.wire import (
    ANSWER_HEADER,
    CALL_HEADER,
    LayerCall,
    ReceivedCall,
    answer_bytes,
    answer_length,
    call_bytes,
    call_length,
    read_answer,
    read_call,
    write_answer,
    write_call,
    write_error,
)

_SEND_TIMEOUT_S = 30.0
_ERROR_FRAME_BYTES = ANSWER_HEADER.size + 2048


class TcpChannel:
    """An engine's line to a worker on another machine."""

    kind = "tcp"

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
        """Connect. Raises HandshakeError or TransportError."""
        self._worker = endpoint.worker
        self._sequence = 0
        self._broken = False
        try:
            self._socket = socket.create_connection((endpoint.tcp_host, endpoint.tcp_port), timeout=HANDSHAKE_TIMEOUT_S)
        except OSError as error:
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            accept, _ = ask_for(self._socket, token, kind="tcp", engine=engine)
        except (OSError, HandshakeError):
            self._socket.close()
            raise
        self.max_rows = min(max_rows, accept.max_rows)
        self._call = bytearray(call_bytes(self.max_rows, self.max_rows * top_k, hidden_size, dtype))
        self._answer = bytearray(max(answer_bytes(self.max_rows, hidden_size, dtype), _ERROR_FRAME_BYTES))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    @property
    def is_broken(self) -> bool:
        if not self._broken and self._socket.fileno() >= 0:
            hung_up = select.poll()  # its own: the compute thread may be polling for an answer
            hung_up.register(self._socket, select.POLLRDHUP | select.POLLHUP)
            self._broken = bool(hung_up.poll(0))
        return self._broken

    def submit(self, call: LayerCall) -> None:
        if self._broken:
            raise TransportError(f"the line to worker {self._worker} is broken")
        self._sequence += 1
        frame = memoryview(self._call)
        length = write_call(frame, call, self._sequence)
        try:
            self._socket.settimeout(_SEND_TIMEOUT_S)
            self._socket.sendall(frame[:length])
        except OSError as error:
            self._broken = True
            raise TransportError(f"worker {self._worker} hung up: {error}") from error

    def collect(self, timeout_s: float) -> torch.Tensor:
        deadline_s = time.monotonic() + timeout_s
        frame = memoryview(self._answer)
        try:
            self._fill(frame[: ANSWER_HEADER.size], deadline_s, timeout_s)
            length = answer_length(frame)
            if length > len(frame):
                raise TransportError(f"worker {self._worker}: an answer may have {len(frame)} bytes, got {length}")
            self._fill(frame[ANSWER_HEADER.size : length], deadline_s, timeout_s)
        except TransportError:
            self._broken = True
            raise
        return read_answer(frame, self._sequence)

    def _fill(self, view: memoryview, deadline_s: float, timeout_s: float) -> None:
        received = 0
        self._socket.setblocking(False)
        while received < len(view):
            if not self._poll.poll(max(0.0, deadline_s - time.monotonic()) * 1e3):
                raise WorkerTimeoutError(f"worker {self._worker} did not answer within {timeout_s:g} s")
            try:
                count = self._socket.recv_into(view[received:])
            except BlockingIOError:
                continue
            except OSError as error:
                raise TransportError(f"worker {self._worker} hung up: {error}") from error
            if count == 0:
                raise TransportError(f"worker {self._worker} hung up")
            received += count

    def close(self) -> None:
        self._broken = True
        self._socket.close()


class TcpPeer:
    """A worker's end of one engine's line. Reads as much as has come, so that a slow line delays nobody else."""

    kind = "tcp"

    def __init__(self, sock: socket.socket, ask: Ask, *, token: str, max_rows: int, num_experts: list[int]) -> None:
        self.engine = ask.engine
        self.socket = sock
        self.bell = sock.fileno()
        self._max_rows = max_rows
        self._num_experts = num_experts
        self._buffer = bytearray(CALL_HEADER.size)
        self._received = 0
        self._answer = bytearray(_ERROR_FRAME_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        send_message(sock, Accept(proof=prove(token, "server", ask.nonce), max_rows=max_rows))
        sock.setblocking(False)

    def receive(self) -> ReceivedCall | None:
        """The next call, or None until all of it has come. Raises TransportError at the line's end or for nonsense."""
        wanted = CALL_HEADER.size
        while True:
            if self._received >= CALL_HEADER.size:
                wanted = call_length(memoryview(self._buffer))
                self._check_size(wanted)
                if len(self._buffer) < wanted:
                    self._buffer = self._buffer + bytearray(wanted - len(self._buffer))
            if self._received == wanted:
                self._received = 0
                return read_call(memoryview(self._buffer), max_rows=self._max_rows, num_experts=self._num_experts)
            try:
                count = self.socket.recv_into(memoryview(self._buffer)[self._received : wanted])
            except BlockingIOError:
                return None
            except OSError as error:
                raise TransportError(f"engine {self.engine} hung up: {error}") from error
            if count == 0:
                raise TransportError(f"engine {self.engine} hung up")
            self._received += count

    def _check_size(self, num_bytes: int) -> None:
        _, _, _, _, _, rows, pairs, _ = CALL_HEADER.unpack_from(self._buffer)
        if rows > self._max_rows or pairs > rows * max(self._num_experts):
            raise TransportError(
                f"a call may have {self._max_rows} rows, got {rows} with {pairs} pairs ({num_bytes} bytes)"
            )

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None:
        needed = answer_bytes(len(partial_RH), partial_RH.shape[1], partial_RH.dtype)
        if len(self._answer) < needed:
            self._answer = bytearray(needed)
        self._send(write_answer(memoryview(self._answer), sequence, partial_RH))

    def fail(self, sequence: int, status: int, message: str) -> None:
        self._send(write_error(memoryview(self._answer), sequence, status, message))

    def _send(self, length: int) -> None:
        try:
            self.socket.settimeout(_SEND_TIMEOUT_S)
            self.socket.sendall(memoryview(self._answer)[:length])
            self.socket.setblocking(False)
        except OSError as error:
            raise TransportError(f"engine {self.engine} hung up: {error}") from error

    def close(self) -> None:
        self.socket.close()
