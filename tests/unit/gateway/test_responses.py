"""Responses that a client reads, in OpenAI's shapes: over real HTTP, through the openai package where it can be."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from moeless.core.generation import GenerationDelta, GenerationRequest
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import (
    MODEL_ID,
    ScriptedEngine,
    chat,
    chunks_of,
    completion,
    delta,
    gateway_for,
    saying,
    token_logprob,
)

pytestmark = pytest.mark.anyio


async def test_a_chat_is_answered(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        answer = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}]
        )
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL_ID
    assert answer.usage is not None
    num_prompt_tokens = len(engine.requests[0].prompt_token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt_tokens, 2)
    assert answer.usage.total_tokens == num_prompt_tokens + 2


async def test_a_prompt_is_completed(engine: ScriptedEngine) -> None:
    engine.script = saying("lo", " there", reason="length")
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        answer = await gateway.openai.completions.create(model=MODEL_ID, prompt="hel")
    assert [choice.text for choice in answer.choices] == ["lo there"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4  # <s> and three bytes


async def test_a_streamed_chat_has_a_role_then_content_then_a_reason(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello world"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks)


async def test_a_streamed_completion_ends_with_a_reason(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello world"
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat()), ("/v1/completions", completion())])
async def test_a_stream_ends_with_done(engine: ScriptedEngine, path: str, body: dict[str, object]) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        events = await gateway.events(path, body | {"stream": True})
    assert events[-1] == "[DONE]"
    assert all("usage" not in chunk for chunk in chunks_of(events))


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat()), ("/v1/completions", completion())])
async def test_include_usage_adds_a_last_chunk_without_choices(
    engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        events = await gateway.events(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, last = chunks_of(events)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    num_prompt_tokens = len(engine.requests[0].prompt_token_ids)
    assert last["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 2,
        "total_tokens": num_prompt_tokens + 2,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_tokens_found_in_the_cache_are_counted_once_for_a_prompt(engine: ScriptedEngine) -> None:
    async def cached(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "a", num_cached_tokens=3)
        yield delta(request, "b", num_cached_tokens=3, finish_reason="stop")

    engine.script = cached
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/completions", json=completion(["one", "two"], n=2))
    usage = response.json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 6}
    assert usage["prompt_tokens"] == 8
    assert usage["completion_tokens"] == 8


async def test_n_choices_are_merged_into_one_stream(engine: ScriptedEngine) -> None:
    async def own_text(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        index = request.request_id.rpartition("-")[2]
        yield delta(request, f"I am {index}")
        yield delta(request, "!", finish_reason="stop")

    engine.script = own_text
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], n=3, stream=True
        )
        texts = ["", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        whole = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], n=3
        )
    assert texts == ["I am 0!", "I am 1!", "I am 2!"]
    assert [choice.message.content for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == [0, 1, 2]


async def test_several_prompts_get_their_choices_in_order(engine: ScriptedEngine) -> None:
    async def tell_the_prompt(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, ",".join(map(str, request.prompt_token_ids)), finish_reason="stop")

    engine.script = tell_the_prompt
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        answer = await gateway.openai.completions.create(model=MODEL_ID, prompt=[[1, 2], [3]], n=2)
    assert [choice.text for choice in answer.choices] == ["1,2", "1,2", "3", "3"]


async def test_chat_logprobs_have_bytes_and_alternatives(engine: ScriptedEngine) -> None:
    engine.script = saying("é", "!")
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        answer = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2
        )
        stream = await gateway.openai.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "hi"}],
            logprobs=True,
            top_logprobs=2,
            stream=True,
        )
        streamed = [
            token
            async for chunk in stream
            for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else None) or []
        ]
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content
    assert tokens is not None
    assert [(token.token, token.bytes, token.logprob) for token in tokens] == [
        ("é", [0xC3, 0xA9], -0.5),
        ("!", [33], -0.5),
    ]
    assert [(top.token, top.bytes, top.logprob) for top in tokens[0].top_logprobs] == [
        ("t0", [116, 48], -0.5),
        ("t1", [116, 49], -1.0),
    ]
    assert streamed == tokens


async def test_completion_logprobs_have_offsets_into_the_text(engine: ScriptedEngine) -> None:
    engine.script = saying("ab", "c", "def")
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        answer = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", logprobs=1)
        stream = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", logprobs=1, stream=True)
        streamed = [chunk.choices[0].logprobs async for chunk in stream]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["ab", "c", "def"]
    assert logprobs.text_offset == [0, 2, 3]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"t0": -0.5, text: -0.5} for text in ("ab", "c", "def")]
    offsets = [offset for part in streamed if part for offset in part.text_offset or []]
    assert offsets == [0, 2, 3]


async def test_minus_infinity_is_written_as_openai_writes_it(engine: ScriptedEngine) -> None:
    async def impossible(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        top = [(1, "a", b"a", -0.1), (2, "a", b"a", float("-inf"))]
        token = token_logprob("a", 0)
        yield delta(request, "a", logprobs=[type(token)(1, "a", b"a", float("-inf"), top)], finish_reason="stop")

    engine.script = impossible
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/completions", json=completion(logprobs=2))
    logprobs = response.json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-9999.0]
    assert logprobs["top_logprobs"] == [{"a": -0.1}]


async def test_text_that_lags_its_tokens_is_not_sent_as_empty_chunks(engine: ScriptedEngine) -> None:
    async def lagging(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "")
        yield delta(request, "")
        yield delta(request, "€", finish_reason="length")

    engine.script = lagging
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        events = await gateway.events(
            "/v1/completions", completion(stream=True, stream_options={"include_usage": True})
        )
    *chunks, last = chunks_of(events)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["€"]
    assert last["usage"]["completion_tokens"] == 3


async def test_log_probabilities_do_not_wait_for_text(engine: ScriptedEngine) -> None:
    async def lagging(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "", logprobs=[token_logprob("\ufffd", 0)])
        yield delta(request, "", num_tokens=0)
        yield delta(request, "é", logprobs=[token_logprob("\ufffd", 0)])
        yield delta(request, "", num_tokens=0, finish_reason="stop")

    engine.script = lagging
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        chat_events = await gateway.events("/v1/chat/completions", chat(stream=True, logprobs=True))
        events = await gateway.events("/v1/completions", completion(stream=True, logprobs=0))
    chat_choices = [chunk["choices"][0] for chunk in chunks_of(chat_events)]
    choices = [chunk["choices"][0] for chunk in chunks_of(events)]
    assert sum(len(choice["logprobs"]["content"]) for choice in chat_choices if choice["logprobs"]) == 2
    assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 2
    assert "".join(choice["delta"].get("content", "") for choice in chat_choices) == "é"
    assert "".join(choice["text"] for choice in choices) == "é"
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"


async def test_every_character_survives_the_stream(engine: ScriptedEngine) -> None:
    text = '"\\\n\r\t\x00\x7f\u2028 data: [DONE]\n\n😀é</script>'
    engine.script = saying(*text)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.chat.completions.create(
            model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        got = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert got == text


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", chat()), ("/v1/completions", completion())])
async def test_continuous_usage_counts_in_every_chunk(
    engine: ScriptedEngine, path: str, body: dict[str, object]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        chunks = chunks_of(await gateway.events(path, body | {"stream": True, "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 2
    assert all(chunk["usage"]["prompt_tokens"] == len(engine.requests[0].prompt_token_ids) for chunk in chunks)
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("stream", [False, True])
async def test_fields_without_effect_are_named_in_a_header(engine: ScriptedEngine, stream: bool) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        body = chat(stream=stream, metadata={"run": "7"}, store=True, parallel_tool_calls=False)
        response = await gateway.http.post("/v1/chat/completions", json=body)
        plain = await gateway.http.post("/v1/chat/completions", json=chat(stream=stream))
    assert response.status_code == plain.status_code == 200
    assert set(response.headers["x-moeless-ignored"].split(", ")) == {"metadata", "store", "parallel_tool_calls"}
    assert "x-moeless-ignored" not in plain.headers


async def test_a_stop_token_is_named_beside_the_reason(engine: ScriptedEngine) -> None:
    async def stopping(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "a", finish_reason="stop", stop_reason=7)

    engine.script = stopping
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        whole = (await gateway.http.post("/v1/completions", json=completion(stop_token_ids=[7]))).json()
        chat_chunks = chunks_of(await gateway.events("/v1/chat/completions", chat(stream=True)))
        chunks = chunks_of(await gateway.events("/v1/completions", completion(stream=True)))
    assert whole["choices"][0]["stop_reason"] == 7
    assert chat_chunks[-1]["choices"][0]["stop_reason"] == 7
    assert chunks[-1]["choices"][0]["stop_reason"] == 7
