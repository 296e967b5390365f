"""Counters of the dispatcher. Written by the compute thread alone, read by others: stale by a step at most."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from moeless.core.arrays import Int64Array

LAYER_SECONDS_BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)


class DispatchMetrics:
    """Counters since the dispatcher began."""

    def __init__(self, num_experts: list[int]) -> None:
        self.retries = 0
        """Groups of pairs sent to a second instance after the first failed."""
        self.fallbacks = 0
        """Groups of pairs computed by the engine's own copies because no worker could."""
        self.layer_seconds_sum = 0.0
        self.layer_seconds_counts = [0] * (len(LAYER_SECONDS_BUCKETS) + 1)
        self.tokens_per_worker: dict[str, int] = {}
        """(token, expert) pairs that each worker computed."""
        self.remote_tokens_LE = [np.zeros(num, dtype=np.int64) for num in num_experts]
        """Pairs of each function that workers computed."""

    def observe_layer(self, seconds: float) -> None:
        self.layer_seconds_sum += seconds
        self.layer_seconds_counts[bisect_left(LAYER_SECONDS_BUCKETS, seconds)] += 1

    def count_local(self, worker: str, num_pairs: int) -> None:
        """The pool counts its functions' tokens itself."""
        self.tokens_per_worker[worker] = self.tokens_per_worker.get(worker, 0) + num_pairs

    def count_remote(self, worker: str, layer: int, experts_n: Int64Array) -> None:
        self.count_local(worker, len(experts_n))
        tokens_E = self.remote_tokens_LE[layer]
        tokens_E += np.bincount(experts_n, minlength=len(tokens_E))

    def cumulative_buckets(self) -> list[tuple[float, int]]:
        """(upper bound in seconds, layers at most that slow), Prometheus style, without +Inf."""
        return list(zip(LAYER_SECONDS_BUCKETS, np.cumsum(self.layer_seconds_counts[:-1]).tolist(), strict=True))
