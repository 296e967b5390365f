"""The id of an HTTP request: in the response header `x-request-id` and in every log line about the request.

create_app puts RequestIdMiddleware outermost.
"""

from __future__ import annotations

import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_MAX_CHARS = 128

_current: ContextVar[str] = ContextVar("request_id", default="none")


def current_request_id() -> str:
    """The id of the request that this task works for; `none` outside of requests."""
    return _current.get()


class RequestIdMiddleware:
    """Keep the client's id, or make one, and send it exactly once.

    Args:
        sent_by_proxy: a proxy in front has added the header to the request and will add it to the response (Ray
            Serve's does).
    """

    def __init__(self, app: ASGIApp, *, sent_by_proxy: bool) -> None:
        self._app = app
        self._sent_by_proxy = sent_by_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _loggable(Headers(scope=scope).get(HEADER, "")) or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        token = _current.set(request_id)
        try:
            await self._app(scope, receive, send if self._sent_by_proxy else send_with_id)
        finally:
            _current.reset(token)


def _loggable(given: str) -> str:
    """A client's id, without what could forge a log line."""
    return "".join(char for char in given[:_MAX_CHARS] if char.isascii() and char.isprintable() and char != " ")
