"""Promises of every transport to another process, with a real worker at the other end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.shared_memory import SharedMemoryChannel
from moeless.dispatch.tcp import TcpChannel
from tests.support.plain_workers import (
    FAILING_LAYER,
    HANGING_LAYER,
    MAX_ROWS,
    UNAVAILABLE_LAYER,
    PlainWorker,
    channel_config,
    expected,
    random_call,
    running_worker,
)
from tests.support.waiting import wait_until

LONG_S = 60.0
Opener = Callable[..., Channel]


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    """One that no test harms."""
    with running_worker() as running:
        yield running


@pytest.fixture(params=[SharedMemoryChannel, TcpChannel], ids=["shm", "tcp"])
def open_channel(request: pytest.FixtureRequest) -> Iterator[Opener]:
    opened: list[Channel] = []

    def open_one(endpoint: WorkerEndpoint, **changes: Any) -> Channel:
        opened.append(request.param(endpoint, channel_config(**changes)))
        return opened[-1]

    yield open_one
    for channel in opened:
        channel.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(1, 1), (9, 4), (MAX_ROWS, MAX_ROWS)])
def test_an_answer_is_the_reference_computation(
    worker: PlainWorker, open_channel: Opener, dtype: torch.dtype, num_tokens: int, num_rows: int
) -> None:
    channel = open_channel(worker.endpoint, dtype=dtype)
    for seed in range(3):
        call = random_call(seed, num_tokens=num_tokens, num_rows=num_rows, dtype=dtype)
        channel.submit(call)
        answer = channel.collect(LONG_S)
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, expected(call))


def test_engines_that_share_a_worker_get_their_own_answers(worker: PlainWorker, open_channel: Opener) -> None:
    def converse(engine: int) -> None:
        channel = open_channel(worker.endpoint, engine=f"engine-{engine}")
        for turn in range(50):
            call = random_call(1000 * engine + turn, num_tokens=engine + 2, num_rows=engine + 1)
            channel.submit(call)
            torch.testing.assert_close(channel.collect(LONG_S), expected(call))

    with ThreadPoolExecutor(4) as engines:
        for conversation in [engines.submit(converse, engine) for engine in range(4)]:
            conversation.result()


def test_an_engine_without_the_token_is_refused(worker: PlainWorker, open_channel: Opener) -> None:
    with pytest.raises(HandshakeError, match="the run secret is not this run's"):
        open_channel(worker.endpoint, run_secret="another run's secret")


def test_a_worker_without_the_token_is_refused(open_channel: Opener) -> None:
    with running_worker(run_secret="another run's secret") as stranger, pytest.raises(HandshakeError):
        open_channel(stranger.endpoint)


def test_a_worker_that_is_not_there_is_a_transport_error(worker: PlainWorker, open_channel: Opener) -> None:
    nobody = WorkerEndpoint(
        worker="worker-9", host_id="", unix_address="moeless-nobody", tcp_host="127.0.0.1", tcp_port=1
    )
    with pytest.raises(TransportError, match="worker worker-9 cannot be reached"):
        open_channel(nobody)


def test_a_worker_killed_while_it_computes_is_noticed_at_once(open_channel: Opener) -> None:
    with running_worker() as doomed, ThreadPoolExecutor(1) as engine:
        channel = open_channel(doomed.endpoint)
        channel.submit(random_call(0, layer=HANGING_LAYER))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        doomed.kill()
        with pytest.raises(TransportError, match="hung up") as raised:
            answer.result(timeout=LONG_S)
        assert not isinstance(raised.value, WorkerTimeoutError)
        assert channel.is_broken


def test_a_worker_killed_between_calls_is_noticed_without_one(open_channel: Opener) -> None:
    with running_worker() as doomed:
        channel = open_channel(doomed.endpoint)
        assert not channel.is_broken
        doomed.kill()
        wait_until(lambda: channel.is_broken)
        with pytest.raises(TransportError, match="is broken"):
            channel.submit(random_call(0))


def test_a_late_worker_is_a_timeout_and_breaks_the_line(open_channel: Opener) -> None:
    with running_worker() as stuck:
        channel = open_channel(stuck.endpoint)
        channel.submit(random_call(0, layer=HANGING_LAYER))
        with pytest.raises(WorkerTimeoutError, match=r"worker worker-0 did not answer within 0\.05 s"):
            channel.collect(0.05)
        assert channel.is_broken
        with pytest.raises(TransportError, match="is broken"):
            channel.submit(random_call(0))
        with pytest.raises(TransportError, match="is broken"):
            channel.collect(LONG_S)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(UNAVAILABLE_LAYER, r"function L02\.E\d{3} does not fit"), (FAILING_LAYER, "ZeroDivisionError: a bug")],
)
def test_a_worker_says_why_it_failed_and_goes_on(
    worker: PlainWorker, open_channel: Opener, layer: int, message: str
) -> None:
    channel = open_channel(worker.endpoint)
    channel.submit(random_call(0, layer=layer))
    with pytest.raises(TransportError, match=message):
        channel.collect(LONG_S)
    assert not channel.is_broken
    call = random_call(1)
    channel.submit(call)
    torch.testing.assert_close(channel.collect(LONG_S), expected(call))


def test_the_worker_limits_the_rows_of_a_call(open_channel: Opener) -> None:
    with running_worker(max_rows=3) as small:
        channel = open_channel(small.endpoint)
        assert channel.max_rows == 3


def test_a_call_beyond_the_workers_limits_is_dropped_and_others_are_served(
    worker: PlainWorker, open_channel: Opener
) -> None:
    honest, wrong = open_channel(worker.endpoint), open_channel(worker.endpoint, engine="wrong")
    wrong.submit(random_call(0)._replace(layer=77))
    with pytest.raises(TransportError, match="hung up"):
        wrong.collect(LONG_S)
    assert wrong.is_broken
    call = random_call(1)
    honest.submit(call)
    torch.testing.assert_close(honest.collect(LONG_S), expected(call))


def test_closing_ends_a_collect_of_another_thread(open_channel: Opener) -> None:
    with running_worker() as stuck, ThreadPoolExecutor(1) as engine:
        channel = open_channel(stuck.endpoint)
        channel.submit(random_call(0, layer=HANGING_LAYER))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        channel.close()
        with pytest.raises(TransportError):
            answer.result(timeout=LONG_S)


def test_closing_twice_is_closing_once(worker: PlainWorker, open_channel: Opener) -> None:
    channel = open_channel(worker.endpoint)
    channel.close()
    channel.close()
    assert channel.is_broken
    with pytest.raises(TransportError, match="is broken"):
        channel.submit(random_call(0))


def test_an_answer_outlives_its_line(worker: PlainWorker, open_channel: Opener) -> None:
    channel = open_channel(worker.endpoint)
    call = random_call(0)
    channel.submit(call)
    answer = channel.collect(LONG_S)
    channel.close()
    del channel
    torch.testing.assert_close(answer, expected(call))


def test_a_hundred_connections_leave_no_descriptor_behind(open_channel: Opener) -> None:
    with running_worker() as busy:
        call = random_call(0)

        def connect_once() -> None:
            channel = open_channel(busy.endpoint)
            channel.submit(call)
            torch.testing.assert_close(channel.collect(LONG_S), expected(call))
            channel.close()

        def num_own_fds() -> int:
            return len(os.listdir("/proc/self/fd"))

        connect_once()
        ours = num_own_fds()
        with pytest.raises(HandshakeError):
            open_channel(busy.endpoint, run_secret="wrong")
        theirs = busy.num_fds()
        for _ in range(100):
            connect_once()
        with pytest.raises(HandshakeError):
            open_channel(busy.endpoint, run_secret="wrong")
        assert num_own_fds() <= ours
        wait_until(lambda: busy.num_fds() <= theirs)
