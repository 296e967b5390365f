"""Answers to clients when the engine refuses, fails or dies, and cancels to the engine when a client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types import Completion

from moeless.core.errors import (
    ContextLengthError,
    EngineStoppedError,
    FunctionUnavailableError,
    PackageError,
    QueueFullError,
)
from moeless.core.generation import EngineClient, GenerationDelta, GenerationRequest
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from tests.unit.gateway.support import (
    CHATML,
    MODEL_ID,
    Gateway,
    ScriptedEngine,
    chat,
    completion,
    delta,
    failing,
    gateway_for,
    model_info,
    never_ending,
    saying,
    serving,
    until,
    until_ready,
    write_tokenizer,
)

pytestmark = pytest.mark.anyio

BOTH_WAYS = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


@BOTH_WAYS
async def test_a_full_queue_is_429_with_retry_after(engine: ScriptedEngine, stream: bool) -> None:
    engine.script = failing(QueueFullError("8 requests are waiting, which is the limit", retry_after_s=2.2))
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=chat(stream=stream))
        with pytest.raises(openai.RateLimitError):
            await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", stream=stream)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "3"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert "8 requests" in error["message"]


@BOTH_WAYS
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (EngineStoppedError("the engine is shutting down"), 503, "engine_stopped"),
        (FunctionUnavailableError("L01.E003: no instance could compute it"), 503, "dispatch_failed"),
        (ContextLengthError("the KV cache holds 100 tokens, 120 were asked for"), 400, "context_length_exceeded"),
    ],
)
async def test_a_refusal_of_the_engine_becomes_the_status(
    engine: ScriptedEngine, failure: Exception, status: int, code: str, stream: bool
) -> None:
    engine.script = failing(failure)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/completions", json=completion(stream=stream))
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["message"] == str(failure)


async def test_one_refused_choice_refuses_the_request_and_cancels_the_others(engine: ScriptedEngine) -> None:
    async def room_for_one(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        if len(engine.requests) > 1:
            raise QueueFullError("no room")
        async for step in never_ending()(request):
            yield step

    engine.script = room_for_one
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=chat(n=2, stream=True))
        assert response.status_code == 429
        await until(lambda: len(engine.cancelled) == 1)


async def test_a_failure_in_the_middle_of_a_whole_answer_is_its_status(engine: ScriptedEngine) -> None:
    engine.script = failing(FunctionUnavailableError("L00.E001 is gone"), "some", "text")
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 503
    assert "L00.E001" in response.json()["error"]["message"]


async def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(engine: ScriptedEngine) -> None:
    heard: list[str] = []

    async def fails_once_heard(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "some")
        await until(lambda: "some" in heard)
        yield delta(request, "", num_tokens=0, finish_reason="error", error="L00-E001 could not be computed")

    async def listen(stream: openai.AsyncStream[Completion]) -> None:
        async for chunk in stream:
            heard.append(chunk.choices[0].text)

    engine.script = fails_once_heard
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", stream=True)
        with pytest.raises(openai.APIError, match="L00-E001 could not be computed") as raised:
            await listen(stream)
        heard.clear()
        lines = []
        async with gateway.http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as response:
            async for line in response.aiter_lines():
                lines.append(line)
                heard.append("some")
    assert isinstance(raised.value.body, dict)
    assert raised.value.body["code"] == "generation_failed"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "data: [DONE]" not in lines


@pytest.mark.parametrize(
    "script", [saying("a", reason="cancelled"), failing(EngineStoppedError("The engine stopped."), "a")]
)
async def test_an_engine_that_stops_is_503(engine: ScriptedEngine, script: object) -> None:
    engine.script = script
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_stopped"


async def test_a_stream_that_breaks_off_is_not_taken_for_an_answer(engine: ScriptedEngine) -> None:
    async def breaks_off(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        yield delta(request, "half an")

    engine.script = breaks_off
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        response = await gateway.http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 503


@BOTH_WAYS
@pytest.mark.parametrize("failure", [RuntimeError("secret.py line 3"), PackageError("/secret/path is damaged")])
async def test_an_internal_error_is_500_with_an_id_and_no_internals(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, failure: Exception, stream: bool
) -> None:
    engine.script = failing(failure)
    with caplog.at_level(logging.ERROR, logger="moeless.gateway"):
        async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
            response = await gateway.http.post("/v1/chat/completions", json=chat(stream=stream))
    error = response.json()["error"]
    assert response.status_code == 500
    assert error["type"] == "internal_error"
    assert "secret" not in response.text
    [record] = [record for record in caplog.records if "internal error request=" in record.getMessage()]
    assert record.getMessage().rpartition("=")[2] in error["message"]
    assert record.exc_info is not None
    assert record.exc_info[1] is failure


@BOTH_WAYS
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_hangs_up_cancels_its_sequences(engine: ScriptedEngine, stream: bool, n: int) -> None:
    async def send(gateway: Gateway) -> None:
        await gateway.events("/v1/chat/completions", chat(n=n, stream=stream))

    engine.script = never_ending()
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        sending = asyncio.create_task(send(gateway))
        await until(lambda: engine.num_said >= 5 * n)
        sending.cancel()
        await until(lambda: len(engine.cancelled) == n)
        metrics = (await gateway.http.get("/metrics")).text
    assert engine.ended == []
    assert f'moeless_request_success_total{{finished_reason="abort",model_name="{MODEL_ID}"}} {n}.0' in metrics


async def test_a_client_that_hangs_up_while_its_request_waits_cancels_it(engine: ScriptedEngine) -> None:
    async def waits(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        await asyncio.Event().wait()
        yield delta(request, "never")

    engine.script = waits
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        sending = asyncio.create_task(gateway.http.post("/v1/completions", json=completion(stream=True)))
        await until(lambda: len(engine.requests) == 1)
        sending.cancel()
        await until(lambda: len(engine.cancelled) == 1)


async def test_a_slow_reader_gets_everything_in_fewer_larger_chunks(engine: ScriptedEngine) -> None:
    texts = [f"{number:06d}" * 20 for number in range(20_000)]
    engine.script = saying(*texts)
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", stream=True)
        await until(lambda: len(engine.ended) == 1)
        chunks = [chunk.choices[0].text async for chunk in stream]
    assert "".join(chunks) == "".join(texts)
    assert len(chunks) < len(texts)


async def test_the_gateway_is_alive_before_the_engine_and_ready_after_it(engine: ScriptedEngine) -> None:
    engine_is_up = False

    async def reach_engine() -> EngineClient:
        if not engine_is_up:
            raise ConnectionError("nobody there")
        return engine

    app = create_app(reach_engine, GatewayConfig(engine_retry_s=0.01))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/metrics")).status_code == 200
        for response in (
            await http.post("/v1/completions", json=completion()),
            await http.get("/v1/models"),
            await http.get("/v1/experts"),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_starting"
            assert response.headers["retry-after"] == "1"
        engine_is_up = True
        await until_ready(http)
        assert (await http.post("/v1/completions", json=completion())).status_code == 200
        engine.ready = False
        assert (await http.get("/ready")).status_code == 503
        engine.ready_error = ConnectionError("gone")
        assert (await http.get("/ready")).status_code == 503
        assert (await http.get("/health")).status_code == 200


async def test_a_stream_that_waits_in_the_queue_begins_all_the_same(
    engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers_came = asyncio.Event()

    async def waits(request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        await headers_came.wait()
        yield delta(request, "at last", finish_reason="stop")

    monkeypatch.setattr("moeless.gateway.completions._START_WAIT_S", 0.01)
    engine.script = waits
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        stream = await gateway.openai.completions.create(model=MODEL_ID, prompt="hi", stream=True)
        headers_came.set()
        assert [chunk.choices[0].text async for chunk in stream] == ["at last"]


async def test_a_missing_tokenizer_keeps_the_gateway_from_being_ready(
    engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.info = type(engine.info)(**{
        field: getattr(engine.info, field) for field in engine.info.__struct_fields__
    } | {"tokenizer_path": "/nowhere"})  # fmt: skip
    app = create_app(engine, GatewayConfig(engine_retry_s=0.01))
    async with serving(app) as address, httpx.AsyncClient(base_url=address) as http:
        await until(lambda: "tokenizer.json" in caplog.text)
        assert (await http.get("/ready")).status_code == 503
    assert caplog.text.count("engine not reached") == 1


async def test_a_client_that_leaves_while_its_text_is_read_takes_the_work_along(tmp_path: Path) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == 'bad' %}" + endless + "{% endif %}" + CHATML
    engine = ScriptedEngine(model_info(write_tokenizer(tmp_path, chat_template=template)))
    app = create_app(engine, GatewayConfig(max_text_processes=1))
    async with gateway_for(app) as gateway:
        bad = [asyncio.create_task(gateway.http.post("/v1/chat/completions", json=chat("bad"))) for _ in range(20)]
        await until(lambda: len(gateway.http._transport._pool.connections) == 20)  # type: ignore[attr-defined]
        for task in bad:
            task.cancel()
        await asyncio.wait(bad)
        # With all of them it would take 20 times the template's limit.
        async with asyncio.timeout(10):
            assert (await gateway.http.post("/v1/chat/completions", json=chat("good"))).status_code == 200
