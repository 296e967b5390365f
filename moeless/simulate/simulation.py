"""Discrete events in virtual time: requests arrive, engines step, planners plan.

What an engine step's layers take is computed when the step begins, all layers at once; with several engines, each
layer is an event of its own and queues at the workers. A plan that is published in the middle of a step serves from
the next step on.

Shapes: L MoE layers, C = L x E cells, W workers, R requests.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray
from moeless.core.plan import Plan
from moeless.planning.first_plan import make_first_plan
from moeless.planning.load_history import LoadHistory
from moeless.planning.observation import Observation
from moeless.simulate.batching import Batch, Step
from moeless.simulate.forecasts import Forecaster, Future
from moeless.simulate.layer_times import StepCosts, StepTimes, sampled_choices
from moeless.simulate.report.results import SystemResult
from moeless.simulate.result_recorder import Recorder
from moeless.simulate.routing import assign_sequences
from moeless.simulate.scenario import Scenario, System
from moeless.simulate.upcoming import TokensOf, upcoming_load
from moeless.simulate.worker_memory import ColdStart, WorkerMemory

OnProgress = Callable[[int, int], None]
"""Called with the requests that are finished, and all of them."""

_DEFAULT_WINDOW_S = 10.0
_RECENT_TOKENS = 64
"""Recent tokens of a request, whose predicted routing its next tokens are expected to follow."""
_STEP_MEMORY = 0.9
"""Weight of the past in the running mean of a step's duration."""


class _Event(IntEnum):
    """In the order in which those of one moment happen."""

    PUBLISH = 0
    TICK = 1
    READY = 2
    """An engine may begin a step; the one it was at is over."""
    LAYER = 3
    """A layer's tokens reach the workers."""


@dataclass(slots=True)
class _Engine:
    batch: Batch
    is_idle: bool = True
    times: StepTimes | None = None
    """Times of the step under way."""
    step_s: float = 0.0
    """Running mean of the steps' durations."""
    began_s: float = 0.0
    layer: int = 0
    layer_began_s: list[float] = field(default_factory=list)
    """Start of dispatch of each layer of the step, and the durations of those that are over."""
    layer_s: list[float] = field(default_factory=list)
    instances_L: FloatArray = field(default_factory=lambda: np.empty(0))


def simulate(
    scenario: Scenario,
    system: System,
    *,
    slo: tuple[float, float] | None = None,
    on_progress: OnProgress | None = None,
) -> SystemResult:
    """Replay the scenario's requests under a system until the last is served.

    Args:
        slo: most seconds to the first token, and for each token after it.
    """
    return _Simulation(scenario, system, on_progress).run(slo)


