from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from moeless.core.errors import ConfigError, ContextLengthError, EngineStoppedError, QueueFullError, RequestError
from moeless.core.generation import (
    EngineClient,
    EngineStats,
    FunctionStatus,
    GenerationDelta,
    GenerationRequest,
    ModelInfo,
)
from moeless.engine.config import EngineConfig
from moeless.engine.local_client import LocalEngineClient
from moeless.engine.transformers.build import build_engine
from tests.families import make_tokenizer
from tests.unit.engine.support import assert_equal_tokens, eager_model, prompt_of, request

MODEL = eager_model()
INFO = ModelInfo(
    model_id="tiny",
    created_unix_s=1,
    max_context_tokens=512,
    vocab_size=320,
    tokenizer_path="",
    num_layers=2,
    num_experts=4,
    top_k=2,
    hidden_size=32,
    dtype="float32",
    device="cpu",
)


def with_client(test: Callable[[LocalEngineClient], Awaitable[None]], options: dict[str, Any] | None = None) -> None:
    """Run `test` against a client of a started engine."""
    settings: dict[str, Any] = {"kv_cache_bytes": 1 << 22, "max_running": 4, "max_batch_tokens": 64}
    engine = build_engine(MODEL, make_tokenizer(), EngineConfig(**(settings | (options or {}))))
    client = LocalEngineClient(engine, INFO)
    engine.start()
    try:
        asyncio.run(asyncio.wait_for(test(client), 60))
    finally:
        engine.stop()


async def all_of(client: EngineClient, what: GenerationRequest) -> list[GenerationDelta]:
    return [delta async for delta in client.generate(what)]


async def until_idle(client: LocalEngineClient) -> EngineStats:
    while (stats := await client.stats()).requests_running or stats.kv_cache_usage:
        await asyncio.sleep(0.001)
    return stats


def test_streams_of_many_requests_come_apart_rightly() -> None:
    lengths = range(1, 40, 4)
    streams: list[list[GenerationDelta]] = []

    async def test(client: LocalEngineClient) -> None:
        streams.extend(await asyncio.gather(*(all_of(client, request(str(n), prompt_of(n))) for n in lengths)))

    with_client(test)
    for n, deltas in zip(lengths, streams, strict=True):
        assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["length"]
        assert_equal_tokens(MODEL, prompt_of(n), [token.token_id for d in deltas for token in d.logprobs])


def test_closing_a_stream_cancels_its_request_and_frees_its_pages() -> None:
    async def test(client: LocalEngineClient) -> None:
        stream = client.generate(request("r", prompt_of(50), max_tokens=400))
        await anext(stream)
        assert (await client.stats()).requests_running == 1
        await stream.aclose()  # type: ignore[attr-defined]
        await until_idle(client)

    with_client(test)


def test_a_task_that_is_cancelled_cancels_its_request() -> None:
    async def test(client: LocalEngineClient) -> None:
        task = asyncio.create_task(all_of(client, request("r", prompt_of(50), max_tokens=400)))
        while not (await client.stats()).requests_running:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_idle(client)

    with_client(test)


def test_cancel_ends_the_stream_with_that_reason() -> None:
    async def test(client: LocalEngineClient) -> None:
        stream = client.generate(request("r", prompt_of(5), max_tokens=400))
        await anext(stream)
        await client.cancel("r")
        rest = [delta async for delta in stream]
        assert rest[-1].finish_reason == "cancelled"

    with_client(test)


def test_refusals_come_before_the_first_delta_and_leave_the_id_free() -> None:
    async def test(client: LocalEngineClient) -> None:
        with pytest.raises(ContextLengthError):
            await all_of(client, request("r", prompt_of(10), max_tokens=1000))
        assert len(await all_of(client, request("r", prompt_of(10)))) == 8
        stream = client.generate(request("r", prompt_of(10), max_tokens=400))
        await anext(stream)
        with pytest.raises(RequestError, match="'r' is being streamed"):
            await all_of(client, request("r", prompt_of(10)))
        with pytest.raises(QueueFullError):
            await asyncio.gather(*(all_of(client, request(str(n), prompt_of(10))) for n in range(3)))
        await stream.aclose()  # type: ignore[attr-defined]

    with_client(test, {"max_running": 1, "max_waiting": 1})


def test_a_stopped_engine_ends_its_streams_and_is_not_ready() -> None:
    engine = build_engine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=1 << 22))
    client = LocalEngineClient(engine, INFO)

    async def test() -> None:
        assert not await client.is_ready()
        engine.start()
        assert await client.is_ready()
        stream = client.generate(request("r", prompt_of(5), max_tokens=400))
        await anext(stream)
        await asyncio.to_thread(engine.stop)
        rest = [delta async for delta in stream]
        assert (rest[-1].finish_reason, rest[-1].error) == ("error", "the engine was stopped")
        assert not await client.is_ready()
        with pytest.raises(EngineStoppedError):
            await all_of(client, request("r", prompt_of(5)))

    asyncio.run(test())


def test_stats_are_the_dispatchers_with_the_engines_own_filled_in() -> None:
    row = FunctionStatus(
        name="L00.E000", layer=0, expert=0, state="warm", replicas=1, workers=["w"], bytes=3, tokens_served=4
    )
    engine = build_engine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=1 << 22))
    plain = LocalEngineClient(engine, INFO)

    async def test() -> None:
        assert await plain.model_info() == INFO
        assert await plain.functions() == []
        stats = await plain.stats()
        assert (stats.requests_running, stats.cold_starts, stats.workers) == (0, 0, [])
        dispatched = msgspec.structs.replace(stats, cold_starts=5, requests_running=99)
        other = build_engine(MODEL, make_tokenizer(), EngineConfig(kv_cache_bytes=1 << 22))
        full = LocalEngineClient(other, INFO, dispatch_stats=lambda: dispatched, functions=lambda: [row])
        assert await full.stats() == msgspec.structs.replace(dispatched, requests_running=0)
        assert await full.functions() == [row]

    asyncio.run(test())


def test_an_engine_has_one_receiver() -> None:
    engine = build_engine(MODEL, make_tokenizer(), EngineConfig())
    with pytest.raises(ConfigError, match="on_step must be set before start"):
        engine.start()
    LocalEngineClient(engine, INFO)
    with pytest.raises(ConfigError, match="on_step is already set"):
        LocalEngineClient(engine, INFO)
