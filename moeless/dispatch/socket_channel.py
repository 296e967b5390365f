"""Both ends of a channel over a socket, as far as all transports share them: handshake, state, hang-up.

shared_memory.py and tcp.py say how calls and answers travel; cuda_ipc.py and collective.py build on those and move the
rows apart from the frames.
"""
# Hooks that do nothing are what most transports need.
# ruff: noqa: B027

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import ChannelConfig, ServerConfig, WorkerEndpoint, has_hung_up
from moeless.dispatch.handshake import Accept, Ask, TransportKind, ask_for, check_sizes, close_all, prove, send_message
from moeless.dispatch.wire import call_bytes, max_answer_bytes, routing_bytes


class SocketChannel(ABC):
    """An engine's end: connects, proves the run secret, and notices when the worker hangs up."""

    kind: TransportKind
    _num_fds = 0
    """Descriptors that the worker passes over in the handshake."""

    def __init__(self, endpoint: WorkerEndpoint, config: ChannelConfig) -> None:
        """Connect. Raises HandshakeError or TransportError."""
        self._worker = endpoint.worker
        self._sequence = 0
        self._shape = (0, 0)
        self._broken = False
        self._closed = False
        self._lock = threading.Lock()
        """Held by a call under way, and by whoever looks at or closes the socket."""
        num_call_bytes, num_answer_bytes = self._frame_bytes(config)
        detail = self._offer(config)
        try:
            self._socket = self._connect(endpoint)
        except OSError as error:
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        try:
            accept, fds = ask_for(
                self._socket,
                config.run_secret,
                kind=self.kind,
                engine=config.engine,
                call_bytes=num_call_bytes,
                answer_bytes=num_answer_bytes,
                detail=detail,
                max_fds=self._num_fds,
            )
        except OSError as error:
            self._socket.close()
            raise TransportError(f"worker {endpoint.worker} cannot be reached: {error}") from error
        except HandshakeError:
            self._socket.close()
            raise
        self.max_rows = min(config.max_rows, accept.max_rows)
        self._open(fds, num_call_bytes, num_answer_bytes)
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

    @abstractmethod
    def close(self) -> None:
        """Hang up and release memory. May be called from any thread, and twice."""

    @abstractmethod
    def _connect(self, endpoint: WorkerEndpoint) -> socket.socket:
        """A connected socket. Raises OSError."""

    @abstractmethod
    def _open(self, fds: list[int], num_call_bytes: int, num_answer_bytes: int) -> None:
        """Make what carries calls and answers, once the worker has accepted."""

    def _check_usable(self) -> None:
        if self._broken:
            raise TransportError(f"the channel to worker {self._worker} is broken")

    # Overridden by transports whose rows travel apart from the frames.

    def _frame_bytes(self, config: ChannelConfig) -> tuple[int, int]:
        """Sizes of the largest call and answer."""
        calls = call_bytes(config.max_rows, config.max_pairs, config.hidden_size, config.dtype)
        return calls, max_answer_bytes(config.max_rows, config.hidden_size, config.dtype)

    def _offer(self, config: ChannelConfig) -> dict[str, str]:  # noqa: ARG002
        """Return the details that the worker needs beyond the sizes."""
        return {}

    def _take_offer(self, detail: dict[str, str]) -> None:
        """Use the worker's part of the handshake. Raises TransportError if that is impossible."""

    def _release(self) -> None:
        """Give back what `_offer` and `_take_offer` took."""


class SocketServerChannel(ABC):
    """A worker's end: accepts a client that has proved the run secret."""

    kind: TransportKind

    def __init__(self, sock: socket.socket, ask: Ask, config: ServerConfig) -> None:
        """Accept. Raises HandshakeError for a bad size, TransportError or OSError."""
        check_sizes(sock, ask)
        self.engine = ask.engine
        self.socket = sock
        self._config = config
        fds: list[int] = []
        try:
            fds += self._make_frames(ask)
            detail = self._offer(ask)
        except (OSError, TransportError) as error:
            close_all(fds)
            self._release()
            if isinstance(error, TransportError):
                send_message(sock, Accept(error=str(error)))
            raise
        accept = Accept(proof=prove(config.run_secret, "server", ask.nonce), max_rows=config.max_rows, detail=detail)
        try:
            send_message(sock, accept, fds)
            self._meet()
        except (OSError, TransportError):
            close_all(fds)
            self._release()
            raise
        self._open(fds)

    @abstractmethod
    def _make_frames(self, ask: Ask) -> list[int]:
        """Make what carries calls and answers. Returns the descriptors to pass over. Raises OSError."""

    def _open(self, fds: list[int]) -> None:
        """Take the descriptors into use, once the engine has them."""

    def _offer(self, ask: Ask) -> dict[str, str]:  # noqa: ARG002
        """Return the details that the engine needs. Raises TransportError if its request cannot be granted."""
        return {}

    def _meet(self) -> None:
        """Finish what takes both sides, once the engine has been accepted. Raises TransportError."""

    def _release(self) -> None:
        """Give back what `_offer` and `_meet` took."""


def frame_bytes_without_rows(config: ChannelConfig) -> tuple[int, int]:
    """Sizes of the largest call and answer of a transport whose rows travel apart."""
    return routing_bytes(config.max_pairs), max_answer_bytes(0, config.hidden_size, config.dtype)
