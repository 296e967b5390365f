"""The token channel, engine to gateway, over real ZeroMQ sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest
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


def test_a_long_message_arrives_whole() -> None:
    async def scenario() -> list[GenerationDelta]:
        receiver, sender = TokenReceiver("secret", "127.0.0.1"), TokenSender("secret")
        receiver.start()
        receiver.open_stream("a")
        sender.send(receiver.address, [GenerationDelta(request_id="a", text="x" * 3_000_000, finish_reason="stop")])
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        sender.close()
        await receiver.close()
        return deltas

    (delta,) = asyncio.run(scenario())
    assert delta.text == "x" * 3_000_000


def test_a_step_too_large_to_send_ends_its_request_alone_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.deployments.token_channel._MAX_MESSAGE_BYTES", 1000)

    async def scenario() -> tuple[list[GenerationDelta], list[GenerationDelta]]:
        receiver, sender = TokenReceiver("secret", "127.0.0.1"), TokenSender("secret")
        receiver.start()
        for request_id in ("small", "large"):
            receiver.open_stream(request_id)
        deltas = [
            GenerationDelta(request_id="large", text="x" * 2000),
            GenerationDelta(request_id="small", text="x", finish_reason="stop"),
        ]
        assert sender.send(receiver.address, deltas)
        got = await asyncio.wait_for(
            asyncio.gather(collect(receiver.deltas("small")), collect(receiver.deltas("large"))), timeout=20
        )
        sender.close()
        await receiver.close()
        return got[0], got[1]

    (small,), (large,) = asyncio.run(scenario())
    assert small.finish_reason == "stop"
    assert large.finish_reason == "error"
    assert "must be at most 1000 bytes, got 2" in str(large.error)


def test_a_step_that_is_sent_in_parts_keeps_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeless.deployments.token_channel._MAX_MESSAGE_BYTES", 1000)

    async def scenario() -> list[GenerationDelta]:
        receiver, sender = TokenReceiver("secret", "127.0.0.1"), TokenSender("secret")
        receiver.start()
        receiver.open_stream("a")
        deltas = [GenerationDelta(request_id="a", text=str(number) * 400) for number in range(5)]
        assert sender.send(receiver.address, [*deltas, GenerationDelta(request_id="a", finish_reason="stop")])
        got = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        sender.close()
        await receiver.close()
        return got

    assert "".join(delta.text[:1] for delta in asyncio.run(scenario())) == "01234"


FORGED = [GenerationDelta(request_id="a", text="forged", num_tokens=1)]
CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
NULL_GREETING = CURVE_GREETING.replace(b"CURVE", b"NULL\0")
READY = b"\x04\x1a\x05READY\x0bSocket-Type\x00\x00\x00\x04PUSH"
MORE_TO_COME = b"\x01\xff" + bytes(255)
LARGE_COMMAND = b"\x06" + (1 << 30).to_bytes(8, "big") + b"\x05HELLO"
HELLO = b"\x04\xc8\x05HELLO" + bytes(194)


@pytest.mark.parametrize(
    ("opening", "endless"),
    [
        (NULL_GREETING + READY, MORE_TO_COME),
        (CURVE_GREETING, MORE_TO_COME),
        (CURVE_GREETING + HELLO, MORE_TO_COME),
        (CURVE_GREETING + LARGE_COMMAND, bytes(1000)),
        (b"\x01\x00", MORE_TO_COME),  # the protocol before there were mechanisms
        (b"", bytes(1000)),
    ],
    ids=["no mechanism", "frames before the handshake", "false hello", "large command", "old protocol", "zeros"],
)
def test_a_stranger_that_sends_without_end_is_cut_off_and_grows_no_memory(opening: bytes, endless: bytes) -> None:
    async def scenario() -> tuple[int, int, list[GenerationDelta]]:
        receiver = TokenReceiver("secret", "127.0.0.1")
        receiver.start()
        receiver.open_stream("a")
        before = psutil.Process().memory_info().rss
        num_bytes = await asyncio.to_thread(send_until_cut_off, receiver.address, opening, endless)
        growth = psutil.Process().memory_info().rss - before
        sender = TokenSender("secret")  # those of the run are still heard
        sender.send(receiver.address, [GenerationDelta(request_id="a", finish_reason="stop")])
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        sender.close()
        await receiver.close()
        return num_bytes, growth, deltas

    num_bytes, growth, deltas = asyncio.run(scenario())
    assert num_bytes < 64 << 20
    assert growth < 16 << 20
    assert [delta.text for delta in deltas] == [""]


def send_until_cut_off(address: str, opening: bytes, endless: bytes) -> int:
    """Send as a stranger until the receiver closes, or 256 MiB are gone. Returns the bytes sent."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    block = endless * (65536 // len(endless))
    num_bytes = 0
    with socket.create_connection((host, int(port)), timeout=20) as stranger:
        try:
            stranger.sendall(opening)
            if READY in opening:  # a receiver without authentication says that it is ready, too
                stranger.settimeout(20)
                heard = b""
                while b"READY" not in heard and (chunk := stranger.recv(4096)):
                    heard += chunk
            while num_bytes < 256 << 20:
                stranger.sendall(block)
                num_bytes += len(block)
        except (ConnectionResetError, BrokenPipeError):
            return num_bytes
    return num_bytes


