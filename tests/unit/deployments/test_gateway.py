"""The gateway's end of the channels to an engine, when the engine or the client goes away at a bad moment."""

from __future__ import annotations

import asyncio
import contextvars
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from moeless.core.errors import QueueFullError
from moeless.core.generation import GenerationDelta, GenerationRequest, SamplingParams
from moeless.deployments.rpc import CancelCall, Pulse, PulseCall, SubmitReply
from moeless.deployments.token_channel import TokenReceiver, TokenSender

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # importing Ray Serve uses what pydantic has deprecated
    from moeless.deployments.gateway import RemoteEngineClient

REQUEST = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=4))


class Handle:
    """A Serve handle whose engine answers a submit with `reply`, or never, and a pulse with what `unknown` returns."""

    def __init__(self, reply: SubmitReply | None, *, is_lost: bool = False) -> None:
        self._reply = reply
        self.is_lost = is_lost
        self.asked = asyncio.Event()
        self.has_cancelled = asyncio.Event()
        self.cancelled: list[int] = []
        self.pulses: list[PulseCall] = []
        self.caller = contextvars.ContextVar("caller", default="nobody")
        self.cancelled_by = ""
        self.submit = SimpleNamespace(remote=self._submit)
        self.pulse = SimpleNamespace(remote=self._pulse)
        self.cancel = SimpleNamespace(remote=self._cancel)

    async def _submit(self, call: bytes) -> bytes:
        self.asked.set()
        if self._reply is None:
            await asyncio.Event().wait()
        return msgspec.msgpack.encode(self._reply)

    async def _pulse(self, call: bytes) -> bytes:
        self.pulses.append(msgspec.msgpack.decode(call, type=PulseCall))
        unknown = self.pulses[-1].live if self.is_lost else []
        return msgspec.msgpack.encode(Pulse(incarnation="one", is_ready=True, unknown=unknown))

    async def _cancel(self, call: bytes) -> None:
        self.cancelled_by = self.caller.get()
        self.cancelled += msgspec.msgpack.decode(call, type=CancelCall).numbers
        self.has_cancelled.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def first_delta(client: RemoteEngineClient) -> Any:
    return await anext(aiter(client.generate(REQUEST)))


def test_a_client_that_leaves_while_its_request_is_handed_over_cancels_it_outside_the_requests_context() -> None:
    async def scenario() -> Handle:
        handle = Handle(None)
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        handle.caller.set("a request")  # as Serve does: what is called in a request's context is cancelled with it
        asking = asyncio.create_task(first_delta(client))
        await asyncio.wait_for(handle.asked.wait(), 20)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.wait_for(handle.has_cancelled.wait(), 20)
        await client.close()
        return handle

    handle = asyncio.run(scenario())
    assert handle.cancelled == [1]
    assert handle.cancelled_by == "nobody"


def test_a_pulse_names_the_requests_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.deployments.gateway._PULSE_EVERY_S", 0.01)

    async def scenario() -> tuple[PulseCall, PulseCall]:
        handle = Handle(SubmitReply(incarnation="one"))
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        asking = asyncio.create_task(first_delta(client))
        await until(lambda: any(pulse.live for pulse in handle.pulses))
        reading = handle.pulses[-1]
        asking.cancel()
        await asyncio.wait({asking})
        await until(lambda: not handle.pulses[-1].live)
        await client.close()
        return reading, handle.pulses[-1]

    reading, left = asyncio.run(scenario())
    assert (reading.last_number, reading.live) == (1, [1])
    assert (left.last_number, left.live) == (1, [])


def test_the_stream_of_a_request_that_the_engine_lost_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.deployments.gateway._PULSE_EVERY_S", 0.01)

    async def scenario() -> Any:
        handle = Handle(SubmitReply(incarnation="one"), is_lost=True)
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        delta = await asyncio.wait_for(first_delta(client), 20)
        await client.close()
        return delta

    delta = asyncio.run(scenario())
    assert (delta.finish_reason, delta.error) == ("error", "the engine ended the request")


def test_the_end_of_a_stream_may_take_longer_than_two_pulses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.deployments.gateway._PULSE_EVERY_S", 0.01)

    async def scenario() -> Any:
        handle = Handle(SubmitReply(incarnation="one"))
        receiver = TokenReceiver("secret", "127.0.0.1")
        client = RemoteEngineClient(handle, receiver)  # type: ignore[arg-type]
        asking = asyncio.create_task(first_delta(client))
        await until(lambda: any(pulse.live for pulse in handle.pulses))
        handle.is_lost, before = True, len(handle.pulses)
        await until(lambda: len(handle.pulses) >= before + 3)
        handle.is_lost = False
        sender = TokenSender("secret")
        sender.send(receiver.address, [GenerationDelta(request_id="r", finish_reason="stop")])
        delta = await asyncio.wait_for(asking, 20)
        sender.close()
        await client.close()
        return delta

    assert asyncio.run(scenario()).finish_reason == "stop"


def test_a_request_that_the_engine_refused_is_not_cancelled() -> None:
    async def scenario() -> list[int]:
        handle = Handle(SubmitReply(incarnation="one", kind="queue_full", message="full"))
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        with pytest.raises(QueueFullError, match="full"):
            await first_delta(client)
        await client.close()
        return handle.cancelled

    assert asyncio.run(scenario()) == []


def test_the_streams_of_an_engine_that_came_back_end_with_an_error() -> None:
    async def scenario() -> Any:
        handle = Handle(SubmitReply(incarnation="an earlier life"))
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        delta = await asyncio.wait_for(first_delta(client), 20)
        await client.close()
        return delta

    delta = asyncio.run(scenario())
    assert (delta.finish_reason, delta.error) == ("error", "the engine was restarted")
