"""Times of one engine step's layers under a plan: which instance gets which tokens, and how long each worker computes.

Shapes: L MoE layers, E experts, k experts per token, C = L x E cells, W workers, N instances, M sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import FloatArray, Int64Array, IntArray
from moeless.core.call_cost import CallCost
from moeless.core.cluster import Cluster
from moeless.core.plan import Plan
from moeless.planning.baselines.lp import lp_split
from moeless.planning.cost import CostProfile, ExpertTime, all_to_all_seconds, hub_seconds
from moeless.planning.step_balance import Replicas, ShareTurns, add_call_costs, balanced_split
from moeless.simulate.batching import Step
from moeless.simulate.exact_load import exact_parts
from moeless.simulate.scenario import Scenario, Split, System

if TYPE_CHECKING:
    from moeless.simulate.worker_memory import ColdStart, WorkerMemory

_SAMPLED_VALUES = 1 << 20
_MAX_SAMPLED = 256


class WorkerLoad(NamedTuple):
    """Work of a step on each worker, every array of shape (L, W)."""

    seconds_LW: FloatArray
    """Time of computing."""
    pairs_LW: FloatArray
    """(token, expert) pairs."""
    tokens_LW: FloatArray
    """Distinct tokens that are sent there."""


class CompiledPlan:
    """A plan in the form that steps are computed with.

    Args:
        sample_MLk: choices of some tokens: they estimate the distinct tokens among a worker's pairs.
        like: a plan that differs in few instances, whose share of distinct tokens is taken over.
        split: how replicas share a step's tokens.
        step_cost: as in a routing table, for the split balanced, which is the dispatcher's (planning.step_balance).
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        expert_time: ExpertTime,
        sample_MLk: IntArray,
        *,
        like: CompiledPlan | None = None,
        split: Split = "shares",
        step_cost: CallCost | None = None,
    ) -> None:
        assert step_cost is not None or split != "balanced"
        self.plan = plan
        self._expert_time = expert_time
        self._shape = (plan.num_layers, plan.num_workers)
        self._speed_N = cluster.speed_W[plan.worker_N]
        self._is_even = bool((cluster.speed_W == 1).all())
        self._cell_N = plan.layer_N.astype(np.int64) * plan.num_experts + plan.expert_N
        self._place_N = plan.layer_N.astype(np.int64) * plan.num_workers + plan.worker_N
        self.has_C = np.zeros(plan.num_layers * plan.num_experts, dtype=np.bool_)
        self.has_C[self._cell_N] = True
        self.instances_L = np.bincount(plan.layer_N, minlength=plan.num_layers)
        # Functions with replicas share out by cumulative shares; those of one instance get all.
        replicas_C = np.bincount(self._cell_N, minlength=len(self.has_C))
        self._shared = np.flatnonzero(replicas_C[self._cell_N] > 1)
        self._alone = np.flatnonzero(replicas_C[self._cell_N] == 1)
        self._kind: Split = split
        self._step_cost = step_cost
        self._speed_W = None if self._is_even else cluster.speed_W.astype(np.float64)
        self._replicas, self._shared_cells = self._replicated()
        self._turns = ShareTurns.of(self._replicas)
        self.has_replicas_L = np.diff(self._replicas.function_L) > 0
        self._distinct_LW: FloatArray = _distinct_share(plan, sample_MLk) if like is None else like._distinct_LW

    def load(self, counts_C: IntArray, *, num_tokens: int, step: int) -> WorkerLoad:
        """Return the work of a step of `num_tokens` tokens; functions without an instance are left out."""
        tokens_N = counts_C[self._cell_N].astype(np.int64)
        if len(self._shared):
            tokens_N[self._shared] = self._split(tokens_N, counts_C[self._shared_cells].astype(np.int64), step)
        seconds_N = self._expert_time(tokens_N)
        if not self._is_even:
            seconds_N /= self._speed_N
        size = self._shape[0] * self._shape[1]
        seconds_LW: NDArray[Any] = np.bincount(self._place_N, weights=seconds_N, minlength=size).reshape(self._shape)
        pairs_LW: NDArray[Any] = np.bincount(self._place_N, weights=tokens_N, minlength=size).reshape(self._shape)
        return WorkerLoad(seconds_LW, pairs_LW, np.minimum(pairs_LW * self._distinct_LW, float(num_tokens)))

    def _replicated(self) -> tuple[Replicas, IntArray]:
        """The functions with replicas, whose instances are in the order of `_shared`, and their cells."""
        cells, begins = np.unique(self._cell_N[self._shared], return_index=True)
        firsts = np.arange(self._shape[0] + 1) * self.plan.num_experts
        replicas = Replicas(
            function_L=np.searchsorted(cells, firsts),
            instance_F=np.append(begins, len(self._shared)),
            worker_N=self.plan.worker_N[self._shared].astype(np.int64),
            share_N=self.plan.share_N[self._shared].astype(np.float64),
        )
        return replicas, cells

    def _split(self, tokens_N: Int64Array, tokens_F: Int64Array, step: int) -> Int64Array:
        """The tokens of instances that are one of several."""
        if self._kind == "shares":
            return self._turns.split(tokens_F, step=step)
        alone = self._alone
        if self._kind == "lp":
            size = self._shape[0] * self._shape[1]
            held_P = np.bincount(self._place_N[alone], weights=tokens_N[alone], minlength=size).astype(np.int64)
            return lp_split(tokens_F, self._replicas, held_P.reshape(self._shape))
        assert self._step_cost is not None
        busy_LW = np.zeros(self._shape)
        add_call_costs(
            tokens_N[alone], self._place_N[alone], self._step_cost, busy_LW.reshape(-1), speed_N=self._speed_N[alone]
        )
        return balanced_split(tokens_F, self._replicas, busy_LW, self._step_cost, speed_W=self._speed_W)


