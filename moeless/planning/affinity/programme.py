"""Integer programmes of affinity-aware placement, solved with HiGHS (scipy.optimize.milp), for plans made offline.

- `min_workers`: a layer whose experts are hosted once each, by a variable for each set and worker: touched[u, w] ≥
  x[e, w] for every expert e of set u. Works for workers that differ; affinity.groups proves more where they do not.
- `min_hops_beside`: a layer given its neighbours: a generalised assignment, which is solved fast. MoETuner (arXiv
  2502.06643) goes so from layer to layer.
- `min_hops`: all layers at once, the quadratic objective of ExFlow (arXiv 2401.08383) linearised: both[e, f, w] ≤
  x[e, w] and ≤ y[f, w]. For small cases.

Where workers are alike, expert e of the (first) layer may only be on workers 0 to e, which leaves one of each kind of
solutions that differ in the workers' names alone.

Shapes: L layers, E experts, W workers, U distinct sets, n instances, V variables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, eye_array, hstack, kron

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.planning.affinity.groups import Solved, are_alike
from moeless.planning.affinity.metrics import hops, touched
from moeless.planning.affinity.search import LayerBounds
from moeless.planning.affinity.statistics import ExpertSets


@dataclass(frozen=True, kw_only=True, slots=True)
class SolverLimits:
    """Limits at which HiGHS stops."""

    time_limit_s: float = 60.0
    """For one programme."""
    gap: float = 0.0
    """Stop once what is found is proved to lie at most this share above the optimum."""

    def __post_init__(self) -> None:
        if not self.time_limit_s > 0:
            raise ConfigError(f"solver.time_limit_s must be above 0, got {self.time_limit_s}")
        if not self.gap >= 0:
            raise ConfigError(f"solver.gap must be at least 0, got {self.gap}")


def min_workers(
    sets: ExpertSets, bounds: LayerBounds, *, limits: SolverLimits | None = None, max_sets: int | None = None
) -> Solved:
    """A placement of a layer's experts, each once, on workers of any kind.

    Args:
        max_sets: number of the heaviest sets to take; a token of another set counts as touching one worker. The cost
            returned is that of all sets, and the bound holds for all.
    """
    limits = limits or SolverLimits()
    num_experts, num_workers = len(bounds.load_E), len(bounds.max_load_W)
    heaviest = np.sort(np.argsort(-sets.weight_U, kind="stable")[:max_sets])
    experts_Uk, weight_U = sets.experts_Uk[heaviest], sets.weight_U[heaviest]
    num_sets, top_k = experts_Uk.shape
    # Row (u, j, w): touched[u, w] − x[experts_Uk[u, j], w] ≥ 0.
    touched_rows = kron(eye_array(num_sets), np.ones((top_k, 1)))
    chosen = coo_array(
        (np.ones(num_sets * top_k), (np.arange(num_sets * top_k), experts_Uk.reshape(-1))),
        shape=(num_sets * top_k, num_experts),
    )
    links = hstack([-kron(chosen, eye_array(num_workers)), kron(touched_rows, eye_array(num_workers))])
    num_free = num_sets * num_workers
    placing = _placing_rows(np.arange(num_experts), bounds.load_E, bounds)
    result = milp(
        np.concatenate([np.zeros(num_experts * num_workers), np.repeat(weight_U, num_workers)]),
        integrality=np.concatenate([np.ones(num_experts * num_workers), np.zeros(num_free)]),
        bounds=Bounds(0, np.concatenate([_allowed(num_experts, bounds), np.ones(num_free)])),
        constraints=[
            LinearConstraint(links.tocsr(), 0, np.inf),
            *(
                LinearConstraint(hstack([a, coo_array((a.shape[0], num_free))]).tocsr(), lo, hi)
                for a, lo, hi in placing
            ),
        ],
        options={"time_limit": limits.time_limit_s, "mip_rel_gap": limits.gap},
    )
    left_out = float(sets.weight_U.sum() - weight_U.sum())
    bound = left_out + (float(weight_U.sum()) if result.mip_dual_bound is None else float(result.mip_dual_bound))
    if result.x is None:
        return Solved(worker_n=None, cost=np.inf, bound=np.inf if result.status == 2 else bound)
    worker_n = _workers(result.x, num_experts, num_workers)
    cost = touched(_dense(np.arange(num_experts), worker_n, np.ones(num_experts), num_experts, num_workers), sets)
    return Solved(worker_n=worker_n, cost=cost, bound=min(bound, cost))


def min_hops_beside(
    kept_EW: FloatArray,
    expert_n: IntArray,
    share_n: FloatArray,
    bounds: LayerBounds,
    *,
    limits: SolverLimits | None = None,
) -> Solved:
    """A placement of a layer's instances, given how many pairs each expert keeps on each worker.

    Its cost is minus the pairs kept.
    """
    limits = limits or SolverLimits()
    num_workers = len(bounds.max_load_W)
    gain_nW = share_n[:, np.newaxis] * kept_EW[expert_n]
    result = milp(
        -gain_nW.reshape(-1),
        integrality=np.ones(gain_nW.size),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(a.tocsr(), lo, hi)
            for a, lo, hi in _placing_rows(expert_n, bounds.load_E[expert_n] * share_n, bounds)
        ],
        options={"time_limit": limits.time_limit_s, "mip_rel_gap": limits.gap},
    )
    bound = -float(gain_nW.max(axis=1).sum()) if result.mip_dual_bound is None else float(result.mip_dual_bound)
    if result.x is None:
        return Solved(worker_n=None, cost=np.inf, bound=np.inf if result.status == 2 else bound)
    worker_n = _workers(result.x, len(expert_n), num_workers)
    cost = -float(gain_nW[np.arange(len(expert_n)), worker_n].sum())
    return Solved(worker_n=worker_n, cost=cost, bound=min(bound, cost))


def min_hops(transitions_LEE: FloatArray, bounds: list[LayerBounds], *, limits: SolverLimits | None = None) -> Solved:
    """A placement of all layers' experts, each once; `worker_n` is layer after layer, the cost the sum of hops."""
    limits = limits or SolverLimits()
    num_layers, num_experts, num_workers = len(bounds), len(bounds[0].load_E), len(bounds[0].max_load_W)
    per_layer = num_experts * num_workers
    num_placing = num_layers * per_layer
    layer_P, before_P, after_P = np.nonzero(transitions_LEE)
    num_pairs = len(layer_P)
    workers = np.arange(num_workers)
    both_PW = num_placing + np.arange(num_pairs)[:, np.newaxis] * num_workers + workers
    rows, columns, values = [], [], []
    for half, (offset, expert_P) in enumerate(((0, before_P), (1, after_P))):
        row_PW = half * num_pairs * num_workers + (both_PW - num_placing)
        x_PW = (layer_P + offset)[:, np.newaxis] * per_layer + expert_P[:, np.newaxis] * num_workers + workers
        rows += [row_PW.reshape(-1)] * 2
        columns += [both_PW.reshape(-1), x_PW.reshape(-1)]
        values += [np.ones(row_PW.size), -np.ones(row_PW.size)]
    num_variables = num_placing + num_pairs * num_workers
    links = coo_array(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
        shape=(2 * num_pairs * num_workers, num_variables),
    )
    constraints = [LinearConstraint(links.tocsr(), -np.inf, 0)]
    for layer, layer_bounds in enumerate(bounds):
        select = coo_array(
            (np.ones(per_layer), (np.arange(per_layer), layer * per_layer + np.arange(per_layer))),
            shape=(per_layer, num_variables),
        )
        for a, lo, hi in _placing_rows(np.arange(num_experts), layer_bounds.load_E, layer_bounds):
            constraints.append(LinearConstraint((a @ select).tocsr(), lo, hi))
    first = _allowed(num_experts, bounds[0]) if all(map(are_alike, bounds)) else np.ones(per_layer)
    result = milp(
        np.concatenate([np.zeros(num_placing), -np.repeat(transitions_LEE[layer_P, before_P, after_P], num_workers)]),
        integrality=np.concatenate([np.ones(num_placing), np.zeros(num_variables - num_placing)]),
        bounds=Bounds(0, np.concatenate([first, np.ones(num_variables - per_layer)])),
        constraints=constraints,
        options={"time_limit": limits.time_limit_s, "mip_rel_gap": limits.gap},
    )
    total = float(transitions_LEE.sum())
    bound = 0.0 if result.mip_dual_bound is None else max(0.0, total + float(result.mip_dual_bound))
    if result.x is None:
        return Solved(worker_n=None, cost=np.inf, bound=np.inf if result.status == 2 else bound)
    worker_n = _workers(result.x[:num_placing], num_layers * num_experts, num_workers)
    expert_n, share_n = np.arange(num_experts), np.ones(num_experts)
    shares = [
        _dense(expert_n, workers_E, share_n, num_experts, num_workers)
        for workers_E in worker_n.reshape(num_layers, num_experts)
    ]
    cost = sum(hops(one, after, t) for one, after, t in zip(shares, shares[1:], transitions_LEE, strict=False))
    return Solved(worker_n=worker_n, cost=cost, bound=min(bound, cost))


