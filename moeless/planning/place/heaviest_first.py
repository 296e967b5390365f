"""Heaviest first: each instance goes to the worker that it would leave least busy, among those with memory.

With kept instances in place this is the placer of the MoEless paper (arXiv 2603.06350): warm instances stay where they
are, the others are placed heaviest first on the least loaded worker. Workers may differ in speed and memory.

Functions with a single instance are, if asked, spread in equal numbers besides: in a step of few tokens each call takes
the time of reading an expert's weights, and what counts is how many a worker must make that nobody else can.

Ties go to the lower expert and the lower worker. Memory is shared by the layers: a layer takes more than its part of a
worker's memory only where it must, so that the first layers do not use up the fast workers.

Shapes: L layers, E experts, W workers.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from moeless.core.arrays import BoolArray, FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless_predictors.compiled import compiled


class InfeasiblePlacementError(ConfigError):
    """The required instances do not fit on the workers."""


def check_counts(counts_LE: IntArray, cluster: Cluster, model: ModelShape) -> None:
    """Raises InfeasiblePlacementError if the counts cannot fit, ConfigError if their shape is not the model's."""
    if counts_LE.shape != (model.num_layers, model.num_experts):
        raise ConfigError(
            f"counts_LE must be of {model.num_layers} layers and {model.num_experts} experts, got {counts_LE.shape}"
        )
    capacity_W = cluster.capacity_W(model)
    if counts_LE.min() < 0:
        raise ConfigError(f"counts_LE must be >= 0, got {counts_LE.min()}")
    if counts_LE.max() > cluster.num_workers:
        raise InfeasiblePlacementError(
            f"counts_LE must be at most the {cluster.num_workers} workers (a worker hosts a function once), "
            f"got {counts_LE.max()}"
        )
    if counts_LE.sum() > capacity_W.sum():
        raise InfeasiblePlacementError(
            f"counts_LE must sum to at most the {capacity_W.sum()} instances that fit the workers' memory, "
            f"got {counts_LE.sum()}"
        )


def heaviest_first(
    has_LEW: BoolArray,
    add_LE: IntArray,
    work_LE: FloatArray,
    cluster: Cluster,
    model: ModelShape,
    *,
    spreads_singles: bool = False,
) -> None:
    """Place `add_LE` more instances of each function into `has_LEW`, which is changed.

    An instance weighs its function's load over its number of instances. Only if nothing else is left are instances
    moved that are in place already, to free memory on a worker that may have it.

    Args:
        spreads_singles: no worker gets more than its part of the layer's functions with a single instance, if another
            has memory.
    Raises: InfeasiblePlacementError if not all of them fit.
    """
    if not add_LE.any():
        return
    hosted_LE, hosted_LW = _hosted(has_LEW)
    counts_LE = hosted_LE + add_LE
    weight_LE = np.ascontiguousarray(work_LE / np.maximum(counts_LE, 1))
    speed_W, capacity_W = cluster.speed_W.copy(), cluster.capacity_W(model)
    free_W = capacity_W - hosted_LW.sum(axis=0)
    part_L = counts_LE.sum(axis=1) / counts_LE.sum()
    for layer in np.flatnonzero(add_LE.any(axis=1)).tolist():
        has_EW, weight_E = has_LEW[layer], weight_LE[layer]
        quota_W = np.ceil(capacity_W * part_L[layer] - 1e-9).astype(np.int64) - hosted_LW[layer]
        is_single_E = (counts_LE[layer] == 1) & spreads_singles
        load_W, singles_W = _computed(has_EW, weight_E, is_single_E)
        singles_W = max_singles(is_single_E, cluster.num_workers) - singles_W
        experts = np.repeat(np.arange(model.num_experts), add_LE[layer])
        experts = experts[np.argsort(-weight_E[experts], kind="stable")]
        placed = 0
        while True:
            placed += _pack(
                experts[placed:], weight_E, has_EW, load_W, free_W, quota_W, singles_W, is_single_E, speed_W
            )
            if placed == len(experts):
                break
            expert = int(experts[placed])
            worker = _make_room(has_LEW, free_W, has_EW[expert], f"layer {layer}, expert {expert}")
            has_EW[expert, worker] = True
            load_W, _ = _computed(has_EW, weight_E, is_single_E)
            free_W[worker] -= 1
            placed += 1


