"""Choose a worker for each instance: warm ones stay, new ones go heaviest first, and few move where that pays.

Called by the planners of planning.planner. Deterministic; ties go to the lower layer, expert and worker.

Shapes: L layers, E experts, W workers, N instances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.load_check import check_load
from moeless.planning.place.heaviest_first import check_counts, heaviest_first
from moeless.planning.place.moves import MoveLimits, TransferTimes, improve_layer
from moeless.planning.place.shares import busiest_L, ideal_L, settled_shares
from moeless_predictors.compiled import compiled


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementConfig:
    """Conditions and limits of moving instances."""

    max_moves: int = 16
    """Instances that may change their worker in one plan, beside those that counts add. 0: warm ones stay."""
    max_imbalance: float = 1.05
    """Busiest worker over perfect balance up to which a layer's instances stay: what is left to gain is within what the
    load changes by from one window to the next."""
    share_tolerance: float = 0.01
    """Leave a layer's shares as they are if new ones would relieve its busiest worker by at most this part."""
    unit_s: float = 1e-6
    """Seconds that one unit of work takes on a worker of speed 1: 1 where work is in seconds; where it is in tokens,
    a token's time (4e-6 for an expert of Mixtral's size on an A6000, 7e-8 for one of DeepSeek-V3's on an H800)."""
    horizon_steps: float = 100.0
    """Engine steps that the plan will be in force: a tick of a second, at 10 ms a step."""
    spreads_singles: bool = False
    """Functions with a single instance are spread over the workers in equal numbers: for steps of few tokens, in which
    each call takes as long as another."""

    def __post_init__(self) -> None:
        if self.max_moves < 0:
            raise ConfigError(f"placement.max_moves must be at least 0, got {self.max_moves}")
        if not self.max_imbalance >= 1:
            raise ConfigError(f"placement.max_imbalance must be at least 1, got {self.max_imbalance}")
        for name in ("share_tolerance", "unit_s", "horizon_steps"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"placement.{name} must be at least 0, got {getattr(self, name)}")


def place(
    counts_LE: IntArray,
    work_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    *,
    previous: Plan | None = None,
    config: PlacementConfig | None = None,
) -> Plan:
    """Place `counts_LE` instances for the work to come, changing the previous plan as little as pays.

    1. Instances of `previous` stay. Where a function has too many, those with the smallest shares go.
    2. Missing ones are placed heaviest first (place.heaviest_first).
    3. Every function's tokens are split so that the busiest worker is least busy (place.shares).
    4. In layers that are not balanced well enough, at most `config.max_moves` instances move (place.moves).

    Args:
        counts_LE: instances of each function, >= 0.
        work_LE: of each function in an engine step that the plan is for, >= 0, in any unit: `config.unit_s`.
        previous: of the same workers; a worker that has less memory than before gives up its lightest instances.
    Returns: a plan with a higher version, or `previous` itself where neither instances nor shares change.
    Raises: InfeasiblePlacementError if the counts do not fit.
    """
    config = config or PlacementConfig()
    check_counts(counts_LE, cluster, model)
    check_load("work_LE", work_LE, counts_LE.shape)
    plan = _with_counts(counts_LE, work_LE, cluster, model, previous, spreads_singles=config.spreads_singles)
    share_N, work_LW = settled_shares(
        plan.layer_N, plan.expert_N, plan.worker_N, plan.share_N, work_LE, cluster.speed_W,
        tolerance=config.share_tolerance,
    )  # fmt: skip
    moved = _rebalanced(plan.with_shares(share_N), work_LE, work_LW, cluster, model, config)
    if previous is not None and moved.num_instances == previous.num_instances:
        same = np.array_equal(moved.keys_N, previous.keys_N) and np.array_equal(moved.share_N, previous.share_N)
        return previous if same else moved
    return moved


def _with_counts(
    counts_LE: IntArray,
    work_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    previous: Plan | None,
    *,
    spreads_singles: bool,
) -> Plan:
    """The previous plan with instances added and dropped; functions that changed have equal shares."""
    shape = (model.num_layers, model.num_experts, cluster.num_workers)
    kept: Plan | None = None
    if previous is not None:
        if (previous.num_layers, previous.num_experts, previous.num_workers) != shape:
            raise ConfigError(
                f"previous must be a plan of {shape} layers, experts and workers, got "
                f"{(previous.num_layers, previous.num_experts, previous.num_workers)}"
            )
        kept = _kept(previous, counts_LE, work_LE, cluster.capacity_W(model))
    kept_LE = np.zeros_like(counts_LE) if kept is None else kept.counts_LE
    if previous is not None and kept is previous and np.array_equal(kept_LE, counts_LE):
        return previous.with_version(previous.version + 1)
    has_LEW = np.zeros(shape, dtype=np.bool_)
    if kept is not None:
        has_LEW[kept.layer_N, kept.expert_N, kept.worker_N] = True
    heaviest_first(has_LEW, counts_LE - kept_LE, work_LE, cluster, model, spreads_singles=spreads_singles)
    before_keys: IntArray = np.empty(0, dtype=np.int64)
    before_shares: FloatArray = np.empty(0)
    if previous is not None:
        # Copies can be written to: compiled code is made for one kind of array.
        before_keys, before_shares = previous.keys_N.copy(), previous.share_N.copy()
    layer_N, expert_N, worker_N, share_N = _instances(
        has_LEW, int(np.count_nonzero(has_LEW)), before_keys, before_shares
    )
    return Plan(
        version=1 if previous is None else previous.version + 1,
        num_layers=shape[0],
        num_experts=shape[1],
        num_workers=shape[2],
        layer_N=layer_N,
        expert_N=expert_N,
        worker_N=worker_N,
        share_N=share_N,
    )


