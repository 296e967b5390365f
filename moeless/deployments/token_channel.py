"""Tokens from engine to gateway: one channel for each pair of them, one message a step for all its streams.

Requests go by Serve handle; a handle item for each token would cost more than the decoding. ZeroMQ carries the
messages, msgspec encodes them; every message shows the run secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio

from moeless.core.errors import EngineStoppedError
from moeless.core.generation import GenerationDelta

logger = logging.getLogger(__name__)

_SEND_HIGH_WATER_MARK = 10_000
"""Steps that a gateway may lag behind before its messages are dropped: a minute at 160 steps a second."""
_MAX_MESSAGE_BYTES = 64 << 20
"""A step of thousands of sequences with log-probabilities stays far below; a stranger's message does not get past."""


class TokenSender:
    """Engine side. All methods but the constructor belong to one thread, the generation thread."""

    def __init__(self, run_secret: str) -> None:
        self._run_secret = run_secret.encode()
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, address: str, deltas: list[GenerationDelta]) -> bool:
        """Send one step's deltas to the gateway at `address`; False if it does not take them any more."""
        socket = self._sockets.get(address)
        if socket is None:
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, _SEND_HIGH_WATER_MARK)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(address)
            self._sockets[address] = socket
        try:
            socket.send_multipart((self._run_secret, self._encoder.encode(deltas)), flags=zmq.NOBLOCK, copy=True)
        except zmq.Again:
            logger.warning("dropped a step for a gateway address=%s deltas=%d", address, len(deltas))
            return False
        return True

    def forget(self, address: str) -> None:
        """Close the channel to a gateway that is gone."""
        socket = self._sockets.pop(address, None)
        if socket is not None:
            socket.close()

    def close(self) -> None:
        for address in list(self._sockets):
            self.forget(address)
        self._context.term()


class TokenReceiver:
    """Gateway side: takes the messages of all engines and hands each delta to its stream. Lives on one event loop."""

    def __init__(self, run_secret: str, host: str) -> None:
        self._run_secret = run_secret.encode()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _SEND_HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._streams: dict[str, asyncio.Queue[GenerationDelta]] = {}
        self._decoder = msgspec.msgpack.Decoder(list[GenerationDelta])
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take messages, on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._receive())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._socket.close(linger=0)
        self._context.term()

    def open_stream(self, request_id: str) -> None:
        """Keep the deltas of `request_id` from now on; before the request is sent."""
        self._streams[request_id] = asyncio.Queue()

    def close_stream(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    async def deltas(self, request_id: str) -> AsyncIterator[GenerationDelta]:
        """The stream's deltas, ending after the one with a finish reason."""
        stream = self._streams[request_id]
        while True:
            delta = await stream.get()
            yield delta
            if delta.finish_reason is not None:
                return

    @property
    def open_streams(self) -> list[str]:
        return list(self._streams)

    def fail_streams(self, request_ids: list[str], reason: str) -> None:
        """End streams whose engine is gone."""
        for request_id in request_ids:
            stream = self._streams.get(request_id)
            if stream is not None:
                error = str(EngineStoppedError(reason))
                stream.put_nowait(GenerationDelta(request_id=request_id, finish_reason="error", error=error))

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 2 or not hmac.compare_digest(frames[0], self._run_secret):
                logger.warning("dropped a message that does not show the run secret")
                continue
            try:
                deltas = self._decoder.decode(frames[1])
            except msgspec.DecodeError as error:
                logger.warning("dropped a message that cannot be decoded reason=%s", error)
                continue
            for delta in deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None:
                    stream.put_nowait(delta)
