"""The instances in the workers' memory over virtual time: starts, cold starts, rollouts, workers that stop and start.

A plan comes into force as planning.rollout orders it: its instances start beside those in force, then it is published,
then the engines end their steps, then what it leaves out is evicted. A worker starts one instance after the other.

Shapes: L MoE layers, E experts, C = L x E cells, W workers, N instances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.plan import Plan
from moeless.planning.cost import CostProfile
from moeless.planning.place import InfeasiblePlacementError
from moeless.planning.rollout import Phase, Rollout
from moeless.simulate.layer_times import CompiledPlan
from moeless.simulate.scenario import Split, TransferConfig

_EPOCH = 1
"""A simulation has one controller."""


class ColdStart(NamedTuple):
    """An instance that a step waits for."""

    worker: int
    is_pending: bool
    """A plan to come has it, and the worker's memory holds a place for it."""


class WorkerMemory:
    """The workers' memory over virtual time.

    Args:
        plan: in force, with warm instances, at time 0.
        sample_MLk: as of CompiledPlan.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        profile: CostProfile,
        config: TransferConfig,
        sample_MLk: IntArray,
        *,
        seed: int,
        split: Split = "shares",
    ) -> None:
        self._cluster, self._profile, self._config, self._sample_MLk = cluster, profile, config, sample_MLk
        self._split: Split = split
        self._step_cost = profile.expert_time.call_cost(link_s=profile.link_s(cluster))
        self._model: ModelShape = profile.model
        self._rng = np.random.default_rng(seed)
        num_workers = cluster.num_workers
        self.serving = self._compiled(plan)
        self._rollout: Rollout | None = None
        """Rollout of the coming plan, until the instances that it leaves out have been evicted."""
        self.pending_keys: IntArray = np.empty(0, dtype=np.int64)
        """Instances that are being started for the plan to come."""
        self._resident_W: IntArray = np.bincount(plan.worker_N, minlength=num_workers)
        self._hosted_meanwhile: set[int] = set()
        self._evicted_meanwhile: set[int] = set()
        self._capacity_W = cluster.capacity_W(self._model)
        self._starting_until_W = np.zeros(num_workers)
        self._asked_until_W = np.zeros(num_workers)
        """The same of what steps wait for, which goes before what a plan starts."""
        self._target_until_W = np.zeros(num_workers)
        """Until when each worker loads for the plan to come."""
        self._empty_since_W = np.where(self._resident_W > 0, np.inf, 0.0)
        self._stopped_since_W = np.full(num_workers, np.inf)
        self._now_s = 0.0
        self.instance_s = 0.0
        """Integral of the resident instances over time."""
        self.worker_s = 0.0
        """The same of the workers that are not stopped."""
        self.num_starts = self.num_cold_starts = self.num_worker_starts = self.num_evicted = 0
        self.num_over_memory = 0
        """Plans whose instances did not fit beside those they replaced: memory was exceeded while they started."""
        self.peak_instances = int(self._resident_W.sum())

    @property
    def num_resident(self) -> int:
        """Instances on workers, starting ones included."""
        return int(self._resident_W.sum())

    @property
    def num_workers_up(self) -> int:
        return int(np.isinf(self._stopped_since_W).sum())

    @property
    def fetch_bytes_per_s(self) -> float:
        """Bandwidth of one fetch from host memory."""
        share, cluster = self._config.transfer_share, self._cluster
        return min(cluster.fetch_bytes_per_s, share * cluster.local_bytes_per_s) if share else cluster.fetch_bytes_per_s

    def free_link_W(self, now_s: float) -> FloatArray | None:
        """Share of each worker's link that fetches leave free; None: all links are free."""
        if not self._config.transfer_share or not (self._starting_until_W > now_s).any():
            return None
        taken = self.fetch_bytes_per_s / self._cluster.local_bytes_per_s
        return np.where(self._starting_until_W > now_s, 1 - min(taken, self._config.transfer_share), 1.0)

    def advance(self, now_s: float) -> None:
        """Bring the integrals up to date, and stop workers that were idle for long enough."""
        self.instance_s += self.num_resident * max(0.0, now_s - self._now_s)
        self._now_s = max(self._now_s, now_s)
        idle_s = self._config.worker_idle_s
        if idle_s is not None:
            stops_W = np.isinf(self._stopped_since_W) & (self._empty_since_W + idle_s <= now_s)
            self._stopped_since_W[stops_W] = self._empty_since_W[stops_W] + idle_s

    def finish(self, now_s: float) -> None:
        """Bring everything up to date at the end."""
        self.advance(now_s)
        self.worker_s += float(np.minimum(self._stopped_since_W, now_s).sum())

    def change_to(self, plan: Plan, now_s: float, *, bytes_per_s: float | None = None) -> float:
        """Begin to load what `plan` has and the workers have not.

        Args:
            bytes_per_s: of a load; default: from host memory, as configured.
        Returns: when the plan can be published, if no step has to wait for a load meanwhile.
        """
        assert not self.is_changing
        self.advance(now_s)
        self._rollout = Rollout(self.serving.plan, plan, epoch=_EPOCH)
        self.pending_keys = self._rollout.start_keys
        started_N = plan.started_since(self.serving.plan)
        starts_W = np.bincount(plan.worker_N[started_N], minlength=self._cluster.num_workers)
        start_s = self._profile.start_time(self._model.expert_bytes, bytes_per_s or self.fetch_bytes_per_s)
        needed_W = starts_W > 0
        begin_W = self._begin_W(needed_W, now_s, self._starting_until_W)
        self._target_until_W = np.where(needed_W, begin_W + starts_W * start_s, now_s)
        self._starting_until_W = np.where(needed_W, self._target_until_W, self._starting_until_W)
        self._resident_W = self._resident_W + starts_W
        self.num_starts += len(started_N)
        self.peak_instances = max(self.peak_instances, self.num_resident)
        self.num_over_memory += bool((self._resident_W > self._capacity_W).any())
        return self.target_ready_s

    @property
    def target_ready_s(self) -> float:
        """Expected time at which all instances of the coming plan are warm."""
        return float(self._target_until_W.max())

    @property
    def is_changing(self) -> bool:
        """Whether a rollout is under way."""
        return self._rollout is not None

    def publish(self, now_s: float, *, engines: Sequence[int] = ()) -> None:
        """Let the plan to come serve; what it leaves out is evicted once the engines have acknowledged.

        Args:
            engines: those in a step, which they end under the old table.
        Raises: RolloutOrderError if an instance of the plan has not started by now.
        """
        assert self._rollout is not None
        self.advance(now_s)
        is_warm_W = self._target_until_W <= now_s
        self._rollout.mark_warm(self.pending_keys[is_warm_W[self.pending_keys % self._cluster.num_workers]])
        plan = self._with_changes_meanwhile(self._rollout.after)
        self._table = self._rollout.publish(engines, in_force=self.serving.plan, plan=plan)
        self.pending_keys = self.pending_keys[:0]
        self.serving = self._compiled(plan)
        self._evict_drained(now_s)

    def acknowledge(self, engine: int, now_s: float) -> None:
        """The engine has ended its step."""
        if self._rollout is not None and self._rollout.phase is Phase.ACKNOWLEDGE:
            self._rollout.acknowledge(engine, self._table)
            self._evict_drained(now_s)

    def _evict_drained(self, now_s: float) -> None:
        """An engine that has ended its step has no call left."""
        assert self._rollout is not None
        if self._rollout.phase is Phase.DRAIN:
            self._rollout.evict(self._rollout.drain_keys)
        if self._rollout.phase is Phase.DONE:
            self._rollout = None
            self.advance(now_s)
            resident_W = np.bincount(self.serving.plan.worker_N, minlength=self._cluster.num_workers)
            self._set_resident(resident_W, now_s)

    def host_cold(self, cells: IntArray, last_used_s_C: FloatArray, now_s: float) -> list[ColdStart]:
        """Choose a worker for each function (given as a cell) that has no instance, and put it into the plan.

        One that loads it already, for a plan to come; else the worker with the most free memory, a running one if there
        is any; where none is free, the function goes whose instance there was unused for longest.
        Returns: in the order of `cells`.
        """
        self.advance(now_s)
        plan = self.serving.plan
        published_W = np.bincount(plan.worker_N, minlength=self._cluster.num_workers)
        free_W = self._capacity_W - self._resident_W
        pending_cells = self.pending_keys // self._cluster.num_workers
        dropped: list[int] = []
        is_pending = np.zeros(len(cells), dtype=np.bool_)
        workers = np.empty(len(cells), dtype=np.int64)
        for index, cell in enumerate(cells.tolist()):
            pending = int(np.searchsorted(pending_cells, cell))
            if pending < len(pending_cells) and pending_cells[pending] == cell:
                workers[index] = self.pending_keys[pending] % self._cluster.num_workers
                is_pending[index] = True
                continue
            is_up_W = np.isinf(self._stopped_since_W)
            open_W = is_up_W & (free_W > 0) if (is_up_W & (free_W > 0)).any() else free_W > 0
            if open_W.any():
                worker = int(np.argmax(np.where(open_W, free_W, np.iinfo(np.int64).min)))
                free_W[worker] -= 1
            else:
                worker = int(np.argmax(published_W))
                dropped.append(self._longest_unused(worker, last_used_s_C, cells, dropped))
            workers[index] = worker
        keys = cells * self._cluster.num_workers + workers
        self.pending_keys = np.setdiff1d(self.pending_keys, keys[is_pending], assume_unique=True)
        self._insert(cells, workers, ~is_pending, dropped, now_s)
        self.num_starts += int(np.count_nonzero(~is_pending))
        return [ColdStart(*of) for of in zip(workers.tolist(), is_pending.tolist(), strict=True)]

    def start_cold(self, start: ColdStart, begin_s: float) -> float:
        """Load an instance before all that no step waits for; returns when it is there."""
        worker = start.worker
        needed_W = np.zeros(self._cluster.num_workers, dtype=np.bool_)
        needed_W[worker] = True
        begin = float(self._begin_W(needed_W, begin_s, self._asked_until_W)[worker])
        start_s = self._profile.start_time(self._model.expert_bytes, self.fetch_bytes_per_s)
        self._asked_until_W[worker] = end = begin + start_s
        # What a plan starts there is done that much later; an instance of the plan only has its turn earlier.
        behind_s = 0.0 if start.is_pending else start_s
        self._starting_until_W[worker] = max(end, self._starting_until_W[worker] + behind_s)
        if self._target_until_W[worker] > begin:
            self._target_until_W[worker] += behind_s
        self.num_cold_starts += 1
        return end

    def _insert(self, cells: IntArray, workers: IntArray, is_new: BoolArray, dropped: list[int], now_s: float) -> None:
        plan = self.serving.plan
        if self._rollout is not None and self._rollout.phase in (Phase.START, Phase.PUBLISH):
            self._hosted_meanwhile.update(cells[is_new].tolist())
            self._evicted_meanwhile.update(plan.keys_N[dropped].tolist())
        kept = _without_instances(plan, np.array(dropped, dtype=np.int64))
        grown = _with_instances(kept, cells, workers)
        self.num_evicted += len(dropped)
        change_W = np.bincount(workers[is_new], minlength=plan.num_workers)
        change_W -= np.bincount(plan.worker_N[dropped], minlength=plan.num_workers)
        self.serving = self._compiled(grown, like=self.serving)
        self._set_resident(self._resident_W + change_W, now_s)

    def _compiled(self, plan: Plan, *, like: CompiledPlan | None = None) -> CompiledPlan:
        return CompiledPlan(
            plan,
            self._cluster,
            self._profile.expert_time,
            self._sample_MLk,
            like=like,
            split=self._split,
            step_cost=self._step_cost,
        )

    def _with_changes_meanwhile(self, plan: Plan) -> Plan:
        """The plan less what was evicted since it was made, and with the cold starts for which it has no instance."""
        before = self.serving.plan
        gone_keys = np.array(sorted(self._evicted_meanwhile - set(before.keys_N.tolist())), dtype=np.int64)
        plan = _without_instances(plan, np.flatnonzero(np.isin(plan.keys_N, gone_keys)))
        has_C = np.zeros(plan.num_layers * plan.num_experts, dtype=np.bool_)
        has_C[plan.function_N] = True
        kept = np.flatnonzero(np.isin(before.function_N, list(self._hosted_meanwhile)) & ~has_C[before.function_N])
        self._hosted_meanwhile.clear()
        self._evicted_meanwhile.clear()
        return _with_instances(plan, before.function_N[kept], before.worker_N[kept]) if len(kept) else plan

    def _longest_unused(self, worker: int, last_used_s_C: FloatArray, needed: IntArray, dropped: list[int]) -> int:
        plan = self.serving.plan
        there = np.setdiff1d(np.flatnonzero(plan.worker_N == worker), dropped)
        cells = plan.layer_N[there] * self._model.num_experts + plan.expert_N[there]
        usable = ~np.isin(cells, needed)
        if not usable.any():
            raise InfeasiblePlacementError(
                f"cluster: memory_bytes of {self._cluster.workers[worker].name} must hold what a step needs beside "
                f"what is being loaded, got {self._cluster.workers[worker].memory_bytes}"
            )
        return int(there[usable][np.argmin(last_used_s_C[cells[usable]])])

    def _begin_W(self, needed_W: BoolArray, now_s: float, busy_until_W: FloatArray) -> FloatArray:
        """Return when each of the workers can begin to start instances; starts stopped workers."""
        begin_W = np.maximum(busy_until_W, now_s)
        starting = np.flatnonzero(needed_W & np.isfinite(self._stopped_since_W))
        if len(starting):
            least, most = self._profile.worker_start_s
            begin_W[starting] = now_s + self._rng.uniform(least, most, len(starting))
            # Counted as if it had never stopped, less the time that it was.
            self.worker_s -= float((now_s - self._stopped_since_W[starting]).sum())
            self._stopped_since_W[starting] = np.inf
            self.num_worker_starts += len(starting)
        self._empty_since_W = np.where(needed_W, np.inf, self._empty_since_W)
        return begin_W

    def _set_resident(self, resident_W: IntArray, now_s: float) -> None:
        self._resident_W = resident_W
        was_empty_W = np.isfinite(self._empty_since_W)
        self._empty_since_W = np.where(resident_W > 0, np.inf, np.where(was_empty_W, self._empty_since_W, now_s))
        self.peak_instances = max(self.peak_instances, self.num_resident)


