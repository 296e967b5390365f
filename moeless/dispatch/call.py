"""Transport over somebody else's remote call: the same frames as bytes in, bytes out.

`isolation: function` uses it with a Ray Serve handle, so that Serve sees the load and scales each function itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from moeless.core.errors import TransportError, WorkerStartingError, WorkerTimeoutError
from moeless.dispatch.wire import (
    Frame,
    LayerCall,
    ReceivedCall,
    answer_bytes,
    call_bytes,
    read_answer,
    read_call,
    write_answer,
    write_call,
)

_ASLEEP_S = 0.05
"""How long to wait for a side that may be at zero replicas: ten times a warm call through Serve. A start takes
seconds."""


class PendingAnswer(Protocol):
    """A call under way."""

    def result(self, timeout_s: float) -> bytes:
        """The answer's frame. Raises TransportError, or WorkerTimeoutError after `timeout_s` seconds; may be asked
        again then."""
        ...

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        ...


class CallChannel:
    """A line whose every call is one remote call. Never broken: the other side replaces what dies.

    A call that is not answered in time stays under way, because it is what wakes a side that scaled to zero; until it
    ends, every other call is refused at once, so that one side that starts or hangs does not stall each layer.

    Args:
        start_call: sends a frame.
        max_rows: most rows of one call.
        idle_s: a side that answered nothing for so many seconds may have scaled to zero, and the next call to it is
            waited for no longer than a warm one takes. None: it is always there.
        give_up_s: a call that is under way for so long is cancelled, and the next one sent.
        clock: seconds.
    """

    kind = "serve"
    is_broken = False

    def __init__(
        self,
        start_call: Callable[[bytes], PendingAnswer],
        *,
        max_rows: int,
        idle_s: float | None = None,
        give_up_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_rows = max_rows
        self._start_call = start_call
        self._idle_s = idle_s
        self._give_up_s = give_up_s
        self._clock = clock
        self._sequence = 0
        self._shape = (0, 0)
        self._pending: PendingAnswer | None = None
        self._late: PendingAnswer | None = None
        self._sent_s = 0.0
        self._answered_s: float | None = None

    def submit(self, call: LayerCall) -> None:
        """Raises WorkerStartingError while an earlier call is under way."""
        if self._late is not None and not self._has_ended(self._late):
            raise WorkerStartingError(f"no answer yet to a call sent {self._clock() - self._sent_s:.1f} s ago")
        self._late = None
        self._sequence += 1
        self._shape = num_rows, hidden = len(call.tokens_R), call.x_TH.shape[1]
        frame = bytearray(call_bytes(num_rows, len(call.rows_n), hidden, call.x_TH.dtype))
        write_call(Frame(memoryview(frame)), call, self._sequence)
        self._sent_s = self._clock()
        self._pending = self._start_call(bytes(frame))

    def collect(self, timeout_s: float) -> torch.Tensor:
        """Raises WorkerStartingError where the other side may have been asleep."""
        pending, self._pending = self._pending, None
        if pending is None:
            raise TransportError("collect without submit")
        may_sleep = self._may_sleep()
        try:
            frame = pending.result(min(timeout_s, _ASLEEP_S) if may_sleep else timeout_s)
        except WorkerTimeoutError as error:
            self._late = pending
            if may_sleep:
                raise WorkerStartingError("it may be starting from zero") from error
            raise
        self._answered_s = self._clock()
        return read_answer(Frame(memoryview(bytearray(frame))), self._sequence, self._shape)

    def close(self) -> None:
        self._pending = self._late = None

    def _may_sleep(self) -> bool:
        if self._idle_s is None:
            return False
        return self._answered_s is None or self._sent_s - self._answered_s >= self._idle_s

    def _has_ended(self, late: PendingAnswer) -> bool:
        try:
            late.result(0.0)
        except WorkerTimeoutError:
            if self._clock() - self._sent_s < self._give_up_s:
                return False
            late.cancel()
        except TransportError:
            pass  # its replica died, say; the next call goes to another
        else:
            self._answered_s = self._clock()
        return True


def answer_call(
    frame: bytes, compute: Callable[[ReceivedCall], torch.Tensor], *, max_rows: int, num_experts: list[int]
) -> bytes:
    """The other side: compute a call's frame into an answer's frame.

    Raises: TransportError for a frame that is no call; what `compute` raises.
    """
    call = read_call(Frame(memoryview(bytearray(frame))), max_rows=max_rows, num_experts=num_experts)
    partial_RH = compute(call)
    answer = bytearray(answer_bytes(len(partial_RH), partial_RH.shape[1], partial_RH.dtype))
    write_answer(Frame(memoryview(answer)), call.sequence, partial_RH)
    return bytes(answer)
