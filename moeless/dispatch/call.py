"""Transport over somebody else's remote call: the same frames as bytes in, bytes out.

`isolation: function` uses it with a Ray Serve handle, so that Serve sees the load and scales each function itself.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

_PATIENCE_S = 0.05
"""Ten times what a call of few rows takes through Serve; a start from zero takes seconds."""
_ROWS_OF_A_CALL = 50
"""Number of rows that takes as long again as a call of few rows."""
_START_S = 1.5
"""No replica starts from zero in less time: an answer within it came from a slow replica."""
_CALMING = 0.95
"""Factor on patience for each answer in time, down to its first value."""


class PendingAnswer(Protocol):
    """A call under way."""

    def result(self, timeout_s: float) -> bytes:
        """The answer's frame. Raises TransportError, or WorkerTimeoutError after `timeout_s` seconds; may be asked
        again then."""
        ...

    def cancel(self) -> None:
        """Drop the answer, which is no longer needed. Does not raise."""
        ...


class CallChannel:
    """A channel whose every call is one remote call. Never broken: the other side replaces what dies.

    Whether the other side runs is not known here: it may have scaled to zero, or hang. So a call is waited for about as
    long as it takes where it runs, and no longer. One that is not answered then stays under way, because it is what
    wakes the other side; until it ends, every other call is refused at once. Where the answer comes sooner than
    anything can start, calls take longer there: the channel is twice as patient then, and less so as calls are answered
    in time.

    Args:
        start_call: sends a frame.
        max_rows: most rows of one call.
        patience_s: how long a call of few rows is waited for at first; a row adds a fiftieth. Infinite: as long as
            `collect` is given.
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
        patience_s: float = _PATIENCE_S,
        give_up_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_rows = max_rows
        self._start_call = start_call
        self._patience_s = patience_s
        self._give_up_s = give_up_s
        self._clock = clock
        self._sequence = 0
        self._shape = (0, 0)
        self._pending: PendingAnswer | None = None
        self._late: PendingAnswer | None = None
        self._sent_s = 0.0
        self._scale = 1.0

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
        """Wait from when the call was sent, so that waits for several channels pass at once.

        Raises: WorkerStartingError where there is no answer in time; the channel is as good as before.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            raise TransportError("collect without submit")
        limit_s = min(timeout_s, self._scale * self._patience_s * self._size)
        try:
            frame = pending.result(max(0.0, self._sent_s + limit_s - self._clock()))
        except WorkerTimeoutError as error:
            self._late = pending
            raise WorkerStartingError(f"no answer within {limit_s:.2f} s; it may be starting") from error
        self._scale = max(1.0, _CALMING * self._scale)
        return read_answer(Frame(memoryview(bytearray(frame))), self._sequence, self._shape)

    def close(self) -> None:
        """Cancel the calls under way."""
        for call in (self._pending, self._late):
            if call is not None:
                call.cancel()
        self._pending = self._late = None

    @property
    def _size(self) -> float:
        """Size of the last call, as a multiple of a call of few rows."""
        return 1 + self._shape[0] / _ROWS_OF_A_CALL

    def _has_ended(self, late: PendingAnswer) -> bool:
        try:
            late.result(0.0)
        except WorkerTimeoutError:
            waited_s = self._clock() - self._sent_s
            if waited_s < self._give_up_s:
                return False
            logger.warning("a call was never answered seconds=%.0f", waited_s)
            late.cancel()
        except TransportError:
            pass  # its replica died, say; the next call goes to another
        else:
            if self._clock() - self._sent_s < _START_S * self._size:
                self._scale *= 2
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
