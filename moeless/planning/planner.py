"""moeless's own planner: scaling and placement, one after the other.

Called by the live loop, the simulator and benchmarks. A planner remembers what it recommended (planning.scale's
stabiliser) and nothing else; it has no clock and no randomness.

Shapes: L MoE layers, E experts per layer, W workers, N instances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.core.policy import (
    UNLIMITED,
    AffinityPlacer,
    BenefitScaler,
    CvScaler,
    LocalityFirstPlacer,
    MinimalMovesPlacer,
    ResolvedPolicy,
)
from moeless.planning.affinity.online import AffinityConfig, place_by_affinity
from moeless.planning.affinity.statistics import AffinityStatistics
from moeless.planning.observation import Observation
from moeless.planning.place import PlacementConfig, equal_shares, place
from moeless.planning.scale import (
    Limits,
    Stabiliser,
    fit_budgets,
    fit_workers,
    min_replicas,
    replicas_by_benefit,
    replicas_by_cv,
    replicas_min_max,
)

_STARTING_SHARE = 0.25
"""Share of a tick for starting instances only to balance load, where the policy sets no number."""

Seconds = Callable[[FloatArray], FloatArray]
"""Time of an expert's calls by their tokens, on a worker of speed 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlanningContext:
    """Model, cluster and costs that plans are made for."""

    model: ModelShape
    cluster: Cluster
    seconds: Seconds | None = None
    """An expert's time. None: in proportion to its tokens."""
    floor_tokens: float = 0.0
    """Number of tokens below which a call takes constant time, so that splitting it relieves no worker."""
    horizon_steps: float = 100.0
    """Engine steps that a plan will be in force."""
    start_s: float = 0.0
    """Time to start an instance besides sending its bytes over the link."""
    affinity: AffinityStatistics | None = None
    """Statistics of recorded routing, which the policy's placer `affinity` needs; without them it is refused."""

    @property
    def ready_s(self) -> float:
        """From the decision to start an instance until it is warm."""
        return self.start_s + self.model.expert_bytes / self.cluster.fetch_bytes_per_s

    def starts_within(self, seconds: float) -> int:
        """Instances that all workers load in that time, at least one."""
        return max(1, int(self.cluster.num_workers * seconds / self.ready_s))

    @property
    def capacity(self) -> int:
        """Instances that fit all workers."""
        return int(self.cluster.capacity_W(self.model).sum())

    def layer_times_L(self, plan: Plan, load_LE: FloatArray) -> FloatArray:
        """Time of each layer's slowest worker, shape (L,)."""
        is_serving_N = plan.share_N > 0  # the others are being started, or kept warm
        serving = np.bincount(plan.function_N[is_serving_N], minlength=load_LE.size)
        work_LW = plan.worker_load_LW(self.work_LE(load_LE, serving.reshape(load_LE.shape)))
        times_L: FloatArray = (work_LW / self.cluster.speed_W).max(axis=1)
        return times_L

    def work_LE(self, load_LE: FloatArray, counts_LE: IntArray) -> FloatArray:
        """Return the work of all instances of each function together, at most: placement balances it.

        The dispatcher sends tokens that take no longer than reading the weights to one instance. It may split more
        tokens, and every part then reads the weights; where calls are expensive, it splits less than is counted here.
        """
        if self.seconds is None:
            return load_LE
        parts_LE = np.maximum(counts_LE, 1).astype(np.float64)
        if self.floor_tokens > 0:
            parts_LE = np.clip(load_LE / self.floor_tokens, 1.0, parts_LE)
        return parts_LE * self.seconds(load_LE / parts_LE)


def hosted_instances(previous: Plan | None, pending_keys: IntArray, shape: tuple[int, int, int]) -> Plan | None:
    """Return the previous plan plus the instances that are being started; None if there is neither.

    They get no tokens where the function has other instances, and equal shares where it has none.
    """
    if not len(pending_keys):
        return previous
    before_keys = np.empty(0, dtype=np.int64) if previous is None else previous.keys_N
    added = np.setdiff1d(pending_keys, before_keys)
    if not len(added):
        return previous
    num_layers, num_experts, num_workers = shape
    keys = np.concatenate((before_keys, added))
    function = keys // num_workers
    share = np.zeros(len(keys))
    if previous is not None:
        share[: len(before_keys)] = previous.share_N
    is_alone = np.isin(function, function[: len(before_keys)], invert=True)
    share[is_alone] = equal_shares(function[is_alone])
    return Plan.from_instances(
        version=0 if previous is None else previous.version,
        num_layers=num_layers,
        num_experts=num_experts,
        num_workers=num_workers,
        layer_N=function // num_experts,
        expert_N=function % num_experts,
        worker_N=keys % num_workers,
        share_N=share,
    )