class _Simulation:
    def __init__(self, scenario: Scenario, system: System, on_progress: OnProgress | None) -> None:
        self._scenario, self._system, self._on_progress = scenario, system, on_progress
        self._routing = routing = scenario.routing
        self._arrivals = arrivals = scenario.arrivals
        seeds = np.random.SeedSequence(scenario.seed).generate_state(5).tolist()
        self._sequences_R = assign_sequences(
            arrivals.num_requests, routing.num_sequences, in_order=scenario.follow_in_order, seed=seeds[0]
        )
        self._prompt_R = np.maximum(1, arrivals.prompt_tokens.astype(np.int64))
        self._output_R = np.maximum(1, arrivals.output_tokens.astype(np.int64))
        window_s = system.window_s
        if window_s is None and system.window_steps is None:
            window_s = _DEFAULT_WINDOW_S
        self._history = LoadHistory(routing.num_cells, window_s=window_s, window_steps=system.window_steps)
        self._future = Future(true=self._upcoming, expected=self._expected)
        self._finished_tokens = 0
        self._forecaster = Forecaster(system.forecast, routing, system.predicted, seed=seeds[1])
        self._rng = np.random.default_rng(seeds[2])
        num_workers = scenario.cluster.num_workers
        self._memory = WorkerMemory(
            self._first_plan(),
            scenario.cluster,
            scenario.profile,
            scenario.transfers,
            sampled_choices(routing.trace.experts_TLk, num_workers=num_workers, seed=seeds[3]),
            seed=seeds[4],
            split=system.split,
        )
        self._costs = StepCosts(scenario, system, self._memory)
        self._recorder = Recorder(arrivals, self._memory, expert_bytes=scenario.profile.model.expert_bytes)
        self._engines = [
            _Engine(Batch(scenario.batching, self._prompt_R, self._output_R)) for _ in range(scenario.num_engines)
        ]
        self._worker_free_s_W = [0.0] * num_workers
        self._events: list[tuple[float, int, int, int]] = []
        self._ties = itertools.count()
        self._next_request = 0
        self._num_finished = 0
        self._steps_at_plan = 0
        self._blocked_until_s = 0.0
        self._now_s = 0.0

    def run(self, slo: tuple[float, float] | None) -> SystemResult:
        if self._system.interval_s is not None:
            self._push(self._system.interval_s, _Event.TICK)
        arrival_s = self._arrivals.arrival_s
        num_requests = self._arrivals.num_requests
        while self._num_finished < num_requests:
            arrives_s = arrival_s[self._next_request] if self._next_request < num_requests else math.inf
            if arrives_s <= (self._events[0][0] if self._events else math.inf):
                self._move_to(float(arrives_s))
                self._arrive()
                continue
            now_s, event, _, engine = heapq.heappop(self._events)
            self._move_to(now_s)
            if event == _Event.READY:
                self._ready(engine)
            elif event == _Event.LAYER:
                self._layer_arrives(engine)
            elif event == _Event.PUBLISH:
                ready_s = self._memory.target_ready_s
                if ready_s > now_s:  # cold starts that steps waited for went before its own
                    self._push(ready_s, _Event.PUBLISH)
                else:
                    self._publish()
            else:
                self._plan()
                assert self._system.interval_s is not None
                self._push(now_s + self._system.interval_s, _Event.TICK)
        return self._recorder.result(self._system.name, self._now_s, slo)

    def _move_to(self, now_s: float) -> None:
        assert now_s >= self._now_s, "virtual time never runs backwards"
        self._now_s = now_s
        if now_s >= self._recorder.interval_ends_s:
            self._recorder.end_interval(now_s, sum(len(engine.batch.waiting) for engine in self._engines))

    def _push(self, time_s: float, event: _Event, engine: int = -1) -> None:
        heapq.heappush(self._events, (time_s, event, next(self._ties), engine))

    def _arrive(self) -> None:
        request = self._next_request
        self._next_request += 1
        self._recorder.arrive(request)
        number = min(range(len(self._engines)), key=lambda index: self._engines[index].batch.num_requests)
        engine = self._engines[number]
        engine.batch.add(request)
        if engine.is_idle:
            engine.is_idle = False
            self._push(self._now_s, _Event.READY, number)

    def _ready(self, number: int) -> None:
        engine, now_s = self._engines[number], self._now_s
        if engine.times is not None:
            self._end_step(engine, engine.times.step)
            self._memory.acknowledge(number, now_s)
        interval = self._system.interval_steps
        if interval is not None and self._recorder.num_steps - self._steps_at_plan >= interval:
            self._steps_at_plan = self._recorder.num_steps
            self._plan()
        if now_s < self._blocked_until_s:
            self._push(self._blocked_until_s, _Event.READY, number)
            return
        step = engine.batch.begin_step()
        if step is None:
            engine.is_idle = True
            return
        self._begin_step(number, step)

    def _begin_step(self, number: int, step: Step) -> None:
        engine, now_s = self._engines[number], self._now_s
        counts_C = self._counts(step)
        self._history.add(counts_C, now_s)
        cold: dict[int, list[ColdStart]] = {}
        missing = np.flatnonzero((counts_C > 0) & ~self._memory.serving.has_C)
        if len(missing):
            starts = self._memory.host_cold(missing, self._history.last_used_s_C, now_s)
            for layer, start in zip((missing // self._routing.num_experts).tolist(), starts, strict=True):
                cold.setdefault(layer, []).append(start)
        times = self._costs.times(step, counts_C, engine=number, number=self._recorder.num_steps, now_s=now_s)
        times.cold = cold
        engine.times, engine.began_s = times, now_s
        engine.instances_L = self._memory.serving.instances_L.astype(np.float64)
        self._recorder.begin_step(step.num_tokens, times.load)
        engine.layer, engine.layer_began_s, engine.layer_s = 0, [now_s + times.backbone_s], []
        if len(self._engines) == 1:
            self._push(self._all_layers(engine, times), _Event.READY, number)
        else:
            self._push(engine.layer_began_s[0] + float(times.dispatch_L[0]), _Event.LAYER, number)

    def _all_layers(self, engine: _Engine, times: StepTimes) -> float:
        """Run the only engine's layers: none waits for another. Returns the step's end."""
        layer_L = times.dispatch_L + times.load.seconds_LW.max(axis=1) + times.combine_L
        if times.cold:
            began_L = self._now_s + np.cumsum(times.backbone_s + layer_L) - layer_L
            for layer in sorted(times.cold):
                ready_s = self._load_cold(times.cold[layer], layer, began_L.tolist())
                stall_s = max(0.0, ready_s - float(began_L[layer] + times.dispatch_L[layer]))
                layer_L[layer] += stall_s
                began_L[layer + 1 :] += stall_s
        self._recorder.layers_done(layer_L, engine.instances_L)
        return self._now_s + times.backbone_s * len(layer_L) + float(layer_L.sum())

    def _layer_arrives(self, number: int) -> None:
        """Run a layer of one of several engines: its tokens wait behind those of the others."""
        engine, now_s = self._engines[number], self._now_s
        times, layer = engine.times, engine.layer
        assert times is not None
        if layer in times.cold:
            ready_s = self._load_cold(times.cold.pop(layer), layer, engine.layer_began_s)
            if ready_s > now_s:
                self._push(ready_s, _Event.LAYER, number)
                return
        ends_s = now_s
        free_s_W = self._worker_free_s_W
        for worker, seconds in enumerate(times.load.seconds_LW[layer].tolist()):
            if seconds > 0:
                free_s_W[worker] = done_s = max(free_s_W[worker], now_s) + seconds
                ends_s = max(ends_s, done_s)
        ends_s += float(times.combine_L[layer])
        engine.layer_s.append(ends_s - engine.layer_began_s[layer])
        engine.layer += 1
        if engine.layer == len(times.dispatch_L):
            self._recorder.layers_done(np.array(engine.layer_s), engine.instances_L)
            self._push(ends_s, _Event.READY, number)
            return
        engine.layer_began_s.append(ends_s + times.backbone_s)
        self._push(engine.layer_began_s[-1] + float(times.dispatch_L[engine.layer]), _Event.LAYER, number)

    def _load_cold(self, starts: list[ColdStart], layer: int, began_s: list[float]) -> float:
        """Load functions of a layer; those that were predicted began earlier. Returns when all are there."""
        ahead = self._system.prefetch_layers
        recall = self._system.prefetch_recall if ahead else 0.0
        begins = [began_s[max(0, layer - ahead) if self._rng.random() < recall else layer] for _ in starts]
        ready_s = max(
            self._memory.start_cold(start, begin_s) for begin_s, start in sorted(zip(begins, starts, strict=True))
        )
        return self._now_s if self._system.is_prefetch_in_time else ready_s

    def _end_step(self, engine: _Engine, step: Step) -> None:
        now_s = self._now_s
        started, finished = engine.batch.end_step(step)
        self._recorder.first_token_s_R[started] = now_s
        self._recorder.last_token_s_R[finished] = now_s
        duration_s = now_s - engine.began_s
        engine.step_s = _STEP_MEMORY * engine.step_s + (1 - _STEP_MEMORY) * duration_s if engine.step_s else duration_s
        engine.times = None
        if finished:
            self._num_finished += len(finished)
            self._finished_tokens += int(self._output_R[finished].sum())
            if self._on_progress is not None:
                self._on_progress(self._num_finished, self._arrivals.num_requests)

    def _counts(self, step: Step) -> NDArray[np.int64]:
        """Tokens that the step sends to each function, shape (C,)."""
        counts_C = np.zeros(self._routing.num_cells, dtype=np.int64)
        if len(step.requests_n):
            counts_C += self._routing.of_tokens(self._sequences_R[step.requests_n], step.positions_n)
        for chunk in step.chunks:
            counts_C += self._routing.of_span(int(self._sequences_R[chunk.request]), chunk.first, chunk.num_tokens)
        return counts_C

    def _first_plan(self) -> Plan:
        return make_first_plan(
            self._system.planner,
            self._scenario.profile.model,
            step_tokens=self._scenario.batching.max_batch_tokens,
            prior_LE=self._system.prior_LE,
        )

    def _plan(self) -> None:
        now_s, memory, history = self._now_s, self._memory, self._history
        if memory.is_changing:
            return  # one rollout at a time: the next tick sees its outcome
        window = history.window(now_s)
        mean_LE, upper_LE = self._forecaster.forecast(now_s, self._horizon_s(), history, window, self._future)
        shape = mean_LE.shape
        before = memory.serving.plan
        plan = self._system.planner.plan(
            Observation(
                time_s=now_s,
                mean_LE=mean_LE,
                upper_LE=upper_LE,
                window_LE=window.mean_C.reshape(shape),
                last_used_s_LE=history.last_used_s_C.reshape(shape),
                num_steps=self._recorder.num_steps,
                pending_keys=memory.pending_keys,
            ),
            before,
        )
        if plan is before:
            return
        self._recorder.num_plans += 1
        if self._system.is_blocking:
            ready_s = memory.change_to(plan, now_s, bytes_per_s=self._peer_bytes_per_s())
            self._recorder.stall_s += ready_s - now_s
            self._blocked_until_s = ready_s
        else:
            ready_s = memory.change_to(plan, now_s)
        if ready_s > now_s:
            self._push(ready_s, _Event.PUBLISH)
        else:
            self._publish()

    def _publish(self) -> None:
        """Engines in a step end it under the old table, and acknowledge then."""
        in_a_step = [number for number, engine in enumerate(self._engines) if engine.times is not None]
        self._memory.publish(self._now_s, engines=in_a_step)

    def _peer_bytes_per_s(self) -> float:
        cluster = self._scenario.cluster
        has_nodes = len({worker.node for worker in cluster.workers}) > 1
        return min(cluster.local_bytes_per_s, cluster.remote_bytes_per_s) if has_nodes else cluster.local_bytes_per_s

    def _horizon_s(self) -> float:
        if self._system.interval_s is not None:
            return self._system.interval_s
        steps_s = [engine.step_s for engine in self._engines if engine.step_s]
        return (self._system.interval_steps or 1) * float(np.mean(steps_s)) / len(self._engines) if steps_s else 0.0

    def _upcoming(self, horizon_s: float) -> tuple[FloatArray, int]:
        """Every token to come, of requests that will arrive, too: what foresight knows."""
        until = int(np.searchsorted(self._arrivals.arrival_s, self._now_s + horizon_s, side="right"))
        arriving = [
            (request, (float(self._arrivals.arrival_s[request]) - self._now_s) / horizon_s)
            for request in range(self._next_request, until)
        ]

        def tokens_of(request: int, first: int, num_tokens: int, _: int) -> NDArray[np.int64]:
            return self._routing.of_span(int(self._sequences_R[request]), first, num_tokens)

        left = [engine.batch.left_n for engine in self._engines]
        return self._load_to_come(tokens_of, arriving, left, self._output_R, horizon_s)

    def _expected(self, horizon_s: float) -> tuple[FloatArray, int]:
        """Tokens of the requests that run, as predictors saw their last ones; answers are expected to be as long as
        those so far, and nothing is known of requests of which nothing is computed."""
        predicted = self._system.predicted
        assert predicted is not None

        def tokens_of(request: int, _: int, num_tokens: int, computed: int) -> FloatArray:
            seen = min(computed, _RECENT_TOKENS)
            if not seen:
                return np.zeros(self._routing.num_cells)
            recent_C = predicted.spans.of_span(int(self._sequences_R[request]), computed - seen, seen)
            return recent_C * (num_tokens / seen)

        done = [self._output_R[engine.batch.requests_n] - engine.batch.left_n for engine in self._engines]
        mean = self._mean_output(done)
        left = [np.maximum(1, mean - done_n) for done_n in done]
        return self._load_to_come(tokens_of, [], left, np.full(len(self._output_R), mean), horizon_s)

    def _mean_output(self, done: list[NDArray[np.int64]]) -> int:
        """Return the mean length of finished answers; before the first, twice that of the running ones so far."""
        if self._num_finished:
            return max(1, round(self._finished_tokens / self._num_finished))
        running_n = np.concatenate(done)
        return max(1, round(2 * float(running_n.mean()))) if len(running_n) else 1

    def _load_to_come(
        self,
        tokens_of: TokensOf,
        arriving: list[tuple[int, float]],
        left: list[NDArray[np.int64]],
        output_R: NDArray[np.int64],
        horizon_s: float,
    ) -> tuple[FloatArray, int]:
        known_s = [engine.step_s for engine in self._engines if engine.step_s]
        mean_s = float(np.mean(known_s)) if known_s else horizon_s
        return upcoming_load(
            tokens_of,
            [engine.batch for engine in self._engines],
            arriving,
            left=left,
            steps=[max(1, math.ceil(horizon_s / max(engine.step_s or mean_s, 1e-9))) for engine in self._engines],
            prompt_tokens_R=self._prompt_R,
            output_tokens_R=output_R,
            max_batch_tokens=self._scenario.batching.max_batch_tokens,
            num_cells=self._routing.num_cells,
        )
