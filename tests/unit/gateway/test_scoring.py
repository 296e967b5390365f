"""Scoring prompts: `echo` with log-probabilities and `prompt_logprobs`, over real HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from moeless.core.generation import GenerationDelta, GenerationRequest, TokenLogprob
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import ScriptedEngine, chat, chunks_of, completion, delta, gateway_for, token_logprob

pytestmark = pytest.mark.anyio

BOS = 256


def scored(token_id: int, data: bytes, rank: int, num_top: int) -> TokenLogprob:
    """A token that stands at `rank` of its place; the likelier ones have the ids 1000, 1001, …"""
    top = [(1000 + n, f"t{n}", b"t%d" % n, -0.25 * (n + 1)) for n in range(num_top)]
    text = data.decode(errors="replace")
    return TokenLogprob(token_id, text, data, -0.25 * rank, top, rank=rank)


async def scoring(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
    """The prompt's tokens (one a byte, see write_tokenizer) in two parts, each of rank 3; then as many x as wanted."""
    sampling = request.sampling
    tokens: list[TokenLogprob] = []
    if sampling.prompt_logprobs is not None:
        data = [bytes([byte]) for byte in "h\u00e9y".encode()]
        ids = request.prompt_token_ids[1:]
        tokens = [scored(i, b, 3, sampling.prompt_logprobs) for i, b in zip(ids, data, strict=True)]
    yield delta(request, "", num_tokens=0, prompt_logprobs=tokens[:1])
    yield delta(request, "", num_tokens=0, prompt_logprobs=tokens[1:])
    for position in range(sampling.max_tokens):
        wants = sampling.logprobs is not None
        logprobs = [token_logprob("x", sampling.logprobs or 0, text_offset=position)] if wants else []
        is_last = position == sampling.max_tokens - 1
        yield delta(request, "x", logprobs=logprobs, finish_reason="length" if is_last else None)
    if sampling.max_tokens == 0:
        yield delta(request, "", num_tokens=0, finish_reason="length")


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
async def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(
    engine: ScriptedEngine, max_tokens: int
) -> None:
    engine.script = scoring
    body = completion("h\u00e9y", echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = (await gateway.http.post("/v1/completions", json=body)).json()
        chunks = chunks_of(await gateway.events("/v1/completions", body | {"stream": True}))
    [choice] = response["choices"]
    assert choice["text"] == "h\u00e9y" + "x" * max_tokens
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "h", "\ufffd", "\ufffd", "y"] + ["x"] * max_tokens
    assert logprobs["token_logprobs"] == [None, *[-0.75] * 4, *[-0.5] * max_tokens]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"t0": -0.25, "h": -0.75}
    # <s> is not in the text; both bytes of the second letter begin where it begins.
    assert logprobs["text_offset"] == [0, 0, 1, 1, 2] + [3 + n for n in range(max_tokens)]
    assert response["usage"]["completion_tokens"] == max_tokens

    streamed = [chunk["choices"][0] for chunk in chunks]
    assert "".join(part["text"] for part in streamed) == choice["text"]
    for name, values in logprobs.items():
        assert [value for part in streamed for value in part["logprobs"][name]] == values


async def test_an_echo_without_log_probabilities_is_the_prompt_as_it_was_sent(engine: ScriptedEngine) -> None:
    engine.script = scoring
    body = completion(["h\u00e9y", "abc"], echo=True, n=2, max_tokens=1)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = (await gateway.http.post("/v1/completions", json=body)).json()
        chunks = chunks_of(await gateway.events("/v1/completions", body | {"stream": True}))
    texts = [choice["text"] for choice in response["choices"]]
    assert texts == ["h\u00e9yx", "h\u00e9yx", "abcx", "abcx"]
    streamed = [""] * 4
    for chunk in chunks:
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert streamed == texts


async def test_token_ids_are_echoed_as_their_text(engine: ScriptedEngine) -> None:
    engine.script = scoring
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        await gateway.http.post("/v1/completions", json=completion("h\u00e9y"))
        token_ids = engine.requests[0].prompt_token_ids
        assert token_ids[0] == BOS
        body = completion(token_ids, echo=True, max_tokens=1)
        response = (await gateway.http.post("/v1/completions", json=body)).json()
    assert response["choices"][0]["text"] == "h\u00e9yx"


async def test_prompt_logprobs_are_by_token_id_with_ranks(engine: ScriptedEngine) -> None:
    engine.script = scoring
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        body = completion("h\u00e9y", prompt_logprobs=2, max_tokens=1)
        [choice] = (await gateway.http.post("/v1/completions", json=body)).json()["choices"]
        token_ids = engine.requests[0].prompt_token_ids
        plain = (await gateway.http.post("/v1/completions", json=completion(max_tokens=1))).json()["choices"][0]
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == len(token_ids)
    assert choice["prompt_logprobs"][1] == {
        "1000": {"logprob": -0.25, "rank": 1, "decoded_token": "t0"},
        "1001": {"logprob": -0.5, "rank": 2, "decoded_token": "t1"},
        str(token_ids[1]): {"logprob": -0.75, "rank": 3, "decoded_token": "h"},
    }
    assert choice["logprobs"] is None
    assert "prompt_logprobs" not in plain


async def test_the_prompt_logprobs_of_a_chat_stand_beside_its_choices(engine: ScriptedEngine) -> None:
    async def script(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        assert request.sampling.prompt_logprobs == 0
        tokens = [scored(token_id, b"a", 1, 0) for token_id in request.prompt_token_ids[1:]]
        yield delta(request, "yes", prompt_logprobs=tokens, finish_reason="stop", stop_reason="END")

    engine.script = script
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = (await gateway.http.post("/v1/chat/completions", json=chat(prompt_logprobs=0))).json()
    assert response["prompt_logprobs"][0] is None
    assert len(response["prompt_logprobs"]) == len(engine.requests[0].prompt_token_ids)
    assert {entry["logprob"] for row in response["prompt_logprobs"][1:] for entry in row.values()} == {-0.25}
    assert response["choices"][0]["stop_reason"] == "END"