def balanced_load(
    counts_C: IntArray,
    cluster: Cluster,
    expert_time: ExpertTime,
    *,
    num_layers: int,
    top_k: int,
    num_tokens: int,
    are_calls_integral: bool = False,
) -> WorkerLoad:
    """The bound of every plan: one call for each function with tokens, and its work spread evenly, as a fluid.

    A worker gets as many distinct tokens as if every token chose its workers independently.

    Args:
        are_calls_integral: bound the time from below by the number of calls too, each of which takes at least the time
            of reading an expert: below some number of tokens a call cannot be split.
    """
    num_workers = cluster.num_workers
    work_L = expert_time(counts_C).reshape(num_layers, -1).sum(axis=1) / cluster.speed_W.sum()
    if are_calls_integral:
        num_calls_L = (counts_C.reshape(num_layers, -1) > 0).sum(axis=1)
        rounds = np.arange(1, max(1, int(num_calls_L.max())) + 1)
        ends = np.sort((rounds[:, np.newaxis] * float(expert_time(1.0)) / cluster.speed_W).ravel())
        work_L = np.maximum(work_L, np.where(num_calls_L > 0, ends[num_calls_L - 1], 0.0))
    pairs_L = counts_C.reshape(num_layers, -1).sum(axis=1) / num_workers
    distinct = num_tokens * (1 - (1 - 1 / num_workers) ** top_k)
    shape = (num_layers, num_workers)
    return WorkerLoad(
        np.broadcast_to(work_L[:, np.newaxis], shape),
        np.broadcast_to(pairs_L[:, np.newaxis], shape),
        np.full(shape, distinct),
    )


def exact_load(
    counts_C: IntArray, cluster: Cluster, profile: CostProfile, *, num_tokens: int, max_instances: int
) -> WorkerLoad:
    """Whole experts, placed for this very load: what rebalancing after the gate for each layer could reach.

    Args:
        max_instances: of a layer, replicas included.
    """
    model, num_workers = profile.model, cluster.num_workers
    counts_LE = counts_C.reshape(model.num_layers, -1).astype(np.int64)
    cost = profile.expert_time.call_cost()
    tokens_LI, worker_LI = exact_parts(counts_LE, cluster.speed_W, cost, max_instances=max_instances)
    place_LI = worker_LI + np.arange(len(worker_LI))[:, np.newaxis] * num_workers
    shape = (model.num_layers, num_workers)

    def per_worker(values_LI: FloatArray) -> FloatArray:
        sums: NDArray[Any] = np.bincount(place_LI.ravel(), weights=values_LI.ravel(), minlength=shape[0] * shape[1])
        return sums.reshape(shape)

    seconds_LW = per_worker(profile.expert_time(tokens_LI)) / cluster.speed_W
    pairs_LW = per_worker(tokens_LI.astype(np.float64))
    distinct = num_tokens * (1 - (1 - 1 / num_workers) ** model.top_k)
    return WorkerLoad(seconds_LW, pairs_LW, np.minimum(pairs_LW, distinct))


