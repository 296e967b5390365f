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


def test_a_channel_that_breaks_soon_is_opened_again_after_a_delay_that_doubles() -> None:
    board = Switchboard()
    now_s = 100.0
    opened_s: list[float] = []

    def connect() -> Any:
        opened_s.append(now_s)
        return BreakableChannel()

    connections = WorkerConnections(
        board,  # type: ignore[arg-type]
        {"worker-0": connect},
        keep_alive_s=None,
        clock=lambda: now_s,
    )

    def seconds_until_reopened() -> float:
        nonlocal now_s
        board.channels["worker-0"].is_broken = True
        broke_s, num_opened = now_s, len(opened_s)
        connections.check()
        while len(opened_s) == num_opened:
            assert board.channels == {}
            now_s += 0.25
            connections.check()
        return now_s - broke_s

    connections.check()
    assert [seconds_until_reopened() for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    now_s += 11  # it was sound
    assert seconds_until_reopened() == 0


def test_a_worker_that_refuses_is_asked_again_in_the_next_round() -> None:
    board = Switchboard()
    num_asked = 0

    def connect() -> Any:
        nonlocal num_asked
        num_asked += 1
        raise TransportError("not yet")

    connections = WorkerConnections(board, {"worker-0": connect}, keep_alive_s=None)  # type: ignore[arg-type]
    for _ in range(3):
        connections.check()
    assert num_asked == 3
