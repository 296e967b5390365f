"""The gateway as the Serve ingress, and its engine: requests by Serve handle, tokens by the token channel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar, cast

import msgspec
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from moeless.core.errors import EngineStoppedError
from moeless.core.generation import EngineStats, FunctionStatus, GenerationDelta, GenerationRequest, ModelInfo
from moeless.deployments.rpc import Pulse, RemoteRecordings, SubmitReply
from moeless.deployments.runtime import node_address
from moeless.deployments.settings import ServeSettings
from moeless.deployments.token_channel import TokenReceiver
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.gateway.service import EngineSource

logger = logging.getLogger(__name__)

ENGINE = "engine"
GATEWAY = "gateway"
_PULSE_EVERY_S = 1.0
_CALL_TIMEOUT_S = 10.0
_ENGINE_SILENCE_S = 60.0
"""Without a pulse for this long (an engine that dies is back in some 10 s), streams end with an error."""

_T = TypeVar("_T")


def gateway_deployment(settings: ServeSettings) -> Any:
    """The ingress deployment class; its FastAPI application is built inside each replica."""

    def build_app() -> FastAPI:
        async def reach_engine() -> RemoteEngineClient:
            handle = serve.get_deployment_handle(ENGINE, app_name=settings.app_name)
            return RemoteEngineClient(handle, TokenReceiver(settings.run_secret, node_address()))

        config = GatewayConfig(
            api_keys=settings.api_keys,
            cors_allow_origins=settings.cors_allow_origins,
            allow_recording=settings.recording_is_allowed,
            request_id_sent_by_proxy=True,
        )
        return create_app(cast(EngineSource, reach_engine), config)

    return serve.deployment(serve.ingress(build_app)())


class RemoteEngineClient:
    """core.generation.EngineClient over a Serve handle and a token channel. Made on the gateway's event loop."""

    def __init__(self, handle: DeploymentHandle[Any], receiver: TokenReceiver) -> None:
        self._handle = handle
        self._receiver = receiver
        self.recordings = RemoteRecordings(self._call)
        self._incarnation_of: dict[str, str] = {}
        self._pulse: Pulse | None = None
        receiver.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def model_info(self) -> ModelInfo:
        return msgspec.msgpack.decode(await self._call("model_info"), type=ModelInfo)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        request_id = request.request_id
        self._receiver.open_stream(request_id)
        ended = False  # a submit that is given up half-way may have reached the engine
        try:
            reply = msgspec.msgpack.decode(
                await self._call("submit", msgspec.msgpack.encode(request), self._receiver.address), type=SubmitReply
            )
            ended = bool(reply.kind)
            reply.raise_error()
            self._incarnation_of[request_id] = reply.incarnation
            async for delta in self._receiver.deltas(request_id):
                ended = delta.finish_reason is not None
                yield delta
        finally:
            self._receiver.close_stream(request_id)
            self._incarnation_of.pop(request_id, None)
            if not ended:
                self._handle.cancel.remote(request_id)

    async def cancel(self, request_id: str) -> None:
        await self._call("cancel", request_id)

    async def stats(self) -> EngineStats:
        return msgspec.msgpack.decode(await self._call("stats"), type=EngineStats)

    async def functions(self) -> list[FunctionStatus]:
        return msgspec.msgpack.decode(await self._call("functions"), type=list[FunctionStatus])

    async def is_ready(self) -> bool:
        return self._pulse is not None and self._pulse.is_ready

    async def close(self) -> None:
        self._watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watcher
        await self._receiver.close()

    async def _call(self, method: str, *args: object, timeout_s: float = _CALL_TIMEOUT_S) -> Any:
        try:
            response: Awaitable[Any] = getattr(self._handle, method).remote(*args)
            async with asyncio.timeout(timeout_s):  # wait_for may swallow a cancellation in Python 3.11
                return await response
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineStoppedError(f"the engine cannot be reached: {type(error).__name__}") from error

    async def _watch(self) -> None:
        """Notice when the engine died and came back: the streams of its former life will never end by themselves."""
        heard_s = time.monotonic()
        while True:
            try:
                pulse = msgspec.msgpack.decode(await self._call("pulse", self._receiver.address), type=Pulse)
                lost = [i for i, incarnation in self._incarnation_of.items() if incarnation != pulse.incarnation]
                self._receiver.fail_streams(lost, "the engine was restarted")
                self._pulse = pulse
                heard_s = time.monotonic()
            except Exception as error:  # whatever it is, the next pulse is asked for
                logger.warning("no pulse from the engine reason=%s", error)
                self._pulse = None
                if time.monotonic() - heard_s > _ENGINE_SILENCE_S:
                    self._receiver.fail_streams(self._receiver.open_streams, "the engine does not answer")
            await asyncio.sleep(_PULSE_EVERY_S)
