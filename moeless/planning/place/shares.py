"""Split each function's tokens over its instances so that the busiest worker's time is minimal.

Called by placing, the baselines' comparisons and the benchmarks. Pure.

The fast method gives one replicated function after the other the split that is best for it alone (water-filling of
its workers, heaviest function first) and goes round again until nothing moves. That is block coordinate descent on
the sum of load² / speed, whose minimum over fractional splits has also the least busiest worker (a lexicographically
optimal base: Fujishige 1980).

Shapes: L layers, E experts, W workers, N instances, F functions, G replicated ones with load.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.plan import Plan
from moeless.planning.load_check import check_load
from moeless_predictors.compiled import compiled

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
    work_LE: FloatArray,
    speed_W: FloatArray,
    *,
    start_N: FloatArray | None = None,
) -> FloatArray:
    """Near-optimal shares of every layer, shape (N,), fast: benchmarks/placement.py measures the gap to `exact_shares`.

    A function without load is split equally.

    Args:
        layer_N, expert_N, worker_N: instances in the order of a plan (layer, expert, worker).
        work_LE: tokens, >= 0.
        start_N: where to begin, shares that sum to 1 over each function; default: equal.
    """
    check_load("work_LE", work_LE, work_LE.shape)
    share_N = equal_shares(layer_N.astype(np.int64) * work_LE.shape[1] + expert_N) if start_N is None else start_N
    new_N, _ = settled_shares(layer_N, expert_N, worker_N, share_N, work_LE, speed_W, tolerance=-np.inf)  # all are new
    return new_N


def settled_shares(
    layer_N: IntArray,
    expert_N: IntArray,
    worker_N: IntArray,
    share_N: FloatArray,
    work_LE: FloatArray,
    speed_W: FloatArray,
    *,
    tolerance: float,
) -> tuple[FloatArray, FloatArray]:
    """Compute `min_max_shares`, but keep the present shares of layers that gain little.

    Args:
        share_N: where to begin; layers keep them where new ones relieve their busiest worker by at most `tolerance`, a
                        part of 1.
        Returns: the shares, and the tokens that the workers then compute of each layer, shape (L, W).
    """
    new_N, work_LW = share_N.astype(np.float64), np.zeros((len(work_LE), len(speed_W)))
    _settle_layers(
        np.array(layer_N, dtype=np.int64, order="C"),
        np.array(expert_N, dtype=np.int64, order="C"),
        np.array(worker_N, dtype=np.int64, order="C"),
        np.array(work_LE, dtype=np.float64, order="C"),
        np.array(speed_W, dtype=np.float64, order="C"),
        tolerance,
        new_N,
        work_LW,
    )
    return new_N, work_LW


@compiled
def _settle_layers(
    layer_N: IntArray,
    expert_N: IntArray,
    worker_N: IntArray,
    work_LE: FloatArray,
    speed_W: FloatArray,
    tolerance: float,
    share_N: FloatArray,
    work_LW: FloatArray,
) -> None:
    """Changes `share_N`, and `work_LW`, which is zero."""
    num_instances = len(layer_N)
    tokens_N = np.empty(num_instances)
    starts_F, count_F = np.empty(num_instances, dtype=np.int64), np.empty(num_instances, dtype=np.int64)
    load_F = np.empty(num_instances)
    n = 0
    while n < num_instances:
        begin, layer, num_replicated = n, layer_N[n], 0
        load_W = work_LW[layer]
        while n < num_instances and layer_N[n] == layer:
            start, load = n, work_LE[layer, expert_N[n]]
            while n < num_instances and layer_N[n] == layer and expert_N[n] == expert_N[start]:
                tokens_N[n] = share_N[n] * load
                load_W[worker_N[n]] += tokens_N[n]
                n += 1
            if n - start > 1 and load > 0:
                starts_F[num_replicated], count_F[num_replicated], load_F[num_replicated] = start, n - start, load
                num_replicated += 1
        if not num_replicated:
            continue
        heaviest_G = np.argsort(-load_F[:num_replicated], kind="mergesort")
        starts_G, count_G, load_G = starts_F[heaviest_G], count_F[heaviest_G], load_F[heaviest_G]
        before_W, before_n = load_W.copy(), share_N[begin:n].copy()
        descend(starts_G, count_G, load_G, worker_N, tokens_N, load_W, speed_W)
        for g in range(num_replicated):
            for i in range(starts_G[g], starts_G[g] + count_G[g]):
                share_N[i] = tokens_N[i] / load_G[g]
        load_W[:] = 0.0
        for i in range(begin, n):
            load_W[worker_N[i]] += share_N[i] * work_LE[layer, expert_N[i]]
        if (before_W / speed_W).max() * (1 - tolerance) <= (load_W / speed_W).max():
            share_N[begin:n], load_W[:] = before_n, before_W


@compiled
def descend(
    starts_G: IntArray,
    count_G: IntArray,
    load_G: FloatArray,
    worker_N: IntArray,
    tokens_N: FloatArray,
    load_W: FloatArray,
    speed_W: FloatArray,
) -> None:
    """Split the tokens of one layer's replicated functions anew, one after the other, until that changes little.

    Args:
        starts_G, count_G: each function's instances in `worker_N` and `tokens_N`, in the order in which they are split.
        tokens_N: of each instance, changed; `load_W`, all that a worker computes of the layer, follows.
    """
    settled = _SETTLED * load_W.sum() / len(load_W)
    most = count_G.max()
    level_c, order_c = np.empty(most), np.empty(most, dtype=np.int64)
    before_W = np.empty_like(load_W)
    for _ in range(_MAX_SWEEPS):
        before_W[:] = load_W
        for g in range(len(starts_G)):
            _fill(starts_G[g], count_G[g], load_G[g], worker_N, tokens_N, load_W, speed_W, level_c, order_c)
        if np.abs(load_W - before_W).max() <= settled:
            break


@compiled
def _fill(
    start: int,
    count: int,
    load: float,
    worker_N: IntArray,
    tokens_N: FloatArray,
    load_W: FloatArray,
    speed_W: FloatArray,
    level_c: FloatArray,
    order_c: IntArray,
) -> None:
    """Tokens of one function that bring all its workers that get any to one level of load / speed."""
    for c in range(count):
        worker = worker_N[start + c]
        load_W[worker] -= tokens_N[start + c]
        level_c[c] = load_W[worker] / speed_W[worker]
        place = c
        while place > 0 and level_c[order_c[place - 1]] > level_c[c]:
            order_c[place] = order_c[place - 1]
            place -= 1
        order_c[place] = c
    # The least busy workers join while the level they would be raised to is above their own.
    speed_sum = load_sum = level = 0.0
    for c in order_c[:count]:
        if speed_sum > 0 and level <= level_c[c]:
            break
        speed = speed_W[worker_N[start + c]]
        speed_sum += speed
        load_sum += level_c[c] * speed
        level = (load + load_sum) / speed_sum
    total = 0.0
    for c in range(count):
        given = max(level - level_c[c], 0.0) * speed_W[worker_N[start + c]]
        tokens_N[start + c] = given
        total += given
    if total <= 0:  # so few tokens that no level rises by them
        tokens_N[start + order_c[0]] = total = load
    for c in range(count):
        tokens_N[start + c] *= load / total
        load_W[worker_N[start + c]] += tokens_N[start + c]


def exact_shares(plan: Plan, work_LE: FloatArray, speed_W: FloatArray) -> FloatArray:
    """Optimal shares, shape (N,), by a linear programme for each layer: the reference, and for plans made offline."""
    check_load("work_LE", work_LE, (plan.num_layers, plan.num_experts))
    share_N = np.ones(plan.num_instances)
    for layer in range(plan.num_layers):
        index_N = np.flatnonzero(plan.layer_N == layer)
        if len(index_N):
            share_N[index_N] = _exact_layer(plan.expert_N[index_N], plan.worker_N[index_N], work_LE[layer], speed_W)
    return share_N


def _exact_layer(expert_N: IntArray, worker_N: IntArray, work_E: FloatArray, speed_W: FloatArray) -> FloatArray:
    experts_F, function_N = np.unique(expert_N, return_inverse=True)
    num_instances, num_workers = len(expert_N), len(speed_W)
    scale = max(float(work_E.sum()), 1e-300)
    index_N = np.arange(num_instances)
    # Variables: the shares, and last the level that no worker's load / speed may exceed.
    level_WV = coo_array(
        (
            np.concatenate([work_E[expert_N] / scale, -speed_W]),
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


def busiest_L(work_LW: NDArray[Any], speed_W: FloatArray) -> FloatArray:
    """Load / speed of each layer's busiest worker, shape (L,)."""
    times_L: FloatArray = (work_LW / speed_W).max(axis=1)
    return times_L


def ideal_L(work_LW: NDArray[Any], speed_W: FloatArray) -> FloatArray:
    """The same if the layer's load were spread perfectly, shape (L,)."""
    ideal: FloatArray = work_LW.sum(axis=1) / speed_W.sum()
    return ideal
