"""What others do, with the interface of ours: static expert parallelism, round robin, random, EPLB.

Functions place as `place.place` does; the planners wrap them for the live loop and the simulator. All replicas of a
function get the same share, as in the systems they stand for.

EPLB from its published description (deepseek-ai/EPLB): replicas go to the expert with the highest load per replica
until the slots are full; then instances are packed heaviest first, each worker the same number. The hierarchical form
first packs groups of experts to nodes and does the rest in each node.

Shapes: L layers, E experts, W workers, G groups of experts.
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
from moeless.planning.observation import Observation
from moeless.planning.place.heaviest_first import InfeasiblePlacementError, check_counts, heaviest_first


def static_expert_parallelism(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """Every function once, contiguous experts on a worker, whatever the load and the counts."""
    del load_LE
    worker_E = np.arange(model.num_experts) * cluster.num_workers // model.num_experts
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    replicas_LEW[:, np.arange(model.num_experts), worker_E] = 1
    return _plan(replicas_LEW, cluster, model)


def round_robin(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """Instances dealt to the workers in turn, function by function, from the first layer to the last."""
    del load_LE
    check_counts(counts_LE, cluster, model)
    layer_N, expert_N = _instances(counts_LE)
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    replicas_LEW[layer_N, expert_N, np.arange(len(layer_N)) % cluster.num_workers] = 1
    return _plan(replicas_LEW, cluster, model)


def random_placement(
    counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape, *, seed: int = 0
) -> Plan:
    """Every instance on a worker drawn from those with memory that do not have the function yet."""
    del load_LE
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
    return _plan(has_LEW.astype(np.int64), cluster, model)


def eplb_global(counts_LE: IntArray, load_LE: FloatArray, cluster: Cluster, model: ModelShape) -> Plan:
    """EPLB's global form. Of `counts_LE` only the sum over each layer is used: its slots.

    Where the slots are no multiple of the workers the first workers have one more.
    """
    workers = np.arange(cluster.num_workers)
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    for layer in range(model.num_layers):
        slots = _at_least_once(int(counts_LE[layer].sum()), model)
        experts = np.arange(model.num_experts)
        replicas_LEW[layer] = _replicate_and_pack(experts, load_LE[layer], slots, workers, cluster.num_workers)
    return _plan(replicas_LEW, cluster, model)


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
    replicas_LEW = np.zeros((*counts_LE.shape, cluster.num_workers), dtype=np.int64)
    for layer in range(model.num_layers):
        slots = _at_least_once(int(counts_LE[layer].sum()), model)
        load_G = np.bincount(group_E, weights=load_LE[layer], minlength=num_groups)
        node_G = _pack(load_G.tolist(), list(range(num_groups)), [num_groups // num_nodes] * num_nodes)
        node_E = np.array(node_G)[group_E]
        slots_W = np.diff(np.arange(cluster.num_workers + 1) * slots // cluster.num_workers)
        for node in range(num_nodes):
            experts = np.flatnonzero(node_E == node)
            workers = np.flatnonzero(node_W == node)
            slots_here = max(int(slots_W[workers].sum()), len(experts))
            replicas_LEW[layer] += _replicate_and_pack(
                experts, load_LE[layer], slots_here, workers, cluster.num_workers
            )
    return _plan(replicas_LEW, cluster, model)


def replicate(load_F: FloatArray, slots: int, *, most: int) -> IntArray:
    """EPLB's replica counts, shape (F,): one each, then one more to the highest load per replica, at most `most`."""
    counts = [1] * len(load_F)
    heap = [(-load, index) for index, load in enumerate(load_F.tolist())] if most > 1 else []
    heapify(heap)
    for _ in range(slots - len(counts)):
        if not heap:
            break
        _, index = heappop(heap)
        counts[index] += 1
        if counts[index] < most:
            heappush(heap, (-float(load_F[index]) / counts[index], index))
    return np.array(counts)


def _replicate_and_pack(
    experts_F: IntArray, load_E: FloatArray, slots: int, workers_V: IntArray, num_workers: int
) -> IntArray:
    """Replicas on each worker, shape (E, W), of the experts and among the workers given."""
    num_here = len(workers_V)
    counts_F = replicate(load_E[experts_F], slots, most=num_here)
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


def _at_least_once(slots: int, model: ModelShape) -> int:
    if slots < model.num_experts:
        raise InfeasiblePlacementError(
            f"counts_LE: EPLB keeps every expert resident and needs {model.num_experts} slots a layer, got {slots}"
        )
    return slots


def _instances(counts_LE: IntArray) -> tuple[IntArray, IntArray]:
    layers, experts = np.nonzero(counts_LE)
    repeats = counts_LE[layers, experts]
    return np.repeat(layers, repeats), np.repeat(experts, repeats)


def _plan(replicas_LEW: IntArray, cluster: Cluster, model: ModelShape) -> Plan:
    """Replicas of a function on one worker are one instance with their shares together."""
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


@dataclass(kw_only=True)
class EplbPlanner:
    """EPLB every so many steps, from the load of the steps before."""

    cluster: Cluster
    model: ModelShape
    spare_replicas: int = 0
    """Instances of each layer beyond one for each expert."""
    interval_steps: int = 3000
    """vLLM's default; SGLang's is 1000."""
    window_steps: int = 1000
    num_groups: int | None = None
    """Hierarchical with so many groups; None: global."""
    name: str = "eplb"
    _windows: deque[tuple[int, FloatArray]] = field(default_factory=deque, init=False, repr=False)
    """Steps of each observed window and its load, oldest first."""
    _seen_steps: int = field(default=0, init=False, repr=False)
    _planned_at: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("spare_replicas", 0), ("interval_steps", 1), ("window_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"eplb.{name} must be at least {least}, got {getattr(self, name)}")

    def plan(self, observation: Observation, previous: Plan | None) -> Plan:
        """Plans anew once `interval_steps` have gone by; until a load was seen, for what the first
        observation's window says, or equal loads."""
        self._remember(observation)
        if previous is not None and observation.num_steps - self._planned_at < self.interval_steps:
            return previous
        self._planned_at = observation.num_steps
        load_LE = self._load_LE(observation.window_LE)
        counts_LE = np.ones((self.model.num_layers, self.model.num_experts), dtype=np.int64)
        counts_LE[:, 0] += self.spare_replicas  # EPLB takes the number of slots from them and chooses itself
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
