"""Answers to bad input: always OpenAI's error shape, naming the field, the rule and the value."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import (
    MODEL_ID,
    Gateway,
    ScriptedEngine,
    chat,
    completion,
    gateway_for,
    model_info,
)

pytestmark = pytest.mark.anyio

LIMITS = GatewayConfig(
    max_body_bytes=20_000, max_messages=3, max_prompts=3, max_n=4, max_sequences=6, max_stop=2, max_stop_chars=5,
    max_logit_bias=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def shared_engine(tokenizer_folder: Path) -> ScriptedEngine:
    return ScriptedEngine(model_info(tokenizer_folder))


@pytest.fixture(scope="module")
async def gateway(anyio_backend: str, shared_engine: ScriptedEngine) -> AsyncIterator[Gateway]:
    """One server for all tests here: they leave nothing behind but the requests they sent."""
    async with gateway_for(create_app(shared_engine, LIMITS)) as gateway:
        yield gateway


@pytest.fixture
def engine(shared_engine: ScriptedEngine) -> ScriptedEngine:
    shared_engine.requests.clear()
    return shared_engine


def error_of(response: httpx.Response) -> dict[str, object]:
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return dict(error)


MESSAGE = {"role": "user", "content": "hi"}

REFUSED_CHATS = [
    # fields of the request, the param of the error, what its message must hold
    ({"messages": None}, "messages", "None"),
    ({"messages": []}, "messages", "empty"),
    ({"messages": [MESSAGE] * 4}, "messages", "at most 3 messages, got 4"),
    ({"messages": [MESSAGE, {"role": "robot", "content": "hi"}]}, "messages[1].role", "'robot'"),
    ({"messages": [{"role": "function", "content": "hi"}]}, "messages[0].role", "'function'"),
    ({"messages": [{**MESSAGE, "tool_call_id": "x"}]}, "messages[0].tool_call_id", "of role tool"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "got 3"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "tool_calls may lack it"),
    ({"messages": [{**MESSAGE, "function_call": {}}]}, "messages[0].function_call", "not supported"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0].type",
        "'text'",
    ),
    (
        {"messages": [{"role": "assistant", "content": "hi", "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
        "required",
    ),
    (
        {"messages": [{**MESSAGE, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        "messages[0].tool_calls",
        "of role assistant",
    ),
    ({"temperature": 2.5}, "temperature", "2.5"),
    ({"temperature": "1"}, "temperature", "'1'"),
    ({"top_p": 0}, "top_p", "greater than 0, got 0"),
    ({"top_p": 1.1}, "top_p", "1.1"),
    ({"top_k": -2}, "top_k", "-2"),
    ({"top_k": 10**30}, "top_k", "2147483648"),
    ({"max_tokens": 0}, "max_tokens", "got 0"),
    ({"max_tokens": True}, "max_tokens", "True"),
    ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "one of them"),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "-1"),
    ({"n": 0}, "n", "got 0"),
    ({"n": 5}, "n", "at most 4 choices, got 5"),
    ({"stop": ["a", "b", "c"]}, "stop", "at most 2 stop strings, got 3"),
    ({"stop": "abcdef"}, "stop", "1 to 5 characters, got 6"),
    ({"stop": ["a", ""]}, "stop", "got 0"),
    ({"stop": {"a": 1}}, "stop", "string or a list"),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"seed": 2**63}, "seed", str(2**63)),
    ({"presence_penalty": -2.1}, "presence_penalty", "-2.1"),
    ({"frequency_penalty": 3}, "frequency_penalty", "got 3"),
    ({"logprobs": 1}, "logprobs", "boolean"),
    ({"top_logprobs": 1}, "top_logprobs", "'logprobs' is true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "101"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    ({"logit_bias": {"260": 1}}, "logit_bias", "0 to 259"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "'-1'"),
    ({"logit_bias": {"1": 1, "2": 1, "3": 1}}, "logit_bias", "at most 2 entries, got 3"),
    ({"stream": "yes"}, "stream", "'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "'stream' is true"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "not known"),
    ({"response_format": {"type": "json_object"}}, "response_format.type", "'json_object'"),
    ({"modalities": ["audio"]}, "modalities[0]", "'audio'"),
    ({"tools": [{"type": "function"}]}, "tools", "only an empty list"),
    ({"tool_choice": "required"}, "tool_choice", "only 'none' and 'auto'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "only 'none' and 'auto'"),
    ({"functions": [{"name": "f"}]}, "functions", "only an empty list"),
    ({"function_call": {"name": "f"}}, "function_call", "only 'none' and 'auto'"),
    ({"audio": {}}, "audio", "not supported"),
    ({"length_penalty": 0.5}, "length_penalty", "only 1 is"),
    ({"use_beam_search": True}, "use_beam_search", "only false is"),
    ({"priority": 3}, "priority", "only 0 is"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "only true is"),
    ({"metadata": "x"}, "metadata", "'x'"),
    ({"reasoning_effort": "much"}, "reasoning_effort", "'much'"),
    (
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "'add_generation_prompt' exclude each other",
    ),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not hold 'messages'"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "object"),
    ({"min_p": 1.5}, "min_p", "1.5"),
    ({"repetition_penalty": 0}, "repetition_penalty", "got 0"),
    ({"min_tokens": -1}, "min_tokens", "-1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "at most the number of tokens to generate, 8, got 9"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]", "-1"),
    ({"stop_token_ids": [260]}, "stop_token_ids", "below the vocabulary's size 260, got 260"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids", "at most 64 token ids, got 65"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    ({"prompt_logprobs": -1}, "prompt_logprobs", "-1"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "'stream' is false"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not known"),
    ({"prompt": "hi"}, "prompt", "not known"),
    ({"beam_width": 2}, "beam_width", "not known"),
]


@pytest.mark.parametrize(("fields", "param", "told"), REFUSED_CHATS)
async def test_a_chat_that_breaks_a_rule_is_refused_by_field(
    gateway: Gateway, engine: ScriptedEngine, fields: dict[str, object], param: str, told: str
) -> None:
    response = await gateway.http.post("/v1/chat/completions", json=chat() | fields)
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert told in str(error["message"])
    assert param in str(error["message"])
    assert engine.requests == []


REFUSED_COMPLETIONS = [
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": 3}, "prompt", "got 3"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt[0]", "empty"),
    ({"prompt": ["a", 1]}, "prompt[1]", "got 1"),
    ({"prompt": [1.5]}, "prompt[0]", "1.5"),
    ({"prompt": [1, "a"]}, "prompt[1]", "'a'"),
    ({"prompt": [1, -1]}, "prompt[1]", "-1"),
    ({"prompt": [1, 260]}, "prompt", "below the vocabulary's size 260, got 260"),
    ({"prompt": ["a"] * 4}, "prompt", "at most 3 prompts, got 4"),
    ({"prompt": ["a"] * 2, "n": 4}, "n", "at most 6 sequences (prompts × n), got 8"),
    ({"best_of": 2}, "best_of", "must equal 'n' (1) here, got 2"),
    ({"echo": "yes"}, "echo", "'yes'"),
    ({"max_tokens": 0}, "max_tokens", "unless 'echo' or 'prompt_logprobs' is set, got 0"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "-1"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "True"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "not known"),
]


@pytest.mark.parametrize(("fields", "param", "told"), REFUSED_COMPLETIONS)
async def test_a_completion_that_breaks_a_rule_is_refused_by_field(
    gateway: Gateway, engine: ScriptedEngine, fields: dict[str, object], param: str, told: str
) -> None:
    response = await gateway.http.post("/v1/completions", json=completion() | fields)
    error = error_of(response)
    assert response.status_code == 400
    assert error["param"] == param
    assert told in str(error["message"])
    assert engine.requests == []


ACCEPTED = [
    {"temperature": None, "n": None, "stop": None, "max_tokens": None, "logit_bias": None, "tools": None},
    {"temperature": 0, "top_p": 1, "top_k": -1, "n": 4, "stop": ["a", "bcdef"], "seed": -(2**63)},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
    {"messages": [MESSAGE, {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}]},
    {"response_format": {"type": "text"}, "modalities": ["text"], "store": False, "service_tier": "auto"},
    {"user": "ann", "safety_identifier": "b", "prompt_cache_key": "c", "ignore_eos": True},
    {"logprobs": False, "logit_bias": {"0": -100, "259": 100.0}},
    {"stream": False, "stream_options": None},
    {"beam_width": None, "stream": True, "stream_options": {"include_usage": True, "verbose": None}},
    {"min_p": 0, "repetition_penalty": 100, "min_tokens": 0, "stop_token_ids": [], "prompt_logprobs": 20},
]


@pytest.mark.parametrize("fields", ACCEPTED)
async def test_a_chat_at_the_edge_of_the_rules_is_answered(gateway: Gateway, fields: dict[str, object]) -> None:
    response = await gateway.http.post("/v1/chat/completions", json=chat() | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"model": }', b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 10_000, b"nul", b"1e999999"]
)
async def test_malformed_json_is_refused(gateway: Gateway, path: str, body: bytes) -> None:
    response = await gateway.http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "JSON" in str(error_of(response)["message"])


async def test_numbers_that_json_does_not_have_are_refused(gateway: Gateway) -> None:
    body = json.dumps(chat(temperature=float("nan"))).encode()
    response = await gateway.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_is_not_announced_as_json_is_refused(gateway: Gateway, media_type: str) -> None:
    response = await gateway.http.post(
        "/v1/completions", content=json.dumps(completion()), headers={"content-type": media_type}
    )
    assert response.status_code == 415
    assert "application/json" in str(error_of(response)["message"])


async def test_a_long_value_is_quoted_in_part(gateway: Gateway) -> None:
    response = await gateway.http.post("/v1/chat/completions", json=chat(stop={"x" * 5000: 1}))
    assert len(str(error_of(response)["message"])) < 300


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat()), ("/v1/completions", completion())])
async def test_an_unknown_model_is_not_found(gateway: Gateway, path: str, body: dict[str, object]) -> None:
    response = await gateway.http.post(path, json=body | {"model": "gpt-17"})
    error = error_of(response)
    assert response.status_code == 404
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'gpt-17'" in str(error["message"])
    assert MODEL_ID in str(error["message"])


async def test_the_openai_client_raises_its_own_errors(gateway: Gateway) -> None:
    with pytest.raises(openai.NotFoundError):
        await gateway.openai.chat.completions.create(model="other", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", temperature=3)


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(gateway: Gateway) -> None:
    response = await gateway.http.post("/v1/completions", json=completion([1] * 300))
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "prompt"
    assert "256 tokens" in str(error["message"])
    assert "300 tokens" in str(error["message"])


async def test_more_tokens_than_the_context_holds_are_refused_with_both_numbers(gateway: Gateway) -> None:
    response = await gateway.http.post("/v1/completions", json=completion([1] * 200, max_tokens=57))
    error = error_of(response)
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_tokens"
    assert "256 tokens" in str(error["message"])
    assert "257 tokens" in str(error["message"])


async def test_the_context_may_be_filled_to_the_last_token(gateway: Gateway, engine: ScriptedEngine) -> None:
    response = await gateway.http.post("/v1/completions", json=completion([1] * 200, max_tokens=56))
    assert response.status_code == 200
    assert engine.requests[0].sampling.max_tokens == 56


@pytest.mark.parametrize("has_length", [True, False])
async def test_a_body_beyond_the_limit_is_refused_while_it_is_read(
    gateway: Gateway, engine: ScriptedEngine, has_length: bool
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1024
            yield b" " * 1024

    content = b" " * 30_000 if has_length else endless()
    response = await gateway.http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response)
    assert response.status_code == 413
    assert error["code"] == "request_too_large"
    assert "20000 bytes" in str(error["message"])
    assert engine.requests == []


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "/health/"])
async def test_an_unknown_path_is_not_found(gateway: Gateway, path: str) -> None:
    response = await gateway.http.get(path)
    assert response.status_code == 404
    assert path in str(error_of(response)["message"])


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"), ("POST", "/health")]
)
async def test_a_method_that_a_path_does_not_have_is_refused(gateway: Gateway, method: str, path: str) -> None:
    response = await gateway.http.request(method, path)
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"]


async def test_all_methods_of_a_path_are_named(gateway: Gateway) -> None:
    response = await gateway.http.put("/v1/traces/recording")
    assert response.status_code == 405
    assert response.headers["allow"] == "DELETE, GET, POST"


async def test_a_whole_number_may_be_written_with_a_point(gateway: Gateway, engine: ScriptedEngine) -> None:
    body = completion([1.0, 2], max_tokens=3.0, n=2.0, stop_token_ids=[4.0])
    assert (await gateway.http.post("/v1/completions", json=body)).status_code == 200
    assert engine.requests[0].prompt_token_ids == [1, 2]
    assert engine.requests[0].sampling.max_tokens == 3
