"""Strangers on a worker's ports: they hold up nobody, take bounded room, and write few lines."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.deployments.worker_connections import WorkerConnections
from moeless.dispatch import handshake_server
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.handshake import Ask, ProofCheck, ask_for
from moeless.dispatch.handshake_server import HandshakeServer
from moeless.dispatch.server import DataPlaneServer
from moeless.dispatch.shared_memory import SharedMemoryChannel
from moeless.dispatch.tcp import TcpChannel
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

NUM_STRANGERS = 100


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    local.bind("")  # a free abstract name
    local.listen(1024)
    with local, socket.create_server(("127.0.0.1", 0), backlog=1024) as remote:
        yield [local, remote]


class Proven:
    """Collects the connections that were let through."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []

    def __call__(self, connection: socket.socket, ask: Ask) -> None:
        self.asks.append(ask)
        connection.close()


@contextmanager
def serving(listeners: list[socket.socket], proven: Proven) -> Iterator[HandshakeServer]:
    server = HandshakeServer(listeners, run_secret=RUN_SECRET, on_proven=proven, name="handshakes")
    server.start()
    yield server
    server.stop()


def stranger(listener: socket.socket, source: str = "") -> socket.socket:
    sock = socket.socket(listener.family, socket.SOCK_STREAM)
    if source:
        sock.bind((source, 0))
    sock.connect(listener.getsockname())
    return sock


def prove_to(listener: socket.socket) -> None:
    """Do as an honest engine up to its proof; the server here hangs up instead of accepting."""
    with stranger(listener) as sock, pytest.raises(HandshakeError, match="hung up"):
        ask_for(sock, RUN_SECRET, kind="tcp", engine="honest", call_bytes=64, answer_bytes=64)


def test_silent_strangers_of_one_address_leave_room_for_local_and_other_addresses(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_server, "MAX_HANDSHAKES_OF_ADDRESS", 8)
    proven = Proven()
    with serving(listeners, proven) as server, ExitStack() as stack:
        strangers = [stack.enter_context(stranger(listeners[1])) for _ in range(20)]
        others = [stack.enter_context(stranger(listeners[1], "127.0.0.2")) for _ in range(3)]
        for sock in others:
            assert sock.recv(1)  # greeted
        wait_until(lambda: server.num_under_way == 8 + 3)
        gone = [sock for sock in strangers[:12] if drained(sock) == b""]
        assert len(gone) == 12  # the oldest of the crowded address
        for listener in listeners:
            prove_to(listener)
        wait_until(lambda: len(proven.asks) == 2)


def drained(sock: socket.socket) -> bytes:
    """The byte at which the server's greeting ends; empty once it hung up."""
    sock.settimeout(20)
    data = b"."
    while data:
        try:
            data = sock.recv(4096)
        except ConnectionResetError:
            return b""
    return data


def test_strangers_of_many_addresses_are_bounded_together(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_server, "MAX_REMOTE_HANDSHAKES", 10)
    proven = Proven()
    with serving(listeners, proven) as server, ExitStack() as stack:
        for number in range(6):
            for _ in range(3):
                assert stack.enter_context(stranger(listeners[1], f"127.0.1.{number + 1}")).recv(1)
        assert server.num_under_way == 10
        prove_to(listeners[0])
        wait_until(lambda: len(proven.asks) == 1)


def test_a_stranger_that_says_nothing_is_given_up(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_server, "HANDSHAKE_TIMEOUT_S", 0.05)
    with serving(listeners, Proven()) as server, stranger(listeners[1]) as sock:
        assert drained(sock) == b""
        wait_until(lambda: server.num_under_way == 0)


