"""Middleware between server and routes, without HTTP clients and servers that would hide the edges."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.gateway.middleware import BodyLimitMiddleware, ErrorMiddleware
from tests.unit.gateway.support import ScriptedEngine

pytestmark = pytest.mark.anyio

App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def call(app: App, scope: dict[str, Any], *messages: Message) -> tuple[list[Message], int]:
    """Run one exchange; returns what was sent and how many of the messages were taken."""
    num_taken = 0
    sent: list[Message] = []

    async def receive() -> Message:
        nonlocal num_taken
        num_taken += 1
        return messages[num_taken - 1] if num_taken <= len(messages) else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    base: dict[str, Any] = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": []}
    await app(base | scope, receive, send)
    return sent, num_taken


def body(num_bytes: int, *, more: bool) -> Message:
    return {"type": "http.request", "body": b"x" * num_bytes, "more_body": more}


async def swallow(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads its body and answers 200."""
    while (await receive()).get("more_body", False):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


LIMITED = ErrorMiddleware(BodyLimitMiddleware(swallow, max_bytes=10))


async def test_a_body_of_exactly_the_limit_passes() -> None:
    sent, _ = await call(LIMITED, {"headers": [(b"content-length", b"10")]}, body(6, more=True), body(4, more=False))
    assert sent[0]["status"] == 200


async def test_what_follows_a_refused_body_is_read_so_that_the_refusal_is_heard() -> None:
    messages = [body(6, more=True), body(5, more=True), body(100, more=True), body(1, more=False)]
    with pytest.raises(Exception, match="at most 10 bytes"):
        await call(BodyLimitMiddleware(swallow, max_bytes=10), {}, *messages)
    sent, num_taken = await call(LIMITED, {}, *messages)
    assert sent[0]["status"] == 413
    assert num_taken == len(messages)
    assert (b"connection", b"close") in sent[0]["headers"]


async def test_an_endless_body_is_not_read_forever() -> None:
    mebibyte = body(1 << 20, more=True)
    sent, num_taken = await call(LIMITED, {}, *[mebibyte] * 100)
    assert sent[0]["status"] == 413
    assert num_taken < 20


async def test_a_client_that_asks_first_is_refused_before_it_sends() -> None:
    headers = [(b"content-length", b"11"), (b"expect", b"100-continue")]
    sent, num_taken = await call(LIMITED, {"headers": headers}, body(11, more=False))
    assert sent[0]["status"] == 413
    assert num_taken == 0


@pytest.mark.parametrize("length", [b"11", b"9" * 5000])
async def test_an_announced_length_is_believed(length: bytes) -> None:
    sent, _ = await call(LIMITED, {"headers": [(b"content-length", length)]}, body(1, more=False))
    assert sent[0]["status"] == 413


async def test_an_error_after_the_first_byte_reaches_the_server() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("too late")

    with pytest.raises(RuntimeError, match="too late"):
        await call(ErrorMiddleware(breaks), {})


@pytest.mark.parametrize(
    ("path", "root_path", "status"),
    [
        ("/health", "", 200),
        ("/prefix/health", "/prefix", 200),
        ("/health/health", "/health", 200),
        ("/health", "/hea", 200),
        ("/prefix/v1/models", "/prefix", 401),
        ("/health/v1/models", "/health", 401),
        ("/prefixhealth", "/prefix", 401),
    ],
)
async def test_a_mounted_gateway_opens_the_same_paths(
    engine: ScriptedEngine, path: str, root_path: str, status: int
) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("key",)))
    scope = {"method": "GET", "path": path, "root_path": root_path, "app": app}
    sent, _ = await call(app, scope)
    assert sent[0]["status"] == status


@pytest.fixture
async def started(engine: ScriptedEngine) -> AsyncIterator[FastAPI]:
    app = create_app(engine, GatewayConfig())
    async with app.router.lifespan_context(app):
        yield app


async def test_other_protocols_are_left_alone(started: FastAPI) -> None:
    sent, _ = await call(started, {"type": "websocket", "path": "/v1/models"}, {"type": "websocket.connect"})
    assert sent[0]["type"] == "websocket.close"
