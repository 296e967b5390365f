"""Keeping connections to workers: connecting, noticing a break, connecting again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from moeless.core.errors import TransportError
from moeless.deployments.worker_connections import WorkerConnections


class BreakableChannel:
    """A channel that can be broken from outside."""

    kind = "shm"
    max_rows = 8

    def __init__(self) -> None:
        self.is_broken = False


class Switchboard:
    """The part of a dispatcher that the connections use; keeps the channels it was given."""

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


def test_a_broken_channel_is_left_out_and_replaced() -> None:
    board = Switchboard()
    refused = threading.Event()
    refused.set()
    opened: list[BreakableChannel] = []

    def connect() -> Any:
        if refused.is_set():
            raise TransportError("not yet")
        opened.append(BreakableChannel())
        return opened[-1]

    connections = WorkerConnections(board, {"worker-0": connect}, keep_alive_s=30.0)  # type: ignore[arg-type]
    connections.start()
    assert not connections.were_all_connected
    refused.clear()
    wait_until(lambda: connections.were_all_connected)
    assert connections.is_connected("worker-0")

    refused.set()
    opened[0].is_broken = True
    wait_until(lambda: {} in board.history)
    assert not connections.is_connected("worker-0")
    assert connections.were_all_connected, "an engine that was ready stays ready: its own copies answer"

    refused.clear()
    wait_until(lambda: connections.is_connected("worker-0"))
    assert opened[1] is board.channels["worker-0"]
    wait_until(lambda: board.num_sweeps > 0)
    connections.stop()


def test_an_engine_without_workers_is_connected_at_once_and_keeps_its_experts() -> None:
    board = Switchboard()
    connections = WorkerConnections(board, {}, keep_alive_s=None)  # type: ignore[arg-type]
    connections.start()
    assert connections.were_all_connected
    connections.stop()
    assert board.num_sweeps == 0


def test_copies_beside_functions_that_are_called_by_handle_are_swept_too() -> None:
    board = Switchboard()
    connections = WorkerConnections(board, {}, keep_alive_s=30.0)  # type: ignore[arg-type]
    connections.start()
    wait_until(lambda: board.num_sweeps > 0)
    connections.stop()
