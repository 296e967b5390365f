"""Authentication of both sides by the run secret; neither side can hold up the other."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeless.core.errors import HandshakeError
from moeless.dispatch import handshake
from moeless.dispatch.handshake import (
    Accept,
    Ask,
    Hello,
    ProofCheck,
    ask_for,
    prove,
    receive_message,
    send_message,
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
RUN_SECRET = "the secret of this run"


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    client, server = socket.socketpair()
    with client, server:
        yield client, server


@pytest.fixture
def other_side() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def ask(sock: socket.socket, run_secret: str = RUN_SECRET, *, max_fds: int = 0) -> tuple[Accept, list[int]]:
    return ask_for(sock, run_secret, kind="shm", engine="engine-0", call_bytes=64, answer_bytes=64, max_fds=max_fds)


def greet(sock: socket.socket, run_secret: str) -> Ask:
    """A server's side up to the client's proof, by a blocking socket."""
    check = ProofCheck(run_secret, nonce="n" * 32)
    sock.sendall(check.hello)
    asked = None
    try:
        while asked is None:
            data = sock.recv(check.num_wanted_bytes)
            if not data:
                raise HandshakeError("hung up")
            asked = check.feed(data)
    except HandshakeError:
        sock.sendall(check.refusal)
        raise
    return asked


def welcome(sock: socket.socket, run_secret: str = RUN_SECRET, fds: list[int] | None = None) -> Ask:
    """A whole server side that grants everything."""
    asked = greet(sock, run_secret)
    send_message(sock, Accept(proof=prove(run_secret, "server", asked.nonce), max_rows=7), fds)
    return asked


def test_two_that_know_the_run_secret_agree(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor
) -> None:
    asked: Future[Ask] = other_side.submit(welcome, ends[1])
    accept, fds = ask(ends[0])
    assert (accept.max_rows, fds) == (7, [])
    assert (asked.result().engine, asked.result().call_bytes) == ("engine-0", 64)


def test_descriptors_come_with_the_acceptance_and_are_not_inherited(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor
) -> None:
    reading, writing = os.pipe()
    other_side.submit(welcome, ends[1], RUN_SECRET, [writing])
    _, fds = ask(ends[0], max_fds=1)
    os.write(fds[0], b"here")
    assert os.read(reading, 4) == b"here"
    assert not os.get_inheritable(fds[0])
    handshake.close_all([reading, writing, *fds])


def test_a_client_without_the_run_secret_is_refused_and_told_so(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor
) -> None:
    asked = other_side.submit(greet, ends[1], RUN_SECRET)
    with pytest.raises(HandshakeError, match="the run secret is not this run's"):
        ask(ends[0], "a guess")
    with pytest.raises(HandshakeError, match="engine 'engine-0' did not prove the run secret"):
        asked.result()


def test_a_server_without_the_run_secret_is_noticed(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor
) -> None:
    def pretend(sock: socket.socket) -> None:
        send_message(sock, Hello(version=handshake.PROTOCOL_VERSION, nonce="n"))
        asked, _ = receive_message(sock, Ask)
        send_message(sock, Accept(proof=asked.proof))  # the best that it can do is to send back what it got

    other_side.submit(pretend, ends[1])
    with pytest.raises(HandshakeError, match="the worker did not prove the run secret"):
        ask(ends[0])


def test_a_worker_of_another_protocol_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    send_message(ends[1], Hello(version=99, nonce="n"))
    with pytest.raises(HandshakeError, match="worker speaks protocol 99"):
        ask(ends[0])


def test_a_proof_outside_ascii_is_a_wrong_proof(ends: tuple[socket.socket, socket.socket]) -> None:
    send_message(ends[0], Ask(proof="é", nonce="n", kind="shm", engine="e"))
    with pytest.raises(HandshakeError, match="did not prove the run secret"):
        greet(ends[1], RUN_SECRET)


@pytest.mark.parametrize("num_fds", [0, 2])
def test_a_wrong_number_of_descriptors_is_refused_and_none_stays_open(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor, num_fds: int
) -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    other_side.submit(lambda: None).result()  # the thread is there
    before = psutil.Process().num_fds()
    asked = other_side.submit(welcome, ends[1], RUN_SECRET, [null] * num_fds)
    with pytest.raises(HandshakeError, match="descriptors instead of 3"):
        ask(ends[0], max_fds=3)
    asked.result()
    assert psutil.Process().num_fds() == before
    os.close(null)


def test_a_message_too_long_is_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(struct.pack("<I", 1 << 30))
    with pytest.raises(HandshakeError, match="may have 4096 bytes, got 1073741824"):
        receive_message(ends[1], Ask)


def test_a_side_that_hangs_up_halfway_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    ends[0].sendall(struct.pack("<I", 100) + b"{")
    ends[0].close()
    with pytest.raises(HandshakeError, match="hung up during the handshake"):
        receive_message(ends[1], Ask)


def test_a_silent_worker_is_given_up(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.05)
    with pytest.raises(HandshakeError, match="timed out"):
        ask(ends[0])


@pytest.mark.parametrize(
    "body", [b'{"proof": "\xff\xfe"}', b"[" * 4000, b"[]", b"7", b'{"proof": 1}', b"\x00" * 12], ids=range(6)
)
def test_a_message_that_is_no_message_is_a_handshake_error(body: bytes) -> None:
    check = ProofCheck(RUN_SECRET, nonce="n")
    with pytest.raises(HandshakeError, match="handshake failed"):
        check.feed(struct.pack("<I", len(body)) + body)


def test_a_message_may_come_byte_by_byte() -> None:
    check = ProofCheck(RUN_SECRET, nonce="n")
    client, server = socket.socketpair()
    with client, server:
        send_message(client, Ask(proof=prove(RUN_SECRET, "client", "n"), nonce="m", kind="tcp", engine="e"))
        client.shutdown(socket.SHUT_WR)
        asked = [check.feed(byte) for byte in iter(lambda: server.recv(1), b"")]
    assert asked[:-1] == [None] * (len(asked) - 1)
    assert asked[-1] is not None
    assert asked[-1].engine == "e"


def test_a_side_that_sends_a_byte_now_and_then_is_given_up(
    ends: tuple[socket.socket, socket.socket], other_side: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 0.2)
    given_up = other_side.submit(receive_message, ends[1], Ask)
    ends[0].sendall(struct.pack("<I", 4096))
    while not given_up.done():
        ends[0].sendall(b" ")
        wait([given_up], timeout=0.02)
    with pytest.raises(HandshakeError, match="timed out"):
        given_up.result()


@pytest.mark.parametrize("size", [0, -1, 1 << 50])
def test_areas_of_a_size_that_no_honest_engine_asks_for_are_refused(
    ends: tuple[socket.socket, socket.socket], size: int
) -> None:
    asked = Ask(proof="", nonce="", kind="tcp", engine="e", call_bytes=size, answer_bytes=100)
    with pytest.raises(HandshakeError, match="call_bytes must be from 32 to"):
        handshake.check_sizes(ends[1], asked)
    accept, _ = receive_message(ends[0], Accept)
    assert "call_bytes must be from 32 to" in accept.error


@unhurried
@given(data=st.binary(max_size=300), as_message=st.booleans())
def test_no_bytes_raise_anything_but_a_handshake_error(data: bytes, as_message: bool) -> None:
    client, server = socket.socketpair()
    with client, server:
        client.sendall(struct.pack("<I", len(data)) + data if as_message else data)
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeError):
            greet(server, RUN_SECRET)


def test_the_proofs_of_the_two_roles_differ() -> None:
    assert prove(RUN_SECRET, "client", "n") != prove(RUN_SECRET, "server", "n")
