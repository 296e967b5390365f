"""Keeping lines to workers: connecting, noticing a break, connecting again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from moeless.core.errors import TransportError
from moeless.deployments.worker_connections import WorkerLinks


class Line:
    """A channel that can be broken from outside."""

    kind = "shm"
    max_rows = 8

    def __init__(self) -> None:
        self.is_broken = False


class Switchboard:
    """The part of a dispatcher that links use, recording what it was told."""

    def __init__(self) -> None:
        self.channels: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.num_sweeps = 0
        self.local = SimpleNamespace(pool=SimpleNamespace(evict_idle=self._evict_idle))

    def set_channels(self, channels: dict[str, Any]) -> None:
        self.channels = dict(channels)
        self.history.append(self.channels)

    def _evict_idle(self, *, keep_alive_s: float) -> list[object]:
        assert keep_alive_s == 30.0
        self.num_sweeps += 1
        return []


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_broken_line_is_left_out_and_replaced() -> None:
    board = Switchboard()
    refused = threading.Event()
    refused.set()
    opened: list[Line] = []

    def connect() -> Any:
        if refused.is_set():
            raise TransportError("not yet")
        opened.append(Line())
        return opened[-1]

    links = WorkerLinks(board, {"worker-0": connect}, keep_alive_s=30.0)  # type: ignore[arg-type]
    links.start()
    assert not links.were_all_connected
    refused.clear()
    wait_until(lambda: links.were_all_connected)
    assert links.is_connected("worker-0")

    refused.set()
    opened[0].is_broken = True
    wait_until(lambda: {} in board.history)
    assert not links.is_connected("worker-0")
    assert links.were_all_connected, "an engine that was ready stays ready: its own copies answer"

    refused.clear()
    wait_until(lambda: links.is_connected("worker-0"))
    assert opened[1] is board.channels["worker-0"]
    wait_until(lambda: board.num_sweeps > 0)
    links.stop()


def test_an_engine_without_workers_is_connected_at_once_and_keeps_its_experts() -> None:
    board = Switchboard()
    links = WorkerLinks(board, {}, keep_alive_s=None)  # type: ignore[arg-type]
    links.start()
    assert links.were_all_connected
    links.stop()
    assert board.num_sweeps == 0


def test_copies_beside_functions_that_are_called_by_handle_are_swept_too() -> None:
    board = Switchboard()
    links = WorkerLinks(board, {}, keep_alive_s=30.0)  # type: ignore[arg-type]
    links.start()
    wait_until(lambda: board.num_sweeps > 0)
    links.stop()
