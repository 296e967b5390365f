"""Whatever JSON a client sends, the gateway answers with 200 or with an error of the client's, never with a 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.gateway.schemas import ChatCompletionRequest, CompletionRequest
from tests.unit.gateway.support import MODEL_ID, ScriptedEngine, chat, completion, model_info

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
TOKENS = st.lists(st.integers(-1, 300), max_size=4)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
        optional={"content": st.text(max_size=20) | JSON, "name": JSON},
    ),
    max_size=3,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-1, 40),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "top_k": st.integers(-3, 300),
    "max_tokens": st.integers(-1, 300),
    "stop": st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=20),
    "seed": st.integers(-(2**64), 2**64),
    "logit_bias": st.dictionaries(st.text(max_size=3) | st.integers(-5, 300).map(str), st.floats(), max_size=3),
    "logprobs": st.booleans() | st.integers(-1, 25),
    "top_logprobs": st.integers(-1, 25),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans() | JSON}),
}


def bodies(model: type[ChatCompletionRequest | CompletionRequest]) -> st.SearchStrategy[Any]:
    fields = {name: LIKELY.get(name, JSON) | JSON for name in model.model_fields if name != "model"}
    fields["messages"] = MESSAGES | JSON
    fields["prompt"] = st.text(max_size=20) | TOKENS | st.lists(TOKENS, max_size=3) | JSON
    if model is ChatCompletionRequest:
        required = {"messages": fields.pop("messages")}
        del fields["prompt"]
    else:
        required = {"prompt": fields.pop("prompt")}
        del fields["messages"]
    # Few fields at a time, or no body would ever be right.
    return st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries(
            {"model": st.just(MODEL_ID) | JSON} | required | {name: fields[name] for name in names}
        )
    )


class InProcess:
    """The app on one event loop for all examples; a socket for each would take most of the time."""

    def __init__(self, tokenizer_folder: Path) -> None:
        self.engine = ScriptedEngine(model_info(tokenizer_folder))
        self.app = create_app(self.engine, GatewayConfig())
        self.runner = asyncio.Runner()
        self.lifespan = self.app.router.lifespan_context(self.app)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    def __enter__(self) -> InProcess:
        self.runner.run(self._start())
        return self

    def __exit__(self, *error: object) -> None:
        self.runner.run(self.lifespan.__aexit__(None, None, None))
        self.runner.close()

    async def _start(self) -> None:
        await self.lifespan.__aenter__()
        async with asyncio.timeout(20):
            while (await self.http.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)

    def post(self, path: str, content: bytes) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return self.runner.run(self.http.post(path, content=content, headers=headers))


@pytest.fixture(scope="module")
def gateway(tokenizer_folder: Path) -> Iterator[InProcess]:
    with InProcess(tokenizer_folder) as gateway:
        yield gateway


def check(gateway: InProcess, path: str, content: bytes) -> None:
    response = gateway.post(path, content)
    if response.status_code == 200:
        return
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


quick = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(body=bodies(ChatCompletionRequest) | JSON)
@example(body=chat())
@example(body=chat(n=3, stream=True, logprobs=True, top_logprobs=2))
def test_no_chat_makes_the_server_fail(gateway: InProcess, body: Any) -> None:
    check(gateway, "/v1/chat/completions", json.dumps(body).encode())


@quick
@given(body=bodies(CompletionRequest) | JSON)
@example(body=completion())
@example(body=completion([[1], [2]], n=2, stream=True, logprobs=2))
def test_no_completion_makes_the_server_fail(gateway: InProcess, body: Any) -> None:
    check(gateway, "/v1/completions", json.dumps(body).encode())


@quick
@given(content=st.binary(max_size=200))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_bytes_make_the_server_fail(gateway: InProcess, path: str, content: bytes) -> None:
    check(gateway, path, content)


def test_the_examples_reach_the_engine(gateway: InProcess) -> None:
    """Or the tests above would show no more than that everything is refused."""
    num_before = len(gateway.engine.requests)
    assert gateway.post("/v1/chat/completions", json.dumps(chat()).encode()).status_code == 200
    assert len(gateway.engine.requests) == num_before + 1
