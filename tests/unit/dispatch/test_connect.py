"""Which transport an engine takes to which worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from tests.support.plain_workers import HIDDEN_SIZE, MAX_ROWS, TOKEN, TOP_K, expected, random_call, running_worker


@pytest.fixture(scope="module")
def endpoint() -> Iterator[WorkerEndpoint]:
    with running_worker() as worker:
        yield worker.endpoint


def open_line(endpoint: WorkerEndpoint, *, token: str = TOKEN) -> Channel:
    return connect(
        endpoint,
        token=token,
        engine="engine-0",
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        dtype=torch.float32,
        max_rows=MAX_ROWS,
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "shm"),
        ({"host_id": "another machine"}, "tcp"),
        # another container of this machine: its Unix sockets cannot be reached
        ({"unix_address": "moeless-elsewhere"}, "tcp"),
    ],
    ids=["same machine", "another machine", "another container"],
)
def test_the_fastest_transport_that_reaches_the_worker(
    endpoint: WorkerEndpoint, changes: dict[str, str], kind: str
) -> None:
    with closing(open_line(msgspec.structs.replace(endpoint, **changes))) as channel:
        assert channel.kind == kind
        call = random_call(0)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(60), expected(call))


def test_a_worker_that_refuses_is_not_asked_again_over_another_transport(endpoint: WorkerEndpoint) -> None:
    nowhere_else = msgspec.structs.replace(endpoint, tcp_port=1)
    with pytest.raises(HandshakeError, match="the token is not this run's"):
        open_line(nowhere_else, token="wrong")


def test_a_worker_that_cannot_be_reached_at_all_is_a_transport_error(endpoint: WorkerEndpoint) -> None:
    gone = msgspec.structs.replace(endpoint, unix_address="moeless-nobody", tcp_port=1)
    with pytest.raises(TransportError, match="worker worker-0 cannot be reached"):
        open_line(gone)
