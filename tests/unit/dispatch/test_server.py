"""The worker's data plane: strangers, silence, its own errors, and its end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import Channel
from moeless.dispatch.handshake import ask_for
from moeless.dispatch.server import DataPlaneServer
from moeless.dispatch.shared_memory import SharedMemoryChannel
from moeless.dispatch.tcp import TcpChannel
from moeless.dispatch.wire import ReceivedCall
from tests.support.plain_workers import (
    MAX_ROWS,
    NUM_EXPERTS,
    RUN_SECRET,
    channel_config,
    compute,
    expected,
    random_call,
)
from tests.support.waiting import wait_until

LONG_S = 60.0


def make_server(function: Callable[[ReceivedCall], torch.Tensor] = compute) -> DataPlaneServer:
    return DataPlaneServer(
        function, worker="worker-0", run_secret=RUN_SECRET, max_rows=MAX_ROWS, num_experts=[NUM_EXPERTS] * 4
    )


@pytest.fixture
def server() -> Iterator[DataPlaneServer]:
    """One in this process; it shares nothing with the engine's side but the interpreter."""
    running = make_server()
    running.start()
    yield running
    running.stop()


def open_channel(server: DataPlaneServer, transport: type[SharedMemoryChannel] | type[TcpChannel]) -> Channel:
    return transport(server.endpoint, channel_config())


def assert_serves(server: DataPlaneServer) -> None:
    for transport in (SharedMemoryChannel, TcpChannel):
        with closing(open_channel(server, transport)) as channel:
            call = random_call(7)
            channel.submit(call)
            torch.testing.assert_close(channel.collect(LONG_S), expected(call))


def stranger(server: DataPlaneServer) -> socket.socket:
    return socket.create_connection((server.endpoint.tcp_host, server.endpoint.tcp_port))


def test_silent_strangers_delay_nobody(server: DataPlaneServer) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(stranger(server))
        assert_serves(server)


@pytest.mark.parametrize("data", [os.urandom(4000), b"GET / HTTP/1.1\r\n\r\n", b"\x05\x00\x00\x00hello", b""])
def test_strangers_that_speak_something_else_are_hung_up_on(server: DataPlaneServer, data: bytes) -> None:
    with stranger(server) as sock, suppress(OSError):  # it may reset the connection before all of it is sent
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    assert_serves(server)


def test_a_transport_is_refused_on_the_wrong_socket(server: DataPlaneServer) -> None:
    with stranger(server) as sock, pytest.raises(HandshakeError, match="transport shm is not served on this socket"):
        ask_for(sock, RUN_SECRET, kind="shm", engine="e", call_bytes=64, answer_bytes=64, max_fds=4)
    assert_serves(server)


def test_an_error_in_its_own_code_is_answered_and_not_its_end() -> None:
    def fail(call: ReceivedCall) -> torch.Tensor:
        raise KeyError("a bug")

    server = make_server(fail)
    server.start()
    for _ in range(2):
        with closing(open_channel(server, SharedMemoryChannel)) as channel:
            channel.submit(random_call(0))
            with pytest.raises(TransportError, match="KeyError: 'a bug'"):
                channel.collect(LONG_S)
    assert server.is_alive
    server.stop()


def test_an_answer_of_an_impossible_kind_is_an_error_answer() -> None:
    server = make_server(lambda call: call.x_RH.double())
    server.start()
    with closing(open_channel(server, SharedMemoryChannel)) as channel:
        channel.submit(random_call(0))
        with pytest.raises(TransportError, match="float64"):
            channel.collect(LONG_S)
        assert not channel.is_broken
    server.stop()


@pytest.mark.parametrize("transport", [SharedMemoryChannel, TcpChannel])
def test_stopping_hangs_up_on_every_engine(transport: type[SharedMemoryChannel] | type[TcpChannel]) -> None:
    server = make_server()
    server.start()
    with closing(open_channel(server, transport)) as channel:
        wait_until(lambda: bool(server._channels))
        server.stop()
        assert not server.is_alive
        wait_until(lambda: channel.is_broken)


def test_stopping_leaves_no_thread_and_no_descriptor() -> None:
    fds, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())
    server = make_server()
    server.start()
    assert_serves(server)
    server.stop()
    wait_until(lambda: set(threading.enumerate()) <= threads)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_handshake_under_way_while_it_stops_comes_to_nothing() -> None:
    server = make_server()
    server.start()
    with stranger(server) as sock:
        assert sock.recv(1)
        server.stop()
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