def _without_instances(plan: Plan, dropped_N: IntArray) -> Plan:
    """The plan less some instances; other instances of their functions share the tokens equally."""
    if not len(dropped_N):
        return plan
    stays_N = np.ones(plan.num_instances, dtype=np.bool_)
    stays_N[dropped_N] = False
    share_N = plan.share_N.copy()
    for gone in dropped_N.tolist():
        left_N = (plan.function_N == plan.function_N[gone]) & stays_N
        if left_N.any():
            share_N[left_N] = 1 / left_N.sum()
    return replace(
        plan,
        layer_N=plan.layer_N[stays_N],
        expert_N=plan.expert_N[stays_N],
        worker_N=plan.worker_N[stays_N],
        share_N=share_N[stays_N],
    )


def _with_instances(plan: Plan, cells: IntArray, workers: IntArray) -> Plan:
    """The plan and one instance more of each of the functions, which have none in it."""
    return Plan.from_instances(
        version=plan.version,
        num_layers=plan.num_layers,
        num_experts=plan.num_experts,
        num_workers=plan.num_workers,
        layer_N=np.concatenate([plan.layer_N, cells // plan.num_experts]),
        expert_N=np.concatenate([plan.expert_N, cells % plan.num_experts]),
        worker_N=np.concatenate([plan.worker_N, workers]),
        share_N=np.concatenate([plan.share_N, np.ones(len(cells))]),
    )
