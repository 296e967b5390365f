"""A worker's data plane: one thread that takes calls from all engines over all transports and computes them.

Runs beside the Ray Serve replica's event loop in the worker's process. A second thread takes new connections, and
each handshake runs in a short-lived one of its own, so that a silent stranger delays nobody.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from moeless.core.errors import FunctionUnavailableError, HandshakeError, TransportError
from moeless.dispatch.channel import ServerConfig, WorkerEndpoint, host_id
from moeless.dispatch.collective import CollectiveServerChannel
from moeless.dispatch.cuda_ipc import CudaIpcServerChannel, DeviceMemory
from moeless.dispatch.cuda_memory import CudaMemory
from moeless.dispatch.handshake import Accept, Ask, TransportKind, greet, send_message
from moeless.dispatch.shared_memory import SharedMemoryServerChannel
from moeless.dispatch.tcp import TcpServerChannel
from moeless.dispatch.wire import STATUS_FUNCTION_UNAVAILABLE, STATUS_INTERNAL_ERROR, ReceivedCall

logger = logging.getLogger(__name__)
_LINGER_S = 0.0006
"""How long after a call a worker looks for the next one before it sleeps."""

Compute = Callable[[ReceivedCall], torch.Tensor]
"""Partial sums (R, H) of a call, on the device where its rows lie."""

_MAX_HANDSHAKES = 64
"""At a time; further connections are hung up on."""
_ACCEPT_AGAIN_S = 0.1
"""Pause after the system refused a connection for want of descriptors."""


class Peer(Protocol):
    """A worker's end of one line."""

    kind: TransportKind
    engine: str
    socket: socket.socket
    """Tells by its end that the engine is gone."""
    bell: int
    """Descriptor that becomes readable when there is something to receive."""

    @property
    def has_unsent(self) -> bool:
        """Whether a part of an answer waits for room in the line."""
        ...

    def receive(self) -> ReceivedCall | None:
        """The next call, or None while it is incomplete. Raises TransportError at the line's end or for nonsense."""
        ...

    def answer(self, sequence: int, partial_RH: torch.Tensor) -> None: ...

    def fail(self, sequence: int, status: int, message: str) -> None: ...

    def flush(self) -> None:
        """Send what is unsent as far as there is room. Raises TransportError at the line's end."""
        ...

    def close(self) -> None: ...


