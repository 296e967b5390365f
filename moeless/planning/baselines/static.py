"""Placements that look at no load: static expert parallelism, round robin, random.

They place as `place.place` does, so that all can be compared. All replicas of a function get the same share.

Shapes: L layers, E experts, W workers, N instances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.plan import Plan
from moeless.planning.load_check import check_load
from moeless.planning.observation import Observation
from moeless.planning.place.heaviest_first import InfeasiblePlacementError, check_counts, heaviest_first


def static_expert_parallelism(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """Every function once, contiguous experts on a worker, whatever the load and the counts."""
    check_load("load_LE", load_LE, counts_LE.shape)
    worker_E = np.arange(model.num_experts) * cluster.num_workers // model.num_experts
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    replicas_LEW[:, np.arange(model.num_experts), worker_E] = 1
    return plan_of_replicas(replicas_LEW, cluster, model)


def round_robin(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """Instances dealt to the workers in turn, function by function, from the first layer to the last."""
    check_load("load_LE", load_LE, counts_LE.shape)
    check_counts(counts_LE, cluster, model)
    layer_N, expert_N = _instances(counts_LE)
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    replicas_LEW[layer_N, expert_N, np.arange(len(layer_N)) % cluster.num_workers] = 1
    return plan_of_replicas(replicas_LEW, cluster, model)


def random_placement(
    counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape, *, seed: int = 0
) -> Plan:
    """Every instance on a worker drawn from those with memory that do not have the function yet."""
    check_load("load_LE", load_LE, counts_LE.shape)
    check_counts(counts_LE, cluster, model)
    rng = np.random.default_rng(seed)
    free_W = cluster.capacity_W(model).copy()
    has_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.bool_)
    missing_LE = np.zeros_like(counts_LE)
    for layer, expert in zip(*(index.tolist() for index in np.nonzero(counts_LE)), strict=True):
        open_W = np.flatnonzero(free_W > 0)
        count = min(int(counts_LE[layer, expert]), len(open_W))
        missing_LE[layer, expert] = counts_LE[layer, expert] - count
        chosen = rng.choice(open_W, size=count, replace=False)
        has_LEW[layer, expert, chosen] = True
        free_W[chosen] -= 1
    # What memory is left lies with workers that have the function: others make room for it.
    heaviest_first(has_LEW, missing_LE, np.ones(counts_LE.shape), cluster, model)
    return plan_of_replicas(has_LEW.astype(np.int64), cluster, model)


def _instances(counts_LE: IntArray) -> tuple[IntArray, IntArray]:
    layers, experts = np.nonzero(counts_LE)
    repeats = counts_LE[layers, experts]
    return np.repeat(layers, repeats), np.repeat(experts, repeats)


def plan_of_replicas(replicas_LEW: IntArray, cluster: Cluster, model: ModelShape) -> Plan:
    """The plan of replica counts by function and worker.

    Replicas of a function on one worker are one instance, with their shares added.

    Raises: InfeasiblePlacementError if a worker has too little memory.
    """
    has_LEW = replicas_LEW > 0
    hosted_W, capacity_W = has_LEW.sum(axis=(0, 1)), cluster.capacity_W(model)
    if (hosted_W > capacity_W).any():
        worker = int(np.argmax(hosted_W > capacity_W))
        raise InfeasiblePlacementError(
            f"worker {cluster.workers[worker].name} must host {hosted_W[worker]} instances, and {capacity_W[worker]} "
            "fit its memory"
        )
    shares_LEW = replicas_LEW / np.maximum(replicas_LEW.sum(axis=2, keepdims=True), 1)
    return Plan.from_dense(has_LEW, shares_LEW, version=1)


@dataclass(kw_only=True)
class StaticPlanner:
    """Static expert parallelism: one plan for ever."""

    cluster: Cluster
    model: ModelShape
    name: str = "static"

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """Contiguous experts; what was planned once stays."""
        if previous is not None:
            return previous
        counts_LE = np.ones((self.model.num_layers, self.model.num_experts), dtype=np.int64)
        return static_expert_parallelism(counts_LE, observation.window_LE, self.cluster, self.model)
