"""docs/api.md names what the gateway has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moeless.gateway import errors
from moeless.gateway.metrics import GatewayMetrics
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from tests.unit.gateway.support import MODEL_ID, STATS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def documented() -> set[str]:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return {re.sub(r"\{.*", "", name) for quoted in re.findall(r"`([^`\n]+)`", text) for name in quoted.split()}


def is_served(model: type[SamplingFields], name: str) -> bool:
    """Whether the field takes anything but null or false."""
    return "_refuse" not in str(model.model_fields[name].metadata)


@pytest.mark.parametrize("model", [ChatCompletionRequest, CompletionRequest])
def test_every_field_that_is_served_is_documented(model: type[SamplingFields], documented: set[str]) -> None:
    served = {name for name in model.model_fields if is_served(model, name)}
    assert served - documented - {"stream_options"} == set()


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
