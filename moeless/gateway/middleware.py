"""Middleware around every route: catch-all for errors, key check, body limit.

Plain ASGI on purpose: starlette's BaseHTTPMiddleware puts a queue between a stream and its socket.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeless.gateway.errors import BodyTooLargeError, ErrorBody, error_response, json_error
from moeless.gateway.request_id import current_request_id

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths that need no key, for probes."""
_MAX_SKIPPED_BYTES = 16 * 1024 * 1024
"""Bytes of a refused body that are read, so that its sender gets to read the refusal."""


class ErrorMiddleware:
    """Answer 500 in OpenAI's shape for whatever no handler caught; the log gets the traceback and an id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting_start)
        except ClientDisconnect:
            logger.info("client gone while it sent its body request=%s", current_request_id())
        except Exception as error:
            if started:
                # Too late for a status; the server closes the connection and logs.
                raise
            await error_response(error)(scope, receive, send)


class UrlLimitMiddleware:
    """Refuse a path and query beyond `max_bytes`."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            num_bytes = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
            if num_bytes > self._max_bytes:
                message = f"The path and query may have at most {self._max_bytes} bytes, got {num_bytes}."
                body = ErrorBody(message=message, type="invalid_request_error", code="uri_too_long")
                await json_error(414, body)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class ApiKeyMiddleware:
    """Let only bearers of a key pass, on every path but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path_within_app(scope) not in OPEN_PATHS and not self._is_allowed(scope):
            body = ErrorBody(
                message="The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                type="invalid_request_error",
                code="invalid_api_key",
            )
            await json_error(401, body, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        given_bytes = given.strip().encode()
        # Every key is compared, in constant time each, so that the time does not reveal which one came close.
        matches = [hmac.compare_digest(given_bytes, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _path_within_app(scope: Scope) -> str:
    """The path as the router sees it: less the prefix under which a server mounts the app."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


class BodyLimitMiddleware:
    """Refuse a body beyond `max_bytes` while it is read, whether its length was announced or not."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_bytes):
            if "expect" not in headers:  # else the client waits for our word before it sends anything
                await self._skip_rest(receive)
            await error_response(self._error(f"{announced} bytes"))(scope, receive, send)
            return
        num_received = 0

        async def receive_within_limit() -> Message:
            nonlocal num_received
            message = await receive()
            if message["type"] == "http.request":
                num_received += len(message.get("body", b""))
                if num_received > self._max_bytes:
                    if message.get("more_body", False):
                        await self._skip_rest(receive)
                    raise self._error("more")
            return message

        await self._app(scope, receive_within_limit, send)

    async def _skip_rest(self, receive: Receive) -> None:
        """Read on for a while and forget it: closing on a client that still writes loses it the answer."""
        num_skipped = 0
        while num_skipped < _MAX_SKIPPED_BYTES:
            message = await receive()
            num_skipped += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    def _error(self, got: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body may have at most {self._max_bytes} bytes, got {got}.")