@pytest.mark.parametrize("data", [b"\x04\x00\x00\x00\xff\xfe\xff\xfe", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x00"])
def test_nonsense_ends_that_connection_only(
    listeners: list[socket.socket], data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    proven = Proven()
    with serving(listeners, proven) as server:
        for _ in range(50):
            with stranger(listeners[1]) as sock:
                sock.sendall(data)
                assert drained(sock) == b""
        prove_to(listeners[1])
        wait_until(lambda: len(proven.asks) == 1)
        assert server.is_alive
    assert len([record for record in caplog.records if "refused a connection" in record.message]) == 1


def test_without_descriptors_it_waits_instead_of_spinning_and_accepts_once_there_are_some(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake_server, "HANDSHAKE_TIMEOUT_S", 60.0)
    exhausted = Exhausted(listeners[1])
    proven = Proven()
    with serving([listeners[0], exhausted], proven), stranger(listeners[0]) as sock:  # type: ignore[list-item]
        assert sock.recv(1)  # a handshake is under way all the time
        with stranger(listeners[1]):
            started_s = time.monotonic()
            wait_until(lambda: exhausted.num_refused >= 5)
            elapsed_s = time.monotonic() - started_s
            assert exhausted.num_refused <= 2 + elapsed_s / handshake_server._ACCEPT_AGAIN_S
            exhausted.is_over = True
            prove_to(listeners[0])
            prove_to(listeners[1])
        wait_until(lambda: len(proven.asks) == 2)


class Exhausted:
    """A listener that finds no free descriptor for what waits in its backlog, until that is over."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.num_refused = 0
        self.is_over = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._listener, name)

    def accept(self) -> tuple[socket.socket, object]:
        if self.is_over:
            return self._listener.accept()
        self.num_refused += 1
        raise OSError(errno.EMFILE, "Too many open files")


def test_where_no_thread_can_be_started_later_ones_still_connect(
    listeners: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    proven = Proven()
    with serving(listeners, proven) as server:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread_left)
            prove_to(listeners[1])
        assert server.is_alive
        assert not proven.asks
        prove_to(listeners[1])
        wait_until(lambda: len(proven.asks) == 1)


def no_thread_left(thread: threading.Thread) -> None:
    """Raise as Python does where the system refuses a thread."""
    raise RuntimeError(f"can't start new thread {thread.name}")


def test_a_wrong_proof_is_answered_in_words(listeners: list[socket.socket]) -> None:
    refused = pytest.raises(HandshakeError, match="the run secret is not this run's")
    with serving(listeners, Proven()), stranger(listeners[1]) as sock, refused:
        ask_for(sock, "a guess", kind="tcp", engine="e", call_bytes=64, answer_bytes=64)


def test_stopping_hangs_up_on_handshakes_under_way(listeners: list[socket.socket]) -> None:
    server = HandshakeServer(listeners, run_secret=RUN_SECRET, on_proven=Proven(), name="handshakes")
    server.start()
    with stranger(listeners[1]) as sock:
        assert sock.recv(1)
        server.stop()
        assert drained(sock) == b""
    assert not server.is_alive


def make_worker(name: str = "worker-0") -> DataPlaneServer:
    worker = DataPlaneServer(
        compute, worker=name, run_secret=RUN_SECRET, max_rows=MAX_ROWS, num_experts=[NUM_EXPERTS] * 4
    )
    worker.start()
    return worker


class Noise:
    """Strangers that connect to a TCP port again as soon as they are hung up on, until the end."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self.num_connections = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Noise:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        strangers: list[socket.socket] = []
        while not self._over.is_set():
            while len(strangers) < NUM_STRANGERS:
                sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.connect_ex(self.address)
                self.num_connections += 1
                strangers.append(sock)
            for sock in strangers[: NUM_STRANGERS // 2]:  # half of them say something wrong, and all come again
                with suppress(OSError):
                    sock.send(b"\x10\x00\x00\x00nonsense nonsense")
                sock.close()
            del strangers[: NUM_STRANGERS // 2]
        for sock in strangers:
            sock.close()


def test_engines_connect_by_both_transports_while_strangers_reconnect(caplog: pytest.LogCaptureFixture) -> None:
    worker = make_worker()
    try:
        with Noise((worker.endpoint.tcp_host, worker.endpoint.tcp_port)) as noise:
            wait_until(lambda: noise.num_connections > 5 * NUM_STRANGERS)
            for transport in (SharedMemoryChannel, TcpChannel):
                with closing(connected(transport, worker.endpoint)) as channel:
                    call = random_call(7)
                    channel.submit(call)
                    torch.testing.assert_close(channel.collect(60.0), expected(call))
    finally:
        worker.stop()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) < 20


def connected(transport: type[SharedMemoryChannel] | type[TcpChannel], endpoint: WorkerEndpoint) -> Channel:
    """Try again as WorkerConnections does; the promise is five seconds, and machines that run tests are slow."""
    deadline_s = time.monotonic() + 30.0
    while True:
        try:
            return transport(endpoint, channel_config())
        except TransportError:
            if time.monotonic() > deadline_s:
                raise


def test_a_proof_check_wants_no_byte_beyond_its_message() -> None:
    check = ProofCheck(RUN_SECRET, nonce="n")
    assert check.num_wanted_bytes == 4
    assert check.feed(b"\x08\x00") is None
    assert check.num_wanted_bytes == 2
    assert check.feed(b"\x00\x00") is None
    assert check.num_wanted_bytes == 8


def test_a_worker_that_restarts_under_noise_is_reconnected() -> None:
    """The engine's WorkerConnections finds the new worker behind the same name while strangers reconnect."""
    workers = [make_worker()]
    channels: dict[str, Channel] = {}

    class Channels:
        """As much of a dispatcher as WorkerConnections uses."""

        def __init__(self) -> None:
            self.channels = channels

        def set_channels(self, new: dict[str, Channel]) -> None:
            for name in channels.keys() - new.keys():
                channels[name].close()
            self.channels = new
            channels.clear()
            channels.update(new)

    connections = WorkerConnections(
        Channels(),  # type: ignore[arg-type]
        {"worker-0": lambda: TcpChannel(workers[-1].endpoint, channel_config())},
        keep_alive_s=None,
    )
    connections.start()
    try:
        wait_until(lambda: connections.is_connected("worker-0"))
        workers.append(make_worker())
        address = (workers[-1].endpoint.tcp_host, workers[-1].endpoint.tcp_port)
        with Noise(address) as noise:
            wait_until(lambda: noise.num_connections > 2 * NUM_STRANGERS)
            first = channels["worker-0"]
            workers[0].stop()
            wait_until(lambda: connections.is_connected("worker-0") and channels["worker-0"] is not first)
    finally:
        connections.stop()
        for channel in channels.values():
            channel.close()
        workers[-1].stop()
