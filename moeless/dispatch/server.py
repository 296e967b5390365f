"""A worker's data plane: one thread that takes calls from all engines over all transports and computes them.

Runs beside the Ray Serve replica's event loop in the worker's process. Handshakes run in short-lived threads, so
that a silent stranger delays nobody.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import torch

from moeless.core.errors import FunctionUnavailableError, HandshakeError, MoelessError, TransportError
from moeless.dispatch.channel import WorkerEndpoint, host_id
from moeless.dispatch.handshake import Accept, Ask, greet, send_message
from moeless.dispatch.shared_memory import SharedMemoryPeer
from moeless.dispatch.tcp import TcpPeer
from moeless.dispatch.wire import STATUS_FUNCTION_UNAVAILABLE, STATUS_INTERNAL_ERROR, ReceivedCall

logger = logging.getLogger(__name__)

Compute = Callable[[ReceivedCall], torch.Tensor]
"""Partial sums (R, H) of a call, on the CPU or wherever the peer's transport takes them from."""


class Peer(Protocol):
    """A worker's end of one line."""

    kind: str
    engine: str
    socket: socket.socket
    bell: int
    """Descriptor that becomes readable when there is something to receive."""

    def receive(self) -> ReceivedCall | None: ...

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None: ...

    def fail(self, sequence: int, status: int, message: str) -> None: ...

    def close(self) -> None: ...


class DataPlaneServer:
    """Listens on a Unix and a TCP socket and serves `compute`.

    Args:
        compute: called in the server's thread only.
        token: the run's token, which every peer must show.
        tcp_host: address to listen on; the port is free choice of the system.
        max_rows: most rows of one call.
        num_experts: experts of each layer, to check calls by.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        worker: str,
        token: str,
        max_rows: int,
        num_experts: list[int],
        tcp_host: str = "127.0.0.1",
        device: str = "cpu",
    ) -> None:
        self._compute = compute
        self._token = token
        self._max_rows = max_rows
        self._num_experts = num_experts
        self._selector = selectors.DefaultSelector()
        self._new_peers: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._peers: dict[int, Peer] = {}
        self._listeners = [_listen_unix(f"moeless-{worker}-{secrets.token_hex(8)}"), _listen_tcp(tcp_host)]
        host, port = self._listeners[1].getsockname()[:2]
        self.endpoint = WorkerEndpoint(
            worker=worker,
            host_id=host_id(),
            unix_address=self._listeners[0].getsockname()[1:].decode(),
            tcp_host=host,
            tcp_port=port,
            pid=os.getpid(),
            device=device,
        )
        self._thread = threading.Thread(target=self._run, name=f"data-plane-{worker}", daemon=True)

    def start(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, self._take_new_peers)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, lambda bound=listener: self._accept(bound))
        self._thread.start()

    def stop(self) -> None:
        """Hang up on every engine and end the thread."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for listener in self._listeners:
            listener.close()
        os.close(self._wake)
        self._selector.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while not self._stopping.is_set():
                    for key, _ in self._selector.select():
                        key.data()
        finally:
            for peer in list(self._peers.values()):
                self._drop(peer)

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        threading.Thread(target=self._shake_hands, args=(connection,), daemon=True).start()

    def _shake_hands(self, connection: socket.socket) -> None:
        try:
            ask = greet(connection, self._token)
            self._new_peers.put(self._make_peer(connection, ask))
            os.eventfd_write(self._wake, 1)
        except (HandshakeError, TransportError, OSError) as error:
            logger.warning("refused a connection reason=%s", error)
            connection.close()

    def _make_peer(self, connection: socket.socket, ask: Ask) -> Peer:
        over_unix = connection.family == socket.AF_UNIX
        if ask.kind == "shm" and over_unix:
            return SharedMemoryPeer(
                connection, ask, token=self._token, max_rows=self._max_rows, num_experts=self._num_experts
            )
        if ask.kind == "tcp" and not over_unix:
            return TcpPeer(connection, ask, token=self._token, max_rows=self._max_rows, num_experts=self._num_experts)
        send_message(connection, Accept(error=f"transport {ask.kind} is not served on this socket"))
        raise HandshakeError(f"engine {ask.engine!r} asked for transport {ask.kind} on the wrong socket")

    def _take_new_peers(self) -> None:
        os.eventfd_read(self._wake)
        while not self._new_peers.empty():
            peer = self._new_peers.get()
            self._peers[peer.bell] = peer
            self._selector.register(peer.bell, selectors.EVENT_READ, lambda bound=peer: self._serve(bound))
            if peer.socket.fileno() != peer.bell:
                self._selector.register(peer.socket, selectors.EVENT_READ, lambda bound=peer: self._drop(bound))
            logger.info("engine connected engine=%s transport=%s", peer.engine, peer.kind)

    def _serve(self, peer: Peer) -> None:
        if peer.bell not in self._peers:  # dropped by an earlier event of the same round
            return
        try:
            call = peer.receive()
            if call is None:
                return
            try:
                peer.answer(call.sequence, self._compute(call))
            except FunctionUnavailableError as error:
                peer.fail(call.sequence, STATUS_FUNCTION_UNAVAILABLE, str(error))
            except (MoelessError, RuntimeError, ValueError) as error:
                logger.exception("a call failed engine=%s layer=%d", peer.engine, call.layer)
                peer.fail(call.sequence, STATUS_INTERNAL_ERROR, f"{type(error).__name__}: {error}")
        except TransportError as error:
            logger.info("engine disconnected engine=%s reason=%s", peer.engine, error)
            self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        if self._peers.pop(peer.bell, None) is None:
            return
        self._selector.unregister(peer.bell)
        if peer.socket.fileno() != peer.bell:
            self._selector.unregister(peer.socket)
        peer.close()


def _listen_unix(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()
    return listener


def _listen_tcp(host: str) -> socket.socket:
    return socket.create_server((host, 0), backlog=64)
