"""Model, workers and links that plans are made for.

Read by planning, simulate and control.

Shapes: W workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moeless.core.arrays import read_only
from moeless.core.errors import ConfigError

_MAX_BYTES = 2**63 - 1
"""Largest number of an int64 array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The experts of a model, as far as planning cares."""

    num_layers: int
    """MoE layers."""
    num_experts: int
    """Experts of each layer."""
    top_k: int
    expert_bytes: int
    """Size of one instance on a worker."""
    hidden_bytes: int
    """Size of one token's hidden state, as it is sent."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "top_k", "expert_bytes", "hidden_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_experts:
            raise ConfigError(f"model.top_k must be at most the {self.num_experts} experts, got {self.top_k}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """One worker: a GPU or a share of a machine."""

    name: str
    memory_bytes: int
    """Memory for instances."""
    speed: float = 1.0
    """Computing speed, relative to the worker that expert times were measured on."""
    node: str = "node-0"

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("worker.name must not be empty")
        if not 0 <= self.memory_bytes <= _MAX_BYTES:
            raise ConfigError(
                f"worker {self.name}: memory_bytes must be from 0 to {_MAX_BYTES}, got {self.memory_bytes}"
            )
        if not self.speed > 0:
            raise ConfigError(f"worker {self.name}: speed must be above 0, got {self.speed}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers in a fixed order, by whose indices plans name them, and what moves bytes between them.

    Its arrays are read-only.
    """

    workers: tuple[WorkerSpec, ...]
    local_bytes_per_s: float = 56e9
    """Between workers of one node, each way; NVLink bridge of an A6000."""
    remote_bytes_per_s: float = 25e9
    """Between nodes, for each worker."""
    fetch_bytes_per_s: float = 24.8e9
    """From host memory to a worker: a cold start; PCIe 4 x16."""

    def __post_init__(self) -> None:
        if not self.workers:
            raise ConfigError("cluster.workers must hold at least one worker")
        names = [worker.name for worker in self.workers]
        if len(set(names)) < len(names):
            raise ConfigError(f"cluster.workers must have different names, got {', '.join(sorted(names))}")
        for name in ("local_bytes_per_s", "remote_bytes_per_s", "fetch_bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster.{name} must be above 0, got {getattr(self, name)}")

    @property
    def num_workers(self) -> int:
        """W."""
        return len(self.workers)

    @cached_property
    def speed_W(self) -> NDArray[np.float64]:
        speed_W = np.array([worker.speed for worker in self.workers], dtype=np.float64)
        read_only(speed_W)
        return speed_W

    @cached_property
    def node_W(self) -> NDArray[np.int64]:
        """Index of each worker's node, in the order in which nodes are first named."""
        order: dict[str, int] = {}
        node_W = np.array([order.setdefault(worker.node, len(order)) for worker in self.workers])
        read_only(node_W)
        return node_W

    def capacity_W(self, model: ModelShape) -> NDArray[np.int64]:
        """Instances that fit each worker's memory, over all layers."""
        return self._memory_W // model.expert_bytes

    @cached_property
    def _memory_W(self) -> NDArray[np.int64]:
        memory_W = np.array([worker.memory_bytes for worker in self.workers], dtype=np.int64)
        read_only(memory_W)
        return memory_W


def even_cluster(
    num_workers: int, *, memory_bytes: int, workers_per_node: int | None = None, speed: float = 1.0
) -> Cluster:
    """Make equal workers named worker-0, worker-1, ...; all on one node, or `workers_per_node` on each."""
    per_node = workers_per_node or num_workers
    return Cluster(
        workers=tuple(
            WorkerSpec(name=f"worker-{i}", memory_bytes=memory_bytes, speed=speed, node=f"node-{i // per_node}")
            for i in range(num_workers)
        )
    )
