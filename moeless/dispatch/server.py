"""A worker's data plane: one thread that takes calls from all engines over all transports and computes them.

Runs beside the Ray Serve replica's event loop in the worker's process. handshake_server.py takes new connections in a
thread of its own, so that clients that never authenticate block no one.
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

import torch

from moeless.core.errors import FunctionUnavailableError, HandshakeError, TransportError
from moeless.dispatch.channel import ServerChannel, ServerConfig, WorkerEndpoint, host_id
from moeless.dispatch.collective import CollectiveServerChannel
from moeless.dispatch.cuda_ipc import CudaIpcServerChannel, DeviceMemory
from moeless.dispatch.cuda_memory import CudaMemory
from moeless.dispatch.handshake import Accept, Ask, send_message
from moeless.dispatch.handshake_server import HandshakeServer
from moeless.dispatch.shared_memory import SharedMemoryServerChannel
from moeless.dispatch.tcp import TcpServerChannel
from moeless.dispatch.wire import STATUS_FUNCTION_UNAVAILABLE, STATUS_INTERNAL_ERROR, ReceivedCall

logger = logging.getLogger(__name__)
_LINGER_S = 0.0006
"""Time after a call for which a worker polls for the next one before it sleeps."""

Compute = Callable[[ReceivedCall], torch.Tensor]
"""Partial sums (R, H) of a call, on the device where its rows lie."""

_BACKLOG = 1024
"""Connections that the system keeps until they are accepted; where they are full, a client waits a second or more."""


class DataPlaneServer:
    """Listens on a Unix and a TCP socket and serves `compute`.

    Args:
        compute: called in the server's thread only.
        run_secret: the run's secret, which every client must prove.
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
        self._channels: set[ServerChannel] = set()
        self._stalled: set[ServerChannel] = set()
        self._new_channels: queue.SimpleQueue[ServerChannel] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = False
        self._lock = threading.Lock()
        """Held to add a channel and to stop, so that none is added after."""
        self._listeners = [_listen_unix(f"moeless-{worker}-{secrets.token_hex(8)}"), _listen_tcp(tcp_host)]
        host, port = self._listeners[1].getsockname()[:2]
        self.endpoint = WorkerEndpoint(
            worker=worker,
            host_id=host_id(),
            unix_address=self._listeners[0].getsockname()[1:].decode(),
            tcp_host=host,
            tcp_port=port,
            device=device,
        )
        self._handshakes = HandshakeServer(
            self._listeners, run_secret=run_secret, on_proven=self._take_in, name=f"data-plane-{worker}-accept"
        )
        self._thread = threading.Thread(target=self._run, name=f"data-plane-{worker}", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._handshakes.start()

    def stop(self) -> None:
        """Hang up on every engine and end the threads. To be called once, after start."""
        with self._lock:
            self._stopping = True
        self._handshakes.stop()
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for listener in self._listeners:
            listener.close()
        os.close(self._wake)
        self._epoll.close()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._handshakes.is_alive

    # ---- new connections, in threads of their own -------------------------------------------------------------

    def _take_in(self, connection: socket.socket, ask: Ask) -> None:
        channel = self._make_channel(connection, ask)
        with self._lock:
            if self._stopping:
                channel.close()
                return
            self._new_channels.put(channel)
            os.eventfd_write(self._wake, 1)

    def _make_channel(self, connection: socket.socket, ask: Ask) -> ServerChannel:
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
        raise HandshakeError(f"engine {ask.engine!r} requested transport {ask.kind}, not served on this socket")

    # ---- calls, in the data plane's thread --------------------------------------------------------------------

    def _run(self) -> None:
        self._watch(self._wake, self._take_new_channels)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    for fd, _ in self._linger() or self._epoll.poll():
                        handler = self._handlers.get(fd)
                        if handler is not None:  # not dropped by an earlier event of the same round
                            handler()
        finally:
            self._take_new_channels()
            for channel in list(self._channels):
                self._drop(channel)

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

    def _take_new_channels(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while not self._new_channels.empty():
            channel = self._new_channels.get()
            self._channels.add(channel)
            self._watch(channel.bell, partial(self._serve, channel))
            if channel.socket.fileno() != channel.bell:
                self._watch(channel.socket.fileno(), partial(self._drop_if_gone, channel))
            logger.info("engine connected engine=%s transport=%s", channel.engine, channel.kind)

    def _serve(self, channel: ServerChannel) -> None:
        try:
            if channel.has_unsent:
                channel.flush()
            else:
                call = channel.receive()
                if call is not None:
                    self._answer(channel, call)
            if channel.has_unsent != (channel in self._stalled):
                self._wait_for_room(channel)
        except TransportError as error:
            logger.info("engine disconnected engine=%s reason=%s", channel.engine, error)
            self._drop(channel)

    def _answer(self, channel: ServerChannel, call: ReceivedCall) -> None:
        try:
            channel.answer(call.sequence, self._compute(call))
            self._has_served = True
        except TransportError:
            raise
        except FunctionUnavailableError as error:
            channel.fail(call.sequence, STATUS_FUNCTION_UNAVAILABLE, str(error))
        except Exception as error:  # whatever it is, the engine must hear of it and other engines be served
            logger.exception("a call failed engine=%s layer=%d", channel.engine, call.layer)
            channel.fail(call.sequence, STATUS_INTERNAL_ERROR, f"{type(error).__name__}: {error}")

    def _wait_for_room(self, channel: ServerChannel) -> None:
        """Watch for room in the socket while an answer is unsent, and for calls else."""
        self._stalled ^= {channel}
        self._epoll.modify(channel.bell, select.EPOLLOUT if channel in self._stalled else select.EPOLLIN)

    def _drop_if_gone(self, channel: ServerChannel) -> None:
        try:
            channel.socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
        except BlockingIOError:  # an event of an earlier channel whose descriptor had the same number
            return
        except OSError as error:
            logger.info("engine disconnected engine=%s reason=%s", channel.engine, error)
        else:
            logger.info("engine disconnected engine=%s", channel.engine)
        self._drop(channel)

    def _drop(self, channel: ServerChannel) -> None:
        self._channels.discard(channel)
        self._stalled.discard(channel)
        for fd in {channel.bell, channel.socket.fileno()}:
            del self._handlers[fd]
            self._epoll.unregister(fd)
        channel.close()


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
    listener.listen(_BACKLOG)
    return listener


def _listen_tcp(host: str) -> socket.socket:
    return socket.create_server((host, 0), backlog=_BACKLOG)
