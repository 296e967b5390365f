"""The API key: asked for everywhere but where probes look."""

from __future__ import annotations

import httpx
import openai
import pytest

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import MODEL_ID, ScriptedEngine, completion, gateway_for, serving

pytestmark = pytest.mark.anyio

PROTECTED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL_ID}"),
    ("GET", "/v1/experts"),
    ("GET", "/v1/predictors"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
    ("GET", "/health/../v1/models"),
    ("GET", "//health"),
    ("OPTIONS", "/v1/models"),
]


@pytest.mark.parametrize("path", ["/health", "/ready"])
async def test_probes_need_no_key(engine: ScriptedEngine, path: str) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("key-1",)))
    async with gateway_for(app, api_key="wrong") as gateway:
        assert (await gateway.http.get(path)).status_code == 200


async def test_everything_else_needs_one(engine: ScriptedEngine) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("key-1",)))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        for method, path in PROTECTED:
            response = await http.request(method, path)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert engine.requests == []


@pytest.mark.parametrize(
    "header",
    ["Bearer key-2", "Bearer key-", "Bearer key-11", "Bearer", "Bearer  key-2", "key-1", "Basic key-1", "Bearer kéy-1"],
)
async def test_a_wrong_key_is_refused_and_not_repeated(engine: ScriptedEngine, header: str) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("key-1",)))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        response = await http.post(
            "/v1/completions", json=completion(), headers={"authorization": header.encode("latin-1")}
        )
    assert response.status_code == 401
    assert "key-" not in response.text


async def test_each_of_several_keys_opens(engine: ScriptedEngine) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("key-1", "key-2")))
    for key in ("key-1", "key-2"):
        async with gateway_for(app, api_key=key) as gateway:
            assert (await gateway.openai.completions.create(model=MODEL_ID, prompt="hi")).choices
    async with serving(app) as address:
        client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="key-3", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
        await client.close()


async def test_no_key_is_asked_for_by_default(engine: ScriptedEngine) -> None:
    async with serving(create_app(engine, GatewayConfig())) as address, httpx.AsyncClient(base_url=address) as http:
        assert (await http.get("/version")).status_code == 200


async def test_browsers_of_other_origins_are_let_in_only_if_named(engine: ScriptedEngine) -> None:
    origin = {"origin": "https://a.example"}
    ask = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    closed = create_app(engine, GatewayConfig())
    opened = create_app(engine, GatewayConfig(api_keys=("key-1",), cors_allow_origins=("https://a.example",)))
    async with serving(closed) as address, httpx.AsyncClient(base_url=address) as http:
        assert "access-control-allow-origin" not in (await http.get("/version", headers=origin)).headers
    async with serving(opened) as address, httpx.AsyncClient(base_url=address) as http:
        preflight = await http.options("/v1/chat/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = await http.get("/version", headers=origin)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert (await http.options("/v1/models", headers=ask | {"origin": "https://b.example"})).status_code == 400
