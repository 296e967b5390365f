"""Results of a simulation, as the table, the JSON file and the report show them.

Times are in seconds, memory in bytes.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import ArrayLike

PERCENTILES = (50, 90, 99)
BOUNDS = ("foresight", "exact-load", "whole-experts", "limit")
"""Systems that nobody can run."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    cdf: list[float] = []
    """Its percentiles from 0 to 100, for plots."""


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """Values over time, one for each interval; `time_s` is the interval's end."""

    time_s: list[float]
    instances: list[float]
    """Resident on all workers, mean of the interval."""
    workers_up: list[int]
    arrived_tokens_per_s: list[float]
    """Tokens of arriving requests: prompts and outputs."""
    served_tokens_per_s: list[float]
    busy_share: list[float]
    """Share of the workers' time spent computing."""
    imbalance: list[float]
    """Busiest worker over the mean, by (token, expert) pairs, averaged over layers and steps; 0 without a step."""
    waiting_requests: list[int]


class SystemResult(msgspec.Struct, frozen=True, kw_only=True):
    """One system on one scenario."""

    system: str
    num_requests: int
    num_tokens: int
    """Computed: of prompts and outputs, less the last one of each, which no step reads."""
    num_steps: int
    step_tokens: float
    """Token-weighted mean of the tokens in a step: rare prefill steps carry most of the work."""
    duration_s: float
    """From time 0 to the last token."""
    tokens_per_s: float
    ttft_s: Latency
    """From a request's arrival to its first token."""
    tpot_s: Latency
    """Between its first token and its last, for each token after the first; requests of one token have none."""
    request_s: Latency
    """From arrival to the last token."""
    layer_s: Latency
    """Latency of MoE layers: dispatch, busiest worker, combine, and waiting."""
    moe_s: float
    """Sum of all layers'."""
    stall_s: float
    """Time that engines waited for a plan's moves; cold starts count in their layers."""
    goodput_per_s: float | None
    """Requests a second within the SLO; None without one."""
    slo_share: float | None
    """Share of the requests that kept the SLO."""
    billed_byte_s: float
    """Sum over layer executions: bytes of that layer's instances times its duration."""
    resident_byte_s: float
    """Bytes of all instances on workers, idle and starting ones too, over all the time."""
    worker_s: float
    """Workers that were not stopped, over all the time."""
    peak_instances: int
    mean_instances: float
    moved_bytes: int
    num_starts: int
    num_cold_starts: int
    num_plans: int
    """Changes of the plan that were made."""
    num_plans_over_memory: int
    """Plans during whose rollout old and new instances together exceeded a worker's memory."""
    num_worker_starts: int
    imbalance: float
    """Mean over steps, as in Series."""
    series: Series


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True):
    """All systems on one scenario."""

    scenario: dict[str, str]
    """Description of the scenario, in words."""
    settings: dict[str, object]
    """Settings as given, with the defaults filled in."""
    slo_s: tuple[float, float] | None
    """Most seconds to the first token, and for each token after it."""
    expert_bytes: int
    capacity_instances: int
    """Instances that fit on all workers together."""
    results: list[SystemResult]


def latency_of(seconds: ArrayLike) -> Latency:
    """Summarize single values; zero where there are none."""
    values = np.asarray(seconds, dtype=np.float64)
    if not values.size:
        return Latency(mean=0.0, p50=0.0, p90=0.0, p99=0.0)
    cdf = np.percentile(values, np.arange(101))
    return Latency(
        mean=float(values.mean()), p50=float(cdf[50]), p90=float(cdf[90]), p99=float(cdf[99]), cdf=cdf.tolist()
    )


class LatencyHistogram:
    """A distribution of many values in little memory: bins that are 1 % wide."""

    _MIN_S, _GROWTH = 1e-7, 1.01
    _NUM_BINS = 2400

    def __init__(self) -> None:
        self._counts = np.zeros(self._NUM_BINS, dtype=np.int64)
        self._sum_s = 0.0

    def add(self, seconds: ArrayLike) -> None:
        """Count values; those from 1e-7 s to half an hour are distinguished."""
        values = np.asarray(seconds, dtype=np.float64)
        bins = np.log(np.maximum(values, self._MIN_S) / self._MIN_S) * (1 / math.log(self._GROWTH))
        self._counts += np.bincount(np.minimum(bins.astype(np.int64), self._NUM_BINS - 1), minlength=self._NUM_BINS)
        self._sum_s += float(values.sum())

    @property
    def sum_s(self) -> float:
        return self._sum_s

    def latency(self) -> Latency:
        """Percentiles to within half a bin."""
        total = int(self._counts.sum())
        if not total:
            return latency_of([])
        upto = np.cumsum(self._counts)
        bins = np.searchsorted(upto, np.maximum(1, np.arange(101) / 100 * total))
        cdf = self._MIN_S * self._GROWTH ** (bins + 0.5)
        return Latency(
            mean=self._sum_s / total, p50=float(cdf[50]), p90=float(cdf[90]), p99=float(cdf[99]), cdf=cdf.tolist()
        )