def test_a_peer_with_another_secret_is_not_heard() -> None:
    async def scenario() -> list[GenerationDelta]:
        receiver, stranger, sender = TokenReceiver("secret", "127.0.0.1"), TokenSender("guess"), TokenSender("secret")
        receiver.start()
        receiver.open_stream("a")
        with refused_handshakes(stranger, receiver.address) as refused:
            stranger.send(receiver.address, FORGED)
            await asyncio.wait_for(asyncio.to_thread(refused), timeout=20)
        sender.send(receiver.address, [GenerationDelta(request_id="a", finish_reason="stop")])
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        stranger.close()
        sender.close()
        await receiver.close()
        return deltas

    assert [(delta.text, delta.finish_reason) for delta in asyncio.run(scenario())] == [("", "stop")]


@contextmanager
def refused_handshakes(sender: TokenSender, address: str) -> Iterator[Callable[[], object]]:
    """Yields what waits until a handshake of `sender` has been refused."""
    monitor = sender._socket(address).get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    try:
        yield monitor.recv_multipart
    finally:
        sender._socket(address).disable_monitor()
        monitor.close()


def test_a_message_of_the_run_that_cannot_be_decoded_is_dropped() -> None:
    async def scenario() -> list[GenerationDelta]:
        receiver, sender = TokenReceiver("secret", "127.0.0.1"), TokenSender("secret")
        receiver.start()
        receiver.open_stream("a")
        sender._socket(receiver.address).send(b"\xff\x00 not msgpack")
        sender.send(receiver.address, [GenerationDelta(request_id="a", finish_reason="stop")])
        deltas = await asyncio.wait_for(collect(receiver.deltas("a")), timeout=20)
        sender.close()
        await receiver.close()
        return deltas

    assert [delta.finish_reason for delta in asyncio.run(scenario())] == ["stop"]


def test_what_is_sent_cannot_be_read_on_the_way() -> None:
    """A listener in the gateway's place sees no text, and without the secret cannot be the gateway."""
    sender = TokenSender("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender.send(f"tcp://127.0.0.1:{listener.getsockname()[1]}", FORGED)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(20)
            connection.sendall(CURVE_GREETING)
            heard = b""
            while b"HELLO" not in heard:
                heard += connection.recv(4096)
            connection.sendall(b"\x04\xa8\x07WELCOME" + bytes(160))
            while chunk := connection.recv(4096):
                heard += chunk
    sender.close()
    assert b"CURVE" in heard
    assert b"forged" not in heard


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