@compiled
def _hosted(has_LEW: BoolArray) -> tuple[IntArray, IntArray]:
    """Instances of each function, and of each layer on each worker."""
    num_layers, num_experts, num_workers = has_LEW.shape
    hosted_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
    hosted_LW = np.zeros((num_layers, num_workers), dtype=np.int64)
    for layer in range(num_layers):
        for expert in range(num_experts):
            for worker in range(num_workers):
                if has_LEW[layer, expert, worker]:
                    hosted_LE[layer, expert] += 1
                    hosted_LW[layer, worker] += 1
    return hosted_LE, hosted_LW


@compiled
def _computed(has_EW: BoolArray, weight_E: FloatArray, is_single_E: BoolArray) -> tuple[FloatArray, IntArray]:
    """Return the weight of each worker's instances, and how many of them are single."""
    num_experts, num_workers = has_EW.shape
    weight_W, singles_W = np.zeros(num_workers), np.zeros(num_workers, dtype=np.int64)
    for expert in range(num_experts):
        for worker in range(num_workers):
            if has_EW[expert, worker]:
                weight_W[worker] += weight_E[expert]
                singles_W[worker] += is_single_E[expert]
    return weight_W, singles_W


def max_singles(is_single_E: BoolArray, num_workers: int) -> int:
    """Functions with a single instance that a worker hosts at most, if they are spread in equal numbers."""
    return -(-int(np.count_nonzero(is_single_E)) // num_workers)


@compiled
def _pack(
    experts: IntArray,
    weight_E: FloatArray,
    has_EW: BoolArray,
    load_W: FloatArray,
    free_W: IntArray,
    quota_W: IntArray,
    singles_W: IntArray,
    is_single_E: BoolArray,
    speed_W: FloatArray,
) -> int:
    """Place instances of the experts in their order; returns how many: fewer than all if one finds no room.

    A worker whose part of the memory is used up is taken only where no other is left, and for a single instance one
    that has its part of those (`singles_W` are the rest) only after the others.
    """
    num_workers = len(load_W)
    for place, expert in enumerate(experts):
        best, best_worker, best_rank = np.inf, -1, 3
        for worker in range(num_workers):
            if free_W[worker] <= 0 or has_EW[expert, worker]:
                continue
            rank = 2 * (quota_W[worker] <= 0) + (is_single_E[expert] and singles_W[worker] <= 0)
            busy = (load_W[worker] + weight_E[expert]) / speed_W[worker]
            if rank < best_rank or (rank == best_rank and busy < best):
                best, best_worker, best_rank = busy, worker, rank
        if best_worker < 0:
            return place
        has_EW[expert, best_worker] = True
        load_W[best_worker] += weight_E[expert]
        free_W[best_worker] -= 1
        quota_W[best_worker] -= 1
        singles_W[best_worker] -= is_single_E[expert]
    return len(experts)


def _make_room(has_LEW: BoolArray, free_W: IntArray, taken_W: BoolArray, name: str) -> int:
    """Free memory on a worker that is not taken, by moving instances along a chain that ends where memory is free.

    Changes `has_LEW` and `free_W`. By the theory of augmenting paths there is a chain whenever everything fits.
    """
    num_workers = len(free_W)
    before: dict[int, int] = {w: -1 for w in range(num_workers) if not taken_W[w]}
    queue = deque(before)
    while queue:
        worker = queue.popleft()
        for other in range(num_workers):
            if other in before or not (has_LEW[:, :, worker] & ~has_LEW[:, :, other]).any():
                continue
            before[other] = worker
            if free_W[other] == 0:
                queue.append(other)
                continue
            free_W[other] -= 1
            while before[other] >= 0:
                source = before[other]
                layers, experts = np.nonzero(has_LEW[:, :, source] & ~has_LEW[:, :, other])
                has_LEW[layers[0], experts[0], source] = False
                has_LEW[layers[0], experts[0], other] = True
                other = source
            free_W[other] += 1
            return other
    raise InfeasiblePlacementError(f"{name}: no worker has memory for another instance, and none can be freed")
