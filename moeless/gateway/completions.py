"""POST /v1/chat/completions and /v1/completions. Registered by app.create_app."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from moeless.gateway.admission import AdmittedRequest
from moeless.gateway.api_document import describes
from moeless.gateway.body import read_json
from moeless.gateway.errors import describe, encode_error
from moeless.gateway.metrics import SequenceObserver
from moeless.gateway.request_id import current_request_id
from moeless.gateway.responses import (
    ChatChunks,
    ChunkEncoder,
    CompletionChunks,
    WholeResponse,
    chat_response,
    completion_response,
    event,
)
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest
from moeless.gateway.service import GatewayService
from moeless.gateway.streams import ClientGoneError, SequenceStreams, until_disconnect
from moeless.gateway.text_protocol import Endpoint

logger = logging.getLogger(__name__)

_CLIENT_GONE_STATUS = 499
"""nginx's; nobody reads it."""
_START_WAIT_S = 5.0
"""Time that a stream waits for the engine's first reply before it sends its status line. A refusal (queue full) comes
at once and becomes a status; a request that waits in the queue must not look dead to clients and proxies."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Endpoint:
    """Differences between the two endpoints."""

    name: Endpoint
    id_prefix: str
    chunks: Callable[[AdmittedRequest, int], ChunkEncoder]
    whole: Callable[[WholeResponse, int], bytes]


_CHAT = _Endpoint(name="chat", id_prefix="chatcmpl", chunks=ChatChunks, whole=chat_response)
_COMPLETION = _Endpoint(name="completion", id_prefix="cmpl", chunks=CompletionChunks, whole=completion_response)


def completions_router(service: GatewayService) -> APIRouter:
    """The two generating endpoints."""
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=_description("ChatCompletion", ChatCompletionRequest))
    async def create_chat_completion(request: Request) -> Response:
        return await _respond(service, request, _CHAT)

    @router.post("/v1/completions", openapi_extra=_description("Completion", CompletionRequest))
    async def create_completion(request: Request) -> Response:
        return await _respond(service, request, _COMPLETION)

    return router


def _description(answer: str, body: type[BaseModel]) -> dict[str, Any]:
    content = {"application/json": answer, "text/event-stream": "Event"}
    return describes(content, 400, 404, 413, 415, 429, 500, 503, body=body)


async def _respond(service: GatewayService, request: Request, endpoint: _Endpoint) -> Response:
    arrived_s = time.monotonic()
    service.model()
    body = await read_json(request)
    admitting = service.texts.admit(endpoint.name, body, f"{endpoint.id_prefix}-{uuid.uuid4().hex}")
    del body  # else it would be kept for as long as the answer takes
    try:
        admitted = await until_disconnect(request.receive, admitting)
    except ClientGoneError:
        logger.info("client gone before its request was read request=%s", current_request_id())
        return Response(status_code=_CLIENT_GONE_STATUS)
    return _GenerationResponse(service, endpoint, admitted, arrived_s)


class _GenerationResponse(Response):
    """Generates while it is sent, so that no sequence can outlive its HTTP exchange.

    Errors before the first byte are raised, and become a status by the app's handlers.
    """

    def __init__(
        self, service: GatewayService, endpoint: _Endpoint, admitted: AdmittedRequest, arrived_s: float
    ) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._admitted = admitted
        self._pacer = service.pacer
        metrics = service.model_metrics()
        observers = [
            SequenceObserver(metrics, num_prompt_tokens=len(sequence.prompt_token_ids), arrived_s=arrived_s)
            for sequence in admitted.sequences
        ]
        self._streams = SequenceStreams(service.client(), admitted.sequences, observers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self._send_events(send) if self._admitted.is_stream else self._send_whole(scope, receive, send)
        try:
            await until_disconnect(receive, work)
        except ClientGoneError:
            logger.info("client gone request=%s completion=%s", current_request_id(), self._admitted.request_id)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        created_unix_s = int(time.time())
        whole = await WholeResponse.collect(self._admitted, self._streams)
        response = Response(
            self._endpoint.whole(whole, created_unix_s),
            media_type="application/json",
            headers=_ignored_header(self._admitted),
        )
        await response(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        chunks = self._endpoint.chunks(self._admitted, int(time.time()))
        with self._pacer.stream():
            await self._send_chunks(send, chunks)

    async def _send_chunks(self, send: Send, chunks: ChunkEncoder) -> None:
        async with self._streams as streams:
            await streams.wait(_START_WAIT_S)
            await send(_stream_start(_ignored_header(self._admitted)))
            try:
                await _send_body(send, chunks.opening())
                while batch := await streams.take():
                    await _send_body(send, chunks.encode(batch))
                    await streams.rest(self._pacer.pause_s())
                last = chunks.closing()
            except Exception as error:
                # The status is long sent: the error becomes the stream's last event, and no [DONE] follows.
                last = event(encode_error(describe(error)[1]))
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _ignored_header(admitted: AdmittedRequest) -> dict[str, str]:
    """Names the fields that the client sent and that changed nothing."""
    return {"x-moeless-ignored": ", ".join(admitted.ignored_fields)} if admitted.ignored_fields else {}


def _stream_start(headers: Mapping[str, str]) -> Message:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            # Asks nginx not to hold events back.
            (b"x-accel-buffering", b"no"),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ],
    }


async def _send_body(send: Callable[[Message], Awaitable[None]], body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})
