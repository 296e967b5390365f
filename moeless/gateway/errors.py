"""Errors in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

app.create_app registers `install_handlers`; streams.py writes the same body as an event of a running stream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, Route

from moeless.core.errors import (
    ContextLengthError,
    DispatchError,
    EngineStoppedError,
    ModelNotFoundError,
    MoelessError,
    QueueFullError,
    RequestError,
)
from moeless.gateway.request_id import current_request_id

logger = logging.getLogger(__name__)


class BodyTooLargeError(RequestError):
    """The body is longer than gateway.max_body_bytes."""

    http_status = 413


class UnsupportedMediaTypeError(RequestError):
    """The body is not announced as JSON."""

    http_status = 415


class EngineStartingError(MoelessError):
    """The engine has not answered yet since the gateway started."""

    http_status = 503

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GenerationFailedError(MoelessError):
    """The engine ended a sequence with an error; the message is the engine's."""

    http_status = 503


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Object under `error`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


_MAX_PATH_CHARS = 200
"""Characters of a path that an error quotes."""

_FOR_CLIENTS = (
    RequestError,
    QueueFullError,
    DispatchError,
    EngineStoppedError,
    EngineStartingError,
    GenerationFailedError,
)
"""Errors whose message is shown; that of any other may speak of files and code."""
_TYPE_OF_STATUS = {429: "rate_limit_error", 500: "internal_error", 503: "service_unavailable_error"}
_CODE_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """HTTP status and body of an error. One that is not meant for clients goes to the log, under the request's id."""
    status = error.http_status if isinstance(error, MoelessError) else 500
    if not isinstance(error, _FOR_CLIENTS):
        request_id = current_request_id()
        logger.error("internal error request=%s", request_id, exc_info=error)
        message = f"The server had an internal error; its log has the details under the id {request_id}."
        return 500, ErrorBody(message=message, type="internal_error", code="internal_error")
    return status, ErrorBody(
        message=str(error),
        type=_TYPE_OF_STATUS.get(status, "invalid_request_error"),
        param=error.param if isinstance(error, RequestError) else None,
        code=_code(error, status),
    )


def _code(error: Exception, status: int) -> str | None:
    match error:
        case RequestError(code=str(code)):
            return code
        case ContextLengthError():
            return "context_length_exceeded"
        case ModelNotFoundError():
            return "model_not_found"
        case QueueFullError():
            return "queue_full"
        case EngineStartingError():
            return "engine_starting"
        case EngineStoppedError():
            return "engine_stopped"
        case DispatchError():
            return "dispatch_failed"
        case GenerationFailedError():
            return "generation_failed"
        case _:
            return _CODE_OF_STATUS.get(status)


def encode_error(body: ErrorBody) -> bytes:
    """The JSON text, as a response and a stream's event hold it."""
    return msgspec.json.encode({"error": body})


def error_response(error: Exception) -> Response:
    """Answer `error` in OpenAI's shape, with Retry-After where coming back helps."""
    status, body = describe(error)
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    if status == 413:
        # What is left of the body is not read, so the connection is of no further use.
        headers["connection"] = "close"
    return json_error(status, body, headers)


def json_error(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    """A response that holds an error body."""
    return Response(encode_error(body), status_code=status, headers=headers, media_type="application/json")


def _allowed_methods(request: Request, routes: Iterable[BaseRoute]) -> str:
    """The methods of a path. The framework names those of the path's first route only."""
    found = [route for route in routes if isinstance(route, Route) and route.matches(request.scope)[0] != Match.NONE]
    return ", ".join(sorted({method for route in found for method in route.methods or ()}))


def install_handlers(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Give every error that reaches the framework OpenAI's shape.

    Args:
        routers: those that `app` includes.
    """
    routes = [*app.routes, *(route for router in routers for route in router.routes)]

    async def on_moeless_error(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.url.path[:_MAX_PATH_CHARS], request.method
        message = {
            404: f"There is no {method} {path} here.",
            405: f"{path} does not answer {method}.",
        }.get(error.status_code, str(error.detail))
        body = ErrorBody(
            message=message,
            type=_TYPE_OF_STATUS.get(error.status_code, "invalid_request_error"),
            code=_CODE_OF_STATUS.get(error.status_code),
        )
        headers = {"allow": _allowed_methods(request, routes)} if error.status_code == 405 else error.headers
        return json_error(error.status_code, body, headers)

    app.add_exception_handler(MoelessError, on_moeless_error)
    app.add_exception_handler(HTTPException, on_http_exception)