@compiled
def _instances(
    has_LEW: BoolArray, num_instances: int, before_keys: IntArray, before_shares: FloatArray
) -> tuple[IntArray, IntArray, IntArray, FloatArray]:
    """Layers, experts, workers and shares of what is placed. Unchanged functions keep their shares, from which
    splitting anew starts.

    Args:
        before_keys, before_shares: of the previous plan, in its order.
    """
    layer_N, expert_N = np.empty(num_instances, dtype=np.int64), np.empty(num_instances, dtype=np.int64)
    worker_N, share_N = np.empty(num_instances, dtype=np.int64), np.empty(num_instances)
    num_layers, num_experts, num_workers = has_LEW.shape
    n = before = 0
    for layer in range(num_layers):
        for expert in range(num_experts):
            start, start_before, first_key = n, before, (layer * num_experts + expert) * num_workers
            while before < len(before_keys) and before_keys[before] < first_key + num_workers:
                before += 1
            is_same = True
            for worker in range(num_workers):
                if not has_LEW[layer, expert, worker]:
                    continue
                place = start_before + n - start
                is_same = is_same and place < before and before_keys[place] == first_key + worker
                layer_N[n], expert_N[n], worker_N[n] = layer, expert, worker
                n += 1
            is_same = is_same and n - start == before - start_before
            for i in range(start, n):
                share_N[i] = before_shares[start_before + i - start] if is_same else 1.0 / (n - start)
    return layer_N, expert_N, worker_N, share_N


def _kept(previous: Plan, counts_LE: IntArray, work_LE: FloatArray, capacity_W: IntArray) -> Plan:
    """Those instances of the previous plan that may stay; itself if all may. Shares need not sum to 1."""
    surplus_LE = previous.counts_LE - counts_LE
    hosted_W = np.bincount(previous.worker_N, minlength=previous.num_workers)
    if (surplus_LE <= 0).all() and (hosted_W <= capacity_W).all():
        return previous
    keep_N = np.ones(previous.num_instances, dtype=np.bool_)
    surplus_N = surplus_LE[previous.layer_N, previous.expert_N]
    some = np.flatnonzero(surplus_N > 0)
    if len(some):
        function = previous.keys_N[some] // previous.num_workers
        order = np.lexsort((previous.worker_N[some], previous.share_N[some], function))
        starts = np.flatnonzero(np.diff(function[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        keep_N[some[order]] = rank >= surplus_N[some[order]]
    hosted_W = np.bincount(previous.worker_N[keep_N], minlength=previous.num_workers)
    for worker in np.flatnonzero(hosted_W > capacity_W).tolist():
        here = np.flatnonzero(keep_N & (previous.worker_N == worker))
        tokens = work_LE[previous.layer_N[here], previous.expert_N[here]] * previous.share_N[here]
        lightest = here[np.argsort(tokens, kind="stable")]
        keep_N[lightest[: hosted_W[worker] - capacity_W[worker]]] = False
    return replace(
        previous,
        layer_N=previous.layer_N[keep_N],
        expert_N=previous.expert_N[keep_N],
        worker_N=previous.worker_N[keep_N],
        share_N=previous.share_N[keep_N],
    )


def _rebalanced(
    plan: Plan, work_LE: FloatArray, work_LW: FloatArray, cluster: Cluster, model: ModelShape, config: PlacementConfig
) -> Plan:
    """The plan after at most `config.max_moves` moves, most needed layers first.

    Args:
        work_LW: what the workers compute under the plan.
    """
    if config.max_moves == 0:
        return plan
    speed_W = cluster.speed_W
    busy_L, balanced_L = busiest_L(work_LW, speed_W), ideal_L(work_LW, speed_W)
    excess_L = busy_L - config.max_imbalance * balanced_L
    transfers = TransferTimes.of(cluster, model)
    limits = MoveLimits(
        max_moves=config.max_moves,
        max_imbalance=config.max_imbalance,
        value_s=config.unit_s * config.horizon_steps,
        spreads_singles=config.spreads_singles,
    )
    # No more can be gained in a layer than its distance from balance.
    is_open_L = (excess_L > 0) & ((busy_L - balanced_L) * limits.value_s > transfers.min_s)
    if not is_open_L.any():
        return plan
    free_W = cluster.capacity_W(model) - np.bincount(plan.worker_N, minlength=cluster.num_workers)
    worker_N, share_N = plan.worker_N.copy(), plan.share_N.copy()
    left = config.max_moves
    bounds_L1 = np.searchsorted(plan.layer_N, np.arange(plan.num_layers + 1))
    open_layers = np.flatnonzero(is_open_L)
    for layer in open_layers[np.argsort(-excess_L[open_layers], kind="stable")].tolist():
        span = slice(bounds_L1[layer], bounds_L1[layer + 1])
        found = improve_layer(
            plan.expert_N[span], worker_N[span], share_N[span], work_LE[layer], free_W, speed_W,
            limits=replace(limits, max_moves=left), transfers=transfers,
        )  # fmt: skip
        if found.num_moves:
            free_W += np.bincount(worker_N[span], minlength=len(free_W))
            free_W -= np.bincount(found.worker_n, minlength=len(free_W))
            worker_N[span], share_N[span] = found.worker_n, found.share_n
        left -= found.num_moves
        if left == 0:
            break
    if left == config.max_moves:
        return plan
    return Plan.from_instances(
        version=plan.version,
        num_layers=plan.num_layers,
        num_experts=plan.num_experts,
        num_workers=plan.num_workers,
        layer_N=plan.layer_N,
        expert_N=plan.expert_N,
        worker_N=worker_N,
        share_N=share_N,
    )
