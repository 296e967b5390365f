"""The endpoints that record what the engine routes. Registered by create_app.

A recording covers the requests of all clients: their number and lengths and, with token ids, their content. So the
endpoints refuse unless the operator allows recording, and token ids are recorded only on request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from moeless.core.errors import EngineStoppedError, RequestError
from moeless.core.recording import RecordedFile, RecordingClient, RecordingOptions, RecordingStatus
from moeless.gateway.api_document import describes
from moeless.gateway.body import read_body
from moeless.gateway.schemas import WHOLE, StrictBody
from moeless.gateway.service import GatewayService

_MAX_TOKENS = 1_000_000_000
_MAX_LAYERS = 1_000
_DEFAULTS = RecordingOptions()
_STATUS = {"application/json": "Recording"}


class RecordingNotAllowedError(RequestError):
    """The operator has not allowed recording."""

    http_status = 403


class RecordingRequest(StrictBody):
    """The body of POST /v1/traces/recording. What memory and the model allow is the engine's to say."""

    max_tokens: Annotated[int, Field(ge=1, le=_MAX_TOKENS), WHOLE] | None = None
    hidden_layers: Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(max_length=_MAX_LAYERS)] | None = None
    token_ids: bool | None = None


def recording_router(service: GatewayService) -> APIRouter:
    """POST, GET and DELETE /v1/traces/recording, POST .../stop and GET .../file."""
    router = APIRouter(prefix="/v1/traces/recording")

    def recordings() -> RecordingClient:
        if not service.config.allow_recording:
            raise RecordingNotAllowedError(
                "This server does not allow recording; it must be started with --allow-recording.",
                code="recording_not_allowed",
            )
        return service.client().recordings

    @router.post("", openapi_extra=describes(_STATUS, 400, 403, 409, 413, 415, 500, 503, body=RecordingRequest))
    async def start(request: Request) -> Response:
        """Begin to record what every request routes; a recording that has ended is dropped."""
        client = recordings()
        body = await read_body(request, RecordingRequest)
        options = RecordingOptions(
            max_tokens=_DEFAULTS.max_tokens if body.max_tokens is None else body.max_tokens,
            hidden_layers=tuple(body.hidden_layers or ()),
            token_ids=bool(body.token_ids),
        )
        return _json(await client.start(options))

    @router.get("", openapi_extra=describes(_STATUS, 403, 500, 503))
    async def status() -> Response:
        """Show the state of the recording."""
        return _json(await recordings().status())

    @router.post("/stop", openapi_extra=describes(_STATUS, 403, 409, 500, 503))
    async def stop() -> Response:
        """End the recording; its file can be downloaded then."""
        return _json(await recordings().stop())

    @router.delete("", openapi_extra=describes(_STATUS, 403, 409, 500, 503))
    async def discard() -> Response:
        """End the recording and drop it."""
        return _json(await recordings().discard())

    @router.get("/file", openapi_extra=describes({"application/octet-stream": "File"}, 403, 409, 500, 503))
    async def download() -> Response:
        """The trace of a recording that has ended."""
        client = recordings()
        file = await client.finish()
        return StreamingResponse(
            _content(client, file),
            media_type="application/octet-stream",
            headers={
                "content-length": str(file.num_bytes),
                "content-disposition": 'attachment; filename="routing.safetensors"',
            },
        )

    return router


async def _content(client: RecordingClient, file: RecordedFile) -> AsyncIterator[bytes]:
    """The file piece by piece. An error breaks the answer off short of its announced length."""
    offset = 0
    while offset < file.num_bytes:
        chunk = await client.read(file.file_id, offset)
        if not chunk:
            raise EngineStoppedError(f"the trace ends at byte {offset} of {file.num_bytes}")
        offset += len(chunk)
        yield chunk


def _json(status: RecordingStatus) -> Response:
    body = {"object": "trace.recording", **msgspec.structs.asdict(status)}
    return Response(msgspec.json.encode(body), media_type="application/json")
