"""Which share of a function's tokens each of its instances gets, so that the busiest worker is least busy.

Called by placing, the baselines' comparisons and the benchmarks. Pure.

The fast method gives one replicated function after the other the split that is best for it alone (water-filling of
its workers, heaviest function first) and goes round again until nothing moves. That is block coordinate descent on
the sum of load² / speed, whose minimum over fractional splits has also the least busiest worker (a lexicographically
optimal base: Fujishige 1980). Functions that share no worker are filled in one go, in all layers at once.

Shapes: L layers, E experts, W workers, N instances, G replicated functions, C most instances of one, R of a round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moeless.core.plan import FloatArray, IntArray, Plan

_MAX_SWEEPS = 12
_SETTLED = 1e-2
"""Stop once no worker's load changes by more than this part of its layer's mean."""


def equal_shares(function_N: IntArray) -> FloatArray:
    """Every instance of a function gets the same. `function_N` names the function of each instance by any integer."""
    _, which_N, count_F = np.unique(function_N, return_inverse=True, return_counts=True)
    shares_N: FloatArray = 1.0 / count_F[which_N]
    return shares_N


def min_max_shares(
    layer_N: IntArray,
    expert_N: IntArray,
    worker_N: IntArray,
    load_LE: FloatArray,
    speed_W: FloatArray,
    *,
    start_N: FloatArray | None = None,
) -> FloatArray:
    """Near-optimal shares, shape (N,), fast: benchmarks/placement.py tells the gap to `exact_shares`.

    A function without load is split equally.

    Args:
        layer_N, expert_N, worker_N: instances in the order of a plan (layer, expert, worker).
        load_LE: tokens, >= 0.
        start_N: where to begin, shares that sum to 1 over each function; default: equal.
    """
    num_workers, num_experts = len(speed_W), load_LE.shape[1]
    function_N = layer_N.astype(np.int64) * num_experts + expert_N
    starts_F = np.flatnonzero(np.diff(function_N, prepend=-1))
    count_F = np.diff(starts_F, append=len(function_N))
    load_F = load_LE.reshape(-1)[function_N[starts_F]]
    share_N = np.repeat(1.0 / count_F, count_F) if start_N is None else start_N.astype(np.float64)
    replicated = np.flatnonzero((count_F > 1) & (load_F > 0))
    if not len(replicated):
        return share_N
    slot_N = layer_N.astype(np.int64) * num_workers + worker_N
    num_slots = load_LE.shape[0] * num_workers
    tokens_N = share_N * np.repeat(load_F, count_F)
    # One slot more, into which the padding of functions with fewer instances points.
    load_S = np.bincount(slot_N, weights=tokens_N, minlength=num_slots + 1)
    mean_L = load_S[:num_slots].reshape(-1, num_workers).mean(axis=1)
    settled_S = np.append(np.repeat(np.maximum(mean_L, 1e-300), num_workers), np.inf) * _SETTLED
    replicated = replicated[np.argsort(-load_F[replicated], kind="stable")]
    offset_C = np.arange(count_F[replicated].max())
    real_GC = offset_C < count_F[replicated][:, np.newaxis]
    index_GC = np.where(real_GC, starts_F[replicated][:, np.newaxis] + offset_C, 0)
    slot_GC = np.where(real_GC, slot_N[index_GC], num_slots)
    tokens_GC = np.where(real_GC, tokens_N[index_GC], 0.0)
    speed_GC = np.where(real_GC, np.append(np.tile(speed_W, load_LE.shape[0]), 1.0)[slot_GC], 1.0)
    load_G = load_F[replicated]
    rounds = [(rows, slot_GC[rows], real_GC[rows], speed_GC[rows], load_G[rows]) for rows in _rounds(slot_GC, real_GC)]
    for _ in range(_MAX_SWEEPS):
        before_S = load_S.copy()
        for rows, slot_RC, real_RC, speed_RC, load_R in rounds:
            others_RC = load_S[slot_RC] - tokens_GC[rows]
            filled_RC = _fill(np.where(real_RC, others_RC, np.inf), speed_RC, load_R)
            tokens_GC[rows] = filled_RC
            load_S[slot_RC] = others_RC + filled_RC
        if (np.abs(load_S - before_S) <= settled_S).all():
            break
    share_N[index_GC[real_GC]] = (tokens_GC / load_G[:, np.newaxis])[real_GC]
    return share_N


def _rounds(slot_GC: IntArray, real_GC: NDArray[np.bool_]) -> list[IntArray]:
    """Rows in which no slot occurs twice; of two that share a slot the earlier row comes in an earlier round."""
    left_R = np.arange(len(slot_GC))
    rounds = []
    first_S = np.empty(int(slot_GC.max()) + 1, dtype=np.int64)
    while len(left_R):
        slot_RC, real_RC = slot_GC[left_R], real_GC[left_R]
        # Assigned backwards, so that the earliest row's number stays.
        first_S[slot_RC[::-1].reshape(-1)] = np.repeat(left_R[::-1], slot_RC.shape[1])
        is_first_R = ((first_S[slot_RC] == left_R[:, np.newaxis]) | ~real_RC).all(axis=1)
        rounds.append(left_R[is_first_R])
        left_R = left_R[~is_first_R]
    return rounds


def _fill(others_RC: FloatArray, speed_RC: FloatArray, load_R: FloatArray) -> FloatArray:
    """Tokens for each worker that bring all that get any to one level of load / speed; inf: no worker there."""
    if others_RC.shape[1] == 2:
        first_R, second_R = others_RC[:, 0], others_RC[:, 1]
        share_R = speed_RC[:, 0] / speed_RC.sum(axis=1)
        tokens_R = np.clip((load_R + first_R + second_R) * share_R - first_R, 0.0, load_R)
        return np.stack([tokens_R, load_R - tokens_R], axis=1)
    level_RC = others_RC / speed_RC
    order_RC = np.argsort(level_RC, axis=1, kind="stable")
    sorted_RC = np.take_along_axis(level_RC, order_RC, axis=1)
    speed_sorted_RC = np.take_along_axis(speed_RC, order_RC, axis=1)
    speed_sum_RC = np.cumsum(speed_sorted_RC, axis=1)
    load_sum_RC = np.cumsum(np.where(np.isfinite(sorted_RC), sorted_RC * speed_sorted_RC, np.inf), axis=1)
    reached_RC = (load_R[:, np.newaxis] + load_sum_RC) / speed_sum_RC
    # The least busy workers join while the level they would be raised to is above their own.
    joined_R = np.maximum((reached_RC > sorted_RC).sum(axis=1) - 1, 0)
    level_R1 = np.take_along_axis(reached_RC, joined_R[:, np.newaxis], axis=1)
    tokens_RC = np.maximum(level_R1 - level_RC, 0.0) * speed_RC
    tokens_RC *= (load_R / tokens_RC.sum(axis=1))[:, np.newaxis]
    return tokens_RC


def exact_shares(plan: Plan, load_LE: FloatArray, speed_W: FloatArray) -> FloatArray:
    """Optimal shares, shape (N,), by a linear programme for each layer: the reference, and for plans made offline."""
    share_N = np.ones(plan.num_instances)
    for layer in range(plan.num_layers):
        index_N = np.flatnonzero(plan.layer_N == layer)
        if len(index_N):
            share_N[index_N] = _exact_layer(plan.expert_N[index_N], plan.worker_N[index_N], load_LE[layer], speed_W)
    return share_N


def _exact_layer(expert_N: IntArray, worker_N: IntArray, load_E: FloatArray, speed_W: FloatArray) -> FloatArray:
    experts_F, function_N = np.unique(expert_N, return_inverse=True)
    num_instances, num_workers = len(expert_N), len(speed_W)
    scale = max(float(load_E.sum()), 1e-300)
    index_N = np.arange(num_instances)
    # Variables: the shares, and last the level that no worker's load / speed may exceed.
    level_WV = coo_array(
        (
            np.concatenate([load_E[expert_N] / scale, -speed_W]),
            (np.concatenate([worker_N, np.arange(num_workers)]), np.append(index_N, [num_instances] * num_workers)),
        ),
        shape=(num_workers, num_instances + 1),
    )
    sum_FV = coo_array((np.ones(num_instances), (function_N, index_N)), shape=(len(experts_F), num_instances + 1))
    cost_V = np.append(np.zeros(num_instances), 1.0)
    result = linprog(
        cost_V,
        A_ub=level_WV.tocsr(),
        b_ub=np.zeros(num_workers),
        A_eq=sum_FV.tocsr(),
        b_eq=np.ones(len(experts_F)),
        method="highs",
    )
    assert result.success, result.message  # equal shares are feasible, and a level above zero bounds it
    share_N = np.maximum(result.x[:-1], 0.0)
    totals_F = np.bincount(function_N, weights=share_N)
    normal_N: FloatArray = share_N / totals_F[function_N]
    return normal_N


def busiest_L(load_LW: NDArray[Any], speed_W: FloatArray) -> FloatArray:
    """Load / speed of each layer's busiest worker, shape (L,)."""
    times_L: FloatArray = (load_LW / speed_W).max(axis=1)
    return times_L


def ideal_L(load_LW: NDArray[Any], speed_W: FloatArray) -> FloatArray:
    """The same if the layer's load were spread perfectly, shape (L,)."""
    ideal: FloatArray = load_LW.sum(axis=1) / speed_W.sum()
    return ideal
