"""Transport over somebody else's remote call: the same frames as bytes in, bytes out.

`isolation: function` uses it with a Ray Serve handle, so that Serve sees the load and scales each function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from moeless.core.errors import TransportError
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


class PendingAnswer(Protocol):
    """A call under way."""

    def result(self, timeout_s: float) -> bytes:
        """The answer's frame. Raises TransportError, or WorkerTimeoutError after `timeout_s` seconds."""
        ...


class CallChannel:
    """A line whose every call is one remote call. Never broken: the other side replaces what dies."""

    kind = "serve"
    is_broken = False

    def __init__(self, start_call: Callable[[bytes], PendingAnswer], *, max_rows: int) -> None:
        self.max_rows = max_rows
        self._start_call = start_call
        self._sequence = 0
        self._shape = (0, 0)
        self._pending: PendingAnswer | None = None

    def submit(self, call: LayerCall) -> None:
        self._sequence += 1
        self._shape = num_rows, hidden = len(call.tokens_R), call.x_TH.shape[1]
        frame = bytearray(call_bytes(num_rows, len(call.rows_n), hidden, call.x_TH.dtype))
        write_call(Frame(memoryview(frame)), call, self._sequence)
        self._pending = self._start_call(bytes(frame))

    def collect(self, timeout_s: float) -> torch.Tensor:
        pending, self._pending = self._pending, None
        if pending is None:
            raise TransportError("collect without submit")
        return read_answer(Frame(memoryview(bytearray(pending.result(timeout_s)))), self._sequence, self._shape)

    def close(self) -> None:
        self._pending = None


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
