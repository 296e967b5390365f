"""What an engine answers a gateway's calls with."""

from __future__ import annotations

from typing import Any, Literal, Self

import msgspec

from moeless.core.errors import (
    ContextLengthError,
    EngineStoppedError,
    MoelessError,
    QueueFullError,
    RecordingError,
    RequestError,
)
from moeless.core.recording import RecordedFile, RecordingOptions, RecordingStatus

ErrorKind = Literal["", "context_length", "request", "recording", "queue_full", "stopped"]
_REQUEST_ERRORS: dict[ErrorKind, type[RequestError]] = {
    # the most special first
    "context_length": ContextLengthError,
    "recording": RecordingError,
    "request": RequestError,
}


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that may be an error of ours."""

    kind: ErrorKind = ""
    message: str = ""
    param: str | None = None
    code: str | None = None
    retry_after_s: float = 1.0

    @classmethod
    def of_error(cls, error: MoelessError, **own: Any) -> Self:
        """`own`: the fields that a kind of reply has beside the error's."""
        if isinstance(error, RequestError):
            kind = next(kind for kind, known in _REQUEST_ERRORS.items() if isinstance(error, known))
            return cls(kind=kind, message=str(error), param=error.param, code=error.code, **own)
        if isinstance(error, QueueFullError):
            return cls(kind="queue_full", message=str(error), retry_after_s=error.retry_after_s, **own)
        return cls(kind="stopped", message=str(error), **own)

    def raise_error(self) -> None:
        """Raise what the engine raised; return if it raised nothing."""
        if self.kind in _REQUEST_ERRORS:
            raise _REQUEST_ERRORS[self.kind](self.message, param=self.param, code=self.code)
        if self.kind == "queue_full":
            raise QueueFullError(self.message, retry_after_s=self.retry_after_s)
        if self.kind == "stopped":
            raise EngineStoppedError(self.message)


class SubmitReply(Reply, frozen=True, kw_only=True):
    """Whether a request was queued, and by which life of the engine."""

    incarnation: str


RecordingAction = Literal["start", "status", "stop", "discard", "finish", "read"]


class RecordingCall(msgspec.Struct, frozen=True, kw_only=True):
    """A method of core.recording.RecordingClient and what it takes."""

    action: RecordingAction
    options: RecordingOptions | None = None
    file_id: str = ""
    offset: int = 0


class RecordingReply(Reply, frozen=True, kw_only=True):
    """What the method gave."""

    status: RecordingStatus | None = None
    file: RecordedFile | None = None
    data: bytes = b""


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """That an engine lives, which life it is, and whether it can answer now."""

    incarnation: str
    is_ready: bool
