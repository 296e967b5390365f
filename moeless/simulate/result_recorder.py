"""Keeps what a simulation saw and sums it up.

Shapes: L MoE layers, W workers, R requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moeless.core.arrays import FloatArray
from moeless.simulate.layer_times import WorkerLoad
from moeless.simulate.report.results import Latency, LatencyHistogram, Series, SystemResult, latency_of
from moeless.simulate.worker_memory import WorkerMemory
from moeless_predictors.compiled import compiled
from moeless_predictors.traces import ArrivalTrace

_NUM_INTERVALS = 200
_MIN_INTERVAL_S = 1e-3


class Recorder:
    """Collects the results of one run. Times of requests are kept, those of layers counted."""

    def __init__(self, arrivals: ArrivalTrace, memory: WorkerMemory, *, expert_bytes: int) -> None:
        self._arrivals, self._memory = arrivals, memory
        self._expert_bytes = expert_bytes
        self.first_token_s_R = np.full(arrivals.num_requests, np.nan)
        self.last_token_s_R = np.full(arrivals.num_requests, np.nan)
        self.layers = LatencyHistogram()
        self.num_tokens = self.num_steps = self.num_plans = 0
        self._square_tokens = 0
        self.stall_s = self.billed_instance_s = 0.0
        self._imbalance_sum = 0.0
        self._rows: list[tuple[float, ...]] = []
        self._interval_s = max(arrivals.duration_s / _NUM_INTERVALS, _MIN_INTERVAL_S)
        self._begin_s = self._instance_s = 0.0
        self._tokens = self._arrived = self._steps = 0
        self._busy_s = self._imbalance = 0.0

    def arrive(self, request: int) -> None:
        """A request came."""
        self._arrived += int(self._arrivals.prompt_tokens[request]) + int(self._arrivals.output_tokens[request])

    def begin_step(self, num_tokens: int, load: WorkerLoad) -> None:
        """A step was put together."""
        self.num_steps += 1
        self.num_tokens += num_tokens
        self._square_tokens += num_tokens**2
        imbalance = _mean_imbalance(np.ascontiguousarray(load.pairs_LW, dtype=np.float64))
        if imbalance > 0:
            self._imbalance_sum += imbalance
            self._imbalance += imbalance
            self._steps += 1
        self._tokens += num_tokens
        self._busy_s += float(load.seconds_LW.sum())

    def layers_done(self, seconds_L: FloatArray, instances_L: FloatArray) -> None:
        """Executions of layers took so long, with so many instances of each layer held."""
        self.layers.add(seconds_L)
        self.billed_instance_s += float(seconds_L @ instances_L)

    @property
    def interval_ends_s(self) -> float:
        """End of the series' current interval; call `end_interval` before recording anything later."""
        return self._begin_s + self._interval_s

    def end_interval(self, now_s: float, num_waiting: int) -> None:
        """Close the interval, which may be a long one if nothing happened."""
        memory = self._memory
        memory.advance(now_s)
        elapsed = now_s - self._begin_s
        up = memory.num_workers_up
        self._rows.append(
            (
                now_s,
                (memory.instance_s - self._instance_s) / elapsed,
                up,
                self._arrived / elapsed,
                self._tokens / elapsed,
                min(1.0, self._busy_s / (elapsed * max(1, up))),
                self._imbalance / self._steps if self._steps else 0.0,
                num_waiting,
            )
        )
        self._begin_s, self._instance_s = now_s, memory.instance_s
        self._tokens = self._arrived = self._steps = 0
        self._busy_s = self._imbalance = 0.0

    def result(self, system: str, end_s: float, slo: tuple[float, float] | None) -> SystemResult:
        """Everything summed up.

        Args:
            slo: most seconds to the first token and for each token after it.
        """
        memory, arrivals = self._memory, self._arrivals
        memory.finish(end_s)
        ttft_R = self.first_token_s_R - arrivals.arrival_s
        later_R = arrivals.output_tokens > 1
        tpot_R = np.zeros(arrivals.num_requests)
        np.divide(self.last_token_s_R - self.first_token_s_R, arrivals.output_tokens - 1, out=tpot_R, where=later_R)
        met = None if slo is None else int(((ttft_R <= slo[0]) & (tpot_R <= slo[1])).sum())
        columns: list[list[Any]] = [list(column) for column in zip(*self._rows, strict=True)] or [[] for _ in range(8)]
        per_second = 1 / end_s if end_s else 0.0
        request_s: Latency = latency_of(self.last_token_s_R - arrivals.arrival_s)
        return SystemResult(
            system=system,
            num_requests=arrivals.num_requests,
            num_tokens=self.num_tokens,
            num_steps=self.num_steps,
            step_tokens=self._square_tokens / self.num_tokens if self.num_tokens else 0.0,
            duration_s=end_s,
            tokens_per_s=self.num_tokens * per_second,
            ttft_s=latency_of(ttft_R),
            tpot_s=latency_of(tpot_R[later_R]),
            request_s=request_s,
            layer_s=self.layers.latency(),
            moe_s=self.layers.sum_s,
            stall_s=self.stall_s,
            goodput_per_s=None if met is None else met * per_second,
            slo_share=None if met is None else met / arrivals.num_requests,
            billed_byte_s=self.billed_instance_s * self._expert_bytes,
            resident_byte_s=memory.instance_s * self._expert_bytes,
            worker_s=memory.worker_s,
            peak_instances=memory.peak_instances,
            mean_instances=memory.instance_s * per_second,
            moved_bytes=memory.num_starts * self._expert_bytes,
            num_starts=memory.num_starts,
            num_cold_starts=memory.num_cold_starts,
            num_plans=self.num_plans,
            num_plans_over_memory=memory.num_over_memory,
            num_worker_starts=memory.num_worker_starts,
            imbalance=self._imbalance_sum / self.num_steps if self.num_steps else 0.0,
            series=Series(
                time_s=columns[0],
                instances=columns[1],
                workers_up=columns[2],
                arrived_tokens_per_s=columns[3],
                served_tokens_per_s=columns[4],
                busy_share=columns[5],
                imbalance=columns[6],
                waiting_requests=columns[7],
            ),
        )


@compiled
def _mean_imbalance(pairs_LW: FloatArray) -> float:
    """The busiest worker's pairs over the mean worker's, averaged over the layers that have any; 0 if none has."""
    total, num_layers = 0.0, 0
    for layer in range(len(pairs_LW)):
        most, of_layer = 0.0, 0.0
        for pairs in pairs_LW[layer]:
            most = max(most, pairs)
            of_layer += pairs
        if of_layer > 0:
            total += most * pairs_LW.shape[1] / of_layer
            num_layers += 1
    return total / num_layers if num_layers else 0.0
