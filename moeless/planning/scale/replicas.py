"""Replicas one after the other to the highest load per replica.

An expert with load x and r replicas has x / r tokens on each. Whoever gives each extra replica to the expert where
that is highest walks down the sorted list of all x / r. Ties go to the expert with the lower index.

Shapes: L MoE layers, E experts per layer, X extra replicas of all layers, layer by layer.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.errors import ConfigError
from moeless.planning.load_check import check_load
from moeless_predictors.compiled import compiled


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Limits:
    """Bounds of the replica counts."""

    min_LE: IntArray
    """At least 1 for functions with load."""
    max_LE: IntArray
    budget_L: IntArray
    """Instances of each layer."""

    def __post_init__(self) -> None:
        if (self.min_LE < 0).any() or (self.min_LE > self.max_LE).any():
            raise ConfigError("limits.min_LE must be from 0 to max_LE for every function")
        wrong = np.flatnonzero(self.min_LE.sum(axis=1) > self.budget_L)
        if len(wrong):
            raise ConfigError(
                f"limits.budget_L must have room for the least of every layer, got {self.budget_L[wrong[0]]} for the "
                f"{self.min_LE[wrong[0]].sum()} of layer {wrong[0]}"
            )

    def rows(self, layers: IntArray) -> Limits:
        """Return the limits of some layers."""
        return Limits(min_LE=self.min_LE[layers], max_LE=self.max_LE[layers], budget_L=self.budget_L[layers])


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Extras:
    """Extra replicas in the order in which they are given, layer by layer."""

    layer_X: IntArray
    expert_X: IntArray
    replicas_X: IntArray
    """Replicas that the expert has before this one."""
    load_X: FloatArray
    """Load of each of those; it decides the order."""
    rank_X: IntArray
    """Place in the order of the layer, from 0."""
    start_L: IntArray
    """Index at which each layer begins."""

    def counts_LE(self, min_LE: IntArray, given_X: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> IntArray:
        """Add the given extras to the minimal counts."""
        num_layers, num_experts = min_LE.shape
        index_X = self.layer_X[given_X] * num_experts + self.expert_X[given_X]
        extra = np.bincount(index_X, minlength=num_layers * num_experts)
        counts_LE: IntArray = min_LE + extra.reshape(min_LE.shape)
        return counts_LE


def extras_in_order(load_LE: FloatArray, limits: Limits, *, room_L: IntArray, enough_L: FloatArray) -> Extras:
    """The first `room_L` extras of each layer, as far as they relieve replicas with more than `enough_L`.

    Raises: ConfigError if a function has load and may have no instance at all.
    """
    if ((load_LE > 0) & (limits.min_LE < 1)).any():
        raise ConfigError("limits.min_LE must be at least 1 for functions with load")
    layer_X, expert_X, replicas_X, load_X, start_L1 = _walk(
        np.ascontiguousarray(load_LE, dtype=np.float64),
        np.ascontiguousarray(limits.min_LE, dtype=np.int64),
        np.ascontiguousarray(limits.max_LE, dtype=np.int64),
        np.ascontiguousarray(room_L, dtype=np.int64),
        np.ascontiguousarray(enough_L, dtype=np.float64),
    )
    return Extras(
        layer_X=layer_X,
        expert_X=expert_X,
        replicas_X=replicas_X,
        load_X=load_X,
        rank_X=np.arange(len(layer_X)) - start_L1[layer_X],
        start_L=start_L1[:-1],
    )


@compiled
def _walk(
    load_LE: FloatArray, min_LE: IntArray, max_LE: IntArray, room_L: IntArray, enough_L: FloatArray
) -> tuple[IntArray, IntArray, IntArray, FloatArray, IntArray]:
    """The extras' layers, experts, replicas before and loads on each of those, and where layers begin and end."""
    num_layers, num_experts = load_LE.shape
    size, num = 1024, 0
    whole_XC, load_X = np.empty((size, 3), dtype=np.int64), np.empty(size)
    start_L1 = np.zeros(num_layers + 1, dtype=np.int64)
    for layer in range(num_layers):
        replicas_E, max_E = min_LE[layer].copy(), max_LE[layer]
        heap = [
            (-load_LE[layer, expert] / replicas_E[expert], expert)
            for expert in range(num_experts)
            if load_LE[layer, expert] > 0 and replicas_E[expert] < max_E[expert]
        ]
        heapq.heapify(heap)
        for _ in range(room_L[layer]):
            if not heap or -heap[0][0] <= enough_L[layer]:
                break
            load, expert = -heap[0][0], heap[0][1]
            if num == size:
                whole_XC, load_X = np.concatenate((whole_XC, whole_XC)), np.concatenate((load_X, load_X))
                size *= 2
            whole_XC[num, 0], whole_XC[num, 1], whole_XC[num, 2] = layer, expert, replicas_E[expert]
            load_X[num] = load
            num += 1
            replicas_E[expert] += 1
            if replicas_E[expert] < max_E[expert]:
                heapq.heapreplace(heap, (-load_LE[layer, expert] / replicas_E[expert], expert))
            else:
                heapq.heappop(heap)
        start_L1[layer + 1] = num
    return whole_XC[:num, 0].copy(), whole_XC[:num, 1].copy(), whole_XC[:num, 2].copy(), load_X[:num].copy(), start_L1


