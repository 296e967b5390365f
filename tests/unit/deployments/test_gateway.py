"""The gateway's end of the channels to an engine, when the engine or the client goes away at a bad moment."""

from __future__ import annotations

import asyncio
import warnings
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from moeless.core.errors import QueueFullError
from moeless.core.generation import GenerationRequest, SamplingParams
from moeless.deployments.rpc import Pulse, SubmitReply
from moeless.deployments.token_channel import TokenReceiver

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # importing Ray Serve uses what pydantic has deprecated
    from moeless.deployments.gateway import RemoteEngineClient

REQUEST = GenerationRequest(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(max_tokens=4))


class Handle:
    """A Serve handle whose engine answers a submit with `reply`, or never."""

    def __init__(self, reply: SubmitReply | None) -> None:
        self._reply = reply
        self.asked = asyncio.Event()
        self.cancelled: list[str] = []
        self.submit = SimpleNamespace(remote=self._submit)
        self.pulse = SimpleNamespace(remote=self._pulse)
        self.cancel = SimpleNamespace(remote=self.cancelled.append)

    async def _submit(self, request: bytes, gateway: str) -> bytes:
        self.asked.set()
        if self._reply is None:
            await asyncio.Event().wait()
        return msgspec.msgpack.encode(self._reply)

    async def _pulse(self, gateway: str) -> bytes:
        return msgspec.msgpack.encode(Pulse(incarnation="one", is_ready=True))


async def first_delta(client: RemoteEngineClient) -> Any:
    return await anext(aiter(client.generate(REQUEST)))


def test_a_client_that_leaves_while_its_request_is_handed_over_cancels_it() -> None:
    async def scenario() -> list[str]:
        handle = Handle(None)
        client = RemoteEngineClient(handle, TokenReceiver("secret", "127.0.0.1"))  # type: ignore[arg-type]
        asking = asyncio.create_task(first_delta(client))
        await asyncio.wait_for(handle.asked.wait(), 20)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await client.close()
        return handle.cancelled

    assert asyncio.run(scenario()) == ["r"]


def test_a_request_that_the_engine_refused_is_not_cancelled() -> None:
    async def scenario() -> list[str]:
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
