"""A line over somebody else's calls: who is asked, how long is waited, and when another answer is taken instead."""

from __future__ import annotations

import math

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
    """The other side of a channel: answers a call after a delay in seconds, or fails it."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.takes_s = 0.001
        self.dies = False
        self.num_calls = 0
        self.num_cancelled = 0
        self.sent_s = 0.0

    def __call__(self, frame: bytes) -> Answer:
        self.num_calls += 1
        self.sent_s = self.clock.now_s
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
def line(far: Far, clock: Clock) -> CallChannel:
    return CallChannel(far, max_rows=8, patience_s=0.05, give_up_s=60.0, clock=clock)


def submit(line: CallChannel, num_rows: int = 1) -> None:
    rows = np.arange(num_rows)
    line.submit(
        LayerCall(
            layer=0,
            x_TH=torch.ones(num_rows, HIDDEN),
            tokens_R=rows,
            rows_n=rows,
            experts_n=np.zeros(num_rows, dtype=np.int64),
            weights_n=np.ones(num_rows, dtype=np.float32),
        )
    )


def ask(line: CallChannel, num_rows: int = 1) -> torch.Tensor:
    """One call, waited for 2 s at most."""
    submit(line, num_rows)
    return line.collect(2.0)


def assert_answered(line: CallChannel, num_rows: int = 1) -> None:
    torch.testing.assert_close(ask(line, num_rows), torch.full((num_rows, HIDDEN), 2.0))


def test_a_side_that_answers_is_asked_for_every_call(line: CallChannel, far: Far) -> None:
    for _ in range(3):
        assert_answered(line)
    assert far.num_calls == 3


def test_a_side_at_zero_is_woken_by_one_call_and_not_waited_for(line: CallChannel, far: Far, clock: Clock) -> None:
    far.takes_s = 3.0
    started_s = clock.now_s
    for _ in range(5):
        with pytest.raises(WorkerStartingError):
            ask(line)
    assert clock.now_s - started_s < 0.1
    assert (far.num_calls, far.num_cancelled) == (1, 0)
    clock.now_s += 3.0
    far.takes_s = 0.001
    assert_answered(line)
    assert far.num_calls == 2


def test_a_side_that_went_to_zero_over_and_over_is_never_waited_for_longer(
    line: CallChannel, far: Far, clock: Clock
) -> None:
    for _ in range(20):
        far.takes_s = 3.0
        started_s = clock.now_s
        with pytest.raises(WorkerStartingError):
            ask(line)
        assert clock.now_s - started_s < 0.1
        clock.now_s += 600.0  # the answer came, and is read long after
        far.takes_s = 0.001
        assert_answered(line)
        clock.now_s += 600.0


def test_lines_are_waited_for_at_once(far: Far, clock: Clock) -> None:
    far.takes_s = 3.0
    lines = [CallChannel(far, max_rows=8, patience_s=0.05, clock=clock) for _ in range(8)]
    started_s = clock.now_s
    for line in lines:
        submit(line)
    for line in lines:
        with pytest.raises(WorkerStartingError):
            line.collect(2.0)
    assert clock.now_s - started_s < 0.1


def test_a_call_of_many_rows_may_take_longer(line: CallChannel, far: Far) -> None:
    far.takes_s = 0.055
    assert_answered(line, num_rows=8)
    with pytest.raises(WorkerStartingError):
        ask(line, num_rows=1)


def test_a_side_that_is_slow_is_waited_for_in_time(line: CallChannel, far: Far, clock: Clock) -> None:
    far.takes_s = 0.3
    answered = 0
    for _ in range(20):
        try:
            ask(line)
            answered += 1
        except WorkerStartingError:
            clock.now_s += 0.3
    assert answered > 12


def test_no_call_is_waited_for_longer_than_collect_is_told(line: CallChannel, far: Far, clock: Clock) -> None:
    far.takes_s = 1.2
    for _ in range(5):  # until it is more patient than that
        with pytest.raises(WorkerStartingError):
            ask(line)
        clock.now_s = far.sent_s + 1.3
    assert_answered(line)
    submit(line)
    started_s = clock.now_s
    with pytest.raises(WorkerStartingError):
        line.collect(0.5)
    assert clock.now_s - started_s == pytest.approx(0.5)


def test_a_side_that_hangs_is_asked_again_after_a_while(line: CallChannel, far: Far, clock: Clock) -> None:
    far.takes_s = 1e6
    for _ in range(10):
        with pytest.raises(WorkerStartingError):
            ask(line)
    with pytest.raises(WorkerStartingError, match="no answer yet to a call sent"):
        ask(line)
    clock.now_s += 60.0
    far.takes_s = 0.001
    assert_answered(line)
    assert (far.num_calls, far.num_cancelled) == (2, 1)


def test_a_call_that_fails_late_frees_the_line(line: CallChannel, far: Far) -> None:
    far.takes_s = 3.0
    with pytest.raises(WorkerStartingError):
        ask(line)
    far.dies = True
    with pytest.raises(TransportError, match="its replica died"):
        ask(line)
    far.dies, far.takes_s = False, 0.001
    assert_answered(line)


def test_nothing_is_wanted_of_a_line_that_is_closed(line: CallChannel, far: Far) -> None:
    far.takes_s = 3.0
    with pytest.raises(WorkerStartingError):
        ask(line)
    line.close()
    line.close()
    assert far.num_cancelled == 1


def test_a_line_may_be_as_patient_as_it_is_told(far: Far, clock: Clock) -> None:
    far.takes_s = 1.5
    assert_answered(CallChannel(far, max_rows=8, patience_s=math.inf, clock=clock))


def test_collect_without_submit_is_refused(far: Far) -> None:
    with pytest.raises(TransportError, match="collect without submit"):
        CallChannel(far, max_rows=8).collect(1.0)
