"""Endpoints about the server, the model and the experts."""

from __future__ import annotations

import subprocess
import sys

import openai
import pytest

from moeless import __version__
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import MODEL_ID, ScriptedEngine, gateway_for


@pytest.mark.anyio
async def test_the_model_is_listed_and_found_by_its_name(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        models = await gateway.openai.models.list()
        found = await gateway.openai.models.retrieve(MODEL_ID)
        with pytest.raises(openai.NotFoundError):
            await gateway.openai.models.retrieve("org/other")
    assert [model.id for model in models.data] == [MODEL_ID]
    assert found.id == MODEL_ID
    assert found.object == "model"
    assert found.created == 1_700_000_000
    assert found.owned_by == "moeless"


@pytest.mark.anyio
async def test_version_and_health(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        assert (await gateway.http.get("/version")).json() == {"version": __version__}
        assert (await gateway.http.get("/health")).json() == {"status": "ok"}
        assert (await gateway.http.get("/ready")).json() == {"status": "ready"}


@pytest.mark.anyio
async def test_predictors_are_listed_with_the_reason_of_their_choice(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        body = (await gateway.http.get("/v1/predictors")).json()
    assert body["object"] == "list"
    (row,) = body["data"]
    assert (row["layer"], row["kind"], row["active"], row["reason"]) == (2, "history", False, "history: 0.84, the best")


@pytest.mark.anyio
async def test_experts_are_listed_with_their_workers_and_totals(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        body = (await gateway.http.get("/v1/experts")).json()
    assert body["object"] == "list"
    assert body["model"] == MODEL_ID
    assert len(body["data"]) == 8
    assert body["data"][1] == {
        "name": "L00.E001",
        "layer": 0,
        "expert": 1,
        "state": "warm",
        "replicas": 1,
        "workers": ["worker-0"],
        "bytes": 100,
        "tokens_served": 10,
    }
    assert body["totals"] == {
        "functions": 8,
        "by_state": {"warm": 6, "cold": 2},
        "replicas": 6,
        "bytes": 800,
        "resident_bytes": 300,
        "tokens_served": 120,
    }
    assert [(worker["name"], worker["alive"]) for worker in body["workers"]] == [
        ("worker-0", True),
        ("worker-1", False),
    ]


@pytest.mark.anyio
async def test_the_openapi_document_describes_the_bodies(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        assert (await gateway.http.get("/docs")).status_code == 200
        document = (await gateway.http.get("/openapi.json")).json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].removeprefix("#/components/schemas/")
    schemas = document["components"]["schemas"]
    assert {"messages", "temperature", "stop"} <= set(schemas[name]["properties"])
    assert "Message" in schemas
    assert "$defs" not in str(document)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"max_n": 0}, "gateway.max_n must be an integer >= 1, got 0"),
        ({"max_body_bytes": 1.5}, "gateway.max_body_bytes must be an integer >= 1, got 1.5"),
        ({"retry_after_s": 0}, "gateway.retry_after_s must be > 0 seconds and finite, got 0"),
        ({"api_keys": "abc"}, "gateway.api_keys must be a tuple of non-empty strings"),
        ({"api_keys": ("",)}, "gateway.api_keys must be a tuple of non-empty strings"),
        ({"api_keys": ("a b",)}, "gateway.api_keys must be printable ASCII"),
        ({"api_keys": ("schlüssel",)}, "gateway.api_keys must be printable ASCII"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_refused_by_name(setting: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match="^" + told):
        GatewayConfig(**setting)


def test_the_gateway_starts_without_torch_ray_and_transformers() -> None:
    code = (
        "import sys, moeless.gateway\n"
        "heavy = {'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
