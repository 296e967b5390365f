"""The id of a request: one header, and the same id in the log."""

from __future__ import annotations

import logging

import httpx
import pytest

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import ScriptedEngine, chat, failing, gateway_for

pytestmark = pytest.mark.anyio


def ids_of(response: httpx.Response) -> list[str]:
    return response.headers.get_list("x-request-id")


@pytest.mark.parametrize("stream", [False, True])
async def test_each_response_has_an_id_of_its_own(engine: ScriptedEngine, stream: bool) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        body = chat(stream=stream)
        responses = [await gateway.http.post("/v1/chat/completions", json=body) for _ in range(2)]
        responses.append(await gateway.http.get("/nowhere"))
    ids = [ids_of(response) for response in responses]
    assert all(len(found) == 1 for found in ids)
    assert len({found[0] for found in ids}) == 3


async def test_the_clients_own_id_is_kept_and_is_the_one_in_the_log(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = failing(RuntimeError("boom"))
    with caplog.at_level(logging.ERROR, logger="moeless.gateway"):
        async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
            response = await gateway.http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "mine-42"})
    assert ids_of(response) == ["mine-42"]
    assert "mine-42" in response.json()["error"]["message"]
    assert "request=mine-42" in caplog.text


async def test_an_id_cannot_forge_or_flood_the_log(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.get("/health", headers={"x-request-id": "a b\tc" + "d" * 1000})
    assert ids_of(response) == ["abc" + "d" * 123]


async def test_behind_a_proxy_that_sends_the_id_the_gateway_only_uses_it(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.script = failing(RuntimeError("boom"))
    with caplog.at_level(logging.ERROR, logger="moeless.gateway"):
        async with gateway_for(create_app(engine, GatewayConfig(request_id_sent_by_proxy=True))) as gateway:
            response = await gateway.http.post("/v1/chat/completions", json=chat(), headers={"x-request-id": "proxys"})
    assert ids_of(response) == []
    assert "request=proxys" in caplog.text
