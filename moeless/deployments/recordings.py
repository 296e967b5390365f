"""Recordings across processes: the gateway's end of core.recording.RecordingClient, by calls of the engine's handle.

The engine's end is `answer`; neither end imports the other's world.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, Protocol

import msgspec

from moeless.core.errors import MoelessError
from moeless.core.recording import RecordedFile, RecordingClient, RecordingOptions, RecordingStatus
from moeless.deployments.rpc import RecordingCall, RecordingReply

_FINISH_TIMEOUT_S = 120.0
"""A gigabyte is sorted, written to a disk and flushed; some 10 s."""


class CallsEngine(Protocol):
    """How the gateway calls a method of the engine's deployment."""

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


async def answer(recordings: RecordingClient, encoded: bytes) -> bytes:
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