def replicas_by_cv(load_LE: FloatArray, limits: Limits, *, max_cv_L: FloatArray) -> IntArray:
    """Give each extra replica to the highest load per replica until these vary little, or the budget is spent.

    Args:
        load_LE: predicted tokens per step, shape (L, E), >= 0.
        max_cv_L: coefficient of variation at which a layer has enough. Replicas of functions without load do not
            count in it: more of the others could never make up for them.
    Returns: counts, shape (L, E).
    Source: MoEless (arXiv 2603.06350), expert scaling; there one V for all layers.
    """
    check_load("load_LE", load_LE, limits.min_LE.shape)
    load_LE = load_LE.astype(np.float64)
    counts_LE = limits.min_LE.copy()
    is_open_LE = load_LE > 0
    room_L = np.minimum(
        limits.budget_L - limits.min_LE.sum(axis=1), ((limits.max_LE - limits.min_LE) * is_open_LE).sum(axis=1)
    )
    left_L = np.flatnonzero(is_open_LE.any(axis=1) & (room_L > 0))
    depth = load_LE.shape[1]
    while len(left_L):
        tried_L = np.minimum(room_L[left_L], depth)
        counts, is_even = _first_even(load_LE[left_L], limits.rows(left_L), tried_L, max_cv_L[left_L])
        counts_LE[left_L] = counts
        left_L = left_L[~is_even & (tried_L < room_L[left_L])]
        depth *= 4
    return counts_LE


def replicas_min_max(load_LE: FloatArray, limits: Limits, *, enough_L: FloatArray | None = None) -> IntArray:
    """The least possible highest load per replica of each layer, with as few instances as that takes.

    Giving replicas to the highest load per replica is optimal (Adams' apportionment): to bring the highest below any
    x, each expert needs its replicas down to x, and these come first in that order. So the highest load that remains
    once the budget is spent is the optimum, and extras that relieved no more than it are taken back.

    Args:
        load_LE: predicted tokens per step, shape (L, E), >= 0.
        enough_L: load per replica below which nothing is gained. Default: 0.
    Returns: counts, shape (L, E).
    """
    check_load("load_LE", load_LE, limits.min_LE.shape)
    enough_load_L = np.zeros(len(load_LE)) if enough_L is None else enough_L
    room_L = limits.budget_L - limits.min_LE.sum(axis=1)
    extras = extras_in_order(load_LE, limits, room_L=room_L, enough_L=enough_load_L)
    full_LE = extras.counts_LE(limits.min_LE, np.ones(len(extras.layer_X), dtype=np.bool_))
    highest_L = (load_LE / np.maximum(full_LE, 1)).max(axis=1, initial=0.0)
    return extras.counts_LE(limits.min_LE, extras.load_X > highest_L[extras.layer_X])


def _first_even(
    load_LE: FloatArray, limits: Limits, room_L: IntArray, max_cv_L: FloatArray
) -> tuple[IntArray, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Counts at the first step of the walk whose CV is small enough, or at its end; and which layers got there.

    n replicas with loads y have CV² = n Σy² / (Σy)² − 1. Σy never changes, and the extra that takes an expert with
    load x from r to r + 1 replicas lowers Σy² by x² / r − x² / (r + 1).
    """
    extras = extras_in_order(load_LE, limits, room_L=room_L, enough_L=np.zeros(len(load_LE)))
    is_open_LE = load_LE > 0
    squares_L = np.divide(load_LE**2, limits.min_LE, where=is_open_LE, out=np.zeros_like(load_LE)).sum(axis=1)
    replicas_L = (limits.min_LE * is_open_LE).sum(axis=1)
    total_L = load_LE.sum(axis=1)
    bound_L = (1 + max_cv_L**2) * (1 + 1e-12) * total_L**2
    is_even_L = replicas_L * squares_L <= bound_L

    drop_X = extras.load_X * extras.load_X * extras.replicas_X / (extras.replicas_X + 1)
    sums_X = np.cumsum(drop_X)
    before_L = np.concatenate(([0.0], sums_X))[extras.start_L]
    layer_X = extras.layer_X
    squares_X = squares_L[layer_X] - (sums_X - before_L[layer_X])
    is_even_X = (replicas_L[layer_X] + extras.rank_X + 1) * squares_X <= bound_L[layer_X]
    # Extras up to and including the first that is even: none where the layer was even from the start.
    needed_L = np.where(is_even_L, 0, room_L)
    hits = np.flatnonzero(is_even_X & ~is_even_L[layer_X])
    hit_layers, first = np.unique(layer_X[hits], return_index=True)
    needed_L[hit_layers] = extras.rank_X[hits[first]] + 1
    is_even_L[hit_layers] = True
    return extras.counts_LE(limits.min_LE, extras.rank_X < needed_L[layer_X]), is_even_L
