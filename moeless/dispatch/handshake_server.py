"""Accept connections and let through those that prove the run secret. Used by the worker's data plane.

One thread serves every handshake up to the proof without ever blocking on a client, so strangers cost a descriptor and
four kilobytes each, not a thread. Local and remote connections have places of their own, and remote ones are counted by
address: where places run out, the oldest handshake of the address with most of them is hung up on. An honest handshake
takes a round trip and is through before that, however many strangers reconnect.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.handshake import HANDSHAKE_TIMEOUT_S, Ask, ProofCheck
from moeless.dispatch.rate_limited_log import RateLimitedLog

logger = logging.getLogger(__name__)

MAX_LOCAL_HANDSHAKES = 64
"""Under way at a time on Unix sockets."""
MAX_REMOTE_HANDSHAKES = 256
"""Under way at a time on TCP sockets, from all addresses together."""
MAX_HANDSHAKES_OF_ADDRESS = 128
_MAX_ACCEPTS = 16
"""Connections accepted before those that already talk are looked at again."""
_ACCEPT_AGAIN_S = 0.1
"""Pause of accepting after the system refused a connection for want of descriptors or memory."""
_WANTS_RESOURCES = frozenset([errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
_LOCAL = "local"

OnProven = Callable[[socket.socket, Ask], None]
"""Receives a blocking socket whose client knows the run secret, in a thread of its own.

Raises: TransportError or OSError; then the connection is closed.
"""


@dataclass(eq=False)
class _Handshake:
    connection: socket.socket
    address: str
    check: ProofCheck
    deadline_s: float


class HandshakeServer:
    """Args:
    listeners: bound and listening sockets.
    on_proven: what happens to a connection once its client has proved the run secret.
    name: of the thread.
    """

    def __init__(self, listeners: Sequence[socket.socket], *, run_secret: str, on_proven: OnProven, name: str) -> None:
        self._listeners = {listener.fileno(): listener for listener in listeners}
        self._run_secret = run_secret
        self._on_proven = on_proven
        self._under_way: dict[int, _Handshake] = {}
        """By descriptor, the oldest first."""
        self._num_of_address: Counter[str] = Counter()
        self._accept_again_s: float | None = None
        """When to accept again after a pause; None while accepting."""
        self._poll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._refused = RateLimitedLog(logger, logging.WARNING)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        for listener in self._listeners.values():
            listener.setblocking(False)
            self._poll.register(listener, select.EPOLLIN)
        self._poll.register(self._stop, select.EPOLLIN)
        self._thread.start()

    def stop(self) -> None:
        """Hang up on every handshake under way and end the thread. To be called once, after start."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)
        self._poll.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def _run(self) -> None:
        try:
            while True:
                ready = [fd for fd, _ in self._poll.poll(self._next_look_s())]
                if self._stop in ready:
                    return
                for fd in ready:  # those that talk come before newcomers
                    if fd in self._under_way:
                        self._advance(self._under_way[fd])
                self._give_up_late_ones()
                self._end_pause()
                for fd in ready:
                    if fd in self._listeners and self._accept_again_s is None:
                        self._accept(self._listeners[fd])
        finally:
            for handshake in list(self._under_way.values()):
                self._hang_up(handshake)

    def _next_look_s(self) -> float | None:
        oldest = next(iter(self._under_way.values()), None)
        due_s = [] if oldest is None else [oldest.deadline_s]
        if self._accept_again_s is not None:
            due_s.append(self._accept_again_s)
        return max(0.0, min(due_s) - time.monotonic()) if due_s else None

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_MAX_ACCEPTS):
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._refused.log("cannot accept a connection reason=%s", error)
                if error.errno in _WANTS_RESOURCES:
                    self._pause()
                return
            is_local = listener.family == socket.AF_UNIX
            self._begin(connection, _LOCAL if is_local else address[0])

    def _pause(self) -> None:
        """Leave newcomers to the listeners' backlogs for a while; else every look would find them waiting, and spin."""
        self._accept_again_s = time.monotonic() + _ACCEPT_AGAIN_S
        for listener in self._listeners.values():
            self._poll.modify(listener, 0)

    def _end_pause(self) -> None:
        if self._accept_again_s is None or time.monotonic() < self._accept_again_s:
            return
        self._accept_again_s = None
        for listener in self._listeners.values():
            self._poll.modify(listener, select.EPOLLIN)

    def _begin(self, connection: socket.socket, address: str) -> None:
        self._make_room(address)
        connection.setblocking(False)
        check = ProofCheck(self._run_secret, nonce=secrets.token_hex(16))
        handshake = _Handshake(connection, address, check, time.monotonic() + HANDSHAKE_TIMEOUT_S)
        self._under_way[connection.fileno()] = handshake
        self._num_of_address[address] += 1
        self._poll.register(connection, select.EPOLLIN)
        try:
            connection.send(check.hello)  # a new socket has room for a hundred bytes
        except OSError:
            self._hang_up(handshake)

    def _make_room(self, address: str) -> None:
        """Hang up on the oldest handshake that stands in the way of one more from `address`."""
        limit = MAX_LOCAL_HANDSHAKES if address == _LOCAL else MAX_HANDSHAKES_OF_ADDRESS
        crowded: str | None = address if self._num_of_address[address] >= limit else None
        if crowded is None and address != _LOCAL:
            remote = Counter({other: count for other, count in self._num_of_address.items() if other != _LOCAL})
            if remote.total() >= MAX_REMOTE_HANDSHAKES:
                crowded = remote.most_common(1)[0][0]
        if crowded is not None:
            oldest = next(handshake for handshake in self._under_way.values() if handshake.address == crowded)
            self._refused.log("hung up on a connection address=%s reason=too many handshakes under way", crowded)
            self._hang_up(oldest)

    def _advance(self, handshake: _Handshake) -> None:
        try:
            data = handshake.connection.recv(handshake.check.num_wanted_bytes)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        try:
            if not data:
                raise HandshakeError("the client hung up during the handshake")
            ask = handshake.check.feed(data)
        except HandshakeError as error:
            self._refused.log("refused a connection address=%s reason=%s", handshake.address, error)
            with contextlib.suppress(OSError):
                handshake.connection.send(handshake.check.refusal)
            self._hang_up(handshake)
            return
        if ask is not None:
            self._forget(handshake)
            thread = threading.Thread(target=self._pass_on, args=(handshake.connection, ask), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left; this one must go on
                self._refused.log("refused an engine engine=%s reason=%s", ask.engine, error)
                handshake.connection.close()

    def _pass_on(self, connection: socket.socket, ask: Ask) -> None:
        connection.settimeout(HANDSHAKE_TIMEOUT_S)
        try:
            self._on_proven(connection, ask)
        except (TransportError, OSError) as error:
            self._refused.log("refused an engine engine=%s reason=%s", ask.engine, error)
            connection.close()

    def _give_up_late_ones(self) -> None:
        now_s = time.monotonic()
        while self._under_way:
            oldest = next(iter(self._under_way.values()))
            if oldest.deadline_s > now_s:
                return
            self._refused.log("refused a connection address=%s reason=timed out", oldest.address)
            self._hang_up(oldest)

    def _hang_up(self, handshake: _Handshake) -> None:
        self._forget(handshake)
        handshake.connection.close()

    def _forget(self, handshake: _Handshake) -> None:
        self._poll.unregister(handshake.connection)
        del self._under_way[handshake.connection.fileno()]
        self._num_of_address[handshake.address] -= 1
        if not self._num_of_address[handshake.address]:
            del self._num_of_address[handshake.address]
