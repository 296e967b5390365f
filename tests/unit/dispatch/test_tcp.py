"""Behaviour special to TCP: bytes come in pieces, slowly, too many, or from strangers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
import torch

from moeless.dispatch import wire
from moeless.dispatch.handshake import ask_for
from moeless.dispatch.tcp import TcpChannel
from moeless.dispatch.wire import Frame, LayerCall
from tests.support.plain_workers import (
    HIDDEN_SIZE,
    MAX_ROWS,
    RUN_SECRET,
    PlainWorker,
    channel_config,
    expected,
    random_call,
    running_worker,
)

LONG_S = 60.0


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    with running_worker(max_rows=4096) as running:
        yield running


def open_channel(worker: PlainWorker, *, hidden_size: int = HIDDEN_SIZE, max_rows: int = MAX_ROWS) -> TcpChannel:
    return TcpChannel(worker.endpoint, channel_config(hidden_size=hidden_size, max_rows=max_rows))


@contextmanager
def plain_socket(worker: PlainWorker, *, num_bytes: int = 1 << 20) -> Iterator[socket.socket]:
    """A socket after the handshake, to send what no TcpChannel sends."""
    with socket.create_connection((worker.endpoint.tcp_host, worker.endpoint.tcp_port)) as sock:
        ask_for(sock, RUN_SECRET, kind="tcp", engine="plain", call_bytes=num_bytes, answer_bytes=num_bytes)
        sock.settimeout(LONG_S)
        yield sock


def frame_of(call: LayerCall, *, sequence: int = 1) -> bytes:
    num_rows, hidden = len(call.tokens_R), call.x_TH.shape[1]
    buffer = bytearray(wire.call_bytes(num_rows, len(call.rows_n), hidden, call.x_TH.dtype))
    wire.write_call(Frame(memoryview(buffer)), call, sequence)
    return bytes(buffer)


def read_answer(sock: socket.socket, call: LayerCall, *, sequence: int = 1) -> torch.Tensor:
    shape = (len(call.tokens_R), call.x_TH.shape[1])
    buffer = bytearray(wire.answer_bytes(*shape, call.x_TH.dtype))
    received = 0
    while received < len(buffer):
        count = sock.recv_into(memoryview(buffer)[received:])
        assert count, "the worker hung up"
        received += count
    return wire.read_answer(Frame(memoryview(buffer)), sequence, shape)


def assert_answers(worker: PlainWorker, seed: int = 99) -> None:
    with closing(open_channel(worker)) as channel:
        call = random_call(seed)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(LONG_S), expected(call))


def was_hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def test_a_call_may_come_in_pieces_while_others_are_served(worker: PlainWorker) -> None:
    call = random_call(0)
    frame = frame_of(call)
    with plain_socket(worker) as slow:
        for cut in (1, wire.CALL_HEADER.size - 1, wire.CALL_HEADER.size, len(frame) - 1):
            slow.sendall(frame[:cut])
            assert_answers(worker, seed=cut)
            slow.sendall(frame[cut:])
            torch.testing.assert_close(read_answer(slow, call), expected(call))


def test_an_engine_that_does_not_take_its_answer_delays_no_other(worker: PlainWorker) -> None:
    call = random_call(0, num_tokens=4096, num_rows=4096, hidden_size=1024)
    with plain_socket(worker, num_bytes=1 << 25) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        slow.sendall(frame_of(call))  # 16 MB, and as many come back: more than a line holds
        assert_answers(worker)
        torch.testing.assert_close(read_answer(slow, call), expected(call))
        small = random_call(1)
        slow.sendall(frame_of(small, sequence=2))
        torch.testing.assert_close(read_answer(slow, small, sequence=2), expected(small))


def test_calls_longer_than_the_line_holds_arrive_whole(worker: PlainWorker) -> None:
    with closing(open_channel(worker, hidden_size=2048, max_rows=4096)) as channel:
        for seed in range(2):
            call = random_call(seed, num_tokens=4096, num_rows=4000, hidden_size=2048)
            channel.submit(call)
            torch.testing.assert_close(channel.collect(LONG_S), expected(call))


@pytest.mark.parametrize(
    "data",
    [
        os.urandom(64),
        b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n" + bytes(64),
        frame_of(random_call(0))[:12] + b"\xff" * 20,  # sizes of 4 billion
        frame_of(random_call(0)) + b"and then some",
        frame_of(random_call(0, num_tokens=100, num_rows=100, hidden_size=4096)),  # more than was asked for
    ],
    ids=["random", "http", "huge", "too long", "beyond its own limit"],
)
def test_nonsense_ends_that_line_only(worker: PlainWorker, data: bytes) -> None:
    with plain_socket(worker) as wrong:
        with suppress(ConnectionError):  # the worker need not read all of it to know
            wrong.sendall(data)
        assert was_hung_up(wrong)
    assert_answers(worker)


def test_an_engine_that_goes_away_halfway_is_forgotten(worker: PlainWorker) -> None:
    with plain_socket(worker) as sock:
        sock.sendall(frame_of(random_call(0))[:100])
    assert_answers(worker)


def test_a_call_before_the_last_answer_was_taken_ends_the_line(worker: PlainWorker) -> None:
    frame = frame_of(random_call(0))
    with plain_socket(worker) as hasty:
        with suppress(ConnectionError):
            hasty.sendall(frame + frame)
        assert was_hung_up(hasty)
    assert_answers(worker)
