"""/metrics as Prometheus reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moeless.core.errors import EngineStoppedError, QueueFullError
from moeless.core.generation import GenerationDelta
from moeless.gateway.app import create_app
from moeless.gateway.config import GatewayConfig
from moeless.gateway.metrics import GatewayMetrics, ModelMetrics, SequenceObserver
from tests.unit.gateway.support import (
    MODEL_ID,
    STATS,
    Gateway,
    ScriptedEngine,
    chat,
    completion,
    failing,
    gateway_for,
    saying,
)

MODEL = {"model_name": MODEL_ID}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"moeless_{name}", tuple(sorted((MODEL | labels).items()))]


async def scrape(gateway: Gateway) -> Samples:
    response = await gateway.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parse(response.text)


@pytest.mark.anyio
async def test_the_engines_figures_are_exposed(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        samples = await scrape(gateway)
    assert value(samples, "engine_up") == 1
    assert value(samples, "num_requests_running") == 3
    assert value(samples, "num_requests_waiting") == 2
    assert value(samples, "kv_cache_usage_perc") == 0.25
    assert value(samples, "function_cold_starts_total") == 5
    assert value(samples, "function_evictions_total") == 2
    assert value(samples, "function_warm_starts_total") == 70
    assert value(samples, "dispatch_retries_total") == 1
    assert value(samples, "dispatch_fallbacks_total") == 2
    assert value(samples, "dispatch_seconds_bucket", le="0.001") == 4
    assert value(samples, "dispatch_seconds_bucket", le="0.01") == 9
    assert value(samples, "dispatch_seconds_bucket", le="+Inf") == 10
    assert value(samples, "dispatch_seconds_count") == 10
    assert value(samples, "dispatch_seconds_sum") == 0.5
    assert value(samples, "worker_tokens_total", worker="worker-1") == 60
    assert value(samples, "worker_up", worker="worker-0") == 1
    assert value(samples, "worker_up", worker="worker-1") == 0
    assert value(samples, "worker_instances", worker="worker-0") == 2
    assert value(samples, "worker_resident_bytes", worker="worker-1") == 100


@pytest.mark.anyio
async def test_forecasts_are_exposed_by_layer(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        samples = await scrape(gateway)
    assert value(samples, "forecast_recall", layer="2") == 0.5
    assert value(samples, "forecast_load_error", layer="2") == 0.75
    assert value(samples, "popularity_load_error", layer="2") == 0.625
    assert value(samples, "forecast_coverage", layer="2") == 0.875
    assert value(samples, "forecast_bound_width", layer="2") == 1.5
    assert value(samples, "popularity_bound_width", layer="2") == 2.25
    assert value(samples, "predictor_active", layer="2", kind="history") == 0
    assert value(samples, "forecasts_total", layer="2") == 40
    assert value(samples, "forecast_seconds_total", layer="2") == 0.25


@pytest.mark.anyio
async def test_requests_are_counted(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        before = await scrape(gateway)
        await gateway.http.post("/v1/completions", json=completion([1, 2, 3], n=2))
        await gateway.events("/v1/chat/completions", chat(stream=True))
        engine.script = saying("a", "b", "c", reason="length")
        await gateway.http.post("/v1/completions", json=completion([1, 2, 3]))
        engine.script = failing(EngineStoppedError("gone"))
        await gateway.http.post("/v1/completions", json=completion([1, 2, 3]))
        samples = await scrape(gateway)
    num_chat_tokens = len(engine.requests[2].prompt_token_ids)
    assert value(before, "generation_tokens_total") == 0
    assert value(samples, "prompt_tokens_total") == 3 * 3 + num_chat_tokens
    assert value(samples, "generation_tokens_total") == 2 * 2 + 2 + 3
    assert value(samples, "request_success_total", finished_reason="stop") == 3
    assert value(samples, "request_success_total", finished_reason="length") == 1
    assert value(samples, "request_success_total", finished_reason="error") == 1
    assert value(samples, "request_success_total", finished_reason="abort") == 0
    assert value(samples, "time_to_first_token_seconds_count") == 4
    assert value(samples, "inter_token_latency_seconds_count") == 3 * 1 + 2
    assert value(samples, "e2e_request_latency_seconds_count") == 4


@pytest.mark.anyio
async def test_refused_requests_are_not_counted_as_ended(engine: ScriptedEngine) -> None:
    engine.script = failing(QueueFullError("full"))
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        await gateway.http.post("/v1/completions", json=completion())
        await gateway.http.post("/v1/completions", json=completion(n=0))
        samples = await scrape(gateway)
    assert value(samples, "request_success_total", finished_reason="error") == 0


@pytest.mark.anyio
async def test_an_engine_that_does_not_answer_is_down_and_the_rest_stays(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        await gateway.http.post("/v1/completions", json=completion())
        engine.stats_error = ConnectionError("gone")
        samples = await scrape(gateway)
    assert value(samples, "engine_up") == 0
    assert value(samples, "generation_tokens_total") == 2
    assert not any(name == "moeless_num_requests_running" for name, _ in samples)


@pytest.mark.anyio
async def test_no_label_holds_a_request(engine: ScriptedEngine) -> None:
    async with gateway_for(create_app(engine, GatewayConfig())) as gateway:
        await gateway.http.post("/v1/completions", json=completion("a secret prompt", user="annabella"))
        text = (await gateway.http.get("/metrics")).text
    names = {name for sample_name, labels in parse(text) for name, _ in labels if sample_name.startswith("moeless_")}
    assert names == {"model_name", "finished_reason", "le", "worker", "layer", "kind"}
    assert "cmpl-" not in text
    assert "secret" not in text
    assert "annabella" not in text


def test_two_gateways_of_one_process_share_no_series() -> None:
    first, second = GatewayMetrics(), GatewayMetrics()
    ModelMetrics(first, "a").generation_tokens.inc(5)
    ModelMetrics(second, "a")
    samples = parse(second.expose().decode())
    assert samples["moeless_generation_tokens_total", (("model_name", "a"),)] == 0


def test_latencies_are_those_of_the_clock() -> None:
    metrics = GatewayMetrics()
    times = iter([10.5, 10.75, 11.75, 12.0])
    observer = SequenceObserver(
        ModelMetrics(metrics, MODEL_ID), num_prompt_tokens=4, arrived_s=10.0, clock=lambda: next(times)
    )
    for num_tokens in (1, 1, 0, 4):  # the third one only flushes text
        observer.on_delta(GenerationDelta(request_id="r", num_tokens=num_tokens))
    observer.on_end("stop")
    samples = parse(metrics.expose().decode())
    assert value(samples, "time_to_first_token_seconds_sum") == 0.5
    assert value(samples, "inter_token_latency_seconds_sum") == 0.25 + 1.0
    assert value(samples, "inter_token_latency_seconds_count") == 1 + 4
    assert value(samples, "inter_token_latency_seconds_bucket", le="0.3") == 5
    assert value(samples, "e2e_request_latency_seconds_sum") == 2.0
    assert value(samples, "generation_tokens_total") == 6
    assert value(samples, "prompt_tokens_total") == 4


def test_stats_are_shown_as_of_the_last_scrape_only() -> None:
    metrics = GatewayMetrics()
    assert "moeless_engine_up" not in metrics.expose().decode()
    metrics.show_engine(MODEL_ID, STATS)
    metrics.show_engine(MODEL_ID, None)
    assert value(parse(metrics.expose().decode()), "engine_up") == 0
