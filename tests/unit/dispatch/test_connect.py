"""Choice of the transport between an engine and a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
import torch

from moeless.core.errors import HandshakeError, TransportError
from moeless.dispatch.channel import Channel, WorkerEndpoint
from moeless.dispatch.connect import connect
from tests.support.plain_workers import HIDDEN_SIZE, MAX_ROWS, RUN_SECRET, TOP_K, expected, random_call, running_worker


@pytest.fixture(scope="module")
def endpoint() -> Iterator[WorkerEndpoint]:
    with running_worker() as worker:
        yield worker.endpoint


def open_channel(endpoint: WorkerEndpoint, *, run_secret: str = RUN_SECRET, device: str = "cpu") -> Channel:
    return connect(
        endpoint,
        run_secret=run_secret,
        engine="engine-0",
        hidden_size=HIDDEN_SIZE,
        top_k=TOP_K,
        dtype=torch.float32,
        max_rows=MAX_ROWS,
        device=device,
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
    with closing(open_channel(msgspec.structs.replace(endpoint, **changes))) as channel:
        assert channel.kind == kind
        call = random_call(0)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(60), expected(call))


def test_a_worker_that_refuses_is_not_asked_again_over_another_transport(endpoint: WorkerEndpoint) -> None:
    nowhere_else = msgspec.structs.replace(endpoint, tcp_port=1)
    with pytest.raises(HandshakeError, match="the run secret is not this run's"):
        open_channel(nowhere_else, run_secret="wrong")


def test_a_worker_that_cannot_be_reached_at_all_is_a_transport_error(endpoint: WorkerEndpoint) -> None:
    gone = msgspec.structs.replace(endpoint, unix_address="moeless-nobody", tcp_port=1)
    with pytest.raises(TransportError, match="worker worker-0 cannot be reached"):
        open_channel(gone)


@pytest.mark.parametrize(("host_id", "kind"), [(None, "shm"), ("another machine", "tcp")])
def test_rows_go_through_host_memory_where_the_gpus_cannot_be_used(
    endpoint: WorkerEndpoint,
    host_id: str | None,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(device: torch.device) -> None:
        raise TransportError("no driver")

    monkeypatch.setattr("moeless.dispatch.connect.CudaMemory", refuse)
    monkeypatch.setattr("moeless.dispatch.pair_group.dist.is_nccl_available", lambda: False)
    on_gpu = msgspec.structs.replace(endpoint, device="cuda:0", host_id=host_id or endpoint.host_id)
    with closing(open_channel(on_gpu, device="cuda:0")) as channel:
        assert channel.kind == kind
    assert "rows go through host memory worker=worker-0" in caplog.text


def test_two_gpus_of_a_machine_share_memory_and_of_two_machines_use_nccl(
    endpoint: WorkerEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr("moeless.dispatch.connect.CudaMemory", lambda device: "its memory")
    monkeypatch.setattr("moeless.dispatch.connect.CudaIpcChannel", lambda *arguments: taken.append(arguments[2]))
    monkeypatch.setattr("moeless.dispatch.connect.CollectiveChannel", lambda *arguments: taken.append(arguments[2]))
    on_gpu = msgspec.structs.replace(endpoint, device="cuda:1")
    open_channel(on_gpu, device="cuda:0")
    open_channel(msgspec.structs.replace(on_gpu, host_id="another machine"), device="cuda:0")
    assert taken == ["its memory", torch.device("cuda:0")]
