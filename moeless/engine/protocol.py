"""Defines what every engine offers, whatever computes its steps: the protocol `Engine` and the gauges it reports.

Implemented by `moeless.engine.transformers`; used by deployments, LocalEngineClient and recording. Importing this
module loads neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from moeless.core.generation import GenerationDelta, GenerationRequest
from moeless.engine.observing import StepObservers

OnStep = Callable[[list[GenerationDelta]], None]
"""Called from the generation thread, once a step, with the deltas of all sequences of that step. Must not block."""


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """The engine's own gauges; `requests_waiting` are held but have not been computed on yet."""

    requests_running: int
    requests_waiting: int
    kv_cache_usage: float
    """Share of the KV memory that sequences hold, 0 to 1. Pages kept only for reuse count as free."""


class Engine(Protocol):
    """Generates for many requests at once. submit, cancel, counters and stop may be called from any thread."""

    max_context_tokens: int
    """Maximum tokens (prompt and completion together) of one request."""
    observers: StepObservers
    """Receives the routing of every step, where the dispatcher passes it on (Dispatcher.set_observer)."""

    def start(self) -> None:
        """Start the generation thread and return when it is ready. Raises what kept it from starting."""
        ...

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request; its deltas go to `on_step`, the last one with a finish reason.

        Raises QueueFullError, ContextLengthError, RequestError or EngineStoppedError.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request with reason "cancelled" and free its memory. Unknown and ended requests are ignored."""
        ...

    def counters(self) -> EngineCounters: ...

    def set_on_step(self, on_step: OnStep) -> None:
        """Set the receiver of deltas, once, before `start`."""
        ...

    @property
    def is_alive(self) -> bool:
        """True while requests are taken."""
        ...

    def stop(self) -> None:
        """Fail what is left with finish reason "error", end the thread and free the KV memory."""
        ...
