"""Behaviour special to shared memory: no left-overs, and no harm from the other side."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moeless.core.errors import HandshakeError
from moeless.dispatch.handshake import ask_for, close_all
from moeless.dispatch.shared_memory import SharedMemoryChannel
from tests.support.plain_workers import (
    RUN_SECRET,
    PlainWorker,
    channel_config,
    expected,
    random_call,
    running_worker,
)


@pytest.fixture(scope="module")
def worker() -> Iterator[PlainWorker]:
    with running_worker() as running:
        yield running


def open_channel(worker: PlainWorker) -> SharedMemoryChannel:
    return SharedMemoryChannel(worker.endpoint, channel_config())


def ask_for_areas(sock: socket.socket, worker: PlainWorker, *, num_bytes: int) -> list[int]:
    sock.connect("\0" + worker.endpoint.unix_address)
    _, fds = ask_for(sock, RUN_SECRET, kind="shm", engine="e", call_bytes=num_bytes, answer_bytes=num_bytes, max_fds=4)
    return fds


def left_behind() -> set[Path]:
    """Everything in the folders for shared memory and temporary files that bears our name."""
    return {path for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("*moeless*")}


def test_a_killed_worker_leaves_no_file() -> None:
    before = left_behind()
    with running_worker() as doomed:
        channel = open_channel(doomed)
        call = random_call(0)
        channel.submit(call)
        torch.testing.assert_close(channel.collect(60), expected(call))
        doomed.kill()
        assert left_behind() == before
        channel.close()
    sockets = Path("/proc/net/unix").read_text()
    assert doomed.endpoint.unix_address not in sockets


def test_an_engine_cannot_take_memory_from_under_the_worker(worker: PlainWorker) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        fds = ask_for_areas(sock, worker, num_bytes=4096)
        for area in fds[2:]:
            with pytest.raises(PermissionError):
                os.ftruncate(area, 0)
        close_all(fds)


def test_nonsense_in_the_call_area_ends_that_line_only(worker: PlainWorker) -> None:
    channel = open_channel(worker)
    with socket.socket(socket.AF_UNIX) as sock:
        fds = ask_for_areas(sock, worker, num_bytes=4096)
        with mmap.mmap(fds[2], 4096) as area:
            area[:] = os.urandom(4096)
        os.eventfd_write(fds[0], 1)
        sock.settimeout(60)
        assert sock.recv(1) == b""
        close_all(fds)
    call = random_call(0)
    channel.submit(call)
    torch.testing.assert_close(channel.collect(60), expected(call))
    channel.close()


def test_areas_larger_than_any_call_are_refused(worker: PlainWorker) -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(HandshakeError, match="call_bytes must be from"):
        ask_for_areas(sock, worker, num_bytes=1 << 45)
