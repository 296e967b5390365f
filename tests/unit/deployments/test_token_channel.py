"""The token channel, engine to gateway, over real ZeroMQ sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import zmq

from moeless.core.generation import GenerationDelta
from moeless.deployments.token_channel import TokenReceiver, TokenSender


async def collect(stream: AsyncIterator[GenerationDelta]) -> list[GenerationDelta]:
    return [delta async for delta in stream]


def test_each_stream_gets_its_deltas_in_order() -> None:
    async def scenario() -> tuple[list[GenerationDelta], list[GenerationDelta]]:
        receiver = TokenReceiver("secret", "127.0.0.1")
        receiver.start()
        sender = TokenSender("secret")
        for request_id in ("a", "b"):
            receiver.open_stream(request_id)
        for step in range(50):
            sender.send(
                receiver.address,
                [GenerationDelta(request_id=i, text=str(step), num_tokens=1) for i in ("a", "b", "nobody")],
            )
        last = [GenerationDelta(request_id=i, finish_reason="stop") for i in ("a", "b")]
        sender.send(receiver.address, last)
        got = await asyncio.wait_for(
            asyncio.gather(collect(receiver.deltas("a")), collect(receiver.deltas("b"))), timeout=20
        )
        sender.close()
        await receiver.close()
        return got[0], got[1]

    for deltas in asyncio.run(scenario()):
        assert [delta.text for delta in deltas] == [*map(str, range(50)), ""]
        assert deltas[-1].finish_reason == "stop"


def test_messages_without_the_run_secret_or_sense_are_dropped() -> None:
    async def scenario() -> list[GenerationDelta]:
        receiver = TokenReceiver("secret", "127.0.0.1")
        receiver.start()
        receiver.open_stream("a")
        forged = msgspec.msgpack.encode([GenerationDelta(request_id="a", text="forged", num_tokens=1)])
        context = zmq.Context()
        stranger = context.socket(zmq.PUSH)
        stranger.connect(receiver.address)
        for frames in ([b"guess", forged], [forged], [b"secret", b"\xff\x00 not msgpack"]):
            stranger.send_multipart(frames)
        stranger.send_multipart(
            [b"secret", msgspec.msgpack.encode([GenerationDelta(request_id="a", finish_reason="stop")])]
        )
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        stranger.close()
        context.term()
        await receiver.close()
        return deltas

    deltas = asyncio.run(scenario())
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", "stop")]


def test_streams_of_a_lost_engine_end_with_an_error() -> None:
    async def scenario() -> list[GenerationDelta]:
        receiver = TokenReceiver("secret", "127.0.0.1")
        receiver.start()
        receiver.open_stream("a")
        receiver.fail_streams(["a", "gone"], "the engine was restarted")
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        await receiver.close()
        return deltas

    (delta,) = asyncio.run(scenario())
    assert delta.finish_reason == "error"
    assert delta.error == "the engine was restarted"


def test_a_gateway_that_is_gone_does_not_block_the_sender() -> None:
    sender = TokenSender("secret")
    for _ in range(20_000):
        sent = sender.send("tcp://127.0.0.1:9", [GenerationDelta(request_id="a")])
    assert not sent
    sender.forget("tcp://127.0.0.1:9")
    sender.close()