def sampled_choices(experts_TLk: IntArray, *, num_workers: int, seed: int) -> IntArray:
    """Choices of some tokens of a trace, as many as tell the distinct ones of each worker at little cost."""
    num_tokens, num_layers, top_k = experts_TLk.shape
    size = min(num_tokens, _MAX_SAMPLED, max(16, _SAMPLED_VALUES // (num_layers * top_k * num_workers)))
    rows = np.sort(np.random.default_rng(seed).choice(num_tokens, size=size, replace=False))
    return np.asarray(experts_TLk[rows]).astype(np.int64)


def _distinct_share(plan: Plan, sample_MLk: IntArray) -> FloatArray:
    """Distinct tokens over pairs of each worker and layer, shape (L, W); 1 where the sample has none there."""
    _, shares_LEW = plan.dense()
    shares = shares_LEW.astype(np.float32)
    layers_L1 = np.arange(plan.num_layers)[:, np.newaxis]
    missed_MLW = np.ones((len(sample_MLk), plan.num_layers, plan.num_workers), dtype=np.float32)
    pairs_LW = np.zeros((plan.num_layers, plan.num_workers))
    for choice in range(sample_MLk.shape[2]):
        share_MLW = shares[layers_L1[:, 0], sample_MLk[:, :, choice]]
        missed_MLW *= 1 - share_MLW
        pairs_LW += share_MLW.sum(axis=0)
    distinct_LW = (1 - missed_MLW).sum(axis=0)
    share_LW: FloatArray = np.divide(distinct_LW, pairs_LW, out=np.ones_like(pairs_LW), where=pairs_LW > 0)
    return share_LW


@dataclass(slots=True)
class StepTimes:
    """Times of one step, layer after layer: backbone, dispatch, the busiest worker, combine."""

    step: Step
    backbone_s: float
    """Backbone's time per MoE layer: an even part of the step's."""
    load: WorkerLoad
    dispatch_L: FloatArray
    combine_L: FloatArray
    cold: dict[int, list[ColdStart]] = field(default_factory=dict)
    """Functions that must start first, by layer."""


class StepCosts:
    """Computes steps of one system on one scenario."""

    def __init__(self, scenario: Scenario, system: System, memory: WorkerMemory) -> None:
        self._scenario, self._system, self._memory = scenario, system, memory
        # Every system has as many devices for the backbone as for the experts.
        self._devices = scenario.cluster.num_workers / scenario.num_engines
        self._num_nodes = int(scenario.cluster.node_W.max()) + 1

    def times(self, step: Step, counts_C: IntArray, *, engine: int, number: int, now_s: float) -> StepTimes:
        """Compute the step's times on otherwise idle workers; functions without an instance are not counted."""
        scenario, profile = self._scenario, self._scenario.profile
        backbone_s = profile.backbone.seconds(
            num_tokens=step.num_tokens,
            decode_context=step.decode_context,
            prefill_context=step.prefill_context,
            devices=self._devices,
        )
        model = profile.model
        if self._system.bound == "exact":
            load = exact_load(
                counts_C,
                scenario.cluster,
                profile,
                num_tokens=step.num_tokens,
                max_instances=max(model.num_experts, self._system.bound_instances),
            )
        elif self._system.bound is not None:
            load = balanced_load(
                counts_C,
                scenario.cluster,
                profile.expert_time,
                num_layers=model.num_layers,
                top_k=model.top_k,
                num_tokens=step.num_tokens,
                are_calls_integral=self._system.bound == "integral",
            )
        else:
            load = self._memory.serving.load(counts_C, num_tokens=step.num_tokens, step=number)
        free_link_W = self._memory.free_link_W(now_s)
        dispatch_L = self._exchange(load.tokens_LW, model.hidden_bytes, engine, free_link_W)
        ratio = profile.exchange.combine_ratio
        combine_L = dispatch_L
        split_s = self._system.split_s + self._system.split_token_s * step.num_tokens
        if ratio != 1:
            combine_L = self._exchange(load.tokens_LW, model.hidden_bytes * ratio, engine, free_link_W)
        if split_s and self._system.bound is None:
            dispatch_L = dispatch_L + split_s * self._memory.serving.has_replicas_L
        return StepTimes(step, backbone_s / model.num_layers, load, dispatch_L, combine_L)

    def _exchange(
        self, tokens_LW: FloatArray, token_bytes: float, engine: int, free_link_W: FloatArray | None
    ) -> FloatArray:
        scenario = self._scenario
        cluster, exchange = scenario.cluster, scenario.profile.exchange
        hub_L = all_to_all_L = np.full(len(tokens_LW), np.inf)
        if self._system.topology == "hub" or self._system.bound is not None:
            hub_L = hub_seconds(
                tokens_LW,
                cluster,
                exchange,
                token_bytes=token_bytes,
                engine_node=engine % self._num_nodes,
                engine_links=self._devices,
                free_link_W=free_link_W,
            )
        if self._system.topology == "all_to_all" or self._system.bound is not None:
            all_to_all_L = all_to_all_seconds(
                tokens_LW, cluster, exchange, token_bytes=token_bytes, free_link_W=free_link_W
            )
        fastest_L: FloatArray = np.minimum(hub_L, all_to_all_L)
        return fastest_L