def _placing_rows(
    expert_n: IntArray, tokens_n: FloatArray, bounds: LayerBounds
) -> list[tuple[coo_array, FloatArray | float, FloatArray | float]]:
    """Rows over x[n, w]: each instance on one worker, workers within their bounds, no expert twice on a worker."""
    num_workers = len(bounds.max_load_W)
    slack = 1e-9 * float(bounds.load_E.sum())
    each = eye_array(num_workers)
    rows: list[tuple[coo_array, FloatArray | float, FloatArray | float]] = [
        (kron(eye_array(len(expert_n)), np.ones((1, num_workers))), 1.0, 1.0),
        (kron(np.ones((1, len(expert_n))), each), -np.inf, bounds.max_instances_W.astype(np.float64)),
        (kron(tokens_n[np.newaxis], each), -np.inf, bounds.max_load_W + slack),
    ]
    experts_F, which_n, count_F = np.unique(expert_n, return_inverse=True, return_counts=True)
    if (count_F > 1).any():
        is_of_Fn = coo_array(
            (np.ones(len(expert_n)), (which_n, np.arange(len(expert_n)))), shape=(len(experts_F), len(expert_n))
        )
        rows.append((kron(is_of_Fn, each), -np.inf, 1.0))
    return rows


def _allowed(num_experts: int, bounds: LayerBounds) -> FloatArray:
    """Upper bounds of x[e, w]: with workers that are alike, expert e is on one of the first e + 1."""
    num_workers = len(bounds.max_load_W)
    allowed_EW = np.ones((num_experts, num_workers))
    if are_alike(bounds):
        allowed_EW = np.tril(allowed_EW)
    return allowed_EW.reshape(-1)


def _workers(x_V: FloatArray, num_instances: int, num_workers: int) -> IntArray:
    worker_n: IntArray = np.argmax(x_V[: num_instances * num_workers].reshape(num_instances, num_workers), axis=1)
    return worker_n


def _dense(
    expert_n: IntArray, worker_n: IntArray, share_n: FloatArray, num_experts: int, num_workers: int
) -> FloatArray:
    shares_EW = np.zeros((num_experts, num_workers))
    shares_EW[expert_n, worker_n] = share_n
    return shares_EW
