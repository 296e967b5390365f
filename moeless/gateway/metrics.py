"""Every Prometheus series that moeless exposes. The names and buckets are vLLM's with its prefix replaced, so that
its dashboards work after one substitution; what serverless experts add stands at the end.

The registry belongs to the app, not to the process. No label ever holds a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from moeless.core.generation import EngineStats, GenerationDelta

FinishedReason = Literal["stop", "length", "abort", "error"]
"""vLLM's words; abort: the client went away."""

_FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_INTER_TOKEN_BUCKETS_S = (
    # vLLM's begin at 0.01 s; small models decode faster than that.
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_BUCKETS_S = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip


class GatewayMetrics:
    """One app's registry. The engine's figures appear once `show_engine` was called."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._engine = _EngineCollector()
        self.registry.register(self._engine)
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token.", _FIRST_TOKEN_BUCKETS_S
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between one token and the next.", _INTER_TOKEN_BUCKETS_S
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token.", _REQUEST_BUCKETS_S
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens given to the engine.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.request_success = self._counter(
            "request_success", "Sequences that came to an end, by the reason.", "finished_reason"
        )

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"moeless_{name}", documentation, ["model_name"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"moeless_{name}", documentation, ["model_name", *labels], registry=self.registry)

    def show_engine(self, model_name: str, stats: EngineStats | None) -> None:
        """Set the engine's figures for the next `expose`; None if it did not answer."""
        self._engine.show(model_name, stats)

    def expose(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The series of one model with their labels bound, because binding them for each token would cost more."""

    def __init__(self, metrics: GatewayMetrics, model_name: str) -> None:
        self.time_to_first_token = metrics.time_to_first_token.labels(model_name)
        self.inter_token_latency = metrics.inter_token_latency.labels(model_name)
        self.e2e_request_latency = metrics.e2e_request_latency.labels(model_name)
        self.prompt_tokens = metrics.prompt_tokens.labels(model_name)
        self.generation_tokens = metrics.generation_tokens.labels(model_name)
        reasons: tuple[FinishedReason, ...] = ("stop", "length", "abort", "error")
        self.request_success = {reason: metrics.request_success.labels(model_name, reason) for reason in reasons}


class SequenceObserver:
    """Follows one sequence from its arrival to its end."""

    __slots__ = ("_arrived_s", "_clock", "_last_token_s", "_metrics", "_num_prompt_tokens")

    def __init__(
        self,
        metrics: ModelMetrics,
        *,
        num_prompt_tokens: int,
        arrived_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._num_prompt_tokens = num_prompt_tokens
        self._arrived_s = arrived_s
        self._last_token_s: float | None = None

    def on_delta(self, delta: GenerationDelta) -> None:
        """Count the tokens of a step and the time since the last."""
        num_tokens = delta.num_tokens
        if num_tokens == 0:
            return
        now_s = self._clock()
        if self._last_token_s is None:
            self._metrics.time_to_first_token.observe(now_s - self._arrived_s)
            self._metrics.prompt_tokens.inc(self._num_prompt_tokens)
        else:
            # Tokens that came in one step share the step's time.
            for _ in range(num_tokens):
                self._metrics.inter_token_latency.observe((now_s - self._last_token_s) / num_tokens)
        self._last_token_s = now_s
        self._metrics.generation_tokens.inc(num_tokens)

    def on_end(self, reason: FinishedReason) -> None:
        """Count the end, once."""
        self._metrics.request_success[reason].inc()
        if reason in ("stop", "length"):
            self._metrics.e2e_request_latency.observe(self._clock() - self._arrived_s)


class _EngineCollector(Collector):
    """The engine's own counters at the time of the scrape."""

    def __init__(self) -> None:
        self._model_name: str | None = None
        self._stats: EngineStats | None = None

    def show(self, model_name: str, stats: EngineStats | None) -> None:
        self._model_name, self._stats = model_name, stats

    def describe(self) -> Iterator[Metric]:
        """Nothing yet, so that registering asks for no figures."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        if self._model_name is None:
            return
        model = [self._model_name]
        yield _gauge("engine_up", "1 if the engine answered this scrape.", model, float(self._stats is not None))
        stats = self._stats
        if stats is None:
            return
        yield _gauge("num_requests_running", "Sequences in the running batch.", model, stats.requests_running)
        yield _gauge("num_requests_waiting", "Sequences that wait for their turn.", model, stats.requests_waiting)
        yield _gauge("kv_cache_usage_perc", "Share of KV pages in use; 1 is all.", model, stats.kv_cache_usage)
        yield _counter("function_cold_starts", "Instances started from a package.", model, stats.cold_starts)
        yield _counter("function_evictions", "Instances that gave their memory back.", model, stats.evictions)
        yield _counter("function_warm_starts", "Calls that met a warm instance.", model, stats.warm_starts)
        yield _counter("dispatch_retries", "Calls sent again to another instance.", model, stats.dispatch_retries)
        yield _counter(
            "dispatch_fallbacks", "Calls computed on the engine's own copy.", model, stats.dispatch_fallbacks
        )
        yield self._dispatch_seconds(model, stats)
        yield from self._workers(model, stats)
        yield from self._predictions(model, stats)

    def _dispatch_seconds(self, model: list[str], stats: EngineStats) -> Metric:
        family = HistogramMetricFamily(
            "moeless_dispatch_seconds", "One MoE layer's exchange with its workers.", labels=["model_name"]
        )
        buckets = [(repr(float(bound)), float(count)) for bound, count in stats.dispatch_seconds_buckets]
        buckets.append(("+Inf", float(stats.dispatch_seconds_count)))
        family.add_metric(model, buckets=buckets, sum_value=stats.dispatch_seconds_sum)
        return family

    def _workers(self, model: list[str], stats: EngineStats) -> Iterator[Metric]:
        labels = ["model_name", "worker"]
        tokens = CounterMetricFamily(
            "moeless_worker_tokens", "Tokens computed, one for each function it passed.", labels=labels
        )
        for worker, count in sorted(stats.tokens_per_worker.items()):
            tokens.add_metric([*model, worker], float(count))
        yield tokens
        up = GaugeMetricFamily("moeless_worker_up", "1 if the worker is alive.", labels=labels)
        instances = GaugeMetricFamily("moeless_worker_instances", "Instances it hosts.", labels=labels)
        resident = GaugeMetricFamily(
            "moeless_worker_resident_bytes", "Bytes of expert weights it holds.", labels=labels
        )
        for status in stats.workers:
            up.add_metric([*model, status.name], float(status.alive))
            instances.add_metric([*model, status.name], float(status.instances))
            resident.add_metric([*model, status.name], float(status.resident_bytes))
        yield from (up, instances, resident)

    def _predictions(self, model: list[str], stats: EngineStats) -> Iterator[Metric]:
        """By layer; nothing where nothing is predicted."""
        if not stats.predictions:
            return
        labels = ["model_name", "layer"]
        for name, field, documentation in _PREDICTION_GAUGES:
            gauge = GaugeMetricFamily(f"moeless_{name}", documentation, labels=labels)
            for status in stats.predictions:
                gauge.add_metric([*model, str(status.layer)], getattr(status, field))
            yield gauge
        active = GaugeMetricFamily(
            "moeless_predictor_active", "0 while popularity stands in for the predictor.", labels=[*labels, "kind"]
        )
        forecasts = CounterMetricFamily("moeless_forecasts", "Forecasts of the layer's load.", labels=labels)
        seconds = CounterMetricFamily("moeless_forecast_seconds", "Time that they took.", labels=labels)
        for status in stats.predictions:
            layer = [*model, str(status.layer)]
            active.add_metric([*layer, status.kind], float(status.active))
            forecasts.add_metric(layer, float(status.forecasts))
            seconds.add_metric(layer, status.seconds)
        yield from (active, forecasts, seconds)


_PREDICTION_GAUGES = (
    ("forecast_recall", "recall", "Share of the tokens' experts that were foretold; of the last measured steps."),
    ("forecast_load_error", "load_error", "Relative L1 error of the layer's forecast load."),
    ("popularity_load_error", "popularity_error", "The same for popularity that learns online."),
    ("forecast_coverage", "coverage", "Share of the experts whose load was at most the calibrated bound."),
    ("forecast_bound_width", "bound_width", "The bound's sum over the load's."),
    ("popularity_bound_width", "popularity_bound_width", "The same for popularity's own bound."),
)
"""Name, field of PredictionStatus, and what it says."""


def _gauge(name: str, documentation: str, model: list[str], value: float) -> Metric:
    family = GaugeMetricFamily(f"moeless_{name}", documentation, labels=["model_name"])
    family.add_metric(model, value)
    return family


def _counter(name: str, documentation: str, model: list[str], value: float) -> Metric:
    family = CounterMetricFamily(f"moeless_{name}", documentation, labels=["model_name"])
    family.add_metric(model, value)
    return family
