"""Answers to strange and broken clients, over real sockets."""

from __future__ import annotations

import asyncio
import logging

import pytest

from moeless.gateway import GatewayConfig, create_app
from tests.unit.gateway.support import ScriptedEngine, gateway_for, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("target", ["/" + "a" * 60_000, "/health?" + "a" * 60_000, "/v1/models/" + "a" * 60_000])
async def test_a_long_url_is_refused_with_the_limit(engine: ScriptedEngine, target: str) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.get(target)
    assert response.status_code == 414
    error = response.json()["error"]
    assert error["code"] == "uri_too_long"
    assert "8192 bytes" in error["message"]
    assert len(response.content) < 500


async def test_a_url_at_the_limit_is_served(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig(max_url_bytes=100))) as gateway:
        assert (await gateway.http.get("/health?" + "a" * 93)).status_code == 200
        assert (await gateway.http.get("/health?" + "a" * 94)).status_code == 414


async def test_a_client_that_leaves_while_it_sends_its_body_is_one_log_line(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
            host, _, port = gateway.address.removeprefix("http://").partition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nx-request-id: gone-1\r\n")
            writer.write(b'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"model":')
            await writer.drain()
            writer.close()
            await until(lambda: "gone-1" in caplog.text)
    records = [record for record in caplog.records if "gone-1" in record.getMessage()]
    assert [record.getMessage() for record in records] == ["client gone while it sent its body request=gone-1"]
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.WARNING]


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
@pytest.mark.parametrize("connections", [("Upgrade", "keep-alive"), ("keep-alive", "Upgrade"), ("Upgrade",)])
async def test_a_body_behind_an_upgrade_is_refused_with_the_reason(
    engine: ScriptedEngine, protocol: str, connections: tuple[str, ...]
) -> None:
    head = "".join(f"Connection: {value}\r\n" for value in connections)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway, asyncio.timeout(20):
        host, _, port = gateway.address.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}Upgrade: {protocol}\r\n".encode())
        writer.write(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
        assert b"unsupported_upgrade" in await reader.readuntil(b"}}")
        writer.close()
