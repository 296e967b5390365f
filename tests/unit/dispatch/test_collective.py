"""Rows over a process group, on its CPU twin: two processes, gloo instead of NCCL, everything else the same."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing.connection import Connection

import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError, WorkerTimeoutError
from moeless.dispatch import pair_group
from moeless.dispatch.channel import WorkerEndpoint
from moeless.dispatch.collective import CollectiveChannel
from tests.support.plain_workers import (
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
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    with running_worker() as running:
        yield running


def open_channel(endpoint: WorkerEndpoint, **changes: object) -> CollectiveChannel:
    return CollectiveChannel(endpoint, channel_config(**changes), CPU)


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
            for turn in range(5):
                call = random_call(100 * engine + turn)
                channel.submit(call)
                torch.testing.assert_close(channel.collect(LONG_S), expected(call))

    with ThreadPoolExecutor(3) as engines:
        for conversation in [engines.submit(converse, engine) for engine in range(3)]:
            conversation.result()


def test_an_engine_without_the_token_is_refused(worker: PlainWorker) -> None:
    with pytest.raises(HandshakeError, match="the run secret is not this run's"):
        open_channel(worker.endpoint, run_secret="another run's secret")


def test_an_error_answer_brings_no_rows_and_the_line_goes_on(worker: PlainWorker) -> None:
    with closing(open_channel(worker.endpoint)) as channel:
        channel.submit(random_call(0, layer=UNAVAILABLE_LAYER))
        with pytest.raises(TransportError, match=r"function L02\.E\d{3} does not fit"):
            channel.collect(LONG_S)
        call = random_call(1)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(LONG_S), expected(call))


def test_a_worker_killed_while_it_computes_is_noticed_at_once() -> None:
    with running_worker() as doomed, closing(open_channel(doomed.endpoint)) as channel, ThreadPoolExecutor(1) as engine:
        channel.submit(random_call(0, layer=HANGING_LAYER))
        answer = engine.submit(channel.collect, 10 * LONG_S)
        doomed.kill()
        with pytest.raises(TransportError) as raised:
            answer.result(timeout=LONG_S)
        assert not isinstance(raised.value, WorkerTimeoutError)
        assert channel.is_broken


def join_and_wait(pipe: Connection, detail: dict[str, str]) -> None:
    store = pair_group.join_store("127.0.0.1", detail)
    pair_group.PairGroup(store, rank=pair_group.ENGINE_RANK, device=CPU, address="127.0.0.1")
    pipe.poll(None)


def test_a_process_killed_before_its_rows_came_is_noticed_at_once() -> None:
    store, detail = pair_group.open_store("127.0.0.1")
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=join_and_wait, args=(theirs, detail))
    process.start()
    group = pair_group.PairGroup(store, rank=pair_group.WORKER_RANK, device=CPU, address="127.0.0.1")
    with ThreadPoolExecutor(1) as worker:
        rows = torch.empty(4)
        receiving = worker.submit(group.receive, rows, deadline_s=time.monotonic() + 10 * LONG_S, is_gone=lambda: False)
        process.kill()
        process.join()
        with pytest.raises(TransportError, match="rows could not be received"):
            receiving.result(timeout=LONG_S)
    group.abort()
    ours.close()
    theirs.close()


def test_a_late_worker_is_a_timeout_and_breaks_the_line() -> None:
    with running_worker() as stuck, closing(open_channel(stuck.endpoint)) as channel:
        channel.submit(random_call(0, layer=HANGING_LAYER))
        with pytest.raises(WorkerTimeoutError, match=r"did not answer within 0\.05 s"):
            channel.collect(0.05)
        assert channel.is_broken


def test_connections_leave_no_descriptor_behind() -> None:
    with running_worker() as busy:

        def connect_once() -> None:
            with closing(open_channel(busy.endpoint)) as channel:
                call = random_call(0)
                channel.submit(call)
                torch.testing.assert_close(channel.collect(LONG_S), expected(call))

        connect_once()
        ours, theirs = len(os.listdir("/proc/self/fd")), busy.num_fds()
        for _ in range(5):
            connect_once()
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= ours)
        wait_until(lambda: busy.num_fds() <= theirs)
