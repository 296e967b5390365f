"""Heaviest first: each instance goes to the worker that it would leave least busy, among those with memory.

With kept instances in place this is the placer of the MoEless paper (arXiv 2603.06350): warm instances stay where they
are, the others are placed heaviest first on the least loaded worker. Workers may differ in speed and memory.

Ties go to the lower expert and the lower worker. Memory is shared by the layers: a layer takes more than its part of a
worker's memory only where it must, so that the first layers do not use up the fast workers.

Shapes: L layers, E experts, W workers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from heapq import heapify, heappop, heappush

import numpy as np

from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import BoolArray, FloatArray, IntArray


class InfeasiblePlacementError(ConfigError):
    """The instances asked for do not fit the workers."""


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
    has_LEW: BoolArray, add_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape
) -> None:
    """Place `add_LE` more instances of each function into `has_LEW`, which is changed.

    An instance weighs its function's load over its number of instances. Only if nothing else is left are instances
    moved that are in place already, to free memory on a worker that may have it.

    Raises: InfeasiblePlacementError if not all of them fit.
    """
    counts_LE = has_LEW.sum(axis=2) + add_LE
    weight_LE = load_LE / np.maximum(counts_LE, 1)
    speeds = cluster.speed_W.tolist()
    capacity_W = cluster.capacity_W(model)
    free = (capacity_W - has_LEW.sum(axis=(0, 1))).tolist()
    part_L = counts_LE.sum(axis=1) / max(int(counts_LE.sum()), 1)
    for layer in np.flatnonzero(add_LE.any(axis=1)).tolist():
        has_EW = has_LEW[layer]
        hosted_W = has_EW.sum(axis=0)
        quota = (np.ceil(capacity_W * part_L[layer] - 1e-9).astype(np.int64) - hosted_W).tolist()
        load = (weight_LE[layer] @ has_EW).tolist()
        experts = np.repeat(np.arange(model.num_experts), add_LE[layer])
        experts = experts[np.argsort(-weight_LE[layer, experts], kind="stable")]
        hosts = _hosts(has_EW)
        queue = _Queue(load, speeds, [min(room) for room in zip(free, quota, strict=True)])
        weights = weight_LE[layer].tolist()
        placed: list[int] = []
        for expert in experts.tolist():
            weight, taken = weights[expert], hosts[expert]
            worker = queue.take(weight, taken)
            if worker is None:
                open_workers = [w for w, room in enumerate(free) if room > 0 and w not in taken]
                if open_workers:
                    worker = min(open_workers, key=lambda w: ((queue.load[w] + weight) / speeds[w], w))
                else:
                    has_EW[experts[: len(placed)], placed] = True
                    worker = _make_room(has_LEW, free, taken, f"layer {layer}, expert {expert}")
                    hosts = _hosts(has_EW)
                    # What the chain moved in this layer is in place: later entries must not put it back.
                    experts, placed = experts[len(placed) :], []
                    taken = hosts[expert]
                    free[worker] -= 1
                    queue = _Queue(queue.load, speeds, free.copy())
                    free[worker] += 1
                queue.load[worker] += weight
            taken.add(worker)
            placed.append(worker)
            free[worker] -= 1
        has_EW[experts, placed] = True


def _hosts(has_EW: BoolArray) -> defaultdict[int, set[int]]:
    hosts: defaultdict[int, set[int]] = defaultdict(set)
    for expert, worker in zip(*(index.tolist() for index in np.nonzero(has_EW)), strict=True):
        hosts[expert].add(worker)
    return hosts


class _Queue:
    """Workers of one layer that have room, by load; one heap for each speed."""

    def __init__(self, load: list[float], speeds: list[float], room: list[int]) -> None:
        self.load, self._room = load, room
        self._heaps: list[tuple[float, list[tuple[float, int]]]] = []
        for speed in sorted(set(speeds)):
            heap = [(load[w], w) for w, s in enumerate(speeds) if s == speed and room[w] > 0]
            heapify(heap)
            self._heaps.append((speed, heap))

    def take(self, weight: float, taken: set[int]) -> int | None:
        """The worker outside `taken` that `weight` would leave least busy; it has that load now, and less room."""
        if len(self._heaps) == 1:
            heap = self._heaps[0][1]
            if heap and heap[0][1] not in taken:
                return self._give(weight, heap, *heappop(heap))
        popped: list[tuple[list[tuple[float, int]], tuple[float, int]]] = []
        best: tuple[float, int, int] | None = None
        for speed, heap in self._heaps:
            while heap:
                entry = heappop(heap)
                popped.append((heap, entry))
                if entry[1] not in taken:
                    candidate = ((entry[0] + weight) / speed, entry[1], len(popped) - 1)
                    best = candidate if best is None else min(best, candidate)
                    break
        worker = None
        if best is not None:
            heap, entry = popped.pop(best[2])
            worker = self._give(weight, heap, *entry)
        for heap, entry in popped:
            heappush(heap, entry)
        return worker

    def _give(self, weight: float, heap: list[tuple[float, int]], load: float, worker: int) -> int:
        self.load[worker] = load + weight
        self._room[worker] -= 1
        if self._room[worker] > 0:
            heappush(heap, (self.load[worker], worker))
        return worker


def _make_room(has_LEW: BoolArray, free: list[int], taken: set[int], name: str) -> int:
    """Free memory on a worker outside `taken` by moving instances along a chain that ends where memory is free.

    Changes `has_LEW` and `free`. By the theory of augmenting paths there is a chain whenever everything fits.
    """
    num_workers = len(free)
    before: dict[int, int] = {w: -1 for w in range(num_workers) if w not in taken}
    queue = deque(before)
    while queue:
        worker = queue.popleft()
        for other in range(num_workers):
            if other in before or not (has_LEW[:, :, worker] & ~has_LEW[:, :, other]).any():
                continue
            before[other] = worker
            if free[other] == 0:
                queue.append(other)
                continue
            free[other] -= 1
            while before[other] >= 0:
                source = before[other]
                layers, experts = np.nonzero(has_LEW[:, :, source] & ~has_LEW[:, :, other])
                has_LEW[layers[0], experts[0], source] = False
                has_LEW[layers[0], experts[0], other] = True
                other = source
            free[other] += 1
            return other
    raise InfeasiblePlacementError(f"{name}: no worker has memory for another instance, and none can be freed")
