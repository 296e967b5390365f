"""A line over somebody else's calls: who is asked, how long is waited, and when another answer is taken instead."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moeless.core.errors import TransportError, WorkerStartingError, WorkerTimeoutError
from moeless.dispatch.call import CallChannel, answer_call
from moeless.dispatch.wire import LayerCall, ReceivedCall

HIDDEN = 4


def double(call: ReceivedCall) -> torch.Tensor:
    return call.x_RH * 2


class Clock:
    """Time that passes where somebody waits."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Far:
    """The other side of a line: answers a call so many seconds after it was sent, or fails it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.takes_s = 0.001
        self.dies = False
        self.num_calls = 0
        self.num_cancelled = 0

    def __call__(self, frame: bytes) -> Answer:
        self.num_calls += 1
        return Answer(self, frame, ready_s=self.clock.now_s + self.takes_s)


class Answer:
    def __init__(self, far: Far, frame: bytes, ready_s: float) -> None:
        self.far, self.frame, self.ready_s = far, frame, ready_s

    def result(self, timeout_s: float) -> bytes:
        if self.far.dies:
            raise TransportError("its replica died")
        waited_s = max(0.0, self.ready_s - self.far.clock.now_s)
        self.far.clock.now_s += min(waited_s, timeout_s)
        if waited_s > timeout_s:
            raise WorkerTimeoutError(f"no answer within {timeout_s:g} s")
        return answer_call(self.frame, double, max_rows=8, num_experts=[2])

    def cancel(self) -> None:
        self.far.num_cancelled += 1


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def far(clock: Clock) -> Far:
    return Far(clock)


@pytest.fixture
def ask(far: Far, clock: Clock) -> Callable[[], torch.Tensor]:
    """One call of the line, waited for 2 s at most."""
    line = CallChannel(far, max_rows=8, idle_s=20.0, give_up_s=60.0, clock=clock)
    return lambda: ask_once(line)


def ask_once(line: CallChannel) -> torch.Tensor:
    line.submit(
        LayerCall(
            layer=0,
            x_TH=torch.ones(1, HIDDEN),
            tokens_R=np.zeros(1, dtype=np.int64),
            rows_n=np.zeros(1, dtype=np.int64),
            experts_n=np.zeros(1, dtype=np.int64),
            weights_n=np.ones(1, dtype=np.float32),
        )
    )
    return line.collect(2.0)


def test_a_side_that_answers_is_asked_for_every_call(ask: Callable[[], torch.Tensor], far: Far) -> None:
    for _ in range(3):
        torch.testing.assert_close(ask(), torch.full((1, HIDDEN), 2.0))
    assert far.num_calls == 3


def test_a_side_at_zero_is_woken_by_one_call_and_not_waited_for(
    ask: Callable[[], torch.Tensor], far: Far, clock: Clock
) -> None:
    far.takes_s = 3.0
    started_s = clock.now_s
    for _ in range(5):
        with pytest.raises(WorkerStartingError):
            ask()
    assert clock.now_s - started_s < 0.1
    assert (far.num_calls, far.num_cancelled) == (1, 0)
    clock.now_s += 3.0
    far.takes_s = 0.001
    torch.testing.assert_close(ask(), torch.full((1, HIDDEN), 2.0))
    assert far.num_calls == 2


def test_a_side_that_answered_lately_is_waited_for(ask: Callable[[], torch.Tensor], far: Far, clock: Clock) -> None:
    ask()
    clock.now_s += 19.0
    far.takes_s = 1.5
    torch.testing.assert_close(ask(), torch.full((1, HIDDEN), 2.0))


def test_a_side_idle_for_long_may_be_at_zero_again(ask: Callable[[], torch.Tensor], far: Far, clock: Clock) -> None:
    ask()
    clock.now_s += 21.0
    far.takes_s = 3.0
    with pytest.raises(WorkerStartingError):
        ask()


def test_a_side_that_hangs_costs_one_deadline_and_not_one_a_call(
    ask: Callable[[], torch.Tensor], far: Far, clock: Clock
) -> None:
    ask()
    far.takes_s = 1e6
    started_s = clock.now_s
    with pytest.raises(WorkerTimeoutError):
        ask()
    for _ in range(10):
        with pytest.raises(WorkerStartingError, match="no answer yet to a call sent"):
            ask()
    assert clock.now_s - started_s == pytest.approx(2.0)
    clock.now_s += 60.0
    far.takes_s = 0.001
    torch.testing.assert_close(ask(), torch.full((1, HIDDEN), 2.0))
    assert far.num_cancelled == 1


def test_a_call_that_fails_late_frees_the_line(ask: Callable[[], torch.Tensor], far: Far, clock: Clock) -> None:
    far.takes_s = 3.0
    with pytest.raises(WorkerStartingError):
        ask()
    far.dies = True
    with pytest.raises(TransportError, match="its replica died"):
        ask()
    far.dies, far.takes_s = False, 0.001
    torch.testing.assert_close(ask(), torch.full((1, HIDDEN), 2.0))


def test_without_an_idle_time_the_other_side_is_always_there(far: Far, clock: Clock) -> None:
    far.takes_s = 1.5
    line = CallChannel(far, max_rows=8, clock=clock)
    torch.testing.assert_close(ask_once(line), torch.full((1, HIDDEN), 2.0))


def test_collect_without_submit_is_refused(far: Far) -> None:
    with pytest.raises(TransportError, match="collect without submit"):
        CallChannel(far, max_rows=8).collect(1.0)
