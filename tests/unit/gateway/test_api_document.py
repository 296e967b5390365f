"""The OpenAPI document says what the server does: schemathesis looks for a difference, with all its checks."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeless.core.generation import GenerationDelta, GenerationRequest
from moeless.engine.observing import StepObservers
from moeless.engine.recording_service import LocalRecordings, Recordings, trace_metadata
from moeless.gateway.app import create_app
from moeless.gateway.body_limits import numbers_up_to
from moeless.gateway.config import GatewayConfig
from moeless.gateway.middleware import OPEN_PATHS
from tests.unit.gateway.support import ScriptedEngine, delta, gateway_for, model_info, token_logprob

pytestmark = pytest.mark.anyio


async def briefly(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
    """As many tokens as wanted, at most three; with the log-probabilities that the request wants."""
    sampling, num_prompt_tokens = request.sampling, len(request.prompt_token_ids)
    prompt_logprobs = []
    if sampling.prompt_logprobs is not None:
        prompt_logprobs = [token_logprob("p", sampling.prompt_logprobs)] * (num_prompt_tokens - 1)
    yield delta(request, "", num_tokens=0, prompt_logprobs=prompt_logprobs)
    num_tokens = min(3, sampling.max_tokens)
    for position in range(num_tokens):
        logprobs = [] if sampling.logprobs is None else [token_logprob("x", sampling.logprobs, text_offset=position)]
        yield delta(request, "x", logprobs=logprobs, finish_reason="length" if position == num_tokens - 1 else None)
    if num_tokens == 0:
        yield delta(request, "", num_tokens=0, finish_reason="length")


@pytest.fixture
def engine(tokenizer_folder: Path) -> ScriptedEngine:
    engine = ScriptedEngine(model_info(tokenizer_folder, max_context_tokens=100_000), briefly)
    engine.recordings = LocalRecordings(Recordings(StepObservers(), trace_metadata(engine.info, source="test")))
    return engine


@pytest.mark.timeout(240)
@pytest.mark.parametrize("api_keys", [(), ("secret",)], ids=["open", "with keys"])
async def test_schemathesis_finds_nothing(engine: ScriptedEngine, tmp_path: Path, api_keys: tuple[str, ...]) -> None:
    app = create_app(engine, GatewayConfig(allow_recording=True, api_keys=api_keys))
    options = ["--checks", "all", "--max-examples", "10", "--seed", "1", "--generation-database", "none", "--no-color"]
    if api_keys:
        options += ["--header", f"Authorization: Bearer {api_keys[0]}"]
    async with gateway_for(app, api_key="secret") as gateway:
        run = await asyncio.create_subprocess_exec(
            sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()",
            "run", f"{gateway.address}/openapi.json", *options,
            cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": "ignore"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output = (await run.communicate())[0].decode()
    assert run.returncode == 0, output
    tested = re.search(r"Tested: (\d+)", output)
    assert tested is not None, output
    assert int(tested[1]) == 15
    assert engine.requests, "no request got as far as the engine"


async def test_statuses_and_media_types_are_those_that_are_sent(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        document = (await gateway.http.get("/openapi.json")).json()
    found = {
        f"{method} {path}": {status: sorted(answer["content"]) for status, answer in operation["responses"].items()}
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }
    error = ["application/json"]
    errors = {status: error for status in ("400", "404", "413", "415", "429", "500", "503")}
    generated = {"200": ["application/json", "text/event-stream"], **errors}
    assert found["post /v1/chat/completions"] == found["post /v1/completions"] == generated
    assert found["get /metrics"] == {"200": ["text/plain; version=0.0.4; charset=utf-8"], "500": error}
    assert found["get /v1/traces/recording/file"]["200"] == ["application/octet-stream"]
    assert not [route for route, answers in found.items() if "422" in answers]
    assert "422" not in json.dumps(document["paths"])
    assert "HTTPValidationError" not in document["components"]["schemas"]


async def test_where_keys_are_needed_the_document_says_so(engine: ScriptedEngine) -> None:
    app = create_app(engine, GatewayConfig(api_keys=("secret",)))
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            is_open = path in OPEN_PATHS
            assert ("401" in operation["responses"]) is not is_open
            assert ("security" in operation) is not is_open


@given(last=st.integers(0, 200_000), number=st.integers(0, 400_000))
def test_a_pattern_matches_the_numbers_up_to_a_last_one(last: int, number: int) -> None:
    pattern = re.compile(numbers_up_to(last))
    assert (pattern.search(str(number)) is not None) is (number <= last)
    assert pattern.search(str(last))
    assert not pattern.search(str(last + 1))
    assert not pattern.search(f"0{number}")
