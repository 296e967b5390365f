"""Tokens from engine to gateway: one channel for each pair of them, one message a step for all its streams.

Requests go by Serve handle; a handle item for each token would cost more than the decoding. ZeroMQ carries the
messages, msgspec encodes them.

Both ends derive CURVE keys from the run secret. A client must know the server's public key before it can say anything,
and this one is never sent or published, so that only processes of the run pass the handshake; messages are encrypted.
Until then a peer's frames are bounded by `_MAX_FRAME_BYTES`, and nothing of them is kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.utils import z85

from moeless.core.errors import EngineStoppedError
from moeless.core.generation import GenerationDelta

logger = logging.getLogger(__name__)

_HIGH_WATER_MARK = 10_000
"""Steps that a gateway may lag behind before its messages are dropped: a minute at 160 steps a second."""
_MAX_FRAME_BYTES = 64 << 10
"""Maximum that one peer can make the gateway hold before it is authenticated. Longer messages are cut into frames."""
_CURVE_OVERHEAD_BYTES = 64
_MAX_MESSAGE_BYTES = 256 << 20
"""Log-probabilities of twenty alternatives for a prompt of 131,072 tokens take some 100 MB."""
_HANDSHAKE_MS = 10_000
"""A peer that has not proved the run secret by then is disconnected."""


class TokenSender:
    """Engine side. All methods but the constructor belong to one thread, the generation thread."""

    def __init__(self, run_secret: str) -> None:
        self._gateway_key = zmq.curve_public(_secret_key(run_secret, "gateway"))
        self._secret_key = _secret_key(run_secret, "engine")
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, address: str, deltas: list[GenerationDelta]) -> bool:
        """Send one step's deltas to the gateway at `address`; False if it does not take them any more."""
        message = self._encoder.encode(deltas)
        if len(message) > _MAX_MESSAGE_BYTES:
            if len(deltas) > 1:
                half = len(deltas) // 2
                return self.send(address, deltas[:half]) and self.send(address, deltas[half:])
            error = f"a step's log-probabilities must be at most {_MAX_MESSAGE_BYTES} bytes, got {len(message)}"
            message = self._encoder.encode(
                [GenerationDelta(request_id=deltas[0].request_id, finish_reason="error", error=error)]
            )
        frames = [message[start : start + _MAX_FRAME_BYTES] for start in range(0, len(message), _MAX_FRAME_BYTES)]
        try:
            self._socket(address).send_multipart(frames, flags=zmq.NOBLOCK, copy=True)
        except zmq.Again:
            logger.warning("dropped a step for a gateway address=%s deltas=%d", address, len(deltas))
            return False
        return True

    def _socket(self, address: str) -> zmq.Socket[bytes]:
        socket = self._sockets.get(address)
        if socket is None:
            socket = self._context.socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.IPV6, int("[" in address))
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._gateway_key)
            _set_keys(socket, self._secret_key)
            socket.connect(address)
            self._sockets[address] = socket
        return socket

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
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME_BYTES + _CURVE_OVERHEAD_BYTES)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        _set_keys(self._socket, _secret_key(run_secret, "gateway"))
        at = f"[{host}]" if ":" in host else host
        port = self._socket.bind_to_random_port(f"tcp://{at}")
        self.address = f"tcp://{at}:{port}"
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
            try:
                deltas = self._decoder.decode(b"".join(frames))
            except msgspec.DecodeError as error:
                logger.warning("dropped a message that cannot be decoded reason=%s", error)
                continue
            for delta in deltas:
                stream = self._streams.get(delta.request_id)
                if stream is not None:
                    stream.put_nowait(delta)


def _secret_key(run_secret: str, role: str) -> bytes:
    """The CURVE secret key of a role; any 32 bytes are one."""
    return z85.encode(hmac.digest(run_secret.encode(), f"moeless token channel {role}".encode(), "sha256"))


def _set_keys(socket: zmq.Socket[Any], secret_key: bytes) -> None:
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret_key)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret_key))