class DataPlaneServer:
    """Listens on a Unix and a TCP socket and serves `compute`.

    Args:
        compute: called in the server's thread only.
        run_secret: the run's secret, which every peer must prove.
        tcp_host: address to listen on; the port is free choice of the system.
        max_rows: most rows of one call.
        num_experts: experts of each layer, to check calls by.
        device: where `compute` wants its rows, if the transport has the choice.
        memory: to share with engines that have their rows on a GPU of this machine; None: that of a CUDA `device`.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        worker: str,
        run_secret: str,
        max_rows: int,
        num_experts: list[int],
        tcp_host: str = "127.0.0.1",
        device: str = "cpu",
        memory: DeviceMemory | None = None,
    ) -> None:
        self._compute = compute
        self._config = ServerConfig(run_secret=run_secret, max_rows=max_rows, num_experts=tuple(num_experts))
        self._device = torch.device(device)
        self._memory = memory or _memory_of(self._device)
        self._epoll = select.epoll()
        self._has_served = False
        self._handlers: dict[int, Callable[[], None]] = {}
        self._peers: set[Peer] = set()
        self._stalled: set[Peer] = set()
        self._new_peers: queue.SimpleQueue[Peer] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop_accepting = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._lock = threading.Lock()
        """Held to add a peer and to stop, so that no peer is added after."""
        self._handshakes = threading.BoundedSemaphore(_MAX_HANDSHAKES)
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
        self._threads = [
            threading.Thread(target=self._run, name=f"data-plane-{worker}", daemon=True),
            threading.Thread(target=self._accept, name=f"data-plane-{worker}-accept", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Hang up on every engine and end the threads. To be called once, after start."""
        with self._lock:
            self._stopping = True
        os.eventfd_write(self._wake, 1)
        os.eventfd_write(self._stop_accepting, 1)
        for thread in self._threads:
            thread.join()
        for listener in self._listeners:
            listener.close()
        os.close(self._wake)
        os.close(self._stop_accepting)
        self._epoll.close()

    @property
    def is_alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    # ---- new connections, in threads of their own -------------------------------------------------------------

    def _accept(self) -> None:
        poll = select.poll()
        by_fd = {listener.fileno(): listener for listener in self._listeners}
        for fd in (self._stop_accepting, *by_fd):
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            for fd, _ in poll.poll():
                if fd not in by_fd:
                    break
                try:
                    connection, _ = by_fd[fd].accept()
                except OSError as error:
                    logger.warning("cannot accept a connection reason=%s", error)
                    threading.Event().wait(_ACCEPT_AGAIN_S)
                    continue
                if not self._handshakes.acquire(blocking=False):
                    logger.warning("refused a connection reason=%d handshakes are under way", _MAX_HANDSHAKES)
                    connection.close()
                    continue
                threading.Thread(target=self._shake_hands, args=(connection,), daemon=True).start()

    def _shake_hands(self, connection: socket.socket) -> None:
        try:
            peer = self._make_peer(connection, greet(connection, self._config.run_secret))
        except (TransportError, OSError) as error:
            logger.warning("refused a connection reason=%s", error)
            connection.close()
            return
        finally:
            self._handshakes.release()
        with self._lock:
            if self._stopping:
                peer.close()
                return
            self._new_peers.put(peer)
            os.eventfd_write(self._wake, 1)

    def _make_peer(self, connection: socket.socket, ask: Ask) -> Peer:
        if connection.family == socket.AF_UNIX:
            if ask.kind == "shm":
                return SharedMemoryServerChannel(connection, ask, self._config)
            if ask.kind == "cuda-ipc" and self._memory is not None:
                return CudaIpcServerChannel(connection, ask, self._config, self._memory)
        else:
            if ask.kind == "tcp":
                return TcpServerChannel(connection, ask, self._config)
            if ask.kind == "nccl":
                return CollectiveServerChannel(connection, ask, self._config, self._device)
        send_message(connection, Accept(error=f"transport {ask.kind} is not served on this socket"))
        raise HandshakeError(f"engine {ask.engine!r} asked for transport {ask.kind}, not served on this socket")

    # ---- calls, in the data plane's thread --------------------------------------------------------------------

    def _run(self) -> None:
        self._watch(self._wake, self._take_new_peers)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    for fd, _ in self._linger() or self._epoll.poll():
                        handler = self._handlers.get(fd)
                        if handler is not None:  # not dropped by an earlier event of the same round
                            handler()
        finally:
            self._take_new_peers()
            for peer in list(self._peers):
                self._drop(peer)

    def _linger(self) -> list[tuple[int, int]]:
        """Look for the next call for as long as a decoding step's layers are apart, before going to sleep.

        A sleeping core takes tens of microseconds to wake. Every look yields, so that whoever else wants this core
        has it at once.
        """
        until_s = time.perf_counter() + (_LINGER_S if self._has_served else 0.0)
        while time.perf_counter() < until_s:
            if ready := self._epoll.poll(0):
                return ready
            os.sched_yield()
        self._has_served = False
        return []

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def _take_new_peers(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._new_peers.empty():
            peer = self._new_peers.get()
            self._peers.add(peer)
            self._watch(peer.bell, partial(self._serve, peer))
            if peer.socket.fileno() != peer.bell:
                self._watch(peer.socket.fileno(), partial(self._drop_if_gone, peer))
            logger.info("engine connected engine=%s transport=%s", peer.engine, peer.kind)

    def _serve(self, peer: Peer) -> None:
        try:
            if peer.has_unsent:
                peer.flush()
            else:
                call = peer.receive()
                if call is not None:
                    self._answer(peer, call)
            if peer.has_unsent != (peer in self._stalled):
                self._wait_for_room(peer)
        except TransportError as error:
            logger.info("engine disconnected engine=%s reason=%s", peer.engine, error)
            self._drop(peer)

    def _answer(self, peer: Peer, call: ReceivedCall) -> None:
        try:
            peer.answer(call.sequence, self._compute(call))
            self._has_served = True
        except TransportError:
            raise
        except FunctionUnavailableError as error:
            peer.fail(call.sequence, STATUS_FUNCTION_UNAVAILABLE, str(error))
        except Exception as error:  # whatever it is, the engine must hear of it and other engines be served
            logger.exception("a call failed engine=%s layer=%d", peer.engine, call.layer)
            peer.fail(call.sequence, STATUS_INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    def _wait_for_room(self, peer: Peer) -> None:
        """Watch for room in the line while an answer is unsent, and for calls else."""
        self._stalled ^= {peer}
        self._epoll.modify(peer.bell, select.EPOLLOUT if peer in self._stalled else select.EPOLLIN)

    def _drop_if_gone(self, peer: Peer) -> None:
        try:
            peer.socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:  # an event of an earlier peer whose descriptor had the same number
            return
        except OSError as error:
            logger.info("engine disconnected engine=%s reason=%s", peer.engine, error)
        else:
            logger.info("engine disconnected engine=%s", peer.engine)
        self._drop(peer)

    def _drop(self, peer: Peer) -> None:
        self._peers.discard(peer)
        self._stalled.discard(peer)
        for fd in {peer.bell, peer.socket.fileno()}:
            del self._handlers[fd]
            self._epoll.unregister(fd)
        peer.close()


def _memory_of(device: torch.device) -> DeviceMemory | None:
    if device.type != "cuda":
        return None
    try:
        return CudaMemory(device)
    except TransportError as error:
        logger.warning("cuda-ipc is not served reason=%s", error)
        return None


def _listen_unix(name: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()
    return listener


def _listen_tcp(host: str) -> socket.socket:
    return socket.create_server((host, 0), backlog=64)