class MoelessPlanner:
    """Counts by the policy's scaler, kept from flapping; placed with few moves; changed only where that pays.

    1. Count instances, pending ones included, and what every function must have (planning.scale).
    2. Spend the budget by the policy's scaler on the forecast's upper quantile, and stabilise.
    3. Make what must change: missing functions get instances, those not wanted for a while lose them.
    4. Where a layer's slowest worker is then further from perfect balance than the policy's threshold, add the
       replicas and let instances move; a layer takes that only if it shortens the slowest worker's time by the
       threshold. All other layers stay as they are.
    5. With the placer `affinity`, instances move with what is left of the tick's moves to where tokens go anyway.
    """

    name = "moeless"

    def __init__(self, policy: ResolvedPolicy, system: PlanningContext) -> None:
        if policy.min_LE.shape != (system.model.num_layers, system.model.num_experts):
            raise ConfigError(
                f"policy must be resolved for the model of {system.model.num_layers} layers x "
                f"{system.model.num_experts} experts, got one for {policy.min_LE.shape}"
            )
        if isinstance(policy.placer, AffinityPlacer):
            if system.affinity is None:
                raise ConfigError("policy: placer affinity needs the statistics of recorded routing, got none")
            if (system.affinity.num_layers, system.affinity.num_experts) != policy.min_LE.shape:
                raise ConfigError(
                    f"system.affinity must be of {policy.min_LE.shape} layers and experts as the model is, got "
                    f"{(system.affinity.num_layers, system.affinity.num_experts)}"
                )
        self._policy = policy
        self._system = system
        self._budget = min(policy.budget, system.capacity)
        self._max_moves = (
            system.starts_within(_STARTING_SHARE * policy.tick_s) if policy.max_moves is None else policy.max_moves
        )
        self._placement = _placement_config(policy, system)
        self._max_LE = np.minimum(policy.max_LE, system.cluster.num_workers)
        self._stabiliser = Stabiliser(
            up_window_s_LE=policy.up_window_s_LE,
            down_window_s_LE=policy.down_window_s_LE,
            ready_s=system.ready_s,
            window_s=policy.tick_s,
        )
        self._last: tuple[Observation, Plan] | None = None
        """Asked again about the same moment, what was decided stands: a tick's moves are made once."""

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """See `Planner.plan`."""
        if previous is not None and self._last is not None and self._last == (observation, previous):
            return previous
        plan = self._decide(observation, previous)
        self._last = (observation, plan)
        return plan

    def _decide(self, observation: Observation, previous: Plan | None) -> Plan:
        shape = (*observation.mean_LE.shape, self._system.cluster.num_workers)
        hosted = hosted_instances(previous, observation.pending_keys, shape)
        hosted_LE = np.zeros(shape[:2], dtype=np.int64) if hosted is None else hosted.counts_LE
        min_LE, counts_LE = self._counts(observation, None if hosted is None else hosted_LE, hosted_LE)
        if hosted is None:
            work_LE = self._system.work_LE(observation.mean_LE, counts_LE)
            plan = self._placed(counts_LE, work_LE, None, max_moves=self._max_moves)
            return self._by_affinity(plan, observation, max_moves=None)
        needed_LE = np.clip(hosted_LE, min_LE, counts_LE)
        work_LE = self._system.work_LE(observation.mean_LE, needed_LE)
        needed = self._placed(needed_LE, work_LE, hosted, max_moves=0)
        times_L = self._system.layer_times_L(hosted, observation.mean_LE)
        is_forced_L = (needed_LE != hosted_LE).any(axis=1)
        plan, times_L = self._where_it_pays(hosted, times_L, needed, observation, is_forced_L=is_forced_L)

        balanced_L = work_LE.sum(axis=1) / self._system.cluster.speed_W.sum()
        is_open_L = times_L * (1 - self._policy.benefit_threshold) > balanced_L
        if is_open_L.any():
            target_LE = np.where(is_open_L[:, np.newaxis], counts_LE, needed_LE)
            plan = self._improved(plan, times_L, target_LE, needed_LE, observation)
        num_started = len(plan.started_since(hosted)) - int(np.maximum(needed_LE - hosted_LE, 0).sum())
        plan = self._by_affinity(plan, observation, max_moves=max(0, self._max_moves - num_started))
        if previous is not None and are_same(plan, previous):
            return previous
        return plan.with_version(1 if previous is None else previous.version + 1)

    def _improved(
        self, plan: Plan, times_L: FloatArray, target_LE: IntArray, needed_LE: IntArray, observation: Observation
    ) -> Plan:
        """The plan with further replicas, up to `target_LE`, and moves in the layers where that pays; together at most
        the moves of a tick.

        Where memory is full, room for a replica is made by moving others: where that is too much, it is tried with
        fewer replicas, and at last with moves alone.
        """
        wanted = int((target_LE - needed_LE).sum())
        allowed, is_forced_L = self._max_moves, np.zeros(len(target_LE), dtype=np.bool_)
        while True:
            counts_LE = target_LE
            if wanted > allowed:
                counts_LE = fit_budgets(
                    target_LE,
                    Limits(min_LE=needed_LE, max_LE=target_LE, budget_L=np.full(len(target_LE), UNLIMITED)),
                    load_LE=observation.upper_LE,
                    wanted_LE=target_LE,
                    budget=int(needed_LE.sum()) + allowed,
                )
            left = max(0, allowed - wanted) if allowed else self._max_moves
            work_LE = self._system.work_LE(observation.mean_LE, counts_LE)
            better = self._placed(counts_LE, work_LE, plan, max_moves=left)
            better, _ = self._where_it_pays(plan, times_L, better, observation, is_forced_L=is_forced_L)
            excess = len(better.started_since(plan)) - self._max_moves
            if excess <= 0:
                return better
            allowed = max(0, allowed - max(1, excess // 2))

    def _counts(
        self, observation: Observation, current_LE: IntArray | None, hosted_LE: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Return the required and the desired number of instances of every function."""
        policy = self._policy
        min_LE = min_replicas(observation, policy, hosted_LE=hosted_LE, max_LE=self._max_LE, budget=self._budget)
        # What has no room for its first instance has none for a second.
        load_LE = np.where(min_LE > 0, observation.upper_LE, 0.0)
        limits = Limits(min_LE=min_LE, max_LE=self._max_LE, budget_L=policy.layer_budget_L)
        wanted_LE = self._wanted(load_LE, limits)
        stable_LE = self._stabiliser.stabilise(wanted_LE, time_s=observation.time_s, current_LE=current_LE)
        counts_LE = fit_budgets(
            np.clip(stable_LE, min_LE, self._max_LE),
            limits,
            load_LE=load_LE,
            wanted_LE=wanted_LE,
            budget=self._budget,
        )
        counts_LE = fit_workers(counts_LE, load_LE, self._system.cluster.capacity_W(self._system.model))
        return np.minimum(min_LE, counts_LE), counts_LE

    def _wanted(self, load_LE: FloatArray, limits: Limits) -> IntArray:
        num_workers = self._system.cluster.num_workers
        scaler = self._policy.scaler
        if isinstance(scaler, CvScaler):
            return replicas_by_cv(load_LE, limits, max_cv_L=self._policy.max_cv_L)
        if isinstance(scaler, BenefitScaler):
            num_used = int(np.count_nonzero(limits.min_LE))
            room = self._budget - int(limits.min_LE.sum())
            return replicas_by_benefit(
                load_LE,
                limits,
                num_extras=min(int(scaler.max_extra_share * num_used), room),
                num_workers=num_workers,
                worker_share=scaler.worker_share,
                seconds=self._system.seconds,
            )
        enough_L = np.maximum(scaler.worker_share * load_LE.sum(axis=1) / num_workers, self._system.floor_tokens)
        max_L = np.floor((1 + scaler.max_extra_share) * np.count_nonzero(limits.min_LE, axis=1)).astype(np.int64)
        min_L = limits.min_LE.sum(axis=1)
        within = replace(limits, budget_L=np.minimum(limits.budget_L, np.maximum(max_L, min_L)))
        return replicas_min_max(load_LE, within, enough_L=enough_L)

    def _placed(self, counts_LE: IntArray, work_LE: FloatArray, before: Plan | None, *, max_moves: int) -> Plan:
        may_move = not isinstance(self._policy.placer, LocalityFirstPlacer)
        config = replace(self._placement, max_moves=max_moves if may_move else 0)
        return place(counts_LE, work_LE, self._system.cluster, self._system.model, previous=before, config=config)

    def _by_affinity(self, plan: Plan, observation: Observation, *, max_moves: int | None) -> Plan:
        """With the placer `affinity`, the plan with instances moved to where tokens go anyway; else the plan."""
        placer, statistics = self._policy.placer, self._system.affinity
        if not isinstance(placer, AffinityPlacer) or statistics is None or max_moves == 0:
            return plan
        config = AffinityConfig(
            objective=placer.objective,
            max_imbalance=placer.max_imbalance,
            max_moves=max_moves,
            min_gain=placer.min_gain,
        )
        work_LE = self._system.work_LE(observation.mean_LE, plan.counts_LE)
        return place_by_affinity(plan, statistics, work_LE, self._system.cluster, self._system.model, config=config)

    def _where_it_pays(
        self, before: Plan, old_L: FloatArray, after: Plan, observation: Observation, *, is_forced_L: BoolArray
    ) -> tuple[Plan, FloatArray]:
        """Each layer as it was, unless it is forced or its slowest worker's time falls by the threshold; and the times.

        A layer of `after` may stand where another layer of it made room. Where not all that pay fit beside those that
        stay, they come in the order of what they gain; if even the forced ones do not fit, all come.

        Args:
            old_L: times of the layers of `before`.
        """
        if after is before:
            return before, old_L
        new_L = self._system.layer_times_L(after, observation.mean_LE)
        comes_L = is_forced_L | (new_L < old_L * (1 - self._policy.benefit_threshold))
        capacity_W = self._system.cluster.capacity_W(self._system.model)
        added_LW = after.hosted_LW - before.hosted_LW
        hosted_W = np.bincount(before.worker_N, minlength=len(capacity_W)) + added_LW[is_forced_L].sum(axis=0)
        if (hosted_W + added_LW[comes_L & ~is_forced_L].sum(axis=0) > capacity_W).any():
            if (hosted_W > capacity_W).any():
                return after, new_L
            pays = np.flatnonzero(comes_L & ~is_forced_L)
            comes_L = is_forced_L.copy()
            for layer in pays[np.argsort(new_L[pays] - old_L[pays], kind="stable")].tolist():
                if (hosted_W + added_LW[layer] <= capacity_W).all():
                    hosted_W += added_LW[layer]
                    comes_L[layer] = True
        return merged_layers(before, after, comes_L), np.where(comes_L, new_L, old_L)


def _placement_config(policy: ResolvedPolicy, system: PlanningContext) -> PlacementConfig:
    config = PlacementConfig(horizon_steps=system.horizon_steps)
    if isinstance(policy.placer, MinimalMovesPlacer | AffinityPlacer):
        config = replace(config, max_imbalance=policy.placer.max_imbalance)
    if system.seconds is not None:
        config = replace(config, unit_s=1.0, spreads_singles=True)  # work_LE is in seconds
    return config


def merged_layers(before: Plan, after: Plan, is_after_L: BoolArray) -> Plan:
    """A plan with some layers of one and the others of the other."""
    if not is_after_L.any():
        return before
    if is_after_L.all():
        return after
    stay_N, come_N = ~is_after_L[before.layer_N], is_after_L[after.layer_N]
    return Plan.from_instances(
        version=after.version,
        num_layers=after.num_layers,
        num_experts=after.num_experts,
        num_workers=after.num_workers,
        layer_N=np.concatenate((before.layer_N[stay_N], after.layer_N[come_N])),
        expert_N=np.concatenate((before.expert_N[stay_N], after.expert_N[come_N])),
        worker_N=np.concatenate((before.worker_N[stay_N], after.worker_N[come_N])),
        share_N=np.concatenate((before.share_N[stay_N], after.share_N[come_N])),
    )


def are_same(one: Plan, other: Plan) -> bool:
    """Return whether two plans have the same instances and shares, whatever their versions."""
    return np.array_equal(one.keys_N, other.keys_N) and np.array_equal(one.share_N, other.share_N)
