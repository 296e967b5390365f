"""EPLB, the expert-parallelism load balancer of DeepSeek (deepseek-ai/EPLB), as published.

Replicas go to the expert with the highest load per replica until each layer has its number of instances; then instances
are packed heaviest first, the same number on each worker. The hierarchical form first packs groups of experts to nodes
and does the rest in each node. All replicas of a function get the same share.

Shapes: L layers, E experts, W workers, G groups of experts, F experts to replicate, V workers to pack on.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np

from moeless.core.arrays import FloatArray, IntArray
from moeless.core.cluster import Cluster, ModelShape
from moeless.core.errors import ConfigError
from moeless.core.plan import Plan
from moeless.planning.baselines.static import plan_of_replicas
from moeless.planning.load_check import check_load
from moeless.planning.observation import Observation
from moeless.planning.place.heaviest_first import InfeasiblePlacementError


def eplb_global(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """EPLB's global form. Of `counts_LE` only the sum over each layer is used: the layer's instances.

    Where these are no multiple of the workers the first workers have one more.
    """
    workers = np.arange(cluster.num_workers)
    check_load("load_LE", load_LE, counts_LE.shape)
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    for layer in range(model.num_layers):
        num_instances = _at_least_once(int(counts_LE[layer].sum()), model)
        experts = np.arange(model.num_experts)
        replicas_LEW[layer] = _replicate_and_pack(experts, load_LE[layer], num_instances, workers, cluster.num_workers)
    return plan_of_replicas(replicas_LEW, cluster, model)


def eplb_hierarchical(
    counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape, *, num_groups: int
) -> Plan:
    """EPLB's hierarchical form: groups of contiguous experts are packed to nodes, as many to each.

    Raises: ConfigError if the groups do not divide the experts, or the nodes the groups, or if the nodes have different
        numbers of workers.
    """
    node_W = cluster.node_W
    num_nodes = int(node_W.max()) + 1
    workers_N = np.bincount(node_W).tolist()
    if len(set(workers_N)) > 1:
        raise ConfigError(f"cluster: hierarchical EPLB needs as many workers on each node, got {workers_N}")
    if num_groups < 1 or model.num_experts % num_groups or num_groups % num_nodes:
        raise ConfigError(
            f"num_groups must divide the {model.num_experts} experts and be a multiple of the {num_nodes} nodes, "
            f"got {num_groups}"
        )
    group_E = np.arange(model.num_experts) // (model.num_experts // num_groups)
    check_load("load_LE", load_LE, counts_LE.shape)
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    for layer in range(model.num_layers):
        num_instances = _at_least_once(int(counts_LE[layer].sum()), model)
        load_G = np.bincount(group_E, weights=load_LE[layer], minlength=num_groups)
        node_G = _pack(load_G.tolist(), list(range(num_groups)), [num_groups // num_nodes] * num_nodes)
        node_E = np.array(node_G)[group_E]
        instances_W = np.diff(np.arange(cluster.num_workers + 1) * num_instances // cluster.num_workers)
        for node in range(num_nodes):
            experts = np.flatnonzero(node_E == node)
            workers = np.flatnonzero(node_W == node)
            num_here_instances = max(int(instances_W[workers].sum()), len(experts))
            replicas_LEW[layer] += _replicate_and_pack(
                experts, load_LE[layer], num_here_instances, workers, cluster.num_workers
            )
    return plan_of_replicas(replicas_LEW, cluster, model)


def replicate(load_F: FloatArray, num_instances: int, *, max_replicas: int) -> IntArray:
    """EPLB's replica counts, shape (F,): one each, then one more to the highest load per replica.

    Args:
        max_replicas: of an expert.
    """
    counts = [1] * len(load_F)
    heap = [(-load, index) for index, load in enumerate(load_F.tolist())] if max_replicas > 1 else []
    heapify(heap)
    for _ in range(num_instances - len(counts)):
        if not heap:
            break
        _, index = heappop(heap)
        counts[index] += 1
        if counts[index] < max_replicas:
            heappush(heap, (-float(load_F[index]) / counts[index], index))
    return np.array(counts)


def _replicate_and_pack(
    experts_F: IntArray, load_E: FloatArray, num_instances: int, workers_V: IntArray, num_workers: int
) -> IntArray:
    """Replicas on each worker, shape (E, W), of the experts and among the workers given."""
    num_here = len(workers_V)
    counts_F = replicate(load_E[experts_F], num_instances, max_replicas=num_here)
    instance_F = np.repeat(np.arange(len(experts_F)), counts_F)
    weight_n = (load_E[experts_F] / counts_F)[instance_F]
    room = np.diff(-(-np.arange(num_here + 1) * len(instance_F) // num_here)).tolist()
    worker_n = _pack(weight_n.tolist(), instance_F.tolist(), room)
    replicas_EW = np.zeros((len(load_E), num_workers), dtype=np.int64)
    np.add.at(replicas_EW, (experts_F[instance_F], workers_V[worker_n]), 1)
    return replicas_EW


def _pack(weights: list[float], kinds: list[int], room: list[int]) -> list[int]:
    """The pack of each item: heaviest first, to the least loaded with room, if it can be without that kind.

    Ties go to the lower item and the lower pack. A kind comes twice to a pack only where all packs with room have it.
    """
    room = room.copy()
    load = [0.0] * len(room)
    has: list[set[int]] = [set() for _ in room]
    target = [0] * len(weights)
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        open_packs = [pack for pack, left in enumerate(room) if left > 0]
        pack = min(open_packs, key=lambda p: (kinds[item] in has[p], load[p], p))
        target[item] = pack
        load[pack] += weights[item]
        room[pack] -= 1
        has[pack].add(kinds[item])
    return target


def _at_least_once(num_instances: int, model: ModelShape) -> int:
    if num_instances < model.num_experts:
        raise InfeasiblePlacementError(
            f"counts_LE: EPLB keeps every expert resident and needs {model.num_experts} instances a layer, got "
            f"{num_instances}"
        )
    return num_instances


@dataclass(kw_only=True)
class EplbPlanner:
    """EPLB at a fixed interval of steps, from the load of the steps before."""

    cluster: Cluster
    model: ModelShape
    spare_replicas: int = 0
    """Instances of each layer beyond one for each expert."""
    interval_steps: int = 3000
    """vLLM's default; SGLang's is 1000."""
    window_steps: int = 1000
    num_groups: int | None = None
    """Number of groups of the hierarchical variant; None: global."""
    name: str = "eplb"
    _windows: deque[tuple[int, FloatArray]] = field(default_factory=deque, init=False, repr=False)
    """Steps of each observed window and its load, oldest first."""
    _seen_steps: int = field(default=0, init=False, repr=False)
    _planned_at: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, minimum in (("spare_replicas", 0), ("interval_steps", 1), ("window_steps", 1)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"eplb.{name} must be at least {minimum}, got {getattr(self, name)}")

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """Plans anew once `interval_steps` have gone by; until a load was seen, for what the first
        observation's window says, or equal loads."""
        self._remember(observation)
        if previous is not None and observation.num_steps - self._planned_at < self.interval_steps:
            return previous
        self._planned_at = observation.num_steps
        load_LE = self._load_LE(observation.window_LE)
        counts_LE = np.ones((self.model.num_layers, self.model.num_experts), dtype=np.int64)
        counts_LE[:, 0] += self.spare_replicas  # EPLB takes the number of instances from them and chooses itself
        if self.num_groups is None:
            plan = eplb_global(counts_LE, load_LE, self.cluster, self.model)
        else:
            plan = eplb_hierarchical(counts_LE, load_LE, self.cluster, self.model, num_groups=self.num_groups)
        return plan if previous is None else plan.with_version(previous.version + 1)

    def _remember(self, observation: Observation) -> None:
        steps = observation.num_steps - self._seen_steps
        if steps > 0:
            self._windows.append((steps, observation.window_LE))
            self._seen_steps = observation.num_steps
        known_steps = sum(steps for steps, _ in self._windows)
        while self._windows and known_steps - self._windows[0][0] >= self.window_steps:
            known_steps -= self._windows.popleft()[0]

    def _load_LE(self, window_LE: FloatArray) -> FloatArray:
        total_LE = np.zeros_like(window_LE, dtype=np.float64)
        for steps, load_LE in self._windows:
            total_LE += steps * load_LE
        if total_LE.any():
            return total_LE
        return window_LE if window_LE.any() else np.ones_like(total_LE)
