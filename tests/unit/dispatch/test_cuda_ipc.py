"""Rows in device memory that two processes share, on its CPU twin: everything but CUDA itself is the same."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.cuda_ipc import CudaIpcChannel
from moeless.dispatch.handshake import ask_for
from moeless.dispatch.shared_memory import SharedMemoryChannel
from tests.support.plain_workers import (
    HANGING_LAYER,
    MAX_ROWS,
    RUN_SECRET,
    UNAVAILABLE_LAYER,
    PlainWorker,
    channel_config,
    expected,
    random_call,
    running_worker,
)
from tests.support.shared_device import SharedDevice
from tests.support.waiting import wait_until

LONG_S = 60.0
NEVER = 10**12


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    with running_worker(memory=SharedDevice()) as running:
        yield running


def open_channel(endpoint: WorkerEndpoint, *, looks: int = 0, **changes: object) -> CudaIpcChannel:
    return CudaIpcChannel(endpoint, channel_config(**changes), SharedDevice(looks))


def assert_answers(channel: CudaIpcChannel | SharedMemoryChannel, seed: int = 0) -> None:
    call = random_call(seed)
    channel.submit(call)
    torch.testing.assert_close(channel.collect(LONG_S), expected(call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_is_the_reference_computation(worker: PlainWorker, dtype: torch.dtype) -> None:
    with closing(open_channel(worker.endpoint, dtype=dtype)) as channel:
        for seed, (num_tokens, num_rows) in enumerate([(1, 1), (9, 4), (MAX_ROWS, MAX_ROWS)]):
            call = random_call(seed, num_tokens=num_tokens, num_rows=num_rows, dtype=dtype)
            channel.submit(call)
            answer = channel.collect(LONG_S)
            assert answer.dtype == dtype
            torch.testing.assert_close(answer, expected(call))


def test_engines_that_share_a_worker_get_their_own_answers(worker: PlainWorker) -> None:
    def converse(engine: int) -> None:
        with closing(open_channel(worker.endpoint, engine=f"engine-{engine}")) as channel:
            for turn in range(50):
                assert_answers(channel, 100 * engine + turn)

    with ThreadPoolExecutor(4) as engines:
        for conversation in [engines.submit(converse, engine) for engine in range(4)]:
            conversation.result()


def test_a_copy_that_is_not_done_yet_is_waited_for_on_both_sides() -> None:
    with (
        running_worker(memory=SharedDevice(looks=20)) as worker,
        closing(open_channel(worker.endpoint, looks=1000)) as channel,
    ):
        for seed in range(5):
            assert_answers(channel, seed)


def test_an_engine_whose_copy_never_ends_delays_no_other() -> None:
    with running_worker(memory=SharedDevice(looks=NEVER)) as worker:
        stuck = open_channel(worker.endpoint)
        stuck.submit(random_call(0))
        with closing(SharedMemoryChannel(worker.endpoint, channel_config())) as other:
            assert_answers(other)
            stuck.close()
            assert_answers(other)


def test_an_answer_that_never_ends_is_a_timeout(worker: PlainWorker) -> None:
    with closing(open_channel(worker.endpoint, looks=NEVER)) as channel:
        channel.submit(random_call(0))
        with pytest.raises(WorkerTimeoutError, match="worker worker-0 did not"):
            channel.collect(0.1)
        assert channel.is_broken


def test_a_worker_killed_before_its_copy_ended_is_noticed_at_once() -> None:
    with (
        running_worker(memory=SharedDevice()) as doomed,
        closing(open_channel(doomed.endpoint, looks=NEVER)) as channel,
        ThreadPoolExecutor(1) as engine,
    ):
        channel.submit(random_call(0))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        doomed.kill()
        with pytest.raises(TransportError, match="hung up") as raised:
            answer.result(timeout=LONG_S)
        assert not isinstance(raised.value, WorkerTimeoutError)


def test_a_worker_killed_while_it_computes_is_noticed_at_once() -> None:
    with (
        running_worker(memory=SharedDevice()) as doomed,
        closing(open_channel(doomed.endpoint)) as channel,
        ThreadPoolExecutor(1) as engine,
    ):
        channel.submit(random_call(0, layer=HANGING_LAYER))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        doomed.kill()
        with pytest.raises(TransportError, match="hung up"):
            answer.result(timeout=LONG_S)


def test_a_worker_says_why_it_failed_and_goes_on(worker: PlainWorker) -> None:
    with closing(open_channel(worker.endpoint)) as channel:
        channel.submit(random_call(0, layer=UNAVAILABLE_LAYER))
        with pytest.raises(TransportError, match=r"function L02\.E\d{3} does not fit"):
            channel.collect(LONG_S)
        assert_answers(channel)


def test_more_rows_than_the_area_holds_are_refused_before_they_are_sent(worker: PlainWorker) -> None:
    with closing(open_channel(worker.endpoint, max_rows=2)) as channel:
        with pytest.raises(TransportError, match="6 pairs need 104 bytes, got 96"):
            channel.submit(random_call(0, num_rows=3))
        few_pairs = random_call(0, num_rows=3, top_k=1)
        with pytest.raises(TransportError, match="3 rows of 64 need 768 bytes, got 512"):
            channel.submit(few_pairs)
        call = random_call(0, num_rows=2)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(LONG_S), expected(call))


@pytest.mark.parametrize(
    ("detail", "message"),
    [
        ({}, "rows_bytes must be from 1 to"),
        ({"rows_bytes": "-5"}, "rows_bytes must be from 1 to"),
        ({"rows_bytes": str(1 << 50)}, "rows_bytes must be from 1 to"),
        ({"rows_bytes": "64", "call_written": "/nowhere"}, "area '/nowhere' cannot be reached"),
    ],
)
def test_a_wish_that_cannot_be_granted_is_refused_in_words(
    worker: PlainWorker, detail: dict[str, str], message: str
) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect("\0" + worker.endpoint.unix_address)
        with pytest.raises(HandshakeError, match=message):
            ask_for(
                sock, RUN_SECRET, kind="cuda-ipc", engine="e", call_bytes=64, answer_bytes=64, detail=detail, max_fds=4
            )


def test_a_worker_without_a_device_refuses() -> None:
    with running_worker() as plain, pytest.raises(HandshakeError, match="transport cuda-ipc is not served"):
        open_channel(plain.endpoint)


def test_connections_leave_no_descriptor_behind(worker: PlainWorker) -> None:
    def connect_once() -> None:
        with closing(open_channel(worker.endpoint)) as channel:
            assert_answers(channel)

    connect_once()
    ours, theirs = len(os.listdir("/proc/self/fd")), worker.num_fds()
    for _ in range(20):
        connect_once()
    assert len(os.listdir("/proc/self/fd")) <= ours
    wait_until(lambda: worker.num_fds() <= theirs)
