"""Calls from gateway to engine, by the engine's Serve handle: their messages, and recordings by them at both ends.

The recordings' engine end is `answer_recording`; neither end imports what the other computes with.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Literal, Protocol, Self

import msgspec

from moeless.core.errors import (
    ContextLengthError,
    EngineStoppedError,
    MoelessError,
    QueueFullError,
    RecordingError,
    RequestError,
)
from moeless.core.generation import GenerationRequest
from moeless.core.recording import RecordedFile, RecordingClient, RecordingOptions, RecordingStatus

_FINISH_TIMEOUT_S = 120.0
"""A gigabyte is sorted, written to a disk and flushed; some 10 s."""

ErrorKind = Literal["", "context_length", "request", "recording", "queue_full", "stopped"]
_REQUEST_ERRORS: dict[ErrorKind, type[RequestError]] = {
    # the most specific first
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
    """Result of the method."""

    status: RecordingStatus | None = None
    file: RecordedFile | None = None
    data: bytes = b""


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """Sign of life of an engine: its incarnation, and whether it can answer now."""

    incarnation: str
    is_ready: bool
    unknown: list[int] = []
    """Requests that the gateway reads and the engine does not hold: ended, or not there yet."""


class GatewayName(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a gateway."""

    address: str
    """Address at which its end of the token channel listens."""
    life: str
    """Random: a later gateway may get the same address."""


class SubmitCall(msgspec.Struct, frozen=True, kw_only=True):
    """A request whose deltas go to the token channel of `gateway`; its gateway counts its requests from 1."""

    gateway: GatewayName
    number: int
    request: GenerationRequest


class CancelCall(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that nobody reads any more, by number."""

    gateway: GatewayName
    numbers: list[int]


class PulseCall(msgspec.Struct, frozen=True, kw_only=True):
    """Sign of life of a gateway, with the requests that it still reads: of those up to `last_number`, only `live`."""

    gateway: GatewayName
    last_number: int = 0
    live: list[int] = []


class CallsEngine(Protocol):
    """Calls a method of the engine's deployment from the gateway."""

    def __call__(self, method: str, *args: object, timeout_s: float = ...) -> Awaitable[Any]: ...


class RemoteRecordings:
    """Args:
    call: the engine's deployment.
    """

    def __init__(self, call: CallsEngine) -> None:
        self._call = call

    async def start(self, options: RecordingOptions) -> RecordingStatus:
        return _status(await self._ask(RecordingCall(action="start", options=options)))

    async def status(self) -> RecordingStatus:
        return _status(await self._ask(RecordingCall(action="status")))

    async def stop(self) -> RecordingStatus:
        return _status(await self._ask(RecordingCall(action="stop")))

    async def discard(self) -> RecordingStatus:
        return _status(await self._ask(RecordingCall(action="discard")))

    async def finish(self) -> RecordedFile:
        reply = await self._ask(RecordingCall(action="finish"), timeout_s=_FINISH_TIMEOUT_S)
        assert reply.file is not None
        return reply.file

    async def read(self, file_id: str, offset: int) -> bytes:
        return (await self._ask(RecordingCall(action="read", file_id=file_id, offset=offset))).data

    async def _ask(self, call: RecordingCall, **options: Any) -> RecordingReply:
        answer = await self._call("recording", msgspec.msgpack.encode(call), **options)
        reply = msgspec.msgpack.decode(answer, type=RecordingReply)
        reply.raise_error()
        return reply


async def answer_recording(recordings: RecordingClient, encoded: bytes) -> bytes:
    """At the engine: do what a RecordingCall asks and encode a RecordingReply."""
    call = msgspec.msgpack.decode(encoded, type=RecordingCall)
    try:
        match call.action:
            case "start":
                reply = RecordingReply(status=await recordings.start(call.options or RecordingOptions()))
            case "finish":
                reply = RecordingReply(file=await recordings.finish())
            case "read":
                reply = RecordingReply(data=await recordings.read(call.file_id, call.offset))
            case "status":
                reply = RecordingReply(status=await recordings.status())
            case "stop":
                reply = RecordingReply(status=await recordings.stop())
            case "discard":
                reply = RecordingReply(status=await recordings.discard())
    except MoelessError as error:
        reply = RecordingReply.of_error(error)
    return msgspec.msgpack.encode(reply)


def _status(reply: RecordingReply) -> RecordingStatus:
    assert reply.status is not None
    return reply.status
