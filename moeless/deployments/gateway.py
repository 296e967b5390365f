"""The gateway as the Serve ingress, and its engine: requests by Serve handle, tokens by the token channel."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moeless.core.errors import EngineStoppedError
from moeless.core.generation import EngineStats, FunctionStatus, GenerationDelta, GenerationRequest, ModelInfo
from moeless.deployments.rpc import CancelCall, GatewayName, Pulse, PulseCall, RemoteRecordings, SubmitCall, SubmitReply
from moeless.deployments.run_log import set_up_logging
from moeless.deployments.run_secrets import read_secrets
from moeless.deployments.runtime import keep_serve_to_loopback, node_address
from moeless.deployments.settings import ServeSettings
from moeless.deployments.token_channel import TokenReceiver
from moeless.gateway.app import create_app
from moeless.gateway.service import EngineSource

logger = logging.getLogger(__name__)

ENGINE = "engine"
GATEWAY = "gateway"
_PULSE_EVERY_S = 1.0
_CALL_TIMEOUT_S = 10.0
_LONG_PROMPT_TOKENS = 4096
_ENGINE_SILENCE_S = 60.0
"""Without a pulse for this long (an engine that dies is back in some 10 s), streams end with an error."""
_MAX_UNKNOWN_PULSES = 5
"""In a row, after which a stream that the engine does not hold ends with an error. Not at once: its own end may still
wait for a connection, or for this process."""


def gateway_deployment(settings: ServeSettings) -> Any:
    """The ingress deployment class; its FastAPI application is built inside each replica."""

    def build_app() -> FastAPI:
        set_up_logging()
        keep_serve_to_loopback()

        async def reach_engine() -> RemoteEngineClient:
            handle = serve.get_deployment_handle(ENGINE, app_name=settings.app_name)
            return RemoteEngineClient(handle, TokenReceiver(run_secrets.run_secret, node_address()))

        run_secrets = read_secrets(settings.secrets_file)
        return create_app(cast(EngineSource, reach_engine), settings.gateway_config(run_secrets.api_keys))

    return serve.deployment(serve.ingress(build_app)())


class RemoteEngineClient:
    """core.generation.EngineClient over a Serve handle and a token channel. Made on the gateway's event loop."""

    def __init__(self, handle: DeploymentHandle[Any], receiver: TokenReceiver) -> None:
        self._handle = handle
        self._receiver = receiver
        self._name = GatewayName(address=receiver.address, life=secrets.token_hex(8))
        self.recordings = RemoteRecordings(self._call)
        self._encoding = asyncio.Lock()
        self._last_number = 0
        self._open: dict[int, _OpenRequest] = {}
        self._left: list[int] = []
        self._has_left = asyncio.Event()
        self._pulse: Pulse | None = None
        receiver.start()
        # Serve cancels with a request every call made in its context, the one that cancels it at the engine too. These
        # tasks have an empty context.
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(work, context=contextvars.Context()) for work in (self._watch(), self._cancel_left())
        ]

    async def model_info(self) -> ModelInfo:
        return msgspec.msgpack.decode(await self._call("model_info"), type=ModelInfo)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        self._last_number = number = self._last_number + 1
        opened = self._open[number] = _OpenRequest(request.request_id)
        self._receiver.open_stream(request.request_id)
        ended = False  # a submit that is given up half-way may have reached the engine
        try:
            call = SubmitCall(gateway=self._name, number=number, request=request)
            reply = msgspec.msgpack.decode(await self._call("submit", await self._encode(call)), type=SubmitReply)
            ended = bool(reply.kind)
            reply.raise_error()
            opened.incarnation = reply.incarnation
            async for delta in self._receiver.deltas(request.request_id):
                ended = delta.finish_reason is not None
                yield delta
        finally:
            self._receiver.close_stream(request.request_id)
            del self._open[number]
            if not ended:
                self._left.append(number)
                self._has_left.set()

    async def _encode(self, call: SubmitCall) -> bytes:
        """Long prompts one a turn of the event loop: each takes a millisecond, and a request may have 128 of them."""
        if len(call.request.prompt_token_ids) < _LONG_PROMPT_TOKENS:
            return msgspec.msgpack.encode(call)
        async with self._encoding:
            await asyncio.sleep(0)
            return msgspec.msgpack.encode(call)

    async def stats(self) -> EngineStats:
        return msgspec.msgpack.decode(await self._call("stats"), type=EngineStats)

    async def functions(self) -> list[FunctionStatus]:
        return msgspec.msgpack.decode(await self._call("functions"), type=list[FunctionStatus])

    async def is_ready(self) -> bool:
        return self._pulse is not None and self._pulse.is_ready

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._receiver.close()

    async def _call(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        try:
            response: Awaitable[Any] = getattr(self._handle, method).remote(*args)
            async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation in Python 3.11
                return await response
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineStoppedError(f"the engine cannot be reached: {type(error).__name__}") from error

    async def _cancel_left(self) -> None:
        """Cancel at the engine what clients have left; one call for all that left since the last."""
        while True:
            await self._has_left.wait()
            self._has_left.clear()
            left, self._left = self._left, []
            try:
                await self._call("cancel", msgspec.msgpack.encode(CancelCall(gateway=self._name, numbers=left)))
            except Exception as error:  # the next pulse does not name them, which ends them too
                logger.warning("cancelling failed requests=%d reason=%s", len(left), error)

    async def _watch(self) -> None:
        """Name to the engine what is still read, and end the streams that it does not generate any more."""
        heard_s, was_heard = time.monotonic(), False
        while True:
            try:
                await self._exchange_pulse()
                heard_s, was_heard = time.monotonic(), True
            except Exception as error:  # whatever it is, the next pulse is sent
                # While the run starts, the engine may be busy with its weights.
                level = logging.WARNING if was_heard else logging.INFO
                logger.log(level, "no pulse from the engine reason=%s", error)
                self._pulse = None
                if time.monotonic() - heard_s > _ENGINE_SILENCE_S:
                    self._receiver.fail_streams(self._receiver.open_streams, "the engine does not answer")
            await asyncio.sleep(_PULSE_EVERY_S)

    async def _exchange_pulse(self) -> None:
        submitted = {number: opened for number, opened in self._open.items() if opened.incarnation}
        call = PulseCall(gateway=self._name, last_number=self._last_number, live=list(self._open))
        pulse = msgspec.msgpack.decode(await self._call("pulse", msgspec.msgpack.encode(call)), type=Pulse)
        unknown = set(pulse.unknown)
        for number, opened in submitted.items():
            if opened.incarnation != pulse.incarnation:
                # The engine died and came back: the streams of its former life never end by themselves.
                self._receiver.fail_streams([opened.request_id], "the engine was restarted")
            elif number not in unknown:
                opened.num_unknown = 0
            else:
                opened.num_unknown += 1
                if opened.num_unknown >= _MAX_UNKNOWN_PULSES:
                    self._receiver.fail_streams([opened.request_id], "the engine ended the request")
        self._pulse = pulse


@dataclass
class _OpenRequest:
    """A request that a client of this gateway reads."""

    request_id: str
    incarnation: str = ""
    """The life of the engine that took it; empty until it has."""
    num_unknown: int = 0
    """Pulses in a row in which the engine did not hold it."""
