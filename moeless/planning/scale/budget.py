"""Required instances, and the order in which instances give way where the budget has no room for all.

Shapes: L MoE layers, E experts per layer, U instances that could give way.
"""

from __future__ import annotations

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.policy import ResolvedPolicy
from moeless.planning.observation import Observation
from moeless.planning.scale.replicas import Limits


def min_replicas(
    observation: Observation, policy: ResolvedPolicy, *, hosted_LE: IntArray, max_LE: IntArray, budget: int
) -> IntArray:
    """Instances that every function must have: the policy's least where it is needed, else none.

    A function is needed if tokens are forecast for it, if it has an instance and got a token within its keep-alive,
    or if the policy forbids zero. Where the budgets have no room, these give way one after the other: second and
    further instances, functions that are only kept alive (least recently used first), functions with the least load.

    Args:
        hosted_LE: present instances, starting ones included.
        max_LE: at least 1.
        budget: instances of all layers.
    """
    is_used_LE = (observation.mean_LE > 0) | (observation.upper_LE > 0)
    idle_s_LE = observation.time_s - observation.last_used_s_LE
    is_kept_LE = (hosted_LE > 0) & (idle_s_LE <= policy.keep_alive_s_LE)
    is_fixed_LE = ~policy.scale_to_zero_LE
    full_LE = np.minimum(policy.min_LE, max_LE)
    min_LE: IntArray = np.where(is_used_LE | is_kept_LE | is_fixed_LE, full_LE, 0)
    if not _is_over(min_LE, policy.layer_budget_L, budget).any():
        return min_LE

    # Instances in the order in which they stay: fixed, by load, by use, then those beyond the first.
    class_LE = np.where(is_fixed_LE, 0, np.where(is_used_LE, 1, 2))
    value_LE = np.where(class_LE == 1, observation.upper_LE, np.where(class_LE == 2, -idle_s_LE, 0.0))
    first_LE = np.where(is_fixed_LE, min_LE, np.minimum(min_LE, 1))
    order = np.lexsort((-value_LE.ravel(), class_LE.ravel()))
    kept_LE = _first_that_fit(first_LE, order, policy.layer_budget_L, budget)
    whole_LE: IntArray = np.where(kept_LE > 0, min_LE, 0)
    return fit_budgets(
        whole_LE,
        Limits(min_LE=kept_LE, max_LE=whole_LE, budget_L=policy.layer_budget_L),
        load_LE=observation.upper_LE,
        wanted_LE=kept_LE,
        budget=budget,
    )


def fit_budgets(
    counts_LE: IntArray, limits: Limits, *, load_LE: FloatArray, wanted_LE: IntArray, budget: int
) -> IntArray:
    """Take instances away until layers and model are within their budgets.

    First those beyond `wanted_LE`, which are only held for a while; of these and of the rest, first those whose loss
    raises the load per replica to the least.

    Args:
        counts_LE: from the limits' least to their most.
        budget: of all layers, with room for the limits' least.
    """
    if not _is_over(counts_LE, limits.budget_L, budget).any():
        return counts_LE
    num_LE = counts_LE - limits.min_LE
    layer_U, expert_U = np.nonzero(num_LE)
    repeats = num_LE[layer_U, expert_U]
    step_U = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    layer_U, expert_U = np.repeat(layer_U, repeats), np.repeat(expert_U, repeats)
    replicas_U = limits.min_LE[layer_U, expert_U] + step_U
    load_U = load_LE[layer_U, expert_U] / np.maximum(replicas_U, 1)
    order_U = np.lexsort((-load_U, replicas_U >= wanted_LE[layer_U, expert_U]))
    layer_U, expert_U = layer_U[order_U], expert_U[order_U]

    fits_U = _rank_in_layer(layer_U) < (limits.budget_L - limits.min_LE.sum(axis=1))[layer_U]
    fits_U &= np.cumsum(fits_U) <= budget - limits.min_LE.sum()
    fitted_LE = limits.min_LE.copy()
    np.add.at(fitted_LE, (layer_U[fits_U], expert_U[fits_U]), 1)
    return fitted_LE


def fit_workers(counts_LE: IntArray, load_LE: FloatArray, capacity_W: IntArray) -> IntArray:
    """Take replicas away until the instances can be placed on workers of different memory.

    A worker hosts a function once, so that what exceeds n instances of each function must fit all but the n workers
    with the most memory, for every n (the theorem of Gale and Ryser). First go those whose loss raises the load per
    replica to the least. Workers of equal memory take whatever is no more than their memory together.

    Args:
        counts_LE: at most as many of each function as there are workers, together no more than their memory.
        capacity_W: instances that fit each worker.
    """
    if (capacity_W == capacity_W[0]).all():
        return counts_LE
    fitted_LE, num_workers = counts_LE.copy(), len(capacity_W)
    room_W = np.concatenate(([0], np.cumsum(np.sort(capacity_W))))
    for num in range(num_workers - 1, 0, -1):
        surplus = int(np.maximum(fitted_LE - num, 0).sum() - room_W[num_workers - num])
        for _ in range(surplus):
            left_LE = np.where(fitted_LE > num, load_LE / np.maximum(fitted_LE - 1, 1), np.inf)
            fitted_LE.ravel()[np.argmin(left_LE)] -= 1
    return fitted_LE


def _is_over(counts_LE: IntArray, budget_L: IntArray, budget: int) -> BoolArray:
    return np.append(counts_LE.sum(axis=1) > budget_L, counts_LE.sum() > budget)


def _first_that_fit(num_LE: IntArray, order: IntArray, budget_L: IntArray, budget: int) -> IntArray:
    """Counts of the functions, given as flat indices in order of importance, that fit in the budgets."""
    kept = np.zeros(num_LE.size, dtype=np.int64)
    num, num_experts = num_LE.ravel(), num_LE.shape[1]
    left_L, left = budget_L.copy(), budget
    for index in order.tolist():
        layer = index // num_experts
        if 0 < num[index] <= min(left_L[layer], left):
            kept[index] = num[index]
            left_L[layer] -= num[index]
            left -= int(num[index])
    return kept.reshape(num_LE.shape)


def _rank_in_layer(layer_U: IntArray) -> IntArray:
    """Place of each among those of its layer, in the order given."""
    order_U = np.argsort(layer_U, kind="stable")
    sorted_U = layer_U[order_U]
    rank_U = np.empty(len(layer_U), dtype=np.int64)
    rank_U[order_U] = np.arange(len(layer_U)) - np.searchsorted(sorted_U, sorted_U)
    return rank_U
