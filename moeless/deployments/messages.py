"""What an engine answers a gateway's calls with."""

from __future__ import annotations

from typing import Literal

import msgspec

from moeless.core.errors import ContextLengthError, EngineStoppedError, MoelessError, QueueFullError, RequestError

ErrorKind = Literal["", "context_length", "request", "queue_full", "stopped"]


class SubmitReply(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a request was queued, and by which life of the engine."""

    incarnation: str
    kind: ErrorKind = ""
    message: str = ""
    param: str | None = None
    code: str | None = None
    retry_after_s: float = 1.0

    @classmethod
    def of_error(cls, error: MoelessError, incarnation: str) -> SubmitReply:
        if isinstance(error, RequestError):
            kind: ErrorKind = "context_length" if isinstance(error, ContextLengthError) else "request"
            return cls(incarnation=incarnation, kind=kind, message=str(error), param=error.param, code=error.code)
        if isinstance(error, QueueFullError):
            return cls(
                incarnation=incarnation, kind="queue_full", message=str(error), retry_after_s=error.retry_after_s
            )
        return cls(incarnation=incarnation, kind="stopped", message=str(error))

    def raise_error(self) -> None:
        """Raise what the engine raised; return if it queued the request."""
        if self.kind == "context_length":
            raise ContextLengthError(self.message, param=self.param, code=self.code)
        if self.kind == "request":
            raise RequestError(self.message, param=self.param, code=self.code)
        if self.kind == "queue_full":
            raise QueueFullError(self.message, retry_after_s=self.retry_after_s)
        if self.kind == "stopped":
            raise EngineStoppedError(self.message)


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """That an engine lives, which life it is, and whether it can answer now."""

    incarnation: str
    is_ready: bool
