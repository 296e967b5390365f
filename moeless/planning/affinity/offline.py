"""Plans made offline with integer programmes: how good a placement can be, and one that is.

Called by benchmarks and who plans offline. Starts from a plan, best that of the local search: what is found is never
worse, and a good start lets the solver leave out most of what there is to look at.

Shapes: L layers, E experts, W workers, n instances of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.expert import FunctionId
from moeless.core.plan import Plan
from moeless.planning.affinity.groups import are_alike, min_workers_by_groups, num_groups
from moeless.planning.affinity.metrics import checked_shares, workers_touched_L
from moeless.planning.affinity.online import AffinityConfig, layer_bounds, layer_spans, moved_plan
from moeless.planning.affinity.programme import SolverLimits, min_hops_beside, min_workers
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import AffinityStatistics


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgrammeConfig:
    """Choice and limits of the integer programmes. Objective and bounds are those of AffinityConfig."""

    limits: SolverLimits = field(default_factory=SolverLimits)
    """For each layer."""
    max_groups: int = 300_000
    """Number of groups of experts up to which a layer is solved by groups; others are solved by sets."""
    max_sets: int | None = 200
    """Number of the most frequent sets that the programme by sets takes. None: all."""
    max_sweeps: int = 6
    """Hops: how often to go over the layers, forwards and back."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("max_groups", self.max_groups, 0),
            ("max_sets", self.max_sets, 1),
            ("max_sweeps", self.max_sweeps, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"programme.{name} must be at least {least}, got {value}")


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class OptimalPlan:
    """A plan, and what was proved of it."""

    plan: Plan
    bound_L: FloatArray | None
    """Workers touched by a token in each layer: no placement within the bounds has fewer; of layers that are
    kept, what they have. None for hops: each layer is optimal given its neighbours, but all together need not be."""
    gap: float
    """Workers: the largest gap of a layer between the plan and what is proved. Hops: of the last programme of a layer,
    between what it found and the optimum beside the layer's neighbours, in pairs kept."""


def min_workers_plan(
    start: Plan,
    statistics: AffinityStatistics,
    load_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    *,
    affinity: AffinityConfig,
    config: ProgrammeConfig | None = None,
    bounds: Sequence[LayerBounds] | None = None,
    keeps_replicated: bool = False,
) -> OptimalPlan:
    """Fewest workers touched, layer by layer. Of `affinity`, max_imbalance and max_instances count.

    Workers that are alike are named so that as many instances as can be stay where `start` has them.

    Args:
        bounds: of each layer, in place of those that follow from `start` and `affinity`; `start` must keep to them.
        keeps_replicated: layers in which a function has several instances, or none, stay as they are.
    Raises: ConfigError if a function has several instances: their product makes the programme quadratic.
    """
    config = config or ProgrammeConfig()
    checked_shares(start, statistics)
    counts_LE = start.counts_LE
    is_single_L = (counts_LE == 1).all(axis=1)
    if not keeps_replicated and not is_single_L.all():
        layer, expert = np.argwhere(counts_LE != 1)[0]
        raise ConfigError(
            f"start must have one instance of every function, got {counts_LE[layer, expert]} of "
            f"{FunctionId(int(layer), int(expert))}"
        )
    cost_L = workers_touched_L(start, statistics)
    worker_N, spans = start.worker_N.copy(), layer_spans(start)
    bound_L = cost_L.copy()
    for layer, given in enumerate(bounds or layer_bounds(start, load_LE, cluster.speed_W, affinity)):
        if not is_single_L[layer]:
            continue
        worker_E = worker_N[spans[layer]]
        spare_W = cluster.capacity_W(model) - np.bincount(worker_N, minlength=start.num_workers)
        within = _within_memory(given, worker_E, spare_W)
        sets = statistics.sets[layer]
        if are_alike(within) and num_groups(start.num_experts, within) <= config.max_groups:
            solved = min_workers_by_groups(
                sets, within, known_cost=float(cost_L[layer]), time_limit_s=config.limits.time_limit_s,
                gap=config.limits.gap,
            )  # fmt: skip
        else:
            solved = min_workers(sets, within, limits=config.limits, max_sets=config.max_sets)
        bound_L[layer] = min(solved.bound, cost_L[layer])
        if solved.worker_n is not None and solved.cost < cost_L[layer] - 1e-9:
            named_E = _named_alike(solved.worker_n, worker_E, start.num_workers)
            worker_N[spans[layer]] = named_E if are_alike(within) else solved.worker_n
            cost_L[layer] = solved.cost
    gap = float((cost_L / np.maximum(bound_L, 1e-12) - 1).max())
    return OptimalPlan(plan=moved_plan(start, worker_N), bound_L=bound_L, gap=max(gap, 0.0))


def min_hops_plan(
    start: Plan,
    statistics: AffinityStatistics,
    load_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    *,
    affinity: AffinityConfig,
    config: ProgrammeConfig | None = None,
    bounds: Sequence[LayerBounds] | None = None,
) -> OptimalPlan:
    """Fewest hops, each layer optimal given its neighbours, until no layer gets better. Replicas keep their shares.

    Args: bounds: as in `min_workers_plan`.
    """
    config = config or ProgrammeConfig()
    checked_shares(start, statistics)
    spans = layer_spans(start)
    given = bounds or layer_bounds(start, load_LE, cluster.speed_W, affinity)
    _, shares_LEW = start.dense()
    worker_N = start.worker_N.copy()
    gaps = np.zeros(start.num_layers)
    for sweep in range(config.max_sweeps):
        before_N = worker_N.copy()
        layers = range(start.num_layers)
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            span = spans[layer]
            expert_n, share_n = start.expert_N[span], start.share_N[span]
            kept_EW = np.zeros(shares_LEW.shape[1:])
            if layer > 0:
                kept_EW += statistics.transitions_LEE[layer - 1].T @ shares_LEW[layer - 1]
            if layer + 1 < start.num_layers:
                kept_EW += statistics.transitions_LEE[layer] @ shares_LEW[layer + 1]
            spare_W = cluster.capacity_W(model) - np.bincount(worker_N, minlength=start.num_workers)
            within = _within_memory(given[layer], worker_N[span], spare_W)
            solved = min_hops_beside(kept_EW, expert_n, share_n, within, limits=config.limits)
            cost = -float((share_n * kept_EW[expert_n, worker_N[span]]).sum())
            if solved.worker_n is not None and solved.cost < cost - 1e-9:
                worker_N[span] = solved.worker_n
                shares_LEW[layer] = 0.0
                shares_LEW[layer, expert_n, solved.worker_n] = share_n
                cost = solved.cost
            gaps[layer] = replace(solved, cost=cost).gap
        if np.array_equal(before_N, worker_N):
            break
    return OptimalPlan(plan=moved_plan(start, worker_N), bound_L=None, gap=float(gaps.max(initial=0.0)))


def _within_memory(bounds: LayerBounds, worker_n: IntArray, spare_W: IntArray) -> LayerBounds:
    """The bounds, and no more instances than memory is left for."""
    hosted_W = np.bincount(worker_n, minlength=len(spare_W))
    return replace(bounds, max_instances_W=np.minimum(bounds.max_instances_W, hosted_W + spare_W))


def _named_alike(worker_n: IntArray, before_n: IntArray, num_workers: int) -> IntArray:
    """The same groups of instances, on workers so named that most stay where they were."""
    same_WW = np.zeros((num_workers, num_workers))
    np.add.at(same_WW, (worker_n, before_n), 1)
    _, name_W = linear_sum_assignment(-same_WW)
    named_n: IntArray = name_W[worker_n]
    return named_n
