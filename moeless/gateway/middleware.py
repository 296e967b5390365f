"""What every request passes before its route: catch-all for errors, key check, body limit.

Plain ASGI on purpose: starlette's BaseHTTPMiddleware puts a queue between a stream and its socket.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moeless.gateway.errors import BodyTooLargeError, ErrorBody, error_response, json_error

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What probes may ask without a key."""


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
        except Exception as error:
            if started:
                # Too late for a status; the server closes the connection and logs.
                raise
            await error_response(error)(scope, receive, send)


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
        # Every key is compared, in constant time each, so that the time tells nothing of which one came close.
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
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_bytes):
            await error_response(self._error(f"{announced} bytes"))(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self._max_bytes:
                    raise self._error("more")
            return message

        await self._app(scope, receive_within_limit, send)

    def _error(self, got: str) -> BodyTooLargeError:
        return BodyTooLargeError(f"The body may have at most {self._max_bytes} bytes, got {got}.")
