"""docs/api.md names what the gateway has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic.json_schema import models_json_schema

from moeless.gateway import GatewayConfig, create_app, errors
from moeless.gateway.body_limits import write_limits
from moeless.gateway.metrics import GatewayMetrics
from moeless.gateway.recording import RecordingRequest
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest, StreamOptions, StrictBody
from tests.unit.gateway.support import MODEL_ID, STATS, ScriptedEngine, model_info

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def documented() -> set[str]:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return {re.sub(r"\{.*", "", name) for quoted in re.findall(r"`([^`\n]+)`", text) for name in quoted.split()}


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest, RecordingRequest, StreamOptions])
def test_every_field_is_documented(model: type[StrictBody], documented: set[str]) -> None:
    assert set(model.model_fields) - documented == set()


def limits_in(schema: object) -> set[str]:
    """Numbers that bound a field, as the docs write them."""
    if isinstance(schema, list):
        return set().union(*map(limits_in, schema))
    found: set[str] = set()
    if isinstance(schema, dict):
        for name, value in schema.items():
            if name in ("minimum", "maximum", "exclusiveMinimum", "maxItems", "maxLength", "maxProperties"):
                found.add(f"{value:g}" if abs(value) < 10_000 else str(value))
            elif name == "exclusiveMaximum":
                found.add(str(value - 1))
            elif name not in ("enum", "const", "default"):
                found |= limits_in(value)
    return found


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest])
def test_every_limit_is_documented_beside_its_field(model: type[StrictBody]) -> None:
    bodies = [ChatCompletionRequest, CompletionRequest, RecordingRequest]
    _, schemas = models_json_schema([(body, "validation") for body in bodies])
    write_limits(schemas["$defs"], GatewayConfig(), None)
    rows = re.findall(r"^\| (.*?) \| (.*)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    missing = []
    for name, schema in schemas["$defs"][model.__name__]["properties"].items():
        if name == "seed":
            continue  # "64 bits"
        text = " ".join(rest for fields, rest in rows if f"`{name}`" in fields)
        found = {limit for limit in limits_in(schema) if re.search(rf"(?<![\d.]){re.escape(limit)}\b", text)}
        implied = {"0"} if name in ("prompt", "stop_token_ids", "tools", "functions") else set()
        missing += [(name, limit) for limit in limits_in(schema) - found - implied]
    assert missing == []


def test_every_status_is_documented() -> None:
    document = create_app(ScriptedEngine(model_info(ROOT)), GatewayConfig(api_keys=("secret",))).openapi()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    statuses = {status for operation in operations for status in operation["responses"]} - {"200"}
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert statuses == set(re.findall(r"^\| (\d{3}) \|", text, re.MULTILINE)) - {"405", "414"}


def test_every_header_of_ours_is_documented(documented: set[str]) -> None:
    assert {"x-request-id", "x-moeless-ignored", "Retry-After", "Allow", "WWW-Authenticate"} - documented == set()


def test_every_series_is_documented(documented: set[str]) -> None:
    metrics = GatewayMetrics()
    metrics.show_engine(MODEL_ID, STATS)
    series = set()
    for family in metrics.registry.collect():
        if family.name.startswith("moeless_"):
            series.add(f"{family.name}_total" if family.type == "counter" else family.name)
    assert series - documented == set()


def test_every_error_code_is_documented(documented: set[str]) -> None:
    sources = Path(errors.__file__).parent.glob("*.py")
    codes = set()
    for source in sources:
        codes.update(re.findall(r'(?:code=|return |: )"([a-z]+(?:_[a-z]+)+)"', source.read_text(encoding="utf-8")))
    codes -= {"rate_limit_error", "service_unavailable_error", "invalid_request_error"}  # types, not codes
    assert "context_length_exceeded" in codes
    assert codes - documented == set()
